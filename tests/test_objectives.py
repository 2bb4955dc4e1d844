"""The objectives draw exactly the pairs that their definitions allow, each as often as it should."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recblocks import (
    Anchors,
    Examples,
    Timelines,
    all_action,
    dense_all_action,
    dense_all_positives,
    next_action,
    sample_anchors,
    sasrec,
)
from recblocks.timelines import examples as examples_module
from recblocks.timelines.examples import drop_rows_without_pairs, sample_within, uniform

DAY = 86_400
OBJECTIVES = [next_action, sasrec, all_action, dense_all_action]

World = tuple[list[list[tuple[int, bool]]], int | None]
WORLDS = st.tuples(
    st.lists(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=10), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(0, 12)),
)


def build(users: list[list[tuple[int, bool]]], *, unit: str = "s") -> tuple[Timelines, list[list[tuple[int, bool]]]]:
    """Timelines at one action a day at most, and each user's (day, positive), newest first."""
    scale = DAY * (1000 if unit == "ms" else 1)
    rows = [(user, day, flag) for user, actions in enumerate(users) for day, flag in actions]
    timelines = Timelines.from_arrays(
        user=torch.tensor([7 * user - 3 for user, _, _ in rows]),
        time=torch.tensor([day * scale for _, day, _ in rows]),
        item=torch.arange(len(rows)),
        good=torch.tensor([flag for _, _, flag in rows]),
        unit=unit,
    )
    ordered = [sorted(actions, key=lambda action: -action[0]) for actions in users]
    return timelines, ordered


def good(action: Mapping[str, Tensor]) -> Tensor:
    return action["good"]


def every_anchor(timelines: Timelines) -> Anchors:
    """One anchor at every action, whether or not it begins an event."""
    return Anchors(torch.repeat_interleave(timelines.ends - timelines.starts), torch.arange(timelines.num_actions))


def allowed_pairs(
    name: str, times: list[int], flags: list[bool], anchor: int, max_len: int, window: int, until: int | None
) -> dict[int, set[int]]:
    """slot -> the places of the labels that it may get."""
    slots = oracles.input_slots(times, anchor, max_len)
    found = {}
    for slot, at in enumerate(slots[:1] if name in ("next_action", "all_action") else slots):
        if name in ("next_action", "sasrec"):
            found[slot] = {j for j in oracles.next_event(times, at, until) if flags[j]}
        else:
            found[slot] = set(oracles.window_positives(times, flags, at, window, until))
    return {slot: places for slot, places in found.items() if places}


def drawn(examples: Examples, timelines: Timelines, anchors: Anchors) -> list[tuple[int, int, int]]:
    """(row, slot, place of the label in its user's timeline)."""
    place = examples.pair_label - timelines.starts[anchors.user_row[examples.pair_row]]
    return list(zip(examples.pair_row.tolist(), examples.pair_slot.tolist(), place.tolist(), strict=True))


def call(objective: Callable[..., Examples], timelines: Timelines, anchors: Anchors, **options: object) -> Examples:
    if objective in (next_action, sasrec):
        options.pop("window_days", None)
    if objective in (next_action, sasrec, dense_all_positives):
        options.pop("max_labels", None)
    if objective is dense_all_positives:
        options.pop("generator", None)
    return objective(timelines, anchors, positive=good, **options)


@pytest.mark.parametrize("objective", [*OBJECTIVES, dense_all_positives])
@pytest.mark.parametrize("unit", ["s", "ms"])
@given(world=WORLDS, max_len=st.integers(1, 6), window=st.integers(1, 6), max_labels=st.integers(1, 4))
def test_only_allowed_pairs_and_as_many_as_there_are(
    objective: Callable[..., Examples], unit: str, world: World, max_len: int, window: int, max_labels: int
) -> None:
    users, until = world
    timelines, ordered = build(users, unit=unit)
    anchors = every_anchor(timelines)
    scale = DAY * (1000 if unit == "ms" else 1)
    examples = call(
        objective, timelines, anchors, max_len=max_len, window_days=float(window), max_labels=max_labels,
        until=None if until is None else until * scale, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    by_row: dict[int, list[tuple[int, int]]] = {row: [] for row in range(anchors.action.shape[0])}
    for row, slot, place in drawn(examples, timelines, anchors):
        by_row[row].append((slot, place))
    for row, pairs in by_row.items():
        user = int(anchors.user_row[row])
        times, flags = [day for day, _ in ordered[user]], [flag for _, flag in ordered[user]]
        # Ties were sorted stably in the oracle's list too, so places agree.
        anchor = int(anchors.action[row] - timelines.starts[user])
        allowed = allowed_pairs(objective.__name__, times, flags, anchor, max_len, window, until)
        everything = {(slot, place) for slot, places in allowed.items() for place in places}
        assert set(pairs) <= everything
        assert len(set(pairs)) == len(pairs)
        slots = [slot for slot, _ in pairs]
        if objective is all_action:
            assert len(pairs) == min(max_labels, len(everything))
        elif objective is dense_all_action:
            assert len(set(slots)) == len(slots) == min(max_labels, len(allowed))
        elif objective is dense_all_positives:
            assert set(pairs) == everything
        else:
            assert len(set(slots)) == len(slots)
            inputs = oracles.input_slots(times, anchor, max_len)
            events = {slot: oracles.next_event(times, inputs[slot], until) for slot in allowed}
            assert {slot for slot, event in events.items() if all(flags[j] for j in event)} <= set(slots)
        assert examples.actions[row][examples.valid[row]].tolist() == [
            int(timelines.starts[user]) + place for place in oracles.input_slots(times, anchor, max_len)
        ]
        assert not examples.actions[row][~examples.valid[row]].any()
    assert examples.users.tolist() == timelines.users[anchors.user_row].tolist()
    assert examples.pair_row.tolist() == sorted(examples.pair_row.tolist())
    assert examples.pair_weight.dtype == torch.float32


@given(world=WORLDS, max_len=st.integers(1, 6))
def test_pair_weights_average_one_a_row(world: World, max_len: int) -> None:
    timelines, _ = build(world[0])
    anchors = every_anchor(timelines)
    for objective in [*OBJECTIVES, dense_all_positives]:
        examples = call(objective, timelines, anchors, max_len=max_len)
        pairs = torch.bincount(examples.pair_row, minlength=len(examples.users))
        total = torch.zeros(len(examples.users)).index_add(0, examples.pair_row, examples.pair_weight)
        # at most 60 pairs a row, each weight rounded once and each addition once: 120 roundings of 2^-24
        torch.testing.assert_close(total, pairs.float(), rtol=120 * 2**-24, atol=0.0)


@given(world=WORLDS, max_len=st.integers(1, 6))
def test_sasrec_weighs_the_newest_as_all_the_others_together(world: World, max_len: int) -> None:
    timelines, _ = build(world[0])
    examples = call(sasrec, timelines, every_anchor(timelines), max_len=max_len)
    for row in range(len(examples.users)):
        here = examples.pair_row == row
        newest = examples.pair_weight[here & (examples.pair_slot == 0)]
        others = examples.pair_weight[here & (examples.pair_slot != 0)]
        if newest.numel() and others.numel():
            torch.testing.assert_close(newest.sum(), others.sum(), rtol=10 * 2**-24, atol=0.0)  # ten roundings
        else:
            assert (examples.pair_weight[here] == 1).all()


@given(world=WORLDS, max_len=st.integers(1, 6), window=st.integers(1, 6))
def test_every_positive_averaged_gives_each_slot_the_same_weight(world: World, max_len: int, window: int) -> None:
    timelines, _ = build(world[0])
    examples = call(dense_all_positives, timelines, every_anchor(timelines), max_len=max_len, window_days=float(window))
    slot = examples.pair_row * max_len + examples.pair_slot
    total = torch.zeros(len(examples.users) * max_len).index_add(0, slot, examples.pair_weight)
    for row in range(len(examples.users)):
        here = examples.pair_row == row
        of_row = total[slot[here].unique()]
        torch.testing.assert_close(of_row, of_row[:1].expand_as(of_row), rtol=20 * 2**-24, atol=0.0)  # 20 roundings
    for one in slot.unique():
        assert examples.pair_weight[slot == one].unique().numel() == 1


def assert_equal_chances(counts: Mapping[object, int], outcomes: int) -> None:
    """Every outcome was drawn, and the chi-square statistic stays below its one-in-a-million bound.

    A chi-square variable of d degrees exceeds d + 2 sqrt(d x) + 2 x with chance below exp(-x) (Laurent, Massart);
    x = 14. The generators are fixed, so a pass stays a pass.
    """
    assert len(counts) == outcomes
    expected = sum(counts.values()) / outcomes
    degrees = outcomes - 1
    bound = degrees + 2 * (degrees * 14) ** 0.5 + 2 * 14
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < bound


# One user whose actions tie, oldest last: three events of several actions with positives and others.
TIED = [
    [(9, True), (8, False), (8, True), (6, True), (6, True), (6, False), (5, True), (3, False), (3, True), (0, True)]
]
ROUNDS = 6000


def repeated(place: int) -> Anchors:
    """The same anchor many times: every row draws for itself."""
    return Anchors(torch.zeros(ROUNDS, dtype=torch.int64), torch.full((ROUNDS,), place))


@pytest.mark.parametrize("place", [3, 6, 7, 9])
def test_the_next_action_is_uniform_over_its_event_positive_or_not(place: int) -> None:
    timelines, ordered = build(TIED)
    times, flags = [day for day, _ in ordered[0]], [flag for _, flag in ordered[0]]
    anchors = repeated(place)
    examples = next_action(timelines, anchors, max_len=1, positive=good, generator=torch.Generator().manual_seed(place))
    event = oracles.next_event(times, place, None)
    counts = Counter(examples.pair_label.tolist())
    positives = [j for j in event if flags[j]]
    assert set(counts) == set(positives)
    # Each action of the event is drawn with chance 1/len(event), so a label's count is binomial; 5 deviations.
    chance = 1 / len(event)
    for j in positives:
        assert abs(counts[j] - ROUNDS * chance) <= 5 * (ROUNDS * chance * (1 - chance)) ** 0.5


def test_all_action_subsets_are_equally_likely() -> None:
    timelines, _ = build(TIED)
    examples = all_action(
        timelines, repeated(7), max_len=1, positive=good, max_labels=2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    pairs = Counter(tuple(sorted(two)) for two in examples.pair_label.view(ROUNDS, 2).tolist())
    assert_equal_chances(pairs, 10)  # 5 later positives: 10 pairs of them


def test_dense_all_action_is_uniform_over_slots_and_then_over_labels() -> None:
    timelines, ordered = build(TIED)
    times, flags = [day for day, _ in ordered[0]], [flag for _, flag in ordered[0]]
    examples = dense_all_action(
        timelines, repeated(3), max_len=6, positive=good, window_days=4, max_labels=1,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    allowed = allowed_pairs("dense_all_action", times, flags, 3, 6, 4, None)
    by_slot = Counter(examples.pair_slot.tolist())
    assert_equal_chances(by_slot, len(allowed))
    for slot, places in allowed.items():
        labels = Counter(examples.pair_label[examples.pair_slot == slot].tolist())
        assert set(labels) == places
        if len(places) > 1:
            assert_equal_chances(labels, len(places))


@given(world=WORLDS, seed=st.integers(0, 9))
def test_anchors_are_the_possible_ones(world: World, seed: int) -> None:
    users, until = world
    timelines, ordered = build(users)
    rows = torch.arange(len(users)).flip(0)
    until_time = None if until is None else until * DAY
    generator = torch.Generator().manual_seed(seed)
    anchors = sample_anchors(timelines, rows, fraction=1.0, max_sequences=99, until=until_time, generator=generator)
    found = list(
        zip(anchors.user_row.tolist(), (anchors.action - timelines.starts[anchors.user_row]).tolist(), strict=True)
    )
    assert found == [
        (row, place)
        for row in rows.tolist()
        for place in oracles.possible_anchors([day for day, _ in ordered[row]], until)
    ]


@given(world=WORLDS, fraction=st.floats(0.01, 1.0), max_sequences=st.integers(1, 4), seed=st.integers(0, 9))
def test_the_knobs_of_sequences_are_respected(world: World, fraction: float, max_sequences: int, seed: int) -> None:
    timelines, ordered = build(world[0])
    anchors = sample_anchors(
        timelines, torch.arange(len(timelines)), fraction=fraction, max_sequences=max_sequences,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    assert anchors.action.unique().numel() == anchors.action.numel()
    for row, actions in enumerate(ordered):
        possible = oracles.possible_anchors([day for day, _ in actions], None)
        places = (anchors.action[anchors.user_row == row] - timelines.starts[row]).tolist()
        assert set(places) <= set(possible)
        share = fraction * len(possible)
        assert len(places) in {min(max_sequences, int(share)), min(max_sequences, int(share) + (share > int(share)))}


def test_anchors_are_drawn_equally_and_their_mean_is_the_fraction() -> None:
    users = 3000
    timelines, _ = build([[(day, True) for day in range(6)]] * users)
    anchors = sample_anchors(
        timelines, torch.arange(users), fraction=0.5, max_sequences=9, generator=torch.Generator().manual_seed(0)
    )
    sizes = torch.bincount(anchors.user_row, minlength=users)
    assert set(sizes.tolist()) == {2, 3}
    # 5 possible sequences, half of them: 2 or 3 with chance 1/2 each, so 3's count is binomial; 5 deviations.
    assert abs(int((sizes == 3).sum()) - users / 2) <= 5 * (users / 4) ** 0.5
    places = Counter((anchors.action - timelines.starts[anchors.user_row]).tolist())
    assert_equal_chances(places, 5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_generator_decides_everything(objective: Callable[..., Examples]) -> None:
    timelines, _ = build(TIED * 20)
    run = functools.partial(call, objective, timelines, every_anchor(timelines), max_len=4, max_labels=2)
    state = torch.get_rng_state()
    one, again, other = (run(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not (one.pair_label.shape == other.pair_label.shape and torch.equal(one.pair_label, other.pair_label))


@given(world=WORLDS, others=WORLDS)
def test_what_is_not_drawn_at_random_does_not_depend_on_other_users(world: World, others: World) -> None:
    alone, _ = build(world[0])
    together, _ = build(world[0] + others[0])
    count = alone.num_actions
    one = call(dense_all_positives, alone, every_anchor(alone), max_len=4)
    all_of_them = every_anchor(together)
    two = call(dense_all_positives, together, Anchors(*(part[:count] for part in all_of_them)), max_len=4)
    mixed = call(dense_all_positives, together, all_of_them, max_len=4)
    pairs = mixed.pair_row < count
    for name in ("pair_row", "pair_slot", "pair_label", "pair_weight"):
        assert torch.equal(getattr(one, name), getattr(two, name))
        assert torch.equal(getattr(one, name), getattr(mixed, name)[pairs])


@given(world=WORLDS)
def test_a_subset_of_users_gives_their_own_pairs(world: World) -> None:
    timelines, _ = build(world[0])
    subset = timelines.select(torch.arange(0, len(timelines), 2))
    whole = call(dense_all_positives, timelines, every_anchor(timelines), max_len=4)
    row = torch.repeat_interleave(subset.ends - subset.starts)
    inside = torch.isin(every_anchor(timelines).user_row, torch.arange(0, len(timelines), 2))
    anchors = Anchors(row, every_anchor(timelines).action[inside])
    part = call(dense_all_positives, subset, anchors, max_len=4)
    assert torch.equal(part.users, whole.users[inside])
    assert torch.equal(part.pair_label, whole.pair_label[inside[whole.pair_row]])


@pytest.mark.parametrize("objective", [*OBJECTIVES, dense_all_positives])
def test_times_at_the_ends_of_int64(objective: Callable[..., Examples]) -> None:
    times = torch.tensor([2**63 - 1, 2**63 - 2, 0, -(2**63)])
    timelines = Timelines.from_arrays(
        user=torch.zeros(4, dtype=torch.int64), time=times, item=torch.arange(4), unit="ms",
        good=torch.ones(4, dtype=torch.bool),
    )  # fmt: skip
    examples = call(objective, timelines, Anchors(torch.tensor([0]), torch.tensor([1])), max_len=3, window_days=1.0)
    assert (examples.pair_label[examples.pair_slot == 0] == 0).all()
    assert examples.pair_label.numel() >= 1


@pytest.mark.parametrize("objective", [*OBJECTIVES, dense_all_positives])
def test_no_anchors_give_no_rows(objective: Callable[..., Examples]) -> None:
    timelines, _ = build(TIED)
    none = torch.zeros(0, dtype=torch.int64)
    assert sample_anchors(timelines, none, fraction=0.5, max_sequences=3).action.shape == (0,)
    examples = call(objective, timelines, Anchors(none, none), max_len=3)
    assert examples.actions.shape == (0, 3)
    assert examples.pair_label.shape == (0,)


def test_rows_without_pairs_are_left_out() -> None:
    timelines, _ = build([[(1, True), (2, False), (3, False)], [(1, False), (2, True)], [(5, True)]])
    examples = call(all_action, timelines, every_anchor(timelines), max_len=2)
    kept = drop_rows_without_pairs(examples)
    assert kept.users.tolist() == [4]
    assert kept.pair_row.tolist() == [0]
    assert torch.equal(kept.pair_label, examples.pair_label)
    assert torch.equal(kept.actions, examples.actions[examples.pair_row])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 4))
def test_sample_within_takes_what_is_wanted_of_each_group(sizes: list[int], wanted: int) -> None:
    group = torch.repeat_interleave(torch.tensor(sizes))
    kept = sample_within(group, torch.full((len(sizes),), wanted), torch.Generator().manual_seed(0))
    assert kept.unique().tolist() == kept.tolist()
    assert torch.bincount(group[kept], minlength=len(sizes)).tolist() == [min(size, wanted) for size in sizes]


def test_uniform_stays_inside_its_range() -> None:
    low = torch.tensor([3]).repeat(4000)
    draws = Counter(uniform(low, low + 7, torch.Generator().manual_seed(0)).tolist())
    assert set(draws) == set(range(3, 10))
    assert_equal_chances(draws, 7)


def test_a_window_of_part_of_a_day_ends_at_its_last_second() -> None:
    times = torch.tensor([0, 60_480, 60_481])  # 0.7 days; as floats 0.7 x 86400 is a little less
    timelines = Timelines.from_arrays(user=torch.zeros(3, dtype=torch.int64), time=times, item=times, unit="s")
    anchors = Anchors(torch.tensor([0]), torch.tensor([2]))
    examples = all_action(timelines, anchors, max_len=1, positive=lambda action: action["item"] >= 0, window_days=0.7)
    assert timelines.columns["item"][examples.pair_label].tolist() == [60_480]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_len": 0}, ValueError, "max_len must be at least 1, got 0"),
        ({"positive": 5}, TypeError, r"positive must be a function of gathered columns, got 5 \(int\)"),
        ({"anchors": None}, TypeError, "anchors must be Anchors, got None"),
        ({"window_days": 0.0}, ValueError, "window_days must be finite and above 0, got 0.0"),
        ({"window_days": 1e15}, ValueError, r"window_days must be from 1 to \d+ s, .* got 1000000000000000\.0"),
        ({"window_days": 1e-5}, ValueError, r"window_days must be from 1 to .* s, .* got 1e-05"),  # 0.864 s
        ({"window_days": 1e-6}, ValueError, r"window_days must be from 1 to .* s, .* got 1e-06"),
        ({"max_labels": 0}, ValueError, "max_labels must be at least 1, got 0"),
        ({"positive": lambda action: action["item"]}, TypeError, "what positive returns must be bool"),
        ({"positive": lambda _: torch.ones(99, dtype=torch.bool)}, ValueError, "what positive returns must have shape"),
        (
            {"anchors": Anchors(torch.tensor([1]), torch.tensor([0]))},
            ValueError,
            r"must be an action of anchors\.user_row, in \[\d+, \d+\) for row 1, got 0",
        ),
        (
            {"anchors": Anchors(torch.tensor([9]), torch.tensor([0]))},
            ValueError,
            r"anchors\.user_row must be in \[0, 2\), got 9 to 9",
        ),
        (
            {"anchors": Anchors(torch.tensor([0]), torch.tensor([0, 1]))},
            ValueError,
            r"anchors.action must have shape \(1\)",
        ),
        ({"anchors": Anchors(torch.tensor([0.0]), torch.tensor([0]))}, TypeError, "anchors.user_row must be int64"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    timelines, _ = build([*TIED, [(2, True), (4, True)]])
    good_call: dict[str, object] = {
        "anchors": Anchors(torch.tensor([0]), torch.tensor([4])),
        "max_len": 2,
        "positive": good,
    }
    with pytest.raises(error, match=message):
        dense_all_action(timelines, **(good_call | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fraction": 0.0}, ValueError, "fraction must be finite and above 0 and at most 1, got 0.0"),
        ({"fraction": 1.5}, ValueError, "fraction must be"),
        ({"max_sequences": 0}, ValueError, "max_sequences must be at least 1, got 0"),
        ({"users": torch.tensor([1])}, ValueError, r"users must be rows in \[0, 1\), got 1 to 1"),
        ({"users": torch.tensor([0.0])}, TypeError, "users must be int64"),
    ],
)
def test_bad_anchor_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    timelines, _ = build(TIED)
    good_call: dict[str, object] = {"users": torch.tensor([0]), "fraction": 0.5, "max_sequences": 3}
    with pytest.raises(error, match=message):
        sample_anchors(timelines, **(good_call | change))  # type: ignore[arg-type]


CUT = 1_700_000_050  # between this and its neighbours float32 sees no difference


@pytest.mark.parametrize("objective", [*OBJECTIVES, dense_all_positives])
def test_until_is_exact_and_never_a_float(objective: Callable[..., Examples]) -> None:
    times = torch.tensor([CUT + 1, CUT, CUT - 90])
    timelines = Timelines.from_arrays(
        user=torch.zeros(3, dtype=torch.int64), time=times, item=torch.arange(3), unit="s",
        good=torch.ones(3, dtype=torch.bool),
    )  # fmt: skip
    anchors = Anchors(torch.tensor([0]), torch.tensor([2]))
    for until in (CUT, np.int64(CUT), torch.tensor(CUT)):
        assert set(call(objective, timelines, anchors, max_len=2, until=until).pair_label.tolist()) == {1}
    for bad in (float(CUT), np.float32(CUT), True, torch.tensor(float(CUT))):
        with pytest.raises(TypeError, match="until must be an int, got"):
            call(objective, timelines, anchors, max_len=2, until=bad)
        with pytest.raises(TypeError, match="until must be an int, got"):
            sample_anchors(timelines, torch.tensor([0]), fraction=1.0, max_sequences=2, until=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="until must be from"):
        call(objective, timelines, anchors, max_len=2, until=2**63)


@pytest.fixture
def _other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture
def expected() -> list[Tensor]:
    return everything_drawn()


def everything_drawn() -> list[Tensor]:
    device = torch.device("cpu")
    actions = torch.arange(20_000, device=device)
    timelines = Timelines.from_arrays(user=actions % 3, time=actions // 6 * DAY, item=actions, unit="s")
    rows, g = torch.arange(3, device=device), torch.Generator("cpu").manual_seed(0)
    anchors = sample_anchors(timelines, rows, fraction=0.0123, max_sequences=50, generator=g)
    found = list(anchors)
    for objective in (*OBJECTIVES, dense_all_positives):
        options = {} if objective is dense_all_positives else {"generator": g}
        drawn = objective(timelines, anchors, max_len=40, positive=lambda action: action["item"] % 3 > 0, **options)
        found += [*drawn, *drop_rows_without_pairs(drawn)]
    return found


@pytest.mark.usefixtures("expected", "_other_defaults")
def test_torchs_defaults_change_nothing(expected: list[Tensor]) -> None:
    found = everything_drawn()
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, expected, strict=True))


def test_the_mean_number_of_anchors_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of one sequence is one for a draw of 0.9 or more; float32's tenth is 1.5e-9 too large."""
    timelines, _ = build([[(1, True), (2, True)]])
    for draw, count in ((0.9 - 1e-12, 0), (0.9 + 1e-12, 1)):
        monkeypatch.setattr(examples_module, "_random", lambda *_, draw=draw: torch.tensor([draw], dtype=torch.float64))
        anchors = sample_anchors(timelines, torch.tensor([0]), fraction=0.1, max_sequences=2)
        assert len(anchors.action) == count
