"""Ranges of rows, one a user: listed, searched and checked all at once."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_ranges(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """List the integers of many ranges, one range after the other.

    Args:
        starts: (R,) int64 first integer of each range.
        ends: (R,) int64 one past the last; where it is not above the start the range is empty.

    Returns:
        (T,) which range each integer belongs to, and (T,) the integers.

    Example:
        >>> expand_ranges(torch.tensor([5, 0, 2]), torch.tensor([7, 0, 3]))
        (tensor([0, 0, 2]), tensor([5, 6, 2]))
    """
    lengths = (ends - starts).clamp(min=0)
    row = torch.repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    return row, torch.arange(row.shape[0], device=row.device) + (starts - before)[row]


def first_at_or_before(time: Tensor, low: Tensor, high: Tensor, limit: Tensor) -> Tensor:
    """Find the first i in [low, high) with time[i] <= limit, or high; a binary search in every range at once.

    Args:
        time: (N,) int64, falling or level inside each range.
        low: (Q,) int64 first index of each range.
        high: (Q,) int64 one past the last index of each range, not below ``low``.
        limit: (Q,) int64, in the unit of ``time``.

    Returns:
        (Q,) int64.

    Example:
        >>> time = torch.tensor([9, 7, 7, 4])
        >>> first_at_or_before(time, torch.tensor([0, 0]), torch.tensor([4, 4]), torch.tensor([8, 3]))
        tensor([1, 4])
    """
    longest = int((high - low).amax()) if low.numel() else 0
    last = max(time.shape[0] - 1, 0)
    for _ in range(longest.bit_length()):
        middle = (low + high) >> 1
        later = time[middle.clamp(max=last)] > limit
        low = torch.where(later, middle + 1, low).minimum(high)
        high = torch.where(later, high, middle)
    return low


def check_bounds(users: Tensor, starts: Tensor, ends: Tensor, total: int) -> None:
    """Require each user's range inside the columns, after those of the users before."""
    check_ascending("users", users)
    for name, wrong in (
        ("starts", (starts < 0) | (starts > ends)),
        ("ends", ends > total),
        ("starts", torch.cat([starts.new_zeros(1, dtype=torch.bool), starts[1:] < ends[:-1]])[: len(starts)]),
    ):
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name} must give each user a range inside the {total} actions, after the ranges of the users before, "
                f"got [{int(starts[row])}, {int(ends[row])}) for row {row}"
            )


def check_ascending(name: str, values: Tensor) -> None:
    """Require values that rise from each to the next."""
    level = torch.nonzero(values[1:] <= values[:-1])
    if level.numel():
        place = int(level[0])
        raise ValueError(f"{name} must be strictly ascending, got {int(values[place])} before {int(values[place + 1])}")
