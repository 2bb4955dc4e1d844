"""What an embedding learns to predict: training pairs sampled on the fly from whole timelines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.timelines.examples import Anchors, Examples, sample_within, uniform
from recblocks.timelines.ranges import expand_ranges, first_at_or_before
from recblocks.timelines.timeline import Timelines

Positive = Callable[[Mapping[str, Tensor]], Tensor]
"""Says which actions are positive, from their columns: ``lambda action: action["duration"] > 10``."""

_UNITS_PER_DAY = {"s": 86_400, "ms": 86_400_000}
_LATEST = torch.iinfo(torch.int64).max


def next_action(
    timelines: Timelines,
    anchors: Anchors,
    *,
    max_len: int,
    positive: Positive,
    until: int | None = None,
    generator: torch.Generator | None = None,
) -> Examples:
    """Predict with slot 0 one random action of the first later event; no pair where that action is not positive.

    Args:
        timelines: whole timelines or a subset.
        anchors: where the sequences start.
        max_len: M, slots of a sequence.
        positive: the predicate on gathered columns.
        until: in the timelines' unit; labels later than this do not exist.
        generator: where the random numbers come from.

    Returns:
        At most one pair a row, of weight 1.

    Example:
        >>> timelines = Timelines.from_arrays(
        ...     user=torch.zeros(3, dtype=torch.int64), time=torch.tensor([1, 2, 3]), item=torch.arange(3), unit="s"
        ... )
        >>> anchors = Anchors(torch.tensor([0]), torch.tensor([2]))
        >>> examples = next_action(timelines, anchors, max_len=4, positive=lambda action: action["item"] > 0)
        >>> examples.pair_label
        tensor([1])

    Note:
        PinnerFormer's timelines have no ties; where several actions share a time, "the next action" is one of them at
        random.

    Source: PinnerFormer, section 3.4.1.
    """
    actions, valid = _inputs(timelines, anchors, max_len)
    row, slot, label = _next_labels(timelines, anchors, actions[:, :1], valid[:, :1], positive, until, generator)
    return _examples(timelines, anchors, actions, valid, row, slot, label, torch.ones_like(row))


def sasrec(
    timelines: Timelines,
    anchors: Anchors,
    *,
    max_len: int,
    positive: Positive,
    until: int | None = None,
    generator: torch.Generator | None = None,
) -> Examples:
    """Predict with every slot one random action of the first event after it; no pair where that is not positive.

    The newest slot's pair weighs as much as all the others of its row together: n/2 for it and n/(2(n-1)) for each
    other of n pairs; 1 for each where there is only one kind.

    Args:
        timelines: whole timelines or a subset.
        anchors: where the sequences start.
        max_len: M, slots of a sequence.
        positive: the predicate on gathered columns.
        until: in the timelines' unit; labels later than this do not exist.
        generator: where the random numbers come from.

    Returns:
        At most one pair a slot.

    Example:
        >>> timelines = Timelines.from_arrays(
        ...     user=torch.zeros(4, dtype=torch.int64), time=torch.arange(4), item=torch.arange(4), unit="s"
        ... )
        >>> anchors = Anchors(torch.tensor([0]), torch.tensor([1]))
        >>> examples = sasrec(timelines, anchors, max_len=3, positive=lambda action: action["item"] > 0)
        >>> examples.pair_slot, examples.pair_label, examples.pair_weight
        (tensor([0, 1, 2]), tensor([0, 1, 2]), tensor([1.5000, 0.7500, 0.7500]))

    Source: PinnerFormer, sections 3.4.1 and A.4.4.
    """
    actions, valid = _inputs(timelines, anchors, max_len)
    row, slot, label = _next_labels(timelines, anchors, actions, valid, positive, until, generator)
    pairs = torch.bincount(row, minlength=actions.shape[0]).double()[row]
    newest = torch.bincount(row[slot == 0], minlength=actions.shape[0])[row]
    weight = torch.where(slot == 0, pairs / 2, pairs / (2 * (pairs - 1).clamp(min=1)))
    weight = torch.where((newest == 1) & (pairs > 1), weight, 1.0)
    return _examples(timelines, anchors, actions, valid, row, slot, label, weight)


def all_action(
    timelines: Timelines,
    anchors: Anchors,
    *,
    max_len: int,
    positive: Positive,
    window_days: float = 28.0,
    max_labels: int = 32,
    until: int | None = None,
    generator: torch.Generator | None = None,
) -> Examples:
    """Predict with slot 0 the positives in (t, t + window], at most ``max_labels`` of them without replacement.

    Args:
        timelines: whole timelines or a subset.
        anchors: where the sequences start.
        max_len: M, slots of a sequence.
        positive: the predicate on gathered columns.
        window_days: K, in days.
        max_labels: at most this many pairs a row.
        until: in the timelines' unit; labels later than this do not exist.
        generator: where the random numbers come from.

    Returns:
        Pairs of slot 0, each of weight 1.

    Example:
        >>> timelines = Timelines.from_arrays(
        ...     user=torch.zeros(4, dtype=torch.int64), time=torch.arange(4) * 86400, item=torch.arange(4), unit="s"
        ... )
        >>> anchors = Anchors(torch.tensor([0]), torch.tensor([3]))
        >>> examples = all_action(
        ...     timelines, anchors, max_len=1, positive=lambda action: action["item"] > 0, window_days=2
        ... )
        >>> timelines.columns["item"][examples.pair_label]
        tensor([2, 1])

    Source: PinnerFormer, section 3.4.2.
    """
    _checks.positive_int("max_labels", max_labels)
    actions, valid = _inputs(timelines, anchors, max_len)
    row, _, first, last, labels = _window_positives(
        timelines, anchors, actions[:, :1], valid[:, :1], positive, window_days, until
    )
    range_row, rank = expand_ranges(first, last)
    row = row[range_row]
    kept = sample_within(row, torch.full_like(anchors.action, max_labels), generator)
    row, label = row[kept], labels[rank[kept]]
    return _examples(timelines, anchors, actions, valid, row, torch.zeros_like(row), label, torch.ones_like(row))


def dense_all_action(
    timelines: Timelines,
    anchors: Anchors,
    *,
    max_len: int,
    positive: Positive,
    window_days: float = 28.0,
    max_labels: int = 32,
    until: int | None = None,
    generator: torch.Generator | None = None,
) -> Examples:
    """Predict with random slots i one random positive each from (t_i, t_i + window].

    Args:
        timelines: whole timelines or a subset.
        anchors: where the sequences start.
        max_len: M, slots of a sequence.
        positive: the predicate on gathered columns.
        window_days: K, in days.
        max_labels: at most this many slots a row, without replacement.
        until: in the timelines' unit; labels later than this do not exist.
        generator: where the random numbers come from.

    Returns:
        At most one pair a slot, each of weight 1.

    Example:
        >>> timelines = Timelines.from_arrays(
        ...     user=torch.zeros(4, dtype=torch.int64), time=torch.arange(4) * 86400, item=torch.arange(4), unit="s"
        ... )
        >>> anchors = Anchors(torch.tensor([0]), torch.tensor([2]))
        >>> examples = dense_all_action(
        ...     timelines, anchors, max_len=2, positive=lambda action: action["item"] != 2, window_days=2
        ... )
        >>> examples.pair_slot, timelines.columns["item"][examples.pair_label]
        (tensor([0, 1]), tensor([3, 1]))

    Note:
        Slots are drawn among those that have a positive in their window, so that every draw gives a pair; the paper
        draws among all of them.

    Source: PinnerFormer, section 3.4.3.
    """
    _checks.positive_int("max_labels", max_labels)
    actions, valid = _inputs(timelines, anchors, max_len)
    row, slot, first, last, labels = _window_positives(
        timelines, anchors, actions, valid, positive, window_days, until, max_labels, generator
    )
    label = labels[uniform(first, last, generator)]
    return _examples(timelines, anchors, actions, valid, row, slot, label, torch.ones_like(row))


def dense_all_positives(
    timelines: Timelines,
    anchors: Anchors,
    *,
    max_len: int,
    positive: Positive,
    window_days: float = 28.0,
    until: int | None = None,
) -> Examples:
    """Predict with every slot i every positive in (t_i, t_i + window], averaged: each slot weighs the same.

    Nothing is sampled, so a row may have M times its window's positives as pairs.

    Args:
        timelines: whole timelines or a subset.
        anchors: where the sequences start.
        max_len: M, slots of a sequence.
        positive: the predicate on gathered columns.
        window_days: K, in days.
        until: in the timelines' unit; labels later than this do not exist.

    Returns:
        All pairs; a slot with c of them, in a row of n pairs in m slots, gives each the weight n/(m c).

    Example:
        >>> timelines = Timelines.from_arrays(
        ...     user=torch.zeros(4, dtype=torch.int64), time=torch.arange(4) * 86400, item=torch.arange(4), unit="s"
        ... )
        >>> anchors = Anchors(torch.tensor([0]), torch.tensor([1]))
        >>> examples = dense_all_positives(timelines, anchors, max_len=2, positive=lambda action: action["item"] > 0)
        >>> examples.pair_slot, examples.pair_label, examples.pair_weight
        (tensor([0, 1, 1]), tensor([0, 0, 1]), tensor([1.5000, 0.7500, 0.7500]))

    Source: Rethinking Personalized Ranking, section 2.1.3.
    """
    actions, valid = _inputs(timelines, anchors, max_len)
    row, slot, first, last, labels = _window_positives(timelines, anchors, actions, valid, positive, window_days, until)
    query, rank = expand_ranges(first, last)
    count = last - first
    pairs = torch.bincount(row[query], minlength=actions.shape[0]).double()[row]
    slots = torch.bincount(row, minlength=actions.shape[0])[row]
    weight = pairs / (slots * count)
    return _examples(timelines, anchors, actions, valid, row[query], slot[query], labels[rank], weight[query])


class _Gathered(Mapping[str, Tensor]):
    """Columns at given indices, each read when it is asked for."""

    def __init__(self, columns: Mapping[str, Tensor], index: Tensor) -> None:
        self._columns = columns
        self._index = index

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name][self._index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def _flags(timelines: Timelines, index: Tensor, positive: Positive) -> Tensor:
    if not callable(positive):
        raise TypeError(f"positive must be a function of gathered columns, got {_checks.describe(positive)}")
    flags = positive(_Gathered(timelines.columns, index))
    _checks.mask("what positive returns", flags, index.shape[0])
    return flags


def _inputs(timelines: Timelines, anchors: Anchors, max_len: int) -> tuple[Tensor, Tensor]:
    """Actions (B, M) and valid (B, M) of the sequences that start at the anchors."""
    _checks.positive_int("max_len", max_len)
    if not isinstance(anchors, Anchors):
        raise TypeError(f"anchors must be Anchors, got {_checks.describe(anchors)}")
    _checks.integers("anchors.user_row", anchors.user_row, None)
    _checks.integers("anchors.action", anchors.action, anchors.user_row.shape[0])
    row, users = anchors.user_row, len(timelines)
    if row.numel() and not 0 <= int(row.min()) <= int(row.max()) < users:
        raise ValueError(f"anchors.user_row must be in [0, {users}), got {int(row.min())} to {int(row.max())}")
    starts, ends = timelines.starts[row], timelines.ends[row]
    outside = ((anchors.action < starts) | (anchors.action >= ends)).nonzero()
    if outside.numel():
        at = int(outside[0])
        raise ValueError(
            f"anchors.action must be an action of anchors.user_row, in [{int(starts[at])}, {int(ends[at])}) for row "
            f"{int(row[at])}, got {int(anchors.action[at])}"
        )
    actions = anchors.action[:, None] + torch.arange(max_len, device=anchors.action.device)
    valid = actions < ends[:, None]
    return torch.where(valid, actions, 0), valid


def _event_starts(time: Tensor, now: Tensor, starts: Tensor, actions: Tensor) -> Tensor:
    """(B, M) the newest action of each slot's event, from each slot's time; at invalid slots it means nothing."""
    first = actions.clone()
    first[:, 0] = first_at_or_before(time, starts, actions[:, 0], now[:, 0])
    first[:, 1:].masked_fill_(now[:, 1:] == now[:, :-1], -1)
    return first.cummax(1).values


def _next_labels(
    timelines: Timelines,
    anchors: Anchors,
    actions: Tensor,
    valid: Tensor,
    positive: Positive,
    until: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, slot, label) of every valid slot whose random action of the first later event is positive."""
    if until is not None:
        until = _checks.integer("until", until)
    time = timelines.columns["time"]
    starts = timelines.starts[anchors.user_row]
    row, slot = valid.nonzero(as_tuple=True)
    end = _event_starts(time, time[actions], starts, actions)[
        row, slot
    ]  # the first later event ends where the slot's own starts
    later = end > starts[row]
    row, slot, end = row[later], slot[later], end[later]
    now = time[end - 1]
    if until is not None:
        row, slot, end, now = (one[now <= until] for one in (row, slot, end, now))
    label = uniform(first_at_or_before(time, starts[row], end - 1, now), end, generator)
    flags = _flags(timelines, label, positive)
    return row[flags], slot[flags], label[flags]


def _window_positives(
    timelines: Timelines,
    anchors: Anchors,
    actions: Tensor,
    valid: Tensor,
    positive: Positive,
    window_days: float,
    until: int | None,
    max_slots: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row, slot, first, last) of the slots with a positive, and labels: a slot's positives are labels[first:last].

    Of the slots with a positive in (t, t + window] at most ``max_slots`` a row are drawn, without replacement.
    """
    _checks.number("window_days", window_days, above=0)
    if until is not None:
        until = _checks.integer("until", until)
    day = _UNITS_PER_DAY[timelines.unit]
    window = math.floor(window_days * day + 1e-6)  # 0.7 x 86400 is a little less than 60480
    if not 1 <= window <= _LATEST:
        raise ValueError(
            f"window_days must be from 1 to {_LATEST} {timelines.unit}, of which a day has {day}, got {window_days!r}"
        )
    time = timelines.columns["time"]
    starts = timelines.starts[anchors.user_row]
    now = time[actions]
    horizon = now.clamp(max=_LATEST - window) + window
    if until is not None:
        horizon = horizon.clamp(max=until)
    end = _event_starts(time, now, starts, actions)
    low = first_at_or_before(time, starts, end[:, 0], horizon[:, 0])
    end = torch.where(valid, end, low[:, None])
    # Every window of a row lies between slot 0's horizon and the oldest slot: the predicate reads that stretch once.
    high = end.amax(1)
    _, stretch = expand_ranges(low, high)
    flags = _flags(timelines, stretch, positive)
    labels = stretch[flags]
    before = torch.cat([low.new_zeros(1), flags.cumsum(0)])  # positives ahead of each place in it
    shift = (high - low).cumsum(0) - high
    # A slot has a positive exactly where the nearest later one, the last ahead of its event, is inside its horizon.
    last = before[end + shift[:, None]]
    nearest = torch.cat([time.new_full((1,), _LATEST), time[labels]])[last]
    row, slot = ((last > before[low + shift][:, None]) & (nearest <= horizon)).nonzero(as_tuple=True)
    if max_slots is not None:
        some = sample_within(row, torch.full_like(starts, max_slots), generator)
        row, slot = row[some], slot[some]
    begin = first_at_or_before(time, low[row], end[row, slot], horizon[row, slot])
    return row, slot, before[begin + shift[row]], last[row, slot], labels


def _examples(
    timelines: Timelines,
    anchors: Anchors,
    actions: Tensor,
    valid: Tensor,
    row: Tensor,
    slot: Tensor,
    label: Tensor,
    weight: Tensor,
) -> Examples:
    return Examples(timelines.users[anchors.user_row], actions, valid, row, slot, label, weight.float())
