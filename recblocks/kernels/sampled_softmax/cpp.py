"""The softmax of a tile in one pass on a CPU: `softmax.cpp`, which `recblocks.kernels.building` builds."""

from __future__ import annotations

import ctypes
import functools
import pathlib

import torch
from torch import Tensor

from recblocks.kernels import building
from recblocks.kernels.own_positives import Owned


def takes(tile: Tensor) -> bool:
    """Whether it is float32 on a CPU with a compiler of C++; one that fails is warned of, once."""
    if tile.device.type != "cpu" or tile.dtype != torch.float32:
        return False
    return building.is_available(library, "the loss's softmax is made")


@functools.cache
def library() -> ctypes.CDLL:
    """The function of `softmax.cpp`; errors are `building.library`'s."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    types = *[pointer] * 9, *[number] * 3
    source = pathlib.Path(__file__).with_name("softmax.cpp")
    return building.library([source], {"softmax_rows": types}, ["-ffp-contract=fast"])


def exponentials_(tile: Tensor, bias: Tensor | None, own: Owned | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
    """Turn logits into exponentials in place, 1 being the largest of a row, and 0 all of a row of -inf.

    Args:
        tile: (R, N) float32, contiguous; -inf where masked.
        bias: (N,) of each column's logit; None is zeros. What it is changes nothing where a column is masked.
        own: of all rows, columns that are masked too; None is none.
        start: where the tile's rows stand among all.

    Returns:
        each row's log-sum-exp (R,) and the sum of its exponentials (R,), 1 where all are 0.
    """
    log_sum_exp, totals = tile.new_empty(2, tile.shape[0])
    bias = None if bias is None else bias.contiguous()
    made = log_sum_exp.data_ptr(), totals.data_ptr()
    where = tile.data_ptr(), None if bias is None else bias.data_ptr(), *made
    owned: list[int | None] = [None] * 5
    if own is not None:
        rows = own.pair_first[start:], own.pair_count[start:]
        owned = [one.data_ptr() for one in (*rows, own.column_first, own.column_count, own.columns)]
    library().softmax_rows(*where, *owned, *tile.shape, building.num_threads())
    return log_sum_exp, totals
