"""The waves of times in one pass on a CPU: `waves.cpp`, which `recblocks.kernels.building` builds."""

from __future__ import annotations

import ctypes
import functools
import pathlib

from torch import Tensor

from recblocks.kernels import building


class _Times(ctypes.Structure):
    _fields_ = (("whole", ctypes.c_void_p), ("part", ctypes.c_void_p), ("num_times", ctypes.c_int64))


def is_available() -> bool:
    """Whether it is built, or can be and is now; a compiler that fails is warned of, once."""
    return building.is_available(library, "times are encoded")


@functools.cache
def library() -> ctypes.CDLL:
    """The functions of `waves.cpp`; errors are `building.library`'s."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    types = pointer, number, ctypes.POINTER(_Times), pointer, pointer, number, number, number
    return building.library([pathlib.Path(__file__).with_name("waves.cpp")], {"fill": types})


def fill(
    out: Tensor, whole: Tensor, part: Tensor | None, frequencies: Tensor, phase: Tensor | None, quarters: int
) -> None:
    """Write the waves into all columns of ``out`` but the last; all are contiguous.

    Args:
        out: (..., 2P+1) float32.
        whole: (...) int64 times.
        part: (...) int64, what stands behind their point, in 2**-32; None: nothing.
        frequencies: (2, P) int64, turns per unit of time and per 2**-32 of it, in 2**-64.
        phase: (2P,) float32; None is zeros.
        quarters: of a turn that every wave is ahead.
    """
    times = _Times(whole.data_ptr(), None if part is None else part.data_ptr(), whole.numel())
    where = out.data_ptr(), out.shape[-1], times, frequencies.data_ptr(), None if phase is None else phase.data_ptr()
    library().fill(*where, frequencies.shape[1], quarters, building.num_threads())
