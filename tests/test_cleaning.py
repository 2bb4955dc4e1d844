"""Cleaning: every record is kept, merged or dropped for one reason, and the counts add up."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recblocks import CleanedActions, Timelines, clean_actions

RECORDS = st.lists(
    st.fixed_dictionaries(
        {
            "user": st.integers(0, 1),
            "item": st.integers(0, 1),
            "action_type": st.integers(0, 2),
            "surface": st.just(4),
            "time": st.integers(0, 14),
            "source": st.integers(0, 3),
            "duration": st.sampled_from([-1.0, 0.0, 1.5, 3.0, float("nan"), float("inf")]),
        }
    ),
    max_size=24,
)
NAMES = ("user", "item", "action_type", "surface", "time", "source", "duration")


def table(records: list[dict[str, float]]) -> dict[str, np.ndarray]:
    columns = {name: np.array([record[name] for record in records], dtype=np.int64) for name in NAMES[:-1]}
    return columns | {"duration": np.array([record["duration"] for record in records], dtype=np.float32)}


def rows(cleaned: CleanedActions) -> list[tuple[float, ...]]:
    return list(zip(*(cleaned.columns[name].tolist() for name in NAMES), strict=True))


@given(records=RECORDS, bound=st.one_of(st.none(), st.integers(0, 6)))
def test_is_the_scalar_definition(records: list[dict[str, float]], bound: int | None) -> None:
    checks = {"time_range": (1, 12), "action_types": {0, 1}}
    cleaned = clean_actions(**table(records), unit="s", clock_bound=bound, **checks)
    kept, merged, dropped = oracles.clean(records, bound, (1, 12), {0, 1})
    assert rows(cleaned) == [tuple(record[name] for name in NAMES) for record in kept]
    assert cleaned.report.merged == merged
    assert cleaned.report.dropped == dropped


@given(records=RECORDS, bound=st.one_of(st.none(), st.integers(0, 6)))
def test_nothing_is_lost_silently(records: list[dict[str, float]], bound: int | None) -> None:
    cleaned = clean_actions(**table(records), unit="s", clock_bound=bound, time_range=(3, 9))
    report = cleaned.report
    assert report.read == len(records)
    assert report.kept == cleaned.columns["user"].size
    assert report.kept + sum(report.merged.values()) + sum(report.dropped.values()) == report.read


@given(records=RECORDS, bound=st.integers(0, 6), seed=st.integers(0, 5))
def test_the_order_of_records_changes_nothing(records: list[dict[str, float]], bound: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(records))
    one = clean_actions(**table(records), unit="s", clock_bound=bound)
    other = clean_actions(**table([records[i] for i in order]), unit="s", clock_bound=bound)
    without_source = [tuple(row[:5] + row[6:]) for row in rows(one)]  # of equal times the source is the first to come
    assert sorted(without_source) == sorted(tuple(row[:5] + row[6:]) for row in rows(other))
    assert one.report == other.report


@given(records=RECORDS, bound=st.integers(0, 6))
def test_cleaning_again_with_times_only_changes_nothing(records: list[dict[str, float]], bound: int) -> None:
    once = clean_actions(**table(records), unit="s", clock_bound=bound)
    twice = clean_actions(**once.columns, unit="s")
    assert rows(twice) == rows(once)
    assert twice.report == (once.report.kept, once.report.kept, {}, {})


def test_each_reason_by_name() -> None:
    null = np.ma.masked_array
    cleaned = clean_actions(
        user=null([1, 2, 3, 4, 5, 6, 7, 8], mask=[1, 0, 0, 0, 0, 0, 0, 0]),
        time=np.array([0, "NaT", 99, 0, 0, 0, 0, 0], dtype="datetime64[s]"),
        item=np.array([5, 5, 5, 6, 5, 5, 5, 5]),
        surface=np.array([1, 1, 1, 1, 2, 1, 1, 1]),
        duration=null([1.0, 1, 1, 1, 1, np.nan, -2, 1], mask=[0, 0, 0, 0, 0, 0, 0, 0]),
        shop=np.array([9, 9, 9, 9, 9, 9, 9, 9]),
        unit="s",
        time_range=(0, 98),
        items=torch.tensor([5]),
        surfaces=[1],
    )
    assert cleaned.report.dropped == {
        "null_user": 1,
        "null_time": 1,
        "time_out_of_range": 1,
        "unknown_item": 1,
        "unknown_surface": 1,
        "duration_not_finite": 1,
        "negative_duration": 1,
    }
    assert {name: column.tolist() for name, column in cleaned.columns.items()} == {
        "user": [8], "time": [0], "item": [5], "surface": [1], "duration": [1.0], "shop": [9],
    }  # fmt: skip


def test_a_record_with_many_faults_has_one_reason() -> None:
    cleaned = clean_actions(
        user=np.ma.masked_array([1], mask=[True]), time=np.array([-5]), item=np.array([3]), unit="s",
        duration=np.array([-1.0]), time_range=(0, 1),
    )  # fmt: skip
    assert cleaned.report == (1, 0, {}, {"null_user": 1})


@pytest.mark.parametrize(
    ("times", "sources", "kept"),
    [
        ([0, 3], [1, 2], [0]),  # two clocks, within the bound
        ([0, 4], [1, 2], [0, 4]),  # beyond it
        ([0, 3], [1, 1], [0, 3]),  # one clock does not differ from itself
        ([0, 2, 4], [1, 2, 3], [0, 4]),  # near each other, yet not near the first: no chain
        ([0, 1, 2], [1, 2, 2], [0, 2]),  # a source joins once
        ([0, 1, 2, 3], [1, 1, 2, 2], [0, 1]),  # two actions, each seen by both clocks
        ([0, 2, 2], [1, 2, 1], [0, 2]),  # the same time is one action first, and its clocks include the first's
        ([-(2**63), 2**63 - 1], [1, 2], [-(2**63), 2**63 - 1]),  # a difference beyond int64
    ],
)
def test_clock_differences_by_example(times: list[int], sources: list[int], kept: list[int]) -> None:
    ones = np.ones(len(times), dtype=np.int64)
    cleaned = clean_actions(
        user=ones, time=np.array(times), item=ones, unit="s", source=np.array(sources), clock_bound=3
    )
    assert cleaned.columns["time"].tolist() == kept


def test_the_longest_duration_and_the_earliest_record_stay() -> None:
    ones = np.ones(3, dtype=np.int64)
    cleaned = clean_actions(
        user=ones, time=np.array([7, 5, 5]), item=ones, unit="s", source=np.array([1, 2, 2]), clock_bound=2,
        duration=np.array([9.0, 1.0, 3.0]), page=np.array([70, 50, 51]),
    )  # fmt: skip
    assert cleaned.columns["time"].tolist() == [5]
    assert cleaned.columns["duration"].tolist() == [9.0]
    assert cleaned.columns["page"].tolist() == [50]
    assert cleaned.report.merged == {"same_time": 1, "clock_difference": 1}


def test_the_input_stays_as_it_was_and_the_output_becomes_timelines() -> None:
    duration = np.array([1.0, 4.0])
    ones = np.ones(2, dtype=np.int64)
    cleaned = clean_actions(user=ones, time=ones, item=ones, duration=duration, unit="s")
    assert duration.tolist() == [1.0, 4.0]
    assert Timelines.from_arrays(**cleaned.columns, unit="s").columns["duration"].tolist() == [4.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clock_bound": 3}, ValueError, "clock_bound needs source"),
        ({"clock_bound": -1, "source": np.array([1])}, ValueError, "clock_bound must be from 0 to .*, got -1"),
        ({"time_range": (3, 1)}, ValueError, r"time_range must be the earliest and the latest time, got \(3, 1\)"),
        ({"clock_bound": 2**70, "source": np.array([1])}, ValueError, f"clock_bound must be from 0 .* got {2**70}"),
        ({"clock_bound": 2.5, "source": np.array([1])}, TypeError, r"clock_bound must be an int, got 2\.5"),
        ({"time_range": (1,)}, ValueError, r"time_range must be the earliest and the latest time, got \(1,\)"),
        ({"time_range": (None, 5)}, TypeError, "time_range must be an int, got None"),
        ({"time_range": 5}, ValueError, "time_range must be the earliest and the latest time, got 5"),
        ({"action_types": [2**63], "action_type": np.array([1])}, ValueError, "action_types must be from .* got"),
        ({"action_types": ["a"], "action_type": np.array([1])}, TypeError, "action_types must be an int, got 'a'"),
        ({"a/b": np.array([1])}, ValueError, "name must be an identifier other than 'user' and 'unit', got 'a/b'"),
        ({"surfaces": [1]}, ValueError, "surfaces needs surface, got None"),
        ({"duration": np.array([1])}, TypeError, "duration must be floats in seconds, got int64"),
        ({"user": np.array([1.0])}, TypeError, "user must be integers, got float64"),
        ({"item": np.array([1, 2])}, ValueError, "item must have one entry for each of the 1 users given, got 2"),
        ({"unit": "us"}, ValueError, "unit must be one of 's', 'ms', got 'us'"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    good: dict[str, object] = {"user": np.array([1]), "time": np.array([1]), "item": np.array([1]), "unit": "s"}
    with pytest.raises(error, match=message):
        clean_actions(**(good | change))  # type: ignore[arg-type]


def test_too_many_sources_for_one_mask() -> None:
    many = np.arange(65)
    with pytest.raises(ValueError, match="source must name at most 64 sources where clock_bound is given, got 65"):
        clean_actions(user=many, time=many, item=many, source=many, clock_bound=1, unit="s")
