"""One pool across ranks: rows gathered from all of them, with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from recblocks import _checks
from recblocks._distributed import all_gather_ragged, group_size


def gather_rows(x: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate every rank's rows in rank order; the gradient of a row is summed over the ranks that used it.

    y = [x of rank 0; x of rank 1; ...], and dx = the own rows of (dy of rank 0 + dy of rank 1 + ...). With each rank's
    loss weighted by `rank_weights`, DistributedDataParallel's average is then the gradient of the whole batch.

    Args:
        x: (R, ...) this rank's rows, of a dtype that the group's backend sends (gloo takes no int16); R may differ
            between ranks and be 0. It requires grad on every rank or on none, and every rank runs backward or none
            does: a rank without rows sends its empty batch through the same model and loss.
        group: the ranks that take part; None is the default group.

    Returns:
        (sum of R, ...) the same on every rank; ``x`` itself without a process group or on one rank.

    Raises:
        TypeError, ValueError: ``x`` is no tensor of at least one dimension; on every rank, where ranks differ in dtype
            or in a dimension after the first.

    Example:
        >>> gather_rows(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.]])

    Source:
        PinnerFormer 3.3.1: "we gather negative examples from across all GPUs used in training".

    Note:
        The counts of rows travel to the host, so under ``torch.compile`` with several ranks this is a graph break.
    """
    _checks.tensor("x", x)
    if x.ndim == 0:
        raise ValueError(f"x must have shape (R, ...), got {_checks.describe(x)}")
    if group_size(group) == 1:
        return x
    if x.requires_grad and torch.is_grad_enabled():
        gathered: Tensor = _GatherRows.apply(x, group)  # type: ignore[no-untyped-call]
        return gathered
    return all_gather_ragged(x, group)[0]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        gathered, sizes = all_gather_ragged(x, group)
        rank = dist.get_rank(group)
        ctx.group, ctx.begin, ctx.size = group, sum(sizes[:rank]), sizes[rank]
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.narrow(0, ctx.begin, ctx.size), None
