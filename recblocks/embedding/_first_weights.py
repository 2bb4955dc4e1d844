"""The first vectors of the rows of a lookup: uniform within ±1/√capacity of their table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recblocks.embedding._layout import Layout


class DrawnRows(NamedTuple):
    """Rows of one width that are given anew."""

    dim: int
    parts: range
    """The parts of the id table that are of this width."""
    begun: Tensor
    """(K,) rows of the id table, ascending."""
    vectors: Tensor
    """(K, dim)."""


def draw_rows(
    begun: Tensor, begins: Tensor, layout: Layout, generator: torch.Generator | None, dtype: torch.dtype
) -> Iterator[DrawnRows]:
    """Draw the vectors of rows of the id table that are given anew, those of a width together."""
    nums = torch.searchsorted(begun, begins).diff()
    bounds = begins.diff().to(torch.float32).rsqrt().repeat_interleave(nums)
    for dim, parts_of in itertools.groupby(enumerate(layout.order), key=lambda pair: layout.tables[pair[1]].dim):
        (first, _), *others = parts_of
        begin, end = int(nums[:first].sum()), int(nums[: first + len(others) + 1].sum())
        drawn = torch.empty(end - begin, dim, device=begun.device, dtype=dtype).uniform_(-1, 1, generator=generator)
        vectors = drawn * bounds[begin:end, None].to(dtype)
        yield DrawnRows(dim, range(first, first + len(others) + 1), begun[begin:end], vectors)


def draw_unseen(rows: Tensor, capacity: int, generator: torch.Generator | None) -> None:
    """Draw the vectors of a feature's rows for unseen ids, in place."""
    bound = 1 / math.sqrt(capacity)
    rows.uniform_(-bound, bound, generator=generator)
