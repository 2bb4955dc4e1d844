"""`recblocks._hashing` for Triton's kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from recblocks._hashing import FIRST, signed

LOW_32 = tl.constexpr((1 << 32) - 1)
MULTIPLIER = tl.constexpr(signed(FIRST))
_LOW_35 = tl.constexpr((1 << 35) - 1)


@triton.jit
def mix(x):
    """As `recblocks._hashing.mix` does, of ids to which the offset was added."""
    x = x ^ ((x >> 32) & LOW_32)
    x = x * MULTIPLIER
    return x ^ ((x >> 29) & _LOW_35)
