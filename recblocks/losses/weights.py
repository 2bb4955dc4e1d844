"""Weights of loss rows that mean the same however the batch is spread over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from recblocks import _checks
from recblocks._distributed import all_gather_ragged, group_size


def equal_user_weights(
    row_users: Tensor, *, counts: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Give every user of the whole batch the same weight, however many rows the user has.

    ``w_r = 1 / (number of pairs of row r's user, on all ranks)``, a row being one pair or, with ``counts``, several.

    Args:
        row_users: (R,) int64 user of each row of this rank; any value. Ranks may have different R, also 0.
        counts: (R,) int64, pairs of each row, such as :func:`positives_in_window` counts them; None is 1 each. All
            ranks give it, or none does.
        group: the ranks that share the batch; None is the default group. Every one of them must call.

    Returns:
        (R,) float32, of each of the row's pairs. Over a user's pairs on all ranks they add up to 1; a user without a
        pair has 0. Without a process group this rank is all.

    Raises:
        TypeError: ``row_users`` or ``counts`` is not an int64 tensor.
        ValueError: ``row_users`` is not one-dimensional, or ``counts`` of another shape or, on a CPU, negative.

    Example:
        >>> import torch
        >>> equal_user_weights(torch.tensor([7, 7, -3])).tolist()
        [0.5, 0.5, 1.0]
        >>> equal_user_weights(torch.tensor([7, 7, -3]), counts=torch.tensor([3, 1, 2])).tolist()
        [0.25, 0.25, 0.5]

    Source: PinnerFormer, section 3.3.2 and A.3.

    Note:
        The paper counts on each GPU, so a user on two GPUs weighs twice as much. Counting globally makes W ranks equal
        to one process.
    """
    _checks.integers("row_users", row_users, None)
    if counts is None:
        everyone = all_gather_ragged(row_users, group)[0].sort().values
        rows = torch.searchsorted(everyone, row_users, right=True) - torch.searchsorted(everyone, row_users)
        return rows.to(torch.float32).reciprocal()
    _check_counts(counts, row_users.shape[0])
    everyone, pairs = all_gather_ragged(torch.stack([row_users, counts], 1), group)[0].unbind(1)
    everyone, order = everyone.sort()
    before = torch.nn.functional.pad(pairs[order].cumsum(0), (1, 0))
    last, first = torch.searchsorted(everyone, row_users, right=True), torch.searchsorted(everyone, row_users)
    pairs = before[last] - before[first]
    return torch.where(pairs > 0, pairs.to(torch.float32).reciprocal(), 0)


def rank_weights(weights: Tensor, *, counts: Tensor | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """Scale weights so that the mean over ranks of ``Σ w l`` is the weighted mean over the whole batch.

    ``w_r * W / Σ_{ranks, rows} n w``, n = 1 or the row's ``counts``. DistributedDataParallel averages gradients over
    the W ranks, so each rank's loss with ``reduction="sum"`` and these weights trains on the weighted mean of the whole
    batch.

    Args:
        weights: (R,) floating point, at least 0, of this rank's rows. Ranks may have different R, also 0.
        counts: (R,) int64, pairs of each row that its weight is of each of; None is 1 each.
        group: the ranks that share the batch; None is the default group. Every one of them must call.

    Returns:
        (R,) like ``weights``; all 0 where the weights of the whole batch add up to 0. The sum over the batch is taken
        as a constant: no gradient flows through it.

    Raises:
        TypeError: ``weights`` is not a floating-point tensor, or ``counts`` not int64.
        ValueError: ``weights`` is not one-dimensional, or ``counts`` of another shape; on a CPU also a weight that is
            not finite and at least 0, or a negative count.

    Example:
        >>> import torch
        >>> rank_weights(torch.tensor([1.0, 1.0, 2.0])).tolist()  # one rank: the weights of a mean
        [0.25, 0.25, 0.5]

    Source: PinnerFormer, section 3.3.2 (the weighted average).
    """
    _checks.floating("weights", weights, None)
    _checks.not_negative("weights", weights)
    dtype = torch.promote_types(weights.dtype, torch.float32)
    total = weights.detach().to(dtype)
    if counts is not None:
        _check_counts(counts, weights.shape[0])
        total = total * counts
    total = total.sum()
    world = group_size(group)
    if world > 1:
        dist.all_reduce(total, group=group)
    scale = torch.where(total > 0, world / total, 0)
    return (weights.to(scale.dtype) * scale).to(weights.dtype)


def _check_counts(counts: Tensor, num_rows: int) -> None:
    _checks.integers("counts", counts, num_rows)
    _checks.not_negative("counts", counts)
