"""Gather rows whose gradient is applied at once, to the rows that were seen: SGD and row-wise Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-8


def apply_gradient(weight: Tensor, moment: Tensor, learning_rate: Tensor, rows: Tensor, grad: Tensor) -> None:
    """Change the rows that were seen, in place.

    SGD: ``w_r -= η g_r``, where ``g_r`` is the sum of the gradients of all places at which row r was seen. Row-wise
    Adagrad: ``m_r += mean(g_r²)``, then ``w_r -= η g_r / (√m_r + ε)``, with ``ε = 1e-8``.

    Args:
        weight: (R, D).
        moment: (R,) float32, row-wise Adagrad's sums; (0,) for SGD.
        learning_rate: () float32, ``η``.
        rows: (N,) int64, a row may repeat.
        grad: (N, D).

    Source:
        Duchi et al. 2011; one number a row as in DLRM's training (fbgemm's EXACT_ROWWISE_ADAGRAD).
    """
    rows, order = rows.sort()
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = rows[1:] != rows[:-1]
    group = begins.cumsum(0) - 1
    dtype = torch.promote_types(weight.dtype, torch.float32)
    summed = torch.zeros(grad.shape, dtype=dtype, device=grad.device)
    summed.index_add_(0, group, grad[order].to(dtype))
    # As many as there are places, for no count is read back: those behind add zeros to the last row.
    row = rows[-1:].expand_as(rows).scatter(0, group, rows)
    if moment.shape[0]:
        moment.index_add_(0, row, summed.square().mean(1).to(moment.dtype))
        summed /= (moment[row].sqrt() + EPS)[:, None]
    weight.index_add_(0, row, (-learning_rate * summed).to(weight.dtype))


@torch.library.custom_op("recblocks::apply_gradient", mutates_args=("weight", "moment"))
def _apply_gradient(weight: Tensor, moment: Tensor, learning_rate: Tensor, rows: Tensor, grad: Tensor) -> None:
    apply_gradient(weight, moment, learning_rate, rows, grad)


@torch.library.custom_op("recblocks::gather_and_train", mutates_args=())
def gather_and_train(
    weight: Tensor,
    moment: Tensor,  # noqa: ARG001
    learning_rate: Tensor,  # noqa: ARG001
    anchor: Tensor,  # noqa: ARG001
    rows: Tensor,
) -> Tensor:
    """(..., D) the rows; their gradient goes where `apply_gradient` says.

    ``anchor`` (0,) requires a gradient, so that there is a backward, and gets one of no numbers.
    """
    return functional.embedding(rows, weight)


@gather_and_train.register_fake
def _(weight: Tensor, *others: Tensor) -> Tensor:
    return weight.new_empty(*others[-1].shape, weight.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    *ctx.trained, anchor, rows = inputs
    ctx.save_for_backward(anchor, rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    anchor, rows = ctx.saved_tensors
    _apply_gradient(*ctx.trained, rows.flatten(), grad.flatten(0, -2))
    return None, None, None, torch.zeros_like(anchor), None


gather_and_train.register_autograd(_backward, setup_context=_save)
