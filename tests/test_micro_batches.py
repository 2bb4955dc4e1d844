"""Realtime actions: at every moment what one batch over all the records so far would give."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recblocks import NewestActions, RealtimeActions, clean_actions

CHECKS = {"time_range": (2, 38), "action_types": {0, 1}}
NAMES = ("time", "item", "action_type", "surface", "source", "page", "duration")
ANY_ORDER = ("time", "item", "action_type", "surface", "duration")  # what no order of arrival changes
Record = dict[str, float]


def is_valid(record: Record) -> bool:
    return 2 <= record["time"] <= 38 and record["action_type"] < 2 and 0 <= record["duration"] < float("inf")


@st.composite
def streams(draw: st.DrawFn, *, shuffled: bool) -> tuple[list[Record], int, int | None, int]:
    """Records in the order in which they come, lateness, clock bound, S; shuffled: not only within the lateness."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))  # Hypothesis itself draws few and sparse records
    lateness, bound = draw(st.integers(0, 9)), draw(st.one_of(st.none(), st.integers(0, 12)))
    faults, others = draw(st.sampled_from([0.0, 0.1])), draw(st.sampled_from([0.0, 0.3]))
    records: list[Record] = [
        {
            "user": -7 if generator.random() < others else 5,
            "item": int(generator.random() < others),
            "action_type": 2 if generator.random() < faults else int(generator.random() < others),
            "surface": 4,
            "time": int(generator.integers(0, 41) if generator.random() < faults else generator.integers(2, 39)),
            "source": int(generator.integers(0, 5)),
            "duration": generator.choice([-1.0, math.nan, math.inf]) if generator.random() < faults else place / 4,
        }
        for place in generator.permutation(draw(st.integers(0, 60))).tolist()
    ]
    records += [dict(one) for one in records if generator.random() < 0.2]
    longest = 40 if shuffled else lateness
    delays = [generator.choice([0, lateness, generator.integers(0, longest + 1)]) for _ in records]
    arrivals = np.array([one["time"] for one in records], dtype=int) + np.array(delays, dtype=int)
    order = np.lexsort((generator.random(len(records)), arrivals))
    records = [records[place] for place in order]
    for place, one in enumerate(records):
        one["page"] = place
    return records, lateness, bound, draw(st.integers(1, 4))


def table(records: list[Record]) -> dict[str, np.ndarray]:
    columns = {name: np.array([one[name] for one in records], dtype=np.int64) for name in ("user", *NAMES[:-1])}
    return columns | {"duration": np.array([one["duration"] for one in records], dtype=np.float32)}


def batches(records: list[Record], cuts: list[int]) -> list[list[Record]]:
    ends = [*sorted(min(cut, len(records)) for cut in cuts), len(records)]
    return [records[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def rows(newest: NewestActions, at: int, names: tuple[str, ...] = NAMES) -> list[tuple[float, ...]]:
    """The valid slots of one row, after a look at the others."""
    valid = newest.valid[at]
    size = int(valid.sum())
    assert valid[:size].all()
    assert all(not column[at, size:].any() for column in newest.columns.values())
    return list(zip(*(newest.columns[name][at, :size].tolist() for name in names), strict=True))


def start(lateness: int, bound: int | None, num_actions: int) -> RealtimeActions:
    return RealtimeActions(
        num_actions=num_actions, unit="s", lateness=lateness, clock_bound=bound, action_types=CHECKS["action_types"]
    )


def feed(stream: RealtimeActions, records: list[Record]) -> RealtimeActions:
    stream.apply(**table(records), time_range=CHECKS["time_range"])
    return stream


MORE = settings(max_examples=5 * settings().max_examples)  # what goes wrong shows in rare meetings of records
CUTS = st.lists(st.integers(0, 72), max_size=20)


@MORE
@given(drawn=streams(shuffled=True), cuts=CUTS, data=st.data())
def test_is_the_scalar_definition_at_every_moment(
    drawn: tuple[list[Record], int, int | None, int], cuts: list[int], data: st.DataObject
) -> None:
    records, lateness, bound, num_actions = drawn
    stream, so_far = start(lateness, bound, num_actions), []
    for batch in batches(records, cuts):
        feed(stream, batch)
        so_far = so_far + batch
        on_time, late = oracles.without_late(so_far, lateness, is_valid)
        kept, merged, dropped = oracles.clean(on_time, bound, CHECKS["time_range"], CHECKS["action_types"])
        late_too = {"late": late} if late else {}
        assert stream.report == (len(so_far), len(kept), merged, dropped | late_too)
        latest = max((one["time"] for one in so_far if is_valid(one)), default=0)
        request = data.draw(st.integers(latest - lateness, latest + 1))
        newest = stream.newest(np.array([5, 99, -7]), request_time=request)
        assert not newest.valid[1].any()
        for at, user in ((0, 5), (2, -7)):
            expected = oracles.newest_actions(kept, user, request, num_actions)
            assert rows(newest, at) == [tuple(one[name] for name in NAMES) for one in expected]


@MORE
@given(drawn=streams(shuffled=False), cuts=CUTS)
def test_any_split_and_order_within_the_lateness_equals_one_batch(
    drawn: tuple[list[Record], int, int | None, int], cuts: list[int]
) -> None:
    records, lateness, bound, num_actions = drawn
    stream = start(lateness, bound, num_actions)
    for batch in batches(records, cuts):
        feed(stream, batch)
    by_time = sorted(records, key=lambda one: one["time"])
    cleaned = clean_actions(**table(by_time), unit="s", clock_bound=bound, **CHECKS)
    assert stream.report == cleaned.report
    kept = [dict(zip(cleaned.columns, row, strict=True)) for row in zip(*cleaned.columns.values(), strict=True)]
    newest = stream.newest(torch.tensor([-7, 5]), request_time=39)
    for at, user in enumerate((-7, 5)):
        expected = oracles.newest_actions(kept, user, 39, num_actions)
        assert rows(newest, at, ANY_ORDER) == [tuple(one[name] for name in ANY_ORDER) for one in expected]


@given(drawn=streams(shuffled=True), cuts=CUTS)
def test_any_split_changes_nothing_late_records_or_not(
    drawn: tuple[list[Record], int, int | None, int], cuts: list[int]
) -> None:
    records, *settings = drawn
    whole, cut = feed(start(*settings), records), start(*settings)
    for batch in batches(records, cuts):
        feed(cut, batch)
    assert cut.report == whole.report
    one, other = (stream.newest(np.array([5, -7]), request_time=41) for stream in (whole, cut))
    assert torch.equal(one.valid, other.valid)
    assert all(torch.equal(column, other.columns[name]) for name, column in one.columns.items())


@given(drawn=streams(shuffled=True), cuts=CUTS)
def test_streams_cut_by_user_give_the_same(drawn: tuple[list[Record], int, int | None, int], cuts: list[int]) -> None:
    records, *settings = drawn
    whole, shard = start(*settings), start(*settings)
    for batch in batches(records, cuts):
        feed(whole, batch)
        feed(shard, [one for one in batch if one["user"] == 5])
    assert rows(whole.newest(np.array([5]), request_time=41), 0) == rows(
        shard.newest(np.array([5]), request_time=41), 0
    )


@MORE
@given(drawn=streams(shuffled=True), cuts=CUTS, request=st.integers(-1, 42))
def test_a_request_in_the_past_is_answered_exactly_or_refused(
    drawn: tuple[list[Record], int, int | None, int], cuts: list[int], request: int
) -> None:
    records, lateness, bound, num_actions = drawn
    stream, endless = start(lateness, bound, num_actions), start(lateness, bound, 50)
    for batch in batches(records, cuts):
        feed(stream, batch)
        feed(endless, batch)
    expected = rows(endless.newest(np.array([5]), request_time=request), 0)[:num_actions]
    try:
        newest = stream.newest(np.array([5]), request_time=request)
    except ValueError as error:
        assert "older ones are forgotten" in str(error)  # noqa: PT017 (both outcomes are right, a wrong answer is not)
        latest = max(one["time"] for one in records if is_valid(one) and one["user"] == 5)
        assert request < latest - lateness
    else:
        assert rows(newest, 0) == expected


@given(drawn=streams(shuffled=True), cut=st.integers(0, 72))
def test_goes_on_from_a_copy(drawn: tuple[list[Record], int, int | None, int], cut: int) -> None:
    records, *settings = drawn
    stream = feed(start(*settings), records[:cut])
    copies = [copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))]
    expected = rows(feed(stream, records[cut:]).newest(np.array([5]), request_time=41), 0)
    for other in copies:
        feed(other, records[cut:])
        assert other.report == stream.report
        assert rows(other.newest(np.array([5]), request_time=41), 0) == expected


def apply(stream: RealtimeActions, times: list[int], **columns: list[int]) -> None:
    ones = np.ones(len(times), dtype=np.int64)
    given = {"user": ones, "item": ones} | {name: np.array(column) for name, column in columns.items()}
    stream.apply(time=np.array(times), **given)


def times(stream: RealtimeActions, request_time: int = 2**63 - 1) -> list[int]:
    newest = stream.newest(np.array([1]), request_time=request_time)
    return newest.columns["time"][0][newest.valid[0]].tolist()


def test_a_late_record_changes_who_is_merged_with_whom() -> None:
    stream = RealtimeActions(num_actions=5, unit="s", lateness=10, clock_bound=3)
    apply(stream, [12, 14], source=[1, 2])
    assert times(stream) == [12]
    apply(stream, [10], source=[1])  # 12 is another action, by the same clock; 14 is too far from 10
    assert times(stream) == [12, 10]
    apply(stream, [13], source=[2])  # and now belongs with 10, and 14 with 12
    assert times(stream) == [12, 10]
    apply(stream, [11], source=[2])
    assert times(stream) == [14, 12, 10]
    assert stream.report == (5, 3, {"clock_difference": 2}, {})


def test_what_was_merged_for_now_leaves_nothing_behind() -> None:
    stream = RealtimeActions(num_actions=5, unit="s", lateness=10, clock_bound=3)

    def durations() -> list[float]:
        return stream.newest(np.array([1]), request_time=99).columns["duration"][0].tolist()

    apply(stream, [12, 14], source=[1, 2], duration=[1.0, 9.0])
    assert durations() == [9, 0, 0, 0, 0]
    apply(stream, [13], source=[2], duration=[2.0])  # takes the place of 14 beside 12
    assert times(stream) == [14, 12]
    assert durations() == [9, 2, 0, 0, 0]
    apply(stream, [30], source=[1], duration=[0.0])  # settles them
    assert times(stream) == [30, 14, 12]
    assert durations() == [0, 9, 2, 0, 0]


def test_a_repeat_exactly_at_the_lateness_finds_the_record_it_repeats() -> None:
    stream = RealtimeActions(num_actions=5, unit="s", lateness=5, clock_bound=5)
    apply(stream, [0, 5], source=[1, 2])
    apply(stream, [10], item=[9], source=[1])
    apply(stream, [5, 4], source=[2, 2])
    assert times(stream) == [10, 0]
    assert stream.report == (5, 2, {"same_time": 1, "clock_difference": 1}, {"late": 1})


def test_what_may_still_be_joined_is_kept_beyond_the_sequence() -> None:
    stream = RealtimeActions(num_actions=1, unit="s", lateness=0, clock_bound=5)
    apply(stream, [10, 11, 12], item=[1, 2, 3], source=[1, 1, 1])
    apply(stream, [15, 15, 15], item=[1, 2, 3], source=[2, 2, 2])
    assert times(stream) == [12]
    assert stream.report == (6, 3, {"clock_difference": 3}, {})


def test_a_settled_action_keeps_the_clocks_and_the_duration_of_all_its_records() -> None:
    stream = RealtimeActions(num_actions=5, unit="s", lateness=0, clock_bound=20)
    apply(stream, [10, 11], source=[1, 2], duration=[1.0, 9.0])
    for time in (12, 13):
        apply(stream, [time], item=[9], source=[1], duration=[0.0])
    apply(stream, [14], source=[2], duration=[2.0])  # another action, by a clock that has seen the first
    newest = stream.newest(np.array([1]), request_time=99)
    assert newest.columns["time"].tolist() == [[14, 13, 12, 10, 0]]
    assert newest.columns["duration"].tolist() == [[2, 0, 0, 9, 0]]


def test_memory_is_bounded_by_users_and_what_is_open() -> None:
    generator = np.random.default_rng(0)
    stream = RealtimeActions(num_actions=4, unit="s", lateness=10)
    for step in range(300):
        size = 50
        stream.apply(
            user=generator.integers(0, 20, size), time=step * 10 + generator.integers(0, 10, size),
            item=generator.integers(0, 1000, size),
        )  # fmt: skip
    most = 20 * (4 + 60)  # each user's records of two steps, generously
    assert stream.report.read == 15000
    assert stream._log.columns["time"].size <= 4 * most


def test_settings_reach_the_checks() -> None:
    stream = RealtimeActions(
        num_actions=9, unit="s", lateness=100, items=torch.tensor([7]), action_types=[1], surfaces=[2]
    )
    ones = np.ones(5, dtype=np.int64)
    report = stream.apply(
        user=np.ma.masked_array(ones, mask=[1, 0, 0, 0, 0]), time=np.arange(5).astype("datetime64[s]"),
        item=np.array([7, 8, 7, 7, 7]), action_type=np.array([1, 1, 3, 1, 1]), surface=np.array([2, 2, 2, 5, 2]),
    )  # fmt: skip
    assert report == (
        5, 1, {}, {"null_user": 1, "unknown_item": 1, "unknown_action_type": 1, "unknown_surface": 1},
    )  # fmt: skip
    assert times(stream) == [4]


def test_an_action_in_the_future_of_a_request_is_not_in_its_sequence() -> None:
    stream = RealtimeActions(num_actions=3, unit="s", lateness=5)
    report = stream.apply(
        user=np.ones(4, dtype=np.int64), time=np.array([8, 10, 14, 90]), item=np.arange(4), time_range=(0, 20),
        duration=np.array([1.0, -1.0, 2.0, 3.0]),
    )  # fmt: skip
    assert report == (4, 2, {}, {"time_out_of_range": 1, "negative_duration": 1})
    assert [times(stream, request) for request in (15, 14, 9, 8)] == [[14, 8], [8], [8], []]


def test_extreme_times_and_ids() -> None:
    low, high = -(2**63), 2**63 - 1
    stream = RealtimeActions(num_actions=3, unit="ms", lateness=high, clock_bound=high)
    stream.apply(
        user=np.array([high, low]), time=np.array([low, low]), item=np.array([low, high]), source=np.array([1, low])
    )
    stream.apply(user=np.array([low]), time=np.array([high - 1]), item=np.array([high]), source=np.array([high]))
    assert stream.report == (3, 3, {}, {})  # the clocks differ by more than int64's largest number
    stream.apply(user=np.array([low]), time=np.array([-2]), item=np.array([high]), source=np.array([2]))
    assert stream.report.dropped == {"late": 1}  # 2**63 earlier
    newest = stream.newest(np.array([low, 0, high, low]), request_time=np.array([high, high, high, low]))
    assert newest.columns["time"].tolist() == [[high - 1, low, 0], [0, 0, 0], [low, 0, 0], [0, 0, 0]]
    assert newest.valid.sum(1).tolist() == [2, 0, 1, 0]


def test_before_the_first_record_and_after_an_empty_batch() -> None:
    stream = RealtimeActions(num_actions=2, unit="s", lateness=0)
    newest = stream.newest(torch.tensor([3]), request_time=0)
    assert newest.columns.keys() == {"time", "item"}
    assert newest.valid.tolist() == [[False, False]]
    none = np.empty(0, dtype=np.int64)
    assert stream.apply(user=none, time=none, item=none, duration=none.astype(np.float16)) == (0, 0, {}, {})
    newest = stream.newest(none, request_time=none)
    assert newest.columns["duration"].dtype == torch.float16
    assert newest.columns["duration"].shape == newest.valid.shape == (0, 2)


def test_the_input_stays_as_it_was() -> None:
    stream = RealtimeActions(num_actions=2, unit="s", lateness=5)
    ones, duration = np.ones(2, dtype=np.int64), np.array([1.0, 4.0])
    stream.apply(user=ones, time=ones, item=ones, duration=duration)
    assert duration.tolist() == [1.0, 4.0]
    first = stream.newest(np.array([1]), request_time=9)
    first.columns["duration"][0, 0] = 7
    assert stream.newest(np.array([1]), request_time=9).columns["duration"].tolist() == [[4.0, 0.0]]


ONE = {"user": np.array([1]), "time": np.array([50]), "item": np.array([1]), "duration": np.array([1.0])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"page": np.array([1])},
            ValueError,
            "columns must be those of the first batch, time, item, duration, source, got",
        ),
        ({"duration": None}, ValueError, "columns must be those of the first batch"),
        ({"duration": np.array([1.0], dtype=np.float32)}, TypeError, "duration must be float64 as in the first batch"),
        ({"source": None}, ValueError, "clock_bound needs source"),
        ({"time": np.array([1.0])}, TypeError, "time must be integers, got float64"),
        ({"item": np.array([1, 2])}, ValueError, "item must have one entry for each of the 1 users given, got 2"),
        ({"time_range": (3, 1)}, ValueError, "time_range must be the earliest and the latest time"),
        (
            {name: np.repeat(column, 64) for name, column in ONE.items()} | {"source": np.arange(100, 164)},
            ValueError,
            "source must name at most 64 sources where clock_bound is given, got 65",
        ),
    ],
)
def test_a_bad_batch_changes_nothing(change: dict[str, object], error: type[Exception], message: str) -> None:
    stream = RealtimeActions(num_actions=2, unit="s", lateness=0, clock_bound=1)
    good: dict[str, object] = ONE | {"source": np.array([1])}
    stream.apply(**good)  # type: ignore[arg-type]
    before = pickle.dumps(stream)
    with pytest.raises(error, match=message):
        stream.apply(**(good | {"time": np.array([60])} | change))  # type: ignore[arg-type]
    assert pickle.dumps(stream) == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_actions": 0}, ValueError, "num_actions must be at least 1, got 0"),
        ({"unit": "us"}, ValueError, "unit must be one of 's', 'ms', got 'us'"),
        ({"lateness": -1}, ValueError, "lateness must be from 0 to .* got -1"),
        ({"lateness": 0.5}, TypeError, r"lateness must be an int, got 0\.5"),
        ({"clock_bound": -1}, ValueError, "clock_bound must be from 0 to .*, got -1"),
        ({"items": np.array([0.5])}, TypeError, "items must be integers, got float64"),
        ({"action_types": ["a"]}, TypeError, "action_types must be an int, got 'a'"),
        ({"surfaces": [2**63]}, ValueError, "surfaces must be from .* got"),
    ],
)
def test_bad_settings(change: dict[str, object], error: type[Exception], message: str) -> None:
    good: dict[str, object] = {"num_actions": 2, "unit": "s", "lateness": 0}
    with pytest.raises(error, match=message):
        RealtimeActions(**(good | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("users", "request_time", "error", "message"),
    [
        (np.array([1.0]), 3, TypeError, "users must be integers, got float64"),
        (np.array([1]), 3.5, TypeError, r"request_time must be an int, got 3\.5"),
        (np.array([1]), np.array([1, 2]), ValueError, "request_time must have one entry for each of the 1 users given"),
        (np.array([1]), 14, ValueError, "request_time must be at most lateness .5. before .* at 20, got 14 for us"),
    ],
)
def test_bad_requests(users: np.ndarray, request_time: object, error: type[Exception], message: str) -> None:
    stream = RealtimeActions(num_actions=1, unit="s", lateness=5)
    apply(stream, [10, 14, 20])
    apply(stream, [20])  # forgets nothing more, and 10 is forgotten still
    assert times(stream, 15) == [14]
    with pytest.raises(error, match=message):
        stream.newest(users, request_time=request_time)
