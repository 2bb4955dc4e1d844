"""Weights of loss rows that mean the same however the batch is spread over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from recblocks import _checks
from recblocks._distributed import all_gather_ragged, group_size


def equal_user_weights(row_users: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Give every user of the whole batch the same weight, however many rows the user has.

    ``w_r = 1 / (number of rows of row r's user, on all ranks)``

    Args:
        row_users: (R,) int64 user of each row (pair) of this rank; any value. Ranks may have different R, also 0.
        group: the ranks that share the batch; None is the default group. Every one of them must call.

    Returns:
        (R,) float32. The weights of one user add up to 1 over all ranks. Without a process group this rank is all.

    Raises:
        TypeError: ``row_users`` is not an int64 tensor.
        ValueError: ``row_users`` is not one-dimensional.

    Example:
        >>> import torch
        >>> equal_user_weights(torch.tensor([7, 7, -3])).tolist()
        [0.5, 0.5, 1.0]

    Source: PinnerFormer, section 3.3.2 and A.3.

    Note:
        The paper counts on each GPU, so a user on two GPUs weighs twice as much. Counting globally makes W ranks equal
        to one process.
    """
    _checks.integers("row_users", row_users, None)
    everyone = all_gather_ragged(row_users, group)[0].sort().values
    rows = torch.searchsorted(everyone, row_users, right=True) - torch.searchsorted(everyone, row_users)
    return rows.to(torch.float32).reciprocal()


def rank_weights(weights: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Scale weights so that the mean over ranks of ``Σ w l`` is the weighted mean over the whole batch.

    ``w_r * W / Σ_{ranks, rows} w``. DistributedDataParallel averages gradients over the W ranks, so each rank's loss
    with ``reduction="sum"`` and these weights trains on the weighted mean of the whole batch.

    Args:
        weights: (R,) floating point, at least 0, of this rank's rows. Ranks may have different R, also 0.
        group: the ranks that share the batch; None is the default group. Every one of them must call.

    Returns:
        (R,) like ``weights``; all 0 where the weights of the whole batch add up to 0. The sum over the batch is taken
        as a constant: no gradient flows through it.

    Raises:
        TypeError: ``weights`` is not a floating-point tensor.
        ValueError: ``weights`` is not one-dimensional, or, on a CPU, holds a number that is not finite and at least 0.

    Example:
        >>> import torch
        >>> rank_weights(torch.tensor([1.0, 1.0, 2.0])).tolist()  # one rank: the weights of a mean
        [0.25, 0.25, 0.5]

    Source: PinnerFormer, section 3.3.2 (the weighted average).
    """
    _checks.floating("weights", weights, None)
    _checks.not_negative("weights", weights)
    total = weights.detach().sum(dtype=torch.promote_types(weights.dtype, torch.float32))
    world = group_size(group)
    if world > 1:
        dist.all_reduce(total, group=group)
    scale = torch.where(total > 0, world / total, 0)
    return (weights.to(scale.dtype) * scale).to(weights.dtype)
