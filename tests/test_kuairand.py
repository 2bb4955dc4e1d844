"""KuaiRand's published files have their published counts, and rows become impressions as a scalar loop reads them."""

from __future__ import annotations

import datetime as dt
import os
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recblocks import kuairand27k_explicit, kuairand_pure
from recblocks.timelines import _files
from recblocks.timelines.kuairand import KUAIRAND_TYPES

FLAGS = ("is_click", "long_view", "is_like", "is_comment", "is_forward", "is_follow", "is_hate")
FOLDERS = {kuairand_pure: "kuairand_pure", kuairand27k_explicit: "kuairand27k_explicit"}


def data_dir(name: str) -> pathlib.Path:
    folder = os.environ.get("RECBLOCKS_DATA")
    if folder is None or not (pathlib.Path(folder) / name).exists():
        pytest.skip(f"needs {name} in the folder that RECBLOCKS_DATA names")
    return pathlib.Path(folder)


def test_pure_has_its_published_counts() -> None:
    folder = data_dir("kuairand_pure")
    seen = kuairand_pure(folder)
    assert seen.report == {"read": 228_329, "merged": 5_885, "kept": 222_444}
    assert seen.columns["user"].unique().numel() == 25_156
    assert seen.columns["item"].unique().numel() == 6_361
    assert seen.columns["surface"].unique().numel() == 15
    columns = ["user_id", "video_id", "time_ms"]
    earlier = {
        tuple(row.values()) for row in pq.read_table(folder / "kuairand_pure/val.parquet", columns=columns).to_pylist()
    }
    check_against_rows(seen, pq.read_table(folder / "kuairand_pure/test.parquet").to_pylist()[:2000], earlier)
    first, last = (dt.date(2022, 4, 25) - dt.date(1970, 1, 1)).days, (dt.date(2022, 5, 8) - dt.date(1970, 1, 1)).days
    val = seen.columns["day"][seen.columns["test"] == 0]
    assert (int(val.min()), int(val.max())) == (first, first + 5)
    assert int(seen.columns["day"].max()) == last
    sequences = pq.read_table(folder / "kuairand_pure/user_sequences.parquet").to_pylist()
    for row in sequences[::5000]:
        mine = seen.earlier["user"] == row["user_id"]
        assert seen.earlier["item"][mine].tolist() == row["watch_seq"][::-1]
        assert seen.earlier["place"][mine].tolist() == list(range(len(row["watch_seq"])))


def test_explicit_has_its_published_counts() -> None:
    seen = kuairand27k_explicit(data_dir("kuairand27k_explicit"))
    assert seen.report == {"read": 41_828, "merged": 124, "kept": 41_704}
    assert seen.columns["user"].unique().numel() == 664
    assert seen.items["item"].numel() == 9_359
    assert bool((seen.labels["like"] ^ seen.labels["hate"]).all())


def check_against_rows(seen: Any, rows: list[dict[str, Any]], earlier: set[Any]) -> None:
    columns = {name: column.tolist() for name, column in seen.columns.items()}
    keys = zip(columns["user"], columns["item"], columns["time"], strict=True)
    place = {key: number for number, key in enumerate(keys)}
    assert len(place) == len(columns["user"]), "a key twice"
    for row in rows:
        key = row["user_id"], row["video_id"], row["time_ms"]
        at = place[key]
        assert columns["surface"][at] in {one["tab"] for one in rows if one["time_ms"] == row["time_ms"]}
        assert columns["test"][at] == (key not in earlier)
        for name, flag in zip(KUAIRAND_TYPES[1:], FLAGS, strict=True):
            assert not row[flag] or bool(seen.labels[name][at])


ROWS = [  # user, video, date, time_ms, tab, flags
    (5, 8, 20220425, 100, 1, (1, 0, 0, 0, 0, 0, 0)), (5, 8, 20220425, 100, 1, (0, 1, 1, 0, 0, 0, 0)),
    (2, 9, 20220430, 90, 0, (0, 0, 0, 0, 0, 0, 0)), (5, 7, 20220425, 100, 2, (1, 1, 0, 0, 0, 0, 1)),
    (5, 8, 20220425, 50, 1, (0, 0, 0, 0, 0, 1, 0)),
]  # fmt: skip


def test_repeats_are_merged_and_the_last_type_that_happened_counts(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "check_digest", lambda *_: None)
    names = ("user_id", "video_id", "date", "time_ms", "tab")
    (tmp_path / "kuairand_pure").mkdir()
    for split, rows in (("val", ROWS[:3]), ("test", ROWS[3:])):
        table = dict(zip(names, map(list, zip(*(row[:5] for row in rows), strict=True)), strict=True))
        table |= dict(zip(FLAGS, map(list, zip(*(row[5] for row in rows), strict=True)), strict=True))
        pq.write_table(pa.table(table), tmp_path / f"kuairand_pure/{split}.parquet")
    sequences = {"user_id": [5, 2], "watch_seq": [[1, 2, 3], [4]]}
    pq.write_table(pa.table(sequences), tmp_path / "kuairand_pure/user_sequences.parquet")
    features = {"video_id": [9, 7, 8], "author_id": [1, 2, 3], "tag": ["39,68", "unknown", "4"], "music_id": [0, 0, 7]}
    pq.write_table(pa.table(features), tmp_path / "kuairand_pure/item_features.parquet")
    seen = kuairand_pure(tmp_path)
    columns = {name: column.tolist() for name, column in seen.columns.items()}
    assert columns["user"] == [2, 5, 5, 5]
    assert columns["time"] == [90, 50, 100, 100]
    assert columns["item"] == [9, 8, 7, 8]
    assert columns["surface"] == [0, 1, 2, 1]
    assert columns["test"] == [0, 1, 1, 0]
    assert [KUAIRAND_TYPES[kind] for kind in columns["action_type"]] == ["shown", "follow", "hate", "like"]
    assert columns["day"] == [19_112, 19_107, 19_107, 19_107]
    assert seen.labels["click"].tolist() == [False, False, True, True]
    assert seen.labels["long_view"].tolist() == [False, False, True, True]
    assert {name: column.tolist() for name, column in seen.earlier.items()} == {
        "user": [5, 5, 5, 2], "item": [3, 2, 1, 4], "place": [0, 1, 2, 0],
    }  # fmt: skip
    assert {name: column.tolist() for name, column in seen.items.items()} == {
        "item": [7, 8, 9], "author": [2, 3, 1], "tag": [-1, 4, 39], "music": [0, 7, 0],
    }  # fmt: skip
    assert seen.report == {"read": 5, "merged": 1, "kept": 4}


@pytest.mark.parametrize("reader", FOLDERS)
def test_another_file_is_refused(reader: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / FOLDERS[reader]).mkdir()
    for name in ("val.parquet", "processed_standard_kcore_15.tsv"):
        (tmp_path / FOLDERS[reader] / name).write_text("user_id\tvideo_id")
    with pytest.raises(ValueError, match=f"{FOLDERS[reader]}.* is another file: its sha256 must begin with"):
        reader(tmp_path)


@pytest.mark.parametrize("reader", FOLDERS)
def test_a_missing_folder_is_named(reader: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=f"there is no .*{FOLDERS[reader]}.*; put the file there, from https://"
    ):
        reader(tmp_path)
