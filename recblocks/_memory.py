"""Memory for tables that are read here and there."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_HUGE_PAGE = 1 << 21


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Ask Linux for pages of 2 MB, not 4 KB, where a new tensor lies, before anything is written there.

    Each read of a large table is of another page, and the CPU must first look up where that lies: in huge pages it
    knows by heart. Elsewhere than on Linux, for small tensors, and where Linux is told to grant none, nothing happens.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu" and type(tensor) is Tensor:
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - begin
        if size >= _HUGE_PAGE:
            advise = ctypes.CDLL(None).madvise
            advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
            advise(begin, size // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return tensor


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy, in huge pages if it is large."""
    fresh = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    return in_huge_pages(fresh).copy_(tensor)
