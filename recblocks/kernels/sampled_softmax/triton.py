"""Sampled softmax in two Triton kernels that never hold rows x columns; on CUDA, or anywhere in the interpreter.

Each program keeps some lines of one side and sweeps over the other side, tile by tile. Over a row's columns the sum of
exponentials and the mean of the columns under the softmax are made at once, as in FlashAttention (Dao et al. 2022).
That mean is the gradient of the log-sum-exp by the query, so only the columns' gradients need a second sweep, over the
rows: four matrix products in all.

What a line owns on the other side is a list of ranges, because that side lies sorted by id. They are met in order, so a
cursor a line finds them, and a tile that nobody owns costs one look at the next range.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recblocks.kernels.own_positives import Ranges

NO_LINE = tl.constexpr(2**31 - 1)  # behind every line
_PROGRAMS = 528  # enough for four on each of a Hopper GPU's 132 multiprocessors
_LEAST_SWEPT = 512  # lines of a split; fewer do not pay for its own output


@triton.jit
def lines_of(matrix, at, mask, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(lines, WIDTH), zeros where masked and behind the last column."""
    column = tl.arange(0, WIDTH)
    wanted = mask[:, None] & (column < DIM)[None, :]
    return tl.load(matrix + at.to(tl.int64)[:, None] * DIM + column[None, :], wanted, 0.0)


@triton.jit
def _reach(cursor, stop, last, low, OWNED: tl.constexpr):
    """Of each line's ranges in cursor to stop the first that does not end before ``low``."""
    if OWNED:
        behind = stop
        while tl.max(behind - cursor) > 0:
            middle = (cursor + behind) // 2
            before = tl.load(last + middle, cursor < behind, 0) <= low
            behind = tl.where((cursor < behind) & ~before, middle, behind)
            cursor = tl.where((cursor < behind) & before, middle + 1, cursor)
    return cursor


@triton.jit
def _hide(logits, at, end, cursor, stop, first, last, OWNED: tl.constexpr):
    """-inf in the tile of other lines ``at``, all before ``end``, that each line owns; and each line's next range."""
    if OWNED:
        begin = tl.load(first + cursor, cursor < stop, NO_LINE)
        if tl.min(begin) < end:  # beside the loop over tiles a bare loop would keep Triton from pipelining that
            while tl.min(begin) < end:
                to = tl.load(last + cursor, begin < end, 0)
                logits = tl.where((at[None, :] >= begin[:, None]) & (at[None, :] < to[:, None]), -float("inf"), logits)
                passed = (begin < end) & (to <= end)
                cursor += passed.to(tl.int32)
                begin = tl.load(first + cursor, passed & (cursor < stop), NO_LINE)
    return logits, cursor


@triton.jit
def softmax_of_rows(
    queries,
    negatives,
    bias,
    inverse_temperature,
    masked,
    begin,
    end,
    first,
    last,
    log_sum_exp,
    mean,
    num_rows,
    num_columns,
    swept,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    TILE: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    OWNED: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some rows a program, over ``swept`` columns: their log-sum-exp, and the mean of the columns under the softmax."""
    dtype = log_sum_exp.dtype.element_ty
    row, split = tl.program_id(0) * KEPT + tl.arange(0, KEPT), tl.program_id(1)
    real = row < num_rows
    query = lines_of(queries, row, real, DIM, WIDTH)
    inverse = tl.load(inverse_temperature)
    low = split * swept
    high = tl.minimum(low + swept, num_columns)
    cursor, stop = tl.zeros((KEPT,), tl.int32), tl.zeros((KEPT,), tl.int32)
    if OWNED:
        cursor, stop = tl.load(begin + row, real, 0), tl.load(end + row, real, 0)
    cursor = _reach(cursor, stop, last, low, OWNED)
    peak = tl.full((KEPT,), -float("inf"), dtype)
    total = tl.zeros((KEPT,), dtype)
    average = tl.zeros((KEPT, WIDTH if WITH_MEAN else 1), dtype)
    for start in range(low, high, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < high
        negative = lines_of(negatives, column, inside, DIM, WIDTH)
        logits = tl.dot(query, tl.trans(negative), input_precision=PRECISION, out_dtype=dtype) * inverse
        if BIASED:
            logits += tl.load(bias + column, inside, 0.0)[None, :]
        if MASKED:
            corner = masked + tl.program_id(0).to(tl.int64) * KEPT * num_columns + start
            place = tl.arange(0, KEPT)[:, None] * num_columns + tl.arange(0, TILE)[None, :]
            hidden = tl.load(corner + place, real[:, None] & inside[None, :], 0)
            logits = tl.where(hidden != 0, -float("inf"), logits)
        logits, cursor = _hide(logits, column, start + TILE, cursor, stop, first, last, OWNED)
        logits = tl.where(inside[None, :], logits, -float("inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        share = tl.exp(logits - shift[:, None])
        fade = tl.exp(peak - shift)
        total = total * fade + tl.sum(share, 1)
        if WITH_MEAN:
            share = share.to(negative.dtype)
            average = tl.dot(share, negative, average * fade[:, None], input_precision=PRECISION, out_dtype=dtype)
        peak = higher
    to = split.to(tl.int64) * num_rows + row
    total = tl.where(total == 0, 1.0, total)  # of a row that sees nothing, whose peak is -inf
    tl.store(log_sum_exp + to, peak + tl.log(total), real)
    if WITH_MEAN:
        average /= total[:, None]
        at = tl.arange(0, WIDTH)
        tl.store(mean + to[:, None] * DIM + at[None, :], average, real[:, None] & (at < DIM)[None, :])


@triton.jit
def gradients_of_columns(
    queries,
    negatives,
    bias,
    inverse_temperature,
    masked,
    begin,
    end,
    first,
    last,
    log_sum_exp,
    slopes,
    grad,
    mass,
    num_rows,
    num_columns,
    swept,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    TILE: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    OWNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some columns a program, over ``swept`` rows: the sums of slope x probability x query, and without the query."""
    dtype = log_sum_exp.dtype.element_ty
    column, split = tl.program_id(0) * KEPT + tl.arange(0, KEPT), tl.program_id(1)
    real = column < num_columns
    negative = lines_of(negatives, column, real, DIM, WIDTH)
    inverse = tl.load(inverse_temperature)
    low = split * swept
    high = tl.minimum(low + swept, num_rows)
    cursor, stop = tl.zeros((KEPT,), tl.int32), tl.zeros((KEPT,), tl.int32)
    if OWNED:
        cursor, stop = tl.load(begin + column, real, 0), tl.load(end + column, real, 0)
    cursor = _reach(cursor, stop, last, low, OWNED)
    shift = tl.zeros((KEPT,), dtype)
    if BIASED:
        shift = tl.load(bias + column, real, 0.0)
    total = tl.zeros((KEPT, WIDTH), dtype)
    slope_sum = tl.zeros((KEPT,), dtype)
    for start in range(low, high, TILE):
        row = start + tl.arange(0, TILE)
        inside = row < high
        query = lines_of(queries, row, inside, DIM, WIDTH)
        logits = tl.dot(negative, tl.trans(query), input_precision=PRECISION, out_dtype=dtype) * inverse
        logits += shift[:, None]
        if MASKED:
            corner = masked + tl.cast(start, tl.int64) * num_columns + tl.program_id(0) * KEPT
            place = tl.arange(0, TILE)[None, :] * num_columns + tl.arange(0, KEPT)[:, None]
            hidden = tl.load(corner + place, real[:, None] & inside[None, :], 0)
            logits = tl.where(hidden != 0, -float("inf"), logits)
        logits, cursor = _hide(logits, row, start + TILE, cursor, stop, first, last, OWNED)
        sums = tl.load(log_sum_exp + row, inside, -float("inf"))
        empty = sums == -float("inf")
        share = tl.exp(logits - tl.where(empty, 0.0, sums)[None, :])
        share = tl.where(empty[None, :], 0.0, share * tl.load(slopes + row, inside, 0.0)[None, :])
        slope_sum += tl.sum(share, 1)
        total = tl.dot(share.to(query.dtype), query, total, input_precision=PRECISION, out_dtype=dtype)
    to = split.to(tl.int64) * num_columns + column
    tl.store(mass + to, slope_sum, real)
    at = tl.arange(0, WIDTH)
    tl.store(grad + to[:, None] * DIM + at[None, :], total * inverse, real[:, None] & (at < DIM)[None, :])


def softmax_over_columns(
    queries: Tensor,
    negatives: Tensor,
    bias: Tensor | None,
    inverse_temperature: Tensor,
    masked: Tensor | None,
    owned: Ranges | None,
    with_mean: bool,
) -> tuple[Tensor, Tensor]:
    """Each row's log-sum-exp (U,), and the mean (U, D) of the columns under its softmax.

    Args:
        queries: (U, D).
        negatives: (N, D) of the same dtype, finite where anything is hidden; sorted as ``owned`` says.
        bias: (N,) sorted likewise.
        inverse_temperature: () 1/τ.
        masked: (U, N) bool.
        owned: ranges of columns of each row.
        with_mean: else the second is (0,).
    """
    (num_rows, dim), num_columns = queries.shape, negatives.shape[0]
    sizes, options = sizes_of(dim, queries.dtype, masked is not None)
    num_splits, swept = _split(num_rows, num_columns, sizes)
    sums = inverse_temperature.new_empty(num_splits, num_rows)
    means = inverse_temperature.new_empty((num_splits, num_rows, dim) if with_mean else (0,))
    given = _given(queries, negatives, bias, inverse_temperature, masked, owned)
    grid = triton.cdiv(num_rows, sizes["KEPT"]), num_splits
    with torch.cuda.device_of(queries):
        softmax_of_rows[grid](
            **given, log_sum_exp=sums, mean=means, swept=swept, WITH_MEAN=with_mean, **sizes, **options
        )
    log_sum_exp = sums.logsumexp(0) if num_splits > 1 else sums.view(num_rows)
    if not with_mean:
        return log_sum_exp, means
    if num_splits == 1:
        return log_sum_exp, means.view(num_rows, dim)
    shares = (sums - log_sum_exp.masked_fill(log_sum_exp == -torch.inf, 0)).exp()
    return log_sum_exp, (shares[:, :, None] * means).sum(0)


def gradients_over_rows(
    queries: Tensor,
    negatives: Tensor,
    bias: Tensor | None,
    inverse_temperature: Tensor,
    masked: Tensor | None,
    owned: Ranges | None,
    log_sum_exp: Tensor,
    slopes: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum of slopes * L by negatives (N, D) and bias (N,).

    Args:
        queries: (U, D) sorted as ``owned`` says, and so the slopes and sums.
        negatives: (N, D) of the same dtype, finite where anything is hidden.
        bias: (N,).
        inverse_temperature: () 1/τ.
        masked: (U, N) bool.
        owned: ranges of rows of each column.
        log_sum_exp: (U,) of each row.
        slopes: (U,) the loss's derivative by it.
    """
    num_rows, (num_columns, dim) = queries.shape[0], negatives.shape
    sizes, options = sizes_of(dim, queries.dtype, masked is not None)
    num_splits, swept = _split(num_columns, num_rows, sizes)
    grad = inverse_temperature.new_empty(num_splits, num_columns, dim)
    mass = inverse_temperature.new_empty(num_splits, num_columns)
    given = _given(queries, negatives, bias, inverse_temperature, masked, owned)
    given |= {"log_sum_exp": log_sum_exp.contiguous(), "slopes": slopes.contiguous()}
    grid = triton.cdiv(num_columns, sizes["KEPT"]), num_splits
    with torch.cuda.device_of(queries):
        gradients_of_columns[grid](**given, grad=grad, mass=mass, swept=swept, **sizes, **options)
    return (grad.sum(0), mass.sum(0)) if num_splits > 1 else (grad.view(num_columns, dim), mass.view(num_columns))


def _given(
    queries: Tensor,
    negatives: Tensor,
    bias: Tensor | None,
    inverse_temperature: Tensor,
    masked: Tensor | None,
    owned: Ranges | None,
) -> dict[str, Any]:
    """What both kernels take."""
    ranges = dict.fromkeys(Ranges._fields) if owned is None else owned._asdict()
    return ranges | {
        "queries": queries.contiguous(),
        "negatives": negatives.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "inverse_temperature": inverse_temperature,
        "masked": None if masked is None else masked.contiguous().view(torch.uint8),
        "num_rows": queries.shape[0],
        "num_columns": negatives.shape[0],
        "BIASED": bias is not None,
        "MASKED": masked is not None,
        "OWNED": owned is not None,
    }


def sizes_of(dim: int, dtype: torch.dtype, masked: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a kernel is built for, and how: what needs no more registers than a multiprocessor has.

    Three products of tf32 have as many bits as one of float32.
    """
    sizes = {"DIM": dim, "WIDTH": max(16, 1 << (dim - 1).bit_length()), "PRECISION": "tf32x3"}
    tile = 64 if dtype == torch.bfloat16 and dim > 32 and not masked else 32
    return sizes | {"KEPT": 64 if masked else 128, "TILE": tile}, {"num_warps": 8, "num_stages": 2}


def _split(num_lines: int, num_swept: int, sizes: dict[str, Any]) -> tuple[int, int]:
    """In how many parts to sweep over the other side, so that a whole GPU has work, and how much each part sweeps."""
    most = min(_PROGRAMS // triton.cdiv(num_lines, sizes["KEPT"]), num_swept // _LEAST_SWEPT)
    swept = triton.cdiv(triton.cdiv(num_swept, max(1, most)), sizes["TILE"]) * sizes["TILE"]
    return triton.cdiv(num_swept, swept), swept
