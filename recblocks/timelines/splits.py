"""Training and evaluation apart: by time, or by user."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recblocks import _checks
from recblocks.timelines._hashing import mix64, mix_integers
from recblocks.timelines.ranges import first_at_or_before
from recblocks.timelines.timeline import Timelines


def split_by_time(timelines: Timelines, cut: int) -> tuple[Timelines, Timelines]:
    """Split every user's actions into those up to the cut and those after it.

    Both parts keep every user, in the same rows, with or without actions; the columns are shared. The cut itself
    belongs to the past, as ``until=cut`` of the objectives has it, so the label window (cut, cut + K] is all future.

    Args:
        timelines: whole timelines or a subset.
        cut: in the timelines' unit.

    Returns:
        The past (time <= cut) and the future (time > cut).

    Example:
        >>> timelines = Timelines.from_arrays(
        ...     user=torch.tensor([1, 1, 2]), time=torch.tensor([5, 6, 7]), item=torch.tensor([0, 1, 2]), unit="s"
        ... )
        >>> past, future = split_by_time(timelines, 5)
        >>> past.ends - past.starts, future.ends - future.starts
        (tensor([1, 0]), tensor([1, 1]))

    Source: PinnerFormer, section 4.1 (a user's future engagement after the embedding was made).
    """
    cut = _checks.integer("cut", cut)
    starts, ends = timelines.starts, timelines.ends
    middle = first_at_or_before(timelines.columns["time"], starts, ends, torch.full_like(starts, cut))
    return timelines.view(timelines.users, middle, ends), timelines.view(timelines.users, starts, middle)


def split_by_user(timelines: Timelines, *, held_out: float, salt: int = 0) -> tuple[Timelines, Timelines]:
    """Split the users by a hash of their raw id; who else is there, and in which order, changes nothing.

    Args:
        timelines: whole timelines or a subset.
        held_out: in [0, 1], the expected share of users held out. A larger share holds out the same users and more.
        salt: another salt is another split.

    Returns:
        The users that stay and those held out; the columns are shared.

    Example:
        >>> timelines = Timelines.from_arrays(
        ...     user=torch.arange(1000), time=torch.arange(1000), item=torch.arange(1000), unit="s"
        ... )
        >>> stay, held = split_by_user(timelines, held_out=0.2)
        >>> len(stay), len(held)
        (793, 207)
    """
    _checks.number("held_out", held_out, at_least=0, at_most=1)
    held = user_shares(timelines.users, salt=salt) < held_out
    return timelines.select(~held), timelines.select(held)


def user_shares(users: Tensor, *, salt: int = 0) -> Tensor:
    """Hash raw user ids to float64 numbers spread evenly over [0, 1).

    Args:
        users: (U,) int64 raw ids.
        salt: another salt is another hash.

    Returns:
        (U,) float64.

    Example:
        >>> user_shares(torch.tensor([-5, 7])).shape
        torch.Size([2])
    """
    _checks.integers("users", users, None)
    salt = _checks.integer("salt", salt)
    words = users.numpy().view(np.uint64) ^ np.uint64(mix_integers(salt))
    return torch.from_numpy((mix64(words) >> np.uint64(11)) * 2.0**-53)
