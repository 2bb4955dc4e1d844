"""The pairs of the dense all-action loss in two Triton kernels; on CUDA, or anywhere in the interpreter.

Rows and positives are sorted by user and time, so that those who meet are few tiles beside a diagonal: beside the
softmax over the whole pool their products cost next to nothing, and nothing is gathered or listed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recblocks.kernels.sampled_softmax.triton import NO_LINE, lines_of, sizes_of


@triton.jit
def _met(first, last, line, real):
    """Each line's range on the other side, and the least range with all of them."""
    begin, end = tl.load(first + line, real, 0), tl.load(last + line, real, 0)
    some = begin < end
    return begin, end, tl.min(tl.where(some, begin, NO_LINE)), tl.max(tl.where(some, end, 0))


@triton.jit
def _share(behind):
    """The logistic function of L - s; where that is far below 0, exp gives inf, and this the 0 that is meant."""
    return 1 / (1 + tl.exp(-behind))


@triton.jit
def pairs_of_rows(
    queries,
    positives,
    shift,
    inverse_temperature,
    log_sum_exp,
    first,
    last,
    losses,
    slopes,
    pulls,
    num_rows,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    TILE: tl.constexpr,
    SHIFTED: tl.constexpr,
    WITH_PULLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some rows a program: the sums over their positives of softplus(L - s), of its slope, and of slope x positive."""
    dtype = losses.dtype.element_ty
    row = tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    real = row < num_rows
    query = lines_of(queries, row, real, DIM, WIDTH)
    inverse = tl.load(inverse_temperature)
    sums = tl.load(log_sum_exp + row, real, 0.0)
    begin, end, low, high = _met(first, last, row, real)
    loss, slope = tl.zeros((KEPT,), dtype), tl.zeros((KEPT,), dtype)
    pull = tl.zeros((KEPT, WIDTH if WITH_PULLS else 1), dtype)
    for start in range(low, high, TILE):
        at = start + tl.arange(0, TILE)
        met = (at[None, :] >= begin[:, None]) & (at[None, :] < end[:, None])
        positive = lines_of(positives, at, at < high, DIM, WIDTH)
        logits = tl.dot(query, tl.trans(positive), input_precision=PRECISION, out_dtype=dtype) * inverse
        if SHIFTED:
            logits += tl.load(shift + at, at < high, 0.0)[None, :]
        behind = sums[:, None] - logits
        small = tl.exp(-tl.abs(behind))
        whole = 1 + small  # what its rounding lost, the factor behind the logarithm brings back (Kahan)
        log = tl.where(whole == 1, small, tl.log(whole) * (small / tl.where(whole == 1, 1.0, whole - 1)))
        loss += tl.sum(tl.where(met, tl.maximum(behind, 0.0) + log, 0.0), 1)
        share = tl.where(met, _share(behind), 0.0)
        slope += tl.sum(share, 1)
        if WITH_PULLS:
            share = share.to(positive.dtype)
            pull = tl.dot(share, positive, pull, input_precision=PRECISION, out_dtype=dtype)
    tl.store(losses + row, loss, real)
    tl.store(slopes + row, slope, real)
    if WITH_PULLS:
        at = tl.arange(0, WIDTH)
        tl.store(pulls + row.to(tl.int64)[:, None] * DIM + at[None, :], pull, real[:, None] & (at < DIM)[None, :])


@triton.jit
def pairs_of_columns(
    queries,
    positives,
    shift,
    inverse_temperature,
    log_sum_exp,
    upstream,
    first,
    last,
    grad,
    mass,
    num_columns,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    TILE: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some positives a program: the sums over their rows of upstream x slope x query, and without the query."""
    dtype = mass.dtype.element_ty
    column = tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    real = column < num_columns
    positive = lines_of(positives, column, real, DIM, WIDTH)
    inverse = tl.load(inverse_temperature)
    moved = tl.zeros((KEPT,), dtype)
    if SHIFTED:
        moved = tl.load(shift + column, real, 0.0)
    begin, end, low, high = _met(first, last, column, real)
    slope_sum = tl.zeros((KEPT,), dtype)
    total = tl.zeros((KEPT, WIDTH), dtype)
    for start in range(low, high, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < high
        met = (at[None, :] >= begin[:, None]) & (at[None, :] < end[:, None])
        query = lines_of(queries, at, inside, DIM, WIDTH)
        logits = tl.dot(positive, tl.trans(query), input_precision=PRECISION, out_dtype=dtype) * inverse
        logits += moved[:, None]
        share = _share(tl.load(log_sum_exp + at, inside, 0.0)[None, :] - logits)
        share = tl.where(met, share * tl.load(upstream + at, inside, 0.0)[None, :], 0.0)
        slope_sum += tl.sum(share, 1)
        total = tl.dot(share.to(query.dtype), query, total, input_precision=PRECISION, out_dtype=dtype)
    tl.store(mass + column, slope_sum, real)
    at = tl.arange(0, WIDTH)
    to = column.to(tl.int64)[:, None] * DIM + at[None, :]
    tl.store(grad + to, total * inverse, real[:, None] & (at < DIM)[None, :])


def sums_over_positives(
    queries: Tensor,
    positives: Tensor,
    shift: Tensor | None,
    inverse_temperature: Tensor,
    log_sum_exp: Tensor,
    first: Tensor,
    last: Tensor,
    with_pulls: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the sums over its positives of softplus(L - s), of its slope (U,), and of slope x positive (U, D).

    Args:
        queries: (U, D) by user and time.
        positives: (P, D) likewise, of the same dtype; finite but in ranges.
        shift: (P,) of a positive's logit.
        inverse_temperature: () 1/τ.
        log_sum_exp: (U,) L.
        first: (U,) int32, where a row's range begins.
        last: (U,) int32, where it ends.
        with_pulls: else the third is (0,).
    """
    num_rows, dim = queries.shape
    sizes, options = sizes_of(dim, queries.dtype, False)
    losses, slopes = inverse_temperature.new_empty(num_rows), inverse_temperature.new_empty(num_rows)
    pulls = inverse_temperature.new_empty((num_rows, dim) if with_pulls else 0)
    with torch.cuda.device_of(queries):
        pairs_of_rows[(triton.cdiv(num_rows, sizes["KEPT"]),)](
            queries, positives, shift, inverse_temperature, log_sum_exp, first, last, losses, slopes, pulls, num_rows,
            SHIFTED=shift is not None, WITH_PULLS=with_pulls, **sizes, **options,
        )  # fmt: skip
    return losses, slopes, pulls


def sums_over_rows(
    queries: Tensor,
    positives: Tensor,
    shift: Tensor | None,
    inverse_temperature: Tensor,
    log_sum_exp: Tensor,
    upstream: Tensor,
    first: Tensor,
    last: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of each positive the sums over its rows of upstream x slope x query / τ (P, D), and of upstream x slope (P,).

    Args:
        queries: (U, D) by user and time; finite but in ranges.
        positives: (P, D) likewise, of the same dtype.
        shift: (P,) of a positive's logit.
        inverse_temperature: () 1/τ.
        log_sum_exp: (U,) L.
        upstream: (U,) the loss's derivative by each row's sum.
        first: (P,) int32, where a positive's range begins.
        last: (P,) int32, where it ends.
    """
    num_columns, dim = positives.shape
    sizes, options = sizes_of(dim, queries.dtype, False)
    grad = inverse_temperature.new_empty(num_columns, dim)
    mass = inverse_temperature.new_empty(num_columns)
    with torch.cuda.device_of(queries):
        pairs_of_columns[(triton.cdiv(num_columns, sizes["KEPT"]),)](
            queries, positives, shift, inverse_temperature, log_sum_exp, upstream, first, last, grad, mass, num_columns,
            SHIFTED=shift is not None, **sizes, **options,
        )  # fmt: skip
    return grad, mass
