"""Timelines on disk: what was written comes back, or a clear error."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_timeline import ROWS, arrays, equal, small

from recblocks import Timelines, TimelinesWriter, split_by_time, write_timelines
from recblocks.timelines import storage
from recblocks.timelines.ranges import expand_ranges


def test_disk_gives_back_every_column_and_dtype(tmp_path: pathlib.Path) -> None:
    written = write_timelines(tmp_path, **small(), unit="ms")
    assert equal(written, Timelines.from_arrays(**small(), unit="ms"))
    assert equal(written, Timelines.open(tmp_path, verify=True))
    assert written.columns["action_type"].dtype == torch.int8
    assert written.unit == "ms"


def test_torch_and_numpy_are_the_same_input(tmp_path: pathlib.Path) -> None:
    tensors = {name: torch.from_numpy(column) for name, column in small().items()}
    assert equal(write_timelines(tmp_path, **tensors, unit="s"), Timelines.from_arrays(**small(), unit="s"))


def test_chunks_equal_one_write(tmp_path: pathlib.Path) -> None:
    columns = small()
    with TimelinesWriter(tmp_path, unit="s") as writer:
        for low, high in ((-9, -2), (-2, 0), (0, 0), (0, 9)):
            rows = (columns["user"] >= low) & (columns["user"] < high)
            writer.append(**{name: column[rows] for name, column in columns.items()})
    assert equal(Timelines.open(tmp_path, verify=True), Timelines.from_arrays(**columns, unit="s"))


def test_a_chunk_must_come_after_the_last(tmp_path: pathlib.Path) -> None:
    one = {"time": np.array([1]), "item": np.array([1])}
    with TimelinesWriter(tmp_path, unit="s") as writer:
        writer.append(user=np.array([4]), **one)
        with pytest.raises(ValueError, match="user must come after 4, the last one written, got 4"):
            writer.append(user=np.array([4]), **one)
        with pytest.raises(ValueError, match="columns must be those of the first chunk"):
            writer.append(user=np.array([5]), **one, extra=np.array([1]))
        with pytest.raises(ValueError, match="columns must be those of the first chunk"):
            writer.append(user=np.array([5]), **one, order=np.array([1], dtype=np.int16))
    assert len(Timelines.open(tmp_path)) == 1


def test_no_actions_at_all(tmp_path: pathlib.Path) -> None:
    with TimelinesWriter(tmp_path, unit="s"):
        pass
    empty = Timelines.open(tmp_path, verify=True)
    assert (len(empty), empty.num_actions, empty.offsets.tolist()) == (0, 0, [0])
    assert empty.rows_of(torch.tensor([3])).tolist() == [-1]


def test_a_write_that_failed_is_not_opened(tmp_path: pathlib.Path) -> None:
    def fail() -> None:
        with TimelinesWriter(tmp_path, unit="s") as writer:
            writer.append(user=np.array([4]), time=np.array([1]), item=np.array([1]))
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    with pytest.raises(ValueError, match=r"header\.json is missing.*cut off"):
        Timelines.open(tmp_path)
    assert not [*tmp_path.parent.glob(f".{tmp_path.name}*")], "its files are gone"
    assert equal(write_timelines(tmp_path, **small(), unit="s"), Timelines.from_arrays(**small(), unit="s"))
    with pytest.raises(FileExistsError, match="already holds timelines"):
        write_timelines(tmp_path, **small(), unit="s")


def test_of_two_writers_one_fails_and_a_reader_sees_no_change(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "timelines"
    readers = []

    def race() -> None:
        with TimelinesWriter(folder, unit="s") as slow:
            slow.append(**{name: column[::-1].copy() for name, column in small().items()})
            with TimelinesWriter(folder, unit="s") as fast:
                fast.append(**small())
            readers.append(Timelines.open(folder))

    with pytest.raises(FileExistsError, match="already holds timelines"):
        race()
    for timelines in (*readers, Timelines.open(folder, verify=True)):
        assert equal(timelines, Timelines.from_arrays(**small(), unit="s"))
    assert [path.name for path in tmp_path.iterdir()] == ["timelines"]


def test_a_folder_that_holds_something_else_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="must be an empty folder"):
        TimelinesWriter(tmp_path, unit="s")
    with pytest.raises(FileExistsError, match="must be an empty folder"):
        TimelinesWriter(tmp_path / "notes.txt", unit="s")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


KILLED = """
import os, pathlib, signal, sys
import torch
from recblocks import TimelinesWriter

rename, when = pathlib.Path.rename, sys.argv[2]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def rename_and_die(source, target):
    if when == "before":
        kill()
    rename(source, target)
    kill()

pathlib.Path.rename = rename_and_die
rows = torch.arange(1000)
with TimelinesWriter(sys.argv[1], unit="s") as writer:
    writer.append(user=rows, time=rows, item=rows)
    if when == "writing":
        kill()
"""


@pytest.mark.parametrize("when", ["writing", "before", "after"])
def test_a_writer_killed_leaves_all_or_nothing(tmp_path: pathlib.Path, when: str) -> None:
    folder = tmp_path / "timelines"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), when], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    if when == "after":
        assert Timelines.open(folder, verify=True).columns["item"].tolist() == list(range(1000))
        return
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Timelines.open(folder)
    assert equal(write_timelines(folder, **small(), unit="s"), Timelines.from_arrays(**small(), unit="s"))


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("name", ["users.bin", "offsets.bin", "column.time.bin", "column.duration.bin"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [(cut, "expected .* bytes, found"), (lengthen, "bytes, found"), (pathlib.Path.unlink, "missing")],
)
def test_a_file_of_another_size(
    tmp_path: pathlib.Path, name: str, harm: Callable[[pathlib.Path], None], message: str
) -> None:
    write_timelines(tmp_path, **small(), unit="s")
    harm(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        Timelines.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, r"version 2, found \('recblocks\.timelines', 3\)"),
        ({"version": 2.0}, r"version 2, found \('recblocks\.timelines', 2\.0\)"),
        ({"format": "x"}, "found"),
        ({"files": {}}, "damaged"),
        ({"files": None}, "damaged"),
        ({"unit": "h"}, "unit must be one of 's', 'ms', got 'h'"),
        ({"num_actions": 49}, "must have 49 entries, got 50"),
    ],
)
def test_a_header_that_does_not_fit(tmp_path: pathlib.Path, change: dict[str, object], message: str) -> None:
    write_timelines(tmp_path, **small(), unit="s")
    header = tmp_path / "header.json"
    seal(header, json.loads(header.read_text()) | change)
    with pytest.raises(ValueError, match=message):
        Timelines.open(tmp_path)


def seal(path: pathlib.Path, header: dict[str, object]) -> None:
    """Write a header with the checksum that belongs to it."""
    header.pop("crc32")
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps(header | {"crc32": zlib.crc32(canonical)}))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"<f4"', '"<i4"'),
        ('"unit": "s"', '"unit": "ms"'),
        ('"num_actions": 50', '"num_actions": 5'),
        ("column.duration", "column.deration"),
        ('"crc32": ', '"crc32": 1'),
        ('"crc32"', '"crc31"'),
    ],
)
def test_a_header_that_was_altered(tmp_path: pathlib.Path, before: str, after: str) -> None:
    write_timelines(tmp_path, **small(), unit="s")
    header = tmp_path / "header.json"
    text = header.read_text()
    assert before in text
    header.write_text(text.replace(before, after))
    with pytest.raises(ValueError, match=r"header\.json is damaged: expected checksum"):
        Timelines.open(tmp_path)
    header.write_text(text)
    Timelines.open(tmp_path)


def test_a_flag_is_no_version(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "VERSION", 1)
    write_timelines(tmp_path, **small(), unit="s")
    header = tmp_path / "header.json"
    seal(header, json.loads(header.read_text()) | {"version": True})
    with pytest.raises(ValueError, match=r"version 1, found \('recblocks\.timelines', True\)"):
        Timelines.open(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 1, r"offsets\.bin.* must run from 0 to 50, got 1 to 50"),
        (-1, 49, r"offsets\.bin.* must run from 0 to 50, got 0 to 49"),
        (2, 0, "is damaged: starts must give each user a range"),
    ],
)
def test_offsets_that_do_not_cover_the_actions(tmp_path: pathlib.Path, place: int, value: int, message: str) -> None:
    write_timelines(tmp_path, **small(), unit="s")
    offsets = np.fromfile(tmp_path / "offsets.bin", dtype="<i8")
    offsets[place] = value
    offsets.tofile(tmp_path / "offsets.bin")
    with pytest.raises(ValueError, match=message):
        Timelines.open(tmp_path)


@pytest.mark.parametrize(("name", "at", "value"), [("users", 1, -(2**60)), ("column.time", 1, 2**60)])
def test_verify_sees_disorder_under_a_good_checksum(tmp_path: pathlib.Path, name: str, at: int, value: int) -> None:
    write_timelines(tmp_path, **small(), unit="s")
    column = np.fromfile(tmp_path / f"{name}.bin", dtype="<i8")
    column[at] = value
    column.tofile(tmp_path / f"{name}.bin")
    header = json.loads((tmp_path / "header.json").read_text())
    header["files"][name]["crc32"] = zlib.crc32(column.tobytes())
    seal(tmp_path / "header.json", header)
    with pytest.raises(ValueError, match=f"{tmp_path.name} is damaged: .* must"):
        Timelines.open(tmp_path, verify=True)


def test_a_header_cut_short(tmp_path: pathlib.Path) -> None:
    write_timelines(tmp_path, **small(), unit="s")
    cut(tmp_path / "header.json")
    with pytest.raises(ValueError, match=r"header\.json is damaged: expected JSON"):
        Timelines.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Timelines.open(tmp_path / "nowhere")


def test_verify_sees_one_changed_byte(tmp_path: pathlib.Path) -> None:
    write_timelines(tmp_path, **small(), unit="s")
    path = tmp_path / "column.item.bin"
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)
    Timelines.open(tmp_path)
    with pytest.raises(ValueError, match=r"column\.item\.bin is damaged: expected checksum"):
        Timelines.open(tmp_path, verify=True)


def test_reading_changes_nothing_and_writing_does_not_reach_the_disk(tmp_path: pathlib.Path) -> None:
    timelines = write_timelines(tmp_path, **small(), unit="s")
    timelines.columns["item"].fill_(-1)
    assert equal(Timelines.open(tmp_path, verify=True), Timelines.from_arrays(**small(), unit="s"))


def test_a_subset_can_be_saved(tmp_path: pathlib.Path) -> None:
    timelines = Timelines.from_arrays(**small(), unit="s")
    saved = timelines.select(torch.tensor([1, 3])).save(tmp_path)
    columns = small()
    rows = np.isin(columns["user"], timelines.users[[1, 3]].numpy())
    assert equal(saved, Timelines.from_arrays(**{name: column[rows] for name, column in columns.items()}, unit="s"))


@given(ROWS, st.integers(-3, 3))
@example([(3, 1, 0), (0, 9, 0), (-5, 2, 0), (-5, 1, 0)], 1)
def test_saving_keeps_users_without_actions(rows: list[tuple[int, int, int]], cut: int) -> None:
    timelines = Timelines.from_arrays(**arrays(rows), unit="s")
    for part in split_by_time(timelines, cut):
        with tempfile.TemporaryDirectory() as folder:
            saved = part.save(folder)
            assert torch.equal(saved.users, timelines.users)
            assert torch.equal(saved.ends - saved.starts, part.ends - part.starts)
            for name, column in part.gather(expand_ranges(part.starts, part.ends)[1]).items():
                assert torch.equal(saved.columns[name], column)
            Timelines.open(folder, verify=True)
