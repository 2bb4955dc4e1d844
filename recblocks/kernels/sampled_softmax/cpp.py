"""The softmax of a tile in one pass on a CPU: `softmax.cpp`, which `recblocks.kernels.building` builds."""

from __future__ import annotations

import ctypes
import functools
import pathlib

import torch
from torch import Tensor

from recblocks.kernels import building


def takes(tile: Tensor) -> bool:
    """Whether it is float32 on a CPU with a compiler of C++; one that fails is warned of, once."""
    if tile.device.type != "cpu" or tile.dtype != torch.float32:
        return False
    return building.is_available(library, "the loss's softmax is made")


@functools.cache
def library() -> ctypes.CDLL:
    """The function of `softmax.cpp`; errors are `building.library`'s."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    types = pointer, pointer, pointer, number, number, number
    source = pathlib.Path(__file__).with_name("softmax.cpp")
    return building.library([source], {"softmax_rows": types}, ["-ffp-contract=fast"])


def softmax_(tile: Tensor, bias: Tensor | None) -> Tensor:
    """Turn logits into probabilities in place (0 in a row of -inf) and return each row's log-sum-exp.

    Args:
        tile: (R, N) float32, contiguous; -inf where masked.
        bias: (N,) of each column's logit; None is zeros. What it is changes nothing where a column is masked.
    """
    log_sum_exp = tile.new_empty(tile.shape[0])
    bias = None if bias is None else bias.contiguous()
    where = tile.data_ptr(), None if bias is None else bias.data_ptr(), log_sum_exp.data_ptr()
    library().softmax_rows(*where, *tile.shape, building.num_threads())
    return log_sum_exp
