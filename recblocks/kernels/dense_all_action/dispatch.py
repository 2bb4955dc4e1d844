"""Triton's kernels of the dense all-action loss's pairs as two operators of torch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from recblocks.kernels.sampled_softmax.pool import refuse
from recblocks.kernels.windows import Windows


def row_losses(
    queries: Tensor,
    positives: Tensor,
    shift: Tensor | None,
    inverse_temperature: Tensor,
    log_sum_exp: Tensor,
    found: Windows,
) -> Tensor:
    """Each row's sum over its positives of softplus(L - s), (U,), differentiable once.

    Args:
        queries: (U, D), and the positives of the same dtype, that of the products' factors; each sorted as ``found``
            says.
        positives: (P, D).
        shift: (P,) of a positive's logit, float32 (float64 where the embeddings are), as all that follows.
        inverse_temperature: () 1/τ.
        log_sum_exp: (U,) L.
        found: whose positive is what; both sides have fewer than 2**31 lines.
    """
    with_pulls = torch.is_grad_enabled() and (queries.requires_grad or inverse_temperature.requires_grad)
    ranges = [one.int() for one in found[2:]]
    given = queries, positives, shift, inverse_temperature, log_sum_exp
    losses: Tensor = _pairs_of_rows(*given, ranges, with_pulls)[0]
    return losses


def _kernels() -> ModuleType:
    return importlib.import_module("recblocks.kernels.dense_all_action.triton")


@torch.library.custom_op("recblocks::dense_all_action_pairs", mutates_args=())
def _pairs_of_rows(
    queries: Tensor,
    positives: Tensor,
    shift: Tensor | None,
    inverse_temperature: Tensor,
    log_sum_exp: Tensor,
    ranges: list[Tensor],
    with_pulls: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss and its slope (U,), and the sum of the slopes times the positives (U, D), or (0,)."""
    num_rows = queries.shape[0]
    if num_rows == 0 or positives.shape[0] == 0:
        losses, slopes = inverse_temperature.new_zeros(num_rows), inverse_temperature.new_zeros(num_rows)
        return losses, slopes, inverse_temperature.new_zeros(queries.shape if with_pulls else 0)
    sums: tuple[Tensor, Tensor, Tensor] = _kernels().sums_over_positives(
        *_contiguous(queries, positives, shift, inverse_temperature, log_sum_exp), *ranges[:2], with_pulls
    )
    return sums


@_pairs_of_rows.register_fake
def _(queries: Tensor, _positives: Tensor, _shift: Tensor, inverse: Tensor, *others: Any) -> tuple[Tensor, ...]:
    each = queries.shape[0]
    return inverse.new_empty(each), inverse.new_empty(each), inverse.new_empty(queries.shape if others[-1] else 0)


@torch.library.custom_op("recblocks::dense_all_action_pairs_backward", mutates_args=())
def _gradients(
    upstream: Tensor,
    slopes: Tensor,
    pulls: Tensor,
    queries: Tensor,
    positives: Tensor,
    shift: Tensor | None,
    inverse_temperature: Tensor,
    log_sum_exp: Tensor,
    ranges: list[Tensor],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum of upstream * loss; of queries and temperature, and of positives and shift, if wanted."""
    of_queries, of_positives, of_shift, of_inverse = _like(queries, positives, inverse_temperature, wanted)
    if wanted[0]:
        by_logit = -upstream[:, None] * pulls
        torch.mul(by_logit, inverse_temperature, out=of_queries)
        torch.sum(by_logit * queries, (0, 1), out=of_inverse)
    if wanted[1]:
        if queries.shape[0] == 0 or positives.shape[0] == 0:
            of_positives.zero_(), of_shift.zero_()
        else:
            given = _contiguous(queries, positives, shift, inverse_temperature, log_sum_exp, upstream)
            grad, mass = _kernels().sums_over_rows(*given, *ranges[2:])
            of_positives.copy_(grad.neg_())
            of_shift.copy_(mass.neg_())
    return of_queries, of_positives, of_shift, of_inverse, upstream * slopes


@_gradients.register_fake
def _(upstream: Tensor, _slopes: Tensor, _pulls: Tensor, queries: Tensor, positives: Tensor, *others: Any) -> Any:
    _, inverse_temperature, *_, wanted = others
    return *_like(queries, positives, inverse_temperature, wanted), torch.empty_like(upstream)


def _like(queries: Tensor, positives: Tensor, inverse: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Memory for the gradients; empty where not wanted."""
    return (
        torch.empty_like(queries) if wanted[0] else queries.new_empty(0),
        torch.empty_like(positives) if wanted[1] else positives.new_empty(0),
        inverse.new_empty(positives.shape[0] if wanted[1] else 0),
        inverse.new_empty(() if wanted[0] else 0),
    )


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if one is None else one.contiguous() for one in tensors]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, ranges, _ = inputs
    ctx.save_for_backward(*output[1:], *given, *ranges)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros in the size of the pulls, which nobody differentiates


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | list[None] | None, ...]:
    saved = ctx.saved_tensors  # under activation checkpointing they can be read once
    given, ranges = saved[:7], list(saved[7:])
    unneeded = [None] * len(ranges), None
    if upstream is None:
        return *[None] * 5, *unneeded
    needed = ctx.needs_input_grad[:5]
    made = _gradients(upstream, *given, ranges, [needed[0] or needed[3], needed[1] or needed[2]])
    return *[one if need else None for one, need in zip(made, needed, strict=True)], *unneeded


_pairs_of_rows.register_autograd(_backward, setup_context=_setup)
_gradients.register_autograd(refuse)
