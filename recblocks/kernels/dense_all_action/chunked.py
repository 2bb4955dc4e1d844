"""The dense all-action loss a few rows at a time: its pairs are entries of the tile that the softmax needs anyway.

A tile's columns that its rows meet lie side by side, because both are sorted by user and time. Their logits are read
before they are masked. Afterwards, where their probability is 0, each takes its share of the row's slope, so that the
three products of the softmax make the pairs' gradients too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recblocks import _checks
from recblocks.kernels.sampled_softmax.chunked import once, scaled, sweep
from recblocks.kernels.sampled_softmax.pool import Pool, Wanted, empty_gradients, wanted_now

_PARTS = 16  # of a tile


class Pairs(NamedTuple):
    """Sorted row k has the columns ``first[k]`` to ``last[k] - 1`` as positives; both ascend."""

    first: Tensor
    last: Tensor
    num_positives: int  # the pool's first columns, sorted
    corrected: bool  # whether a positive's logit has the bias of its column


def row_losses(queries: Tensor, pool: Pool, inverse_temperature: Tensor, pairs: Pairs) -> Tensor:
    """Each row's sum over its pairs of softplus(L - s), (U,), differentiable once."""
    result: Tensor = _row_losses(queries, *pool[:2], inverse_temperature, *pairs, pool.own)
    return result


def sum_of_losses(queries: Tensor, pool: Pool, inverse_temperature: Tensor, pairs: Pairs, weights: Tensor) -> Tensor:
    """Sum of w l over the rows' losses, differentiable once.

    Args:
        queries: (U, D) sorted as ``pairs`` says.
        pool: the positives, sorted likewise, and then the other columns; no dense mask.
        inverse_temperature: () 1/τ.
        pairs: which columns are whose.
        weights: (U,) of each pair of the row.
    """
    wanted = [*wanted_now(queries, pool, inverse_temperature)]
    total: Tensor = _weighted_sum(queries, *pool[:2], inverse_temperature, weights, *pairs, pool.own, wanted)[0]
    return total


def _sweep(
    queries: Tensor, pool: Pool, inverse_temperature: Tensor, pairs: Pairs, weights: Tensor, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rows' losses (U,), and the gradients of the sum of w l by queries, columns, bias and inverse temperature."""
    losses = queries.new_zeros(queries.shape[0])
    pulled = queries.new_zeros(pairs.num_positives)
    place = torch.arange(pairs.num_positives, device=queries.device)
    bias = pool.bias if pairs.corrected else None
    parts: list[tuple[slice, slice, Tensor]] = []  # of a tile: some rows, the columns they lie in, and their logits

    def before(rows: slice, tile: Tensor) -> None:
        parts.clear()
        for some in _some_at_a_time(rows):
            first, last = pairs.first[some], pairs.last[some]
            slab = slice(int(first[0]), int(last[-1])) if _checks.readable(first) else slice(0, pairs.num_positives)
            here = tile[some.start - rows.start : some.stop - rows.start, slab]
            parts.append((some, slab, here.clone() if bias is None else here + bias[slab]))

    def upstream(log_sum_exp: Tensor, rows: slice, exponentials: Tensor, totals: Tensor) -> Tensor:
        slopes = torch.zeros_like(losses[rows])
        for some, slab, logits in parts:
            outside = (place[slab] < pairs.first[some, None]) | (place[slab] >= pairs.last[some, None])
            behind = logits.sub_(log_sum_exp[some, None]).neg_().masked_fill_(outside, -torch.inf)
            losses[some] = -F.logsigmoid(-behind).sum(1)
            if not any(wanted):
                continue
            pulls = behind.sigmoid_()
            slope = pulls.sum(1)
            if wanted.bias and not pairs.corrected:
                pulled[slab].addmv_(pulls.t(), weights[some])
            here = slice(some.start - rows.start, some.stop - rows.start)
            slopes[here] = slope
            # A slope may be so small that nothing but its own pulls can be divided by it.
            shares = pulls.div_(torch.where(slope == 0, 1, slope)[:, None])
            exponentials[here, slab] -= shares.mul_(totals[here, None])
        return weights[rows] * slopes

    swept = sweep(queries, pool, inverse_temperature, upstream, wanted, before)
    if wanted.bias:
        swept[3][: pairs.num_positives] += pulled
    return losses, swept[1], swept[2], swept[3], swept[4]


def _some_at_a_time(rows: slice) -> list[slice]:
    """Few rows of a tile lie in few columns, and what is made of them on the way is small beside the tile."""
    step = math.ceil((rows.stop - rows.start) / _PARTS)
    return [slice(begin, min(begin + step, rows.stop)) for begin in range(rows.start, rows.stop, step)]


@torch.library.custom_op("recblocks::dense_all_action_weighted_sum", mutates_args=())
def _weighted_sum(
    queries: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    inverse_temperature: Tensor,
    weights: Tensor,
    first: Tensor,
    last: Tensor,
    num_positives: int,
    corrected: bool,
    own: list[Tensor],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of w l, the rows' losses l (U,), and the gradients of the sum: see `_sweep`; empty where not wanted."""
    pool, pairs = Pool(columns, bias, None, own, None), Pairs(first, last, num_positives, corrected)
    swept = _sweep(queries, pool, inverse_temperature, pairs, weights, Wanted(*wanted))
    return (weights * swept[0]).sum(), *swept


@_weighted_sum.register_fake
def _(queries: Tensor, columns: Tensor, *others: Any) -> tuple[Tensor, ...]:
    gradients = empty_gradients(queries, columns, Wanted(*others[-1]))
    return queries.new_empty(()), queries.new_empty(queries.shape[0]), *gradients


def _setup_weighted_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_own = len(inputs[-2])
    ctx.save_for_backward(*output[1:], *inputs[:5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros in the size of the gradients for outputs nobody differentiates


def _backward_weighted_sum(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | list[None] | None, ...]:
    unneeded = *[None] * 4, [None] * ctx.num_own, None
    if grad is None:
        return *[None] * 5, *unneeded
    losses, *gradients, queries, columns, bias, inverse, weights = ctx.saved_tensors
    inputs = queries, columns, bias, inverse, weights
    made = [*gradients, losses.masked_fill(weights == 0, 0)]
    needed = ctx.needs_input_grad[:5]
    return *[scaled(one, grad, *inputs) if need else None for one, need in zip(made, needed, strict=True)], *unneeded


_weighted_sum.register_autograd(_backward_weighted_sum, setup_context=_setup_weighted_sum)


@torch.library.custom_op("recblocks::dense_all_action_row_losses", mutates_args=())
def _row_losses(
    queries: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    inverse_temperature: Tensor,
    first: Tensor,
    last: Tensor,
    num_positives: int,
    corrected: bool,
    own: list[Tensor],
) -> Tensor:
    pool, pairs = Pool(columns, bias, None, own, None), Pairs(first, last, num_positives, corrected)
    weights = queries.new_zeros(queries.shape[0])
    return _sweep(queries, pool, inverse_temperature, pairs, weights, Wanted(False, False, False))[0]


@_row_losses.register_fake
def _(queries: Tensor, *_: Any) -> Tensor:
    return queries.new_empty(queries.shape[0])


def _setup_row_losses(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *given, ctx.num_positives, ctx.corrected, own = inputs
    ctx.save_for_backward(*given, *own)


def _backward_row_losses(ctx: Any, upstream: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    queries, columns, bias, inverse, first, last, *own = ctx.saved_tensors
    needed = ctx.needs_input_grad
    wanted = [needed[0] or needed[3], needed[1], needed[2]]
    pairs = first, last, ctx.num_positives, ctx.corrected
    made = _weighted_sum(queries, columns, bias, inverse, upstream, *pairs, own, wanted)[2:]
    inputs = upstream, queries, columns, bias, inverse
    gradients = [once(one, *inputs) if need else None for one, need in zip(made, needed[:4], strict=True)]
    return *gradients, *[None] * 4, [None] * len(own)


_row_losses.register_autograd(_backward_row_losses, setup_context=_setup_row_losses)
