"""Sampled softmax some rows at a time: one tile of logits is all there is.

A tile of rows meets every column, so its log-sum-exp is final at once, and the tile, turned into exponentials in place,
gives its share of every gradient before the next one overwrites it: three matrix products in all. That needs the
loss's derivative by each row's log-sum-exp during the sweep. The weighted sum of the pairs' losses knows it, so
`sum_of_losses` makes the gradients in its forward. Losses returned one by one do not, so the backward of `log_sum_exp`
sweeps again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from recblocks import _checks
from recblocks.kernels.dispatch import watched
from recblocks.kernels.own_positives import OwnPositives
from recblocks.kernels.sampled_softmax import cpp
from recblocks.kernels.sampled_softmax.pool import Pool, Wanted, clear_unused, empty_gradients, refuse, wanted_now

# One tile of logits: so many rows that the matrix products are about as fast as square ones; 256 of 65,536 columns.
_TILE_BYTES = 64 * 2**20
_MIN_ROWS = 16
_PAIRS = 4096  # whose embeddings are gathered at once

# Of every row's log-sum-exp so far (U,), the rows of one tile, their exponentials, which may be changed, and the sums
# of these (R,): the loss's derivative by those rows' log-sum-exp.
Upstream = Callable[[Tensor, slice, Tensor, Tensor], Tensor]
# Sees the rows of one tile and their logits before any is masked or gets its column's bias.
Before = Callable[[slice, Tensor], None]


def sweep(
    queries: Tensor,
    pool: Pool,
    inverse_temperature: Tensor,
    upstream: Upstream | None,
    wanted: Wanted,
    before: Before | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Go once over all rows.

    Args:
        queries: (U, D).
        pool: the columns and their masks; what is masked for every present row is finite.
        inverse_temperature: () 1/τ.
        upstream: called once a tile; None: no gradient is made.
        wanted: which gradients are.
        before: called once a tile.

    Returns:
        log-sum-exp (U,), -inf where every column is masked; then the gradients of queries (U, D), negatives (N, D),
        bias (N,) and inverse temperature (), each an empty tensor where it is not wanted.
    """
    num_rows, num_columns = queries.shape[0], pool.negatives.shape[0]
    log_sum_exp = queries.new_full((num_rows,), -torch.inf)
    grad_queries = torch.zeros_like(queries) if wanted.queries else queries.new_empty(0)
    grad_negatives = torch.zeros_like(pool.negatives) if wanted.negatives else queries.new_empty(0)
    grad_bias = queries.new_zeros(num_columns) if wanted.bias else queries.new_empty(0)
    grad_inverse = queries.new_zeros(() if wanted.queries else 0)
    if num_rows == 0 or num_columns == 0:
        return log_sum_exp, grad_queries, grad_negatives, grad_bias, grad_inverse

    negatives = pool.negatives
    own = OwnPositives(*pool.own) if pool.own else None
    most = max(_MIN_ROWS, _TILE_BYTES // (num_columns * queries.element_size()))
    rows = math.ceil(num_rows / math.ceil(num_rows / most))  # tiles of about the same size
    buffer = queries.new_empty(rows, num_columns)
    in_cpp = cpp.takes(buffer)
    # Autocast leaves products alone that are written into a given tensor, as all of these are.
    for start in range(0, num_rows, rows):
        chunk = slice(start, min(start + rows, num_rows))
        tile = buffer[: chunk.stop - start]
        scaled = queries[chunk] * inverse_temperature
        torch.mm(scaled, negatives.t(), out=tile)
        if before is not None:
            before(chunk, tile)
        if pool.bias is not None and not in_cpp:
            tile += pool.bias
        if pool.masked is not None:
            tile.masked_fill_(pool.masked[chunk], -torch.inf)
        if in_cpp:
            log_sum_exp[chunk], totals = cpp.exponentials_(tile, pool.bias, None if own is None else own.owned, start)
        else:
            if own is not None:
                own.fill_(tile, start, -torch.inf)
            log_sum_exp[chunk], totals = _exponentials_(tile)
        if upstream is None:
            continue
        slope = (upstream(log_sum_exp, chunk, tile, totals) / totals)[:, None]
        if wanted.queries:
            grad = torch.mm(tile, negatives, out=grad_queries[chunk]).mul_(slope * inverse_temperature)
            grad_inverse += (queries[chunk] * grad).sum() / inverse_temperature
        if wanted.negatives:
            grad_negatives.addmm_(tile.t(), scaled.mul_(slope))
        if wanted.bias:
            grad_bias.addmv_(tile.t(), slope[:, 0])
    return log_sum_exp, grad_queries, grad_negatives, grad_bias, grad_inverse


def _exponentials_(tile: Tensor) -> tuple[Tensor, Tensor]:
    """As `cpp.exponentials_`, but divided by their sums, which are 1 then, and finite in a row of -inf."""
    peak = tile.amax(1)
    empty = peak == -torch.inf
    if not _checks.readable(tile) or empty.any():
        tile.masked_fill_(empty[:, None], 0)
    torch.softmax(tile, 1, out=tile)
    return peak - tile.amax(1).log(), torch.ones_like(peak)


def _pair_slopes(log_sum_exp: Tensor, positive_logits: Tensor, weights: Tensor, pair_queries: Tensor | None) -> Tensor:
    """The derivative of each weighted pair loss by its row's L."""
    return weights * torch.sigmoid(_of_pairs(log_sum_exp, pair_queries) - positive_logits)


def _pair_losses(log_sum_exp: Tensor, positive_logits: Tensor, pair_queries: Tensor | None) -> Tensor:
    """softplus(L - s), exact in both tails."""
    return -F.logsigmoid(positive_logits - _of_pairs(log_sum_exp, pair_queries))


def _of_pairs(log_sum_exp: Tensor, pair_queries: Tensor | None) -> Tensor:
    return log_sum_exp if pair_queries is None else log_sum_exp.index_select(0, pair_queries)


def sum_of_losses(
    queries: Tensor,
    positives: Tensor,
    shift: Tensor | None,
    pool: Pool,
    inverse_temperature: Tensor,
    weights: Tensor,
    pair_queries: Tensor | None,
) -> Tensor:
    """Sum over pairs of w softplus(L - s), s = <u, p> / τ + shift, differentiable once.

    Args:
        queries: (U, D), and all that follows of the same dtype, float32 or float64.
        positives: (R, D).
        shift: (R,) of each pair's logit.
        pool: the columns and their masks.
        inverse_temperature: () 1/τ.
        weights: (R,) at least 0.
        pair_queries: (R,) the query row of each pair; None: pair r is of row r.
    """
    of_queries, *of_columns = wanted_now(queries, pool, inverse_temperature)
    wanted = [of_queries, torch.is_grad_enabled() and positives.requires_grad, *of_columns]
    total: Tensor = _weighted_sum(
        queries, positives, shift, *pool[:2], inverse_temperature, weights, pair_queries, *pool[2:], wanted
    )[0]
    return total


def log_sum_exp(queries: Tensor, pool: Pool, inverse_temperature: Tensor) -> Tensor:
    """Each row's L (U,), -inf where every column is masked, differentiable once."""
    result: Tensor = _log_sum_exp(queries, *pool[:2], inverse_temperature, *pool[2:])
    return result


class _Once(torch.autograd.Function):
    """A gradient that refuses to be differentiated again, instead of taking the forward's numbers for constants."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor | None) -> Tensor:  # noqa: ARG004
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # noqa: ARG004
        refuse()


def once(gradient: Tensor, *depends_on: Tensor | None) -> Tensor:
    """The gradient; where it could be differentiated by what it depends on, one that refuses."""
    return cast(Tensor, _Once.apply(gradient, *depends_on)) if torch.is_grad_enabled() else gradient  # type: ignore[no-untyped-call]


def scaled(gradient: Tensor, grad: Tensor, *depends_on: Tensor | None) -> Tensor:
    """``grad * gradient``, in the memory of what was kept where no other backward will read it."""
    if watched() or torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph():
        return once(grad * gradient, *depends_on)
    return gradient.mul_(grad)


@torch.library.custom_op("recblocks::sampled_softmax_weighted_sum", mutates_args=())
def _weighted_sum(
    queries: Tensor,
    positives: Tensor,
    shift: Tensor | None,
    negatives: Tensor,
    bias: Tensor | None,
    inverse_temperature: Tensor,
    weights: Tensor,
    pair_queries: Tensor | None,
    masked: Tensor | None,
    own: list[Tensor],
    present: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of w softplus(L - s), each row's L, each pair's s, and the gradients of the sum.

    These are of queries (U, D), positives (R, D), negatives (N, D), bias (N,) and inverse temperature (), each an empty
    tensor where it is not wanted.
    """
    products = _products(queries, positives, pair_queries)
    positive_logits = products * inverse_temperature
    if shift is not None:
        positive_logits += shift

    def upstream(log_sum_exp: Tensor, chunk: slice, *_: Tensor) -> Tensor:
        if pair_queries is None:
            return _pair_slopes(log_sum_exp[chunk], positive_logits[chunk], weights[chunk], None)
        # Rows of later tiles still have L = -inf and so a slope of 0.
        slopes = _pair_slopes(log_sum_exp, positive_logits, weights, pair_queries)
        return torch.zeros_like(log_sum_exp).index_add_(0, pair_queries, slopes)[chunk]

    pool = clear_unused(Pool(negatives, bias, masked, own, present))
    wants = Wanted(wanted[0], *wanted[2:])
    swept = sweep(queries, pool, inverse_temperature, upstream if any(wants) else None, wants)
    log_sum_exp, grad_queries, grad_negatives, grad_bias, grad_inverse = swept
    total = (weights * _pair_losses(log_sum_exp, positive_logits, pair_queries)).sum()
    grad_positives = torch.empty_like(positives) if wanted[1] else positives.new_empty(0)
    pull = -_pair_slopes(log_sum_exp, positive_logits, weights, pair_queries)
    if wants.queries:
        grad_inverse += (pull * products).sum()
        _add_positives_(grad_queries, pull * inverse_temperature, positives, pair_queries)
    if wanted[1]:
        _put_queries_(grad_positives, pull * inverse_temperature, queries, pair_queries)
    return total, log_sum_exp, positive_logits, grad_queries, grad_positives, grad_negatives, grad_bias, grad_inverse


def _products(queries: Tensor, positives: Tensor, pair_queries: Tensor | None) -> Tensor:
    """<u, p> of each pair (R,)."""
    products = positives.new_empty(positives.shape[0])
    for chunk in _some_at_a_time(positives):
        products[chunk] = (_queries_of(queries, pair_queries, chunk) * positives[chunk]).sum(1)
    return products


def _add_positives_(grad_queries: Tensor, pull: Tensor, positives: Tensor, pair_queries: Tensor | None) -> None:
    """Add ``pull[r] * positives[r]`` to the query of each pair."""
    for chunk in _some_at_a_time(positives):
        if pair_queries is None:
            grad_queries[chunk].addcmul_(pull[chunk, None], positives[chunk])
        else:
            grad_queries.index_add_(0, pair_queries[chunk], pull[chunk, None] * positives[chunk])


def _put_queries_(grad_positives: Tensor, pull: Tensor, queries: Tensor, pair_queries: Tensor | None) -> None:
    """Write ``pull[r]`` times the query of each pair."""
    for chunk in _some_at_a_time(grad_positives):
        torch.mul(pull[chunk, None], _queries_of(queries, pair_queries, chunk), out=grad_positives[chunk])


def _some_at_a_time(pairs: Tensor) -> list[slice]:
    """Pairs of which nothing as large as all of them is held beside them."""
    return [slice(start, start + _PAIRS) for start in range(0, pairs.shape[0], _PAIRS)]


def _queries_of(queries: Tensor, pair_queries: Tensor | None, chunk: slice) -> Tensor:
    return queries[chunk] if pair_queries is None else queries.index_select(0, pair_queries[chunk])


@_weighted_sum.register_fake
def _(queries: Tensor, positives: Tensor, _: Tensor | None, negatives: Tensor, *others: Any) -> tuple[Tensor, ...]:
    wanted: list[bool] = others[-1]
    of_queries, *rest = empty_gradients(queries, negatives, Wanted(wanted[0], *wanted[2:]))
    of_positives = torch.empty_like(positives) if wanted[1] else positives.new_empty(0)
    numbers = queries.new_empty(()), queries.new_empty(queries.shape[0]), queries.new_empty(positives.shape[0])
    return *numbers, of_queries, of_positives, *rest


def _setup_weighted_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_own = len(inputs[-3])
    ctx.save_for_backward(*output[1:], *inputs[:8])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros in the size of the gradients for outputs nobody differentiates


def _backward_weighted_sum(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | list[None] | None, ...]:
    if grad is None:
        return *[None] * 9, [None] * ctx.num_own, None, None
    saved = ctx.saved_tensors  # under activation checkpointing they can be read once
    (log_sum_exp, positive_logits, of_queries, of_positives, *of_columns, of_inverse), inputs = saved[:7], saved[7:]
    *_, weights, pair_queries = inputs
    slopes = _pair_slopes(log_sum_exp, positive_logits, weights, pair_queries)
    losses = _pair_losses(log_sum_exp, positive_logits, pair_queries).masked_fill(weights == 0, 0)
    gradients = [
        scaled(gradient, grad, *inputs) if needed else None
        for gradient, needed in zip(
            [of_queries, of_positives, -slopes, *of_columns, of_inverse, losses], ctx.needs_input_grad, strict=False
        )
    ]
    return *gradients, None, None, [None] * ctx.num_own, None, None


_weighted_sum.register_autograd(_backward_weighted_sum, setup_context=_setup_weighted_sum)


@torch.library.custom_op("recblocks::sampled_softmax_log_sum_exp", mutates_args=())
def _log_sum_exp(
    queries: Tensor,
    negatives: Tensor,
    bias: Tensor | None,
    inverse_temperature: Tensor,
    masked: Tensor | None,
    own: list[Tensor],
    present: Tensor | None,
) -> Tensor:
    """Each row's L."""
    pool = clear_unused(Pool(negatives, bias, masked, own, present))
    return sweep(queries, pool, inverse_temperature, None, Wanted(False, False, False))[0]


@_log_sum_exp.register_fake
def _(queries: Tensor, *_: Any) -> Tensor:
    return queries.new_empty(queries.shape[0])


@torch.library.custom_op("recblocks::sampled_softmax_log_sum_exp_backward", mutates_args=())
def _log_sum_exp_backward(
    slopes: Tensor,
    queries: Tensor,
    negatives: Tensor,
    bias: Tensor | None,
    inverse_temperature: Tensor,
    masked: Tensor | None,
    own: list[Tensor],
    present: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum of slopes * L, in the order of `sweep`."""
    pool = clear_unused(Pool(negatives, bias, masked, own, present))
    return sweep(queries, pool, inverse_temperature, lambda _, chunk, *__: slopes[chunk], Wanted(*wanted))[1:]


@_log_sum_exp_backward.register_fake
def _(_: Tensor, queries: Tensor, negatives: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(queries, negatives, Wanted(*others[-1]))


def _setup_log_sum_exp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    queries, negatives, bias, inverse, masked, own, present = inputs
    ctx.save_for_backward(queries, negatives, bias, inverse, masked, present, *own)


def _backward_log_sum_exp(ctx: Any, slopes: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    queries, negatives, bias, inverse, masked, present, *own = ctx.saved_tensors
    needed = ctx.needs_input_grad
    wanted = [needed[0] or needed[3], needed[1], needed[2]]
    grads = _log_sum_exp_backward(slopes, queries, negatives, bias, inverse, masked, own, present, wanted)
    return (
        *[grad if need else None for grad, need in zip(grads, needed[:4], strict=True)],
        None,
        [None] * len(own),
        None,
    )


_log_sum_exp.register_autograd(_backward_log_sum_exp, setup_context=_setup_log_sum_exp)
_log_sum_exp_backward.register_autograd(refuse)
