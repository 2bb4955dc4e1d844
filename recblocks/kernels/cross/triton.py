"""A layer of a cross network as one matrix product in Triton; on CUDA, or anywhere in the interpreter."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def cross(
    first,
    crossed,
    hidden,
    weight,
    bias,
    out,
    num_rows,
    num_columns,
    num_hidden,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some rows and columns a program: the product, and with it the rest of the layer."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows, columns = row < num_rows, column < num_columns
    dtype = out.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), tl.float64 if dtype == tl.float64 else tl.float32)
    for start in range(0, num_hidden, DEPTH):
        at = start + tl.arange(0, DEPTH)
        inside = (at < num_hidden)[None, :]
        left = tl.load(hidden + row[:, None] * num_hidden + at[None, :], rows[:, None] & inside, 0.0)
        right = tl.load(
            weight + column.to(tl.int64)[:, None] * num_hidden + at[None, :], columns[:, None] & inside, 0.0
        )
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION, out_dtype=total.dtype)
    total += tl.load(bias + column, columns, 0.0)[None, :]
    transformed = total.to(dtype).to(total.dtype)  # rounded as a product by itself is, so that training sees the same
    place = row[:, None] * num_columns + column[None, :]
    wanted = rows[:, None] & columns[None, :]
    by = tl.load(first + place, wanted, 0.0).to(total.dtype)
    tl.store(out + place, by * transformed + tl.load(crossed + place, wanted, 0.0), wanted)


def fill(out: Tensor, first: Tensor, crossed: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Write ``first * (hidden @ weight.T + bias) + crossed``; all are contiguous.

    Args:
        out: (B, D), and all of its dtype.
        first: (B, D).
        crossed: (B, D).
        hidden: (B, K).
        weight: (D, K).
        bias: (D,).
    """
    num_rows, num_columns = out.shape
    sizes, options = sizes_of(out.dtype)
    grid = triton.cdiv(num_rows, sizes["ROWS"]), triton.cdiv(num_columns, sizes["COLUMNS"])
    given = first, crossed, hidden, weight, bias, out, num_rows, num_columns, hidden.shape[1]
    with torch.cuda.device_of(out):
        cross[grid](*given, **sizes, **options)


def sizes_of(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernel is built for, and how; three products of tf32 have as many bits as one of float32."""
    depth = 64 if dtype.itemsize == 2 else 32
    return {"ROWS": 64, "COLUMNS": 64, "DEPTH": depth, "PRECISION": "tf32x3"}, {"num_warps": 8, "num_stages": 3}
