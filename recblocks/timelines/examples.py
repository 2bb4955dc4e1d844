"""Input sequences and their training pairs, and the sampling that every objective shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.timelines.ranges import expand_ranges, first_at_or_before
from recblocks.timelines.timeline import Timelines


class Anchors(NamedTuple):
    """Where input sequences start: the newest action of each, and whose it is."""

    user_row: Tensor
    """(B,) int64 row of the timelines."""
    action: Tensor
    """(B,) int64 index into the columns."""


class Examples(NamedTuple):
    """A batch of input sequences and the pairs (slot, label) that they train.

    Over the pairs of one row ``pair_weight`` averages 1, so it may be multiplied with
    ``equal_user_weights(users[pair_row])`` and every user still weighs the same.
    """

    users: Tensor
    """(B,) int64 raw user ids."""
    actions: Tensor
    """(B, M) int64 index into the columns, newest first, 0 where invalid."""
    valid: Tensor
    """(B, M) bool, True = a real action."""
    pair_row: Tensor
    """(P,) int64 ascending, the row of each pair."""
    pair_slot: Tensor
    """(P,) int64, the slot whose embedding predicts."""
    pair_label: Tensor
    """(P,) int64 index into the columns of the action to predict."""
    pair_weight: Tensor
    """(P,) float32."""


def sample_anchors(
    timelines: Timelines,
    users: Tensor,
    *,
    fraction: float,
    max_sequences: int,
    until: int | None = None,
    generator: torch.Generator | None = None,
) -> Anchors:
    """Sample input sequences of users: min(max_sequences, fraction of their n possible ones), without replacement.

    A possible sequence starts at the newest action of an event (actions of one time are one event) that has a later
    event to predict. fraction * n is rounded up or down at random, so that its mean is exact.

    Args:
        timelines: whole timelines or a subset.
        users: (B,) int64 rows of the timelines, each at most once.
        fraction: in (0, 1], the fraction of a user's possible sequences.
        max_sequences: at most this many of one user.
        until: in the timelines' unit; events later than this do not exist.
        generator: where the random numbers come from.

    Returns:
        Anchors, ordered by user as given, then newest first.

    Example:
        >>> timelines = Timelines.from_arrays(
        ...     user=torch.zeros(4, dtype=torch.int64), time=torch.tensor([1, 2, 2, 3]), item=torch.arange(4), unit="s"
        ... )
        >>> sample_anchors(timelines, torch.tensor([0]), fraction=1.0, max_sequences=10).action
        tensor([1, 3])

    Source: PinnerFormer, section 3.5.
    """
    _checks.integers("users", users, None)
    _checks.number("fraction", fraction, above=0, at_most=1)
    _checks.positive_int("max_sequences", max_sequences)
    if until is not None:
        until = _checks.integer("until", until)
    if users.numel() and not 0 <= int(users.min()) <= int(users.max()) < len(timelines):
        raise ValueError(f"users must be rows in [0, {len(timelines)}), got {int(users.min())} to {int(users.max())}")
    time = timelines.columns["time"]
    ends = timelines.ends[users]
    newest = _not_after(time, timelines.starts[users], ends, until)
    row, index = expand_ranges(newest, ends)
    if index.numel() == 0:
        return Anchors(index, index)
    at = time[index]
    starts_event = torch.ones_like(at, dtype=torch.bool)
    starts_event[1:] = at[1:] != at[:-1]
    # A user's first event, the newest, has nothing later to predict; so it does not matter that its time may equal that
    # of the user before. An empty range has no rows, so its clamped index is never read.
    possible = starts_event & (at < time[newest.clamp(max=time.shape[0] - 1)][row])
    row, index = row[possible], index[possible]
    share = fraction * torch.bincount(row, minlength=users.shape[0]).double()
    wanted = (share + _random(share, generator)).long()
    kept = sample_within(row, wanted.clamp(max=max_sequences), generator)
    return Anchors(users[row[kept]], index[kept])


def drop_rows_without_pairs(examples: Examples) -> Examples:
    """Leave out the rows that train nothing, so that no encoder runs for them."""
    has_pairs = torch.zeros_like(examples.users, dtype=torch.bool)
    has_pairs[examples.pair_row] = True
    new_row = has_pairs.cumsum(0) - 1
    return examples._replace(
        users=examples.users[has_pairs],
        actions=examples.actions[has_pairs],
        valid=examples.valid[has_pairs],
        pair_row=new_row[examples.pair_row],
    )


def uniform(low: Tensor, high: Tensor, generator: torch.Generator | None) -> Tensor:
    """One integer from each non-empty [low, high)."""
    return (low + (_random(low, generator) * (high - low)).long()).minimum(high - 1)


def sample_within(group: Tensor, wanted: Tensor, generator: torch.Generator | None) -> Tensor:
    """Positions of up to ``wanted[g]`` members of each group g, without replacement; ``group`` (N,) ascends."""
    sizes = torch.bincount(group, minlength=wanted.shape[0])
    if bool((sizes <= wanted).all()):
        return torch.arange(group.shape[0], device=group.device)
    draw = torch.randint(1 << 32, group.shape, generator=generator, device=group.device)
    order = ((group << 32) | draw).argsort()  # sorting shuffles inside each group
    rank = torch.arange(group.shape[0], device=group.device) - (sizes.cumsum(0) - sizes)[group]
    return order[rank < wanted[group]].sort().values


def _random(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, dtype=torch.float64, generator=generator, device=like.device)


def _not_after(time: Tensor, low: Tensor, high: Tensor, until: int | None) -> Tensor:
    """The first action of each range that is not later than ``until``."""
    return low if until is None else first_at_or_before(time, low, high, torch.full_like(low, until))
