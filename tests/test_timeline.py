"""Timelines: order, subsets, tables and bad input."""

from __future__ import annotations

import pathlib
import pickle

import numpy as np
import oracles
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from recblocks import Timelines, write_timelines
from recblocks.timelines.ranges import expand_ranges, first_at_or_before
from recblocks.timelines.tables import columns_from_arrow

INT64 = st.integers(-(2**63), 2**63 - 1)
ROWS = st.lists(
    st.tuples(st.sampled_from([-(2**63), -5, 0, 3, 2**63 - 1]), st.one_of(st.integers(-3, 3), INT64), INT64),
    max_size=30,
)


def arrays(rows: list[tuple[int, int, int]]) -> dict[str, np.ndarray]:
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    order = np.arange(len(rows), dtype=np.int16)
    return {"user": table[:, 0], "time": table[:, 1], "item": table[:, 2], "order": order}


def small() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "user": rng.integers(-4, 4, 50),
        "time": rng.integers(0, 9, 50),
        "item": rng.integers(0, 99, 50),
        "action_type": rng.integers(0, 5, 50).astype(np.int8),
        "duration": rng.random(50, dtype=np.float32),
        "paid": rng.random(50) < 0.5,
    }


def equal(one: Timelines, other: Timelines) -> bool:
    same = one.columns.keys() == other.columns.keys() and one.unit == other.unit
    same = same and all(torch.equal(one.columns[key], other.columns[key]) for key in one.columns)
    same = same and all(one.columns[key].dtype == other.columns[key].dtype for key in one.columns)
    return same and torch.equal(one.users, other.users) and torch.equal(one.offsets, other.offsets)


@given(ROWS)
@example([(3, 1, 0), (3, 2, 0)])  # users in order, one's times not
def test_orders_by_user_then_newest_first_and_keeps_ties_as_they_came(rows: list[tuple[int, int, int]]) -> None:
    timelines = Timelines.from_arrays(**arrays(rows), unit="s")
    found = {}
    for row, user in enumerate(timelines.users.tolist()):
        found[user] = timelines.columns["order"][timelines.offsets[row] : timelines.offsets[row + 1]].tolist()
    assert found == oracles.newest_first(rows)
    assert list(found) == sorted(found)


@given(ROWS)
def test_what_is_stored_is_its_own_order(rows: list[tuple[int, int, int]]) -> None:
    timelines = Timelines.from_arrays(**arrays(rows), unit="s")
    row, index = expand_ranges(timelines.starts, timelines.ends)
    assert equal(Timelines.from_arrays(user=timelines.users[row], **timelines.gather(index), unit="s"), timelines)


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-2, 6)), max_size=8))
def test_expand_ranges_is_the_loop(ranges: list[tuple[int, int]]) -> None:
    starts = torch.tensor([start for start, _ in ranges], dtype=torch.int64)
    ends = torch.tensor([start + length for start, length in ranges], dtype=torch.int64)
    row, index = expand_ranges(starts, ends)
    expected = [(r, i) for r, (start, length) in enumerate(ranges) for i in range(start, start + length)]
    assert list(zip(row.tolist(), index.tolist(), strict=True)) == expected


@given(st.lists(st.lists(st.integers(-4, 4), max_size=9), min_size=1, max_size=4), st.integers(-5, 5))
def test_first_at_or_before_is_the_scan(users: list[list[int]], limit: int) -> None:
    falling = [sorted(times, reverse=True) for times in users]
    time = torch.tensor([t for times in falling for t in times], dtype=torch.int64)
    ends = torch.tensor([len(times) for times in falling]).cumsum(0)
    low = ends - torch.tensor([len(times) for times in falling])
    found = first_at_or_before(time, low, ends, torch.full_like(low, limit)) - low
    expected = [next((i for i, t in enumerate(times) if t <= limit), len(times)) for times in falling]
    assert found.tolist() == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.lists(st.integers(0, 3), min_size=9, max_size=9))
@example([0, 2, 0, 1], [1, 2, 0, 0, 0, 0, 0, 0, 0])
def test_times_must_not_rise_inside_a_users_range(lengths: list[int], times: list[int]) -> None:
    rows = list(range(1, len(lengths), 2))  # between two users lie others' actions
    ends = torch.tensor(lengths).cumsum(0)
    total = int(ends[-1])
    times = (times * 2)[:total]
    timelines = Timelines(
        torch.tensor(rows, dtype=torch.int64), (ends - torch.tensor(lengths))[rows], ends[rows],
        {"time": torch.zeros(total, dtype=torch.int64), "item": torch.arange(total)}, unit="s",
    )  # fmt: skip
    bounds = zip(timelines.starts.tolist(), timelines.ends.tolist(), strict=True)
    time = torch.tensor(times, dtype=torch.int64)
    if all(times[i] <= times[i - 1] for start, end in bounds for i in range(start + 1, end)):
        assert timelines.with_columns(time=time).columns["time"] is time
    else:
        with pytest.raises(ValueError, match="time must run from each user's newest action to the oldest, got user"):
            timelines.with_columns(time=time)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"users": torch.tensor([2, 1])}, ValueError, "users must be strictly ascending, got 2 before 1"),
        ({"users": torch.tensor([1, 1])}, ValueError, "users must be strictly ascending, got 1 before 1"),
        ({"users": torch.tensor([1.0, 2.0])}, TypeError, "users must be int64"),
        (
            {"starts": torch.tensor([-1, 1])},
            ValueError,
            r"starts must .* inside the 3 actions.* got \[-1, 1\) for row 0",
        ),
        ({"starts": torch.tensor([2, 1])}, ValueError, r"starts must .* got \[2, 1\) for row 0"),
        ({"starts": torch.tensor([0, 0])}, ValueError, r"starts must .* after the ranges .* got \[0, 3\) for row 1"),
        ({"ends": torch.tensor([1, 4])}, ValueError, r"ends must .* got \[1, 4\) for row 1"),
        ({"ends": torch.tensor([1])}, ValueError, r"ends must have shape \(2\)"),
        ({"item": torch.arange(2)}, ValueError, r"columns\['item'\] must have shape \(3\)"),
        ({"extra": torch.ones(4)}, ValueError, r"columns\['extra'\] must have shape \(3\)"),
        ({"extra": np.ones(3)}, TypeError, r"columns\['extra'\] must be a torch\.Tensor"),
        ({"a/b": torch.ones(3)}, ValueError, "name must be an identifier other than 'user' and 'unit', got 'a/b'"),
    ],
)
def test_bounds_and_columns_that_do_not_fit(change: dict[str, object], error: type[Exception], message: str) -> None:
    good: dict[str, object] = {
        "users": torch.tensor([1, 2]), "starts": torch.tensor([0, 1]), "ends": torch.tensor([1, 3]),
        "time": torch.tensor([5, 7, 6]), "item": torch.arange(3),
    }  # fmt: skip
    given = good | change
    with pytest.raises(error, match=message):
        Timelines(*(given.pop(name) for name in ("users", "starts", "ends")), given, unit="s")  # type: ignore[arg-type]


@pytest.mark.parametrize("on_disk", [True, False])
def test_columns_added_or_replaced_reach_another_process(tmp_path: pathlib.Path, on_disk: bool) -> None:
    timelines = Timelines.from_arrays(**small(), unit="s")
    if on_disk:
        timelines = timelines.save(tmp_path)
    row, item = torch.arange(50), timelines.columns["item"] * 2
    changed = timelines.with_columns(row=row, item=item)
    assert changed.columns["row"] is row
    assert changed.columns["time"] is timelines.columns["time"]
    assert "row" not in timelines.columns
    for sent in (
        changed,
        changed.select(torch.tensor([1, 4])),
        changed.select(torch.tensor([2])).with_columns(row=item),
    ):
        again = pickle.loads(pickle.dumps(sent))
        assert list(again.columns) == list(sent.columns)
        assert all(torch.equal(again.columns[name], sent.columns[name]) for name in sent.columns)
        assert [again.users.tolist(), again.starts.tolist(), again.ends.tolist()] == [
            sent.users.tolist(), sent.starts.tolist(), sent.ends.tolist(),
        ]  # fmt: skip
    if on_disk:
        other = timelines.with_columns(row=row)
        assert len(pickle.dumps(other)) < len(pickle.dumps(timelines)) + 8 * 50 + 1000, "the rest is opened, not sent"
    with pytest.raises(TypeError, match="item assignment"):
        timelines.columns["row"] = row  # type: ignore[index]
    with pytest.raises(ValueError, match=r"columns\['row'\] must have shape \(50\)"):
        timelines.with_columns(row=torch.arange(49))
    with pytest.raises(TypeError, match=r"columns\['item'\] must be int64"):
        timelines.with_columns(item=torch.ones(50))


@pytest.mark.parametrize("on_disk", [True, False])
def test_pickle_opens_the_folder_again_and_keeps_a_subset(tmp_path: pathlib.Path, on_disk: bool) -> None:
    timelines = Timelines.from_arrays(**small(), unit="s")
    if on_disk:
        timelines = timelines.save(tmp_path)
        assert len(pickle.dumps(timelines)) < 500
    assert equal(pickle.loads(pickle.dumps(timelines)), timelines)
    subset = timelines.select(torch.tensor([1, 4]))
    again = pickle.loads(pickle.dumps(subset))
    assert torch.equal(again.users, subset.users)
    assert torch.equal(again.starts, subset.starts)
    assert torch.equal(again.ends, subset.ends)


def test_a_subset_shares_the_columns() -> None:
    timelines = Timelines.from_arrays(**small(), unit="s")
    rows = torch.tensor([0, 2, 5])
    subset = timelines.select(rows)
    assert subset.columns["item"] is timelines.columns["item"]
    assert subset.users.tolist() == timelines.users[rows].tolist()
    assert subset.num_actions == int((timelines.ends - timelines.starts)[rows].sum())
    mask = torch.zeros(len(timelines), dtype=torch.bool)
    mask[rows] = True
    assert torch.equal(timelines.select(mask).starts, subset.starts)
    with pytest.raises(ValueError, match="use starts and ends"):
        _ = subset.offsets
    assert subset.rows_of(torch.tensor([[int(timelines.users[2]), 77]])).tolist() == [[1, -1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([2, 1]), "rows must be strictly ascending, got 2 before 1"),
        (torch.tensor([1, 1]), "rows must be strictly ascending, got 1 before 1"),
        (torch.tensor([-1, 1]), r"rows must be in \[0, 8\), got -1 to 1"),
        (torch.tensor([8]), r"rows must be in \[0, 8\), got 8 to 8"),
        (torch.ones(3, dtype=torch.bool), "rows must have shape"),
    ],
)
def test_rows_that_do_not_fit(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Timelines.from_arrays(**small(), unit="s").select(rows)


def test_arrow_pandas_and_parquet_come_back_the_same(tmp_path: pathlib.Path) -> None:
    timelines = Timelines.from_arrays(**small(), unit="ms")
    assert equal(Timelines.from_arrow(pa.table(small()), unit="ms"), timelines)
    assert equal(Timelines.from_pandas(pd.DataFrame(small()), unit="ms"), timelines)
    assert equal(Timelines.from_arrow(timelines.to_arrow(), unit="ms"), timelines)
    timelines.to_parquet(tmp_path / "actions.parquet")
    assert equal(Timelines.from_parquet(tmp_path / "actions.parquet", unit="ms"), timelines)
    with pytest.raises(ValueError, match="unit must be 'ms', which the table notes, got 's'"):
        Timelines.from_parquet(tmp_path / "actions.parquet", unit="s")


@pytest.mark.parametrize(("unit", "expected"), [("s", [-1, 1_500_000_000]), ("ms", [-500, 1_500_000_000_250])])
def test_datetimes_are_rounded_down(unit: str, expected: list[int]) -> None:
    instants = ["1969-12-31T23:59:59.500000001", "2017-07-14T02:40:00.250999"]
    time = np.array(instants, dtype="datetime64[ns]")
    columns = {"user": np.array([1, 2]), "item": np.array([1, 2])}
    frame = pd.DataFrame(columns | {"time": pd.to_datetime(instants, format="ISO8601", utc=True)})
    for timelines in (
        Timelines.from_arrays(**columns, time=time, unit=unit),
        Timelines.from_pandas(frame, unit=unit),
    ):
        assert timelines.columns["time"].tolist() == expected


def test_nulls_in_arrow_become_masks() -> None:
    table = pa.table(
        {"user": pa.array([1, None]), "duration": pa.array([None, 2.5]), "time": pa.array([None, 5], "timestamp[s]")}
    )
    columns = columns_from_arrow(table)
    assert np.ma.getmaskarray(columns["user"]).tolist() == [False, True]
    assert np.ma.getmaskarray(columns["duration"]).tolist() == [True, False]
    assert columns["user"].dtype == np.int64
    assert np.isnat(columns["time"]).tolist() == [True, False]
    with pytest.raises(ValueError, match="user has 1 nulls among 2"):
        Timelines.from_arrow(pa.table({"user": pa.array([1, None]), "time": [1, 2], "item": [1, 2]}), unit="s")
    with pytest.raises(TypeError, match=r"user must be integers, floats.* got string"):
        columns_from_arrow(pa.table({"user": ["a"]}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"unit": "h"}, ValueError, "unit must be one of 's', 'ms', got 'h'"),
        ({"user": [1, 2]}, TypeError, "user must be a numpy array or a torch.Tensor"),
        ({"user": np.array([1.0, 2.0])}, TypeError, "user must be integers, got float64"),
        ({"user": np.array([1, 2**63], dtype=np.uint64)}, ValueError, "user must fit int64, got 9223372036854775808"),
        ({"time": np.array([1.0, 2.0])}, TypeError, "time must be integers, got float64"),
        ({"item": np.array([1])}, ValueError, "item must have one entry for each of the 2 users given, got 1"),
        ({"item": np.array([[1, 2]])}, ValueError, r"item must have shape \(any\), got an array of shape \(1, 2\)"),
        ({"item": np.ma.masked_array([1, 2], mask=[True, False])}, ValueError, "item has 1 nulls among 2"),
        ({"extra": torch.ones(2, dtype=torch.bfloat16)}, TypeError, "extra must be bool, .* got a bfloat16 tensor"),
        (
            {"time": np.array([1, 2**60], "M8[s]"), "unit": "ms"},
            ValueError,
            r"time must fit int64 in 'ms', got datetime",
        ),
        ({"extra": np.array(["a", "b"])}, TypeError, "extra must be bool, .* got <U1"),
        ({"a/b": np.array([1, 2])}, ValueError, "name must be an identifier other than 'user' and 'unit', got 'a/b'"),
    ],
)
def test_bad_input(tmp_path: pathlib.Path, change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"user": np.array([1, 2]), "time": np.array([1, 2]), "item": np.array([1, 2]), "unit": "s"}
    with pytest.raises(error, match=message):
        write_timelines(tmp_path, **(good | change))  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        Timelines.from_arrays(**(good | change))  # type: ignore[arg-type]


def test_columns_of_any_name_and_byte_order(tmp_path: pathlib.Path) -> None:
    one = np.array([1, 2])
    named = {"path": one, "self": one, "cls": one, "verify": np.array([0.5, 2.0], dtype=">f4")}
    written = write_timelines(tmp_path, user=one, time=one, item=one, unit="s", **named)
    for timelines in (written, Timelines.from_arrays(user=one, time=one, item=one, unit="s", **named)):
        assert timelines.columns["verify"].tolist() == [0.5, 2.0]
        assert timelines.with_columns(self=timelines.columns["path"]).columns["self"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="name must be an identifier other than 'user' and 'unit', got 'unit'"):
        Timelines.from_arrow(pa.table({"user": one, "time": one, "item": one, "unit": one}), unit="s")


def test_the_latest_datetime_that_fits() -> None:
    latest = np.array([2**63 // 1000, -(2**63) // 1000 + 2], "M8[s]")
    timelines = Timelines.from_arrays(user=np.array([1, 2]), item=np.array([1, 2]), time=latest, unit="ms")
    assert timelines.columns["time"].tolist() == [2**63 // 1000 * 1000, (-(2**63) // 1000 + 2) * 1000]
