"""Hashes of 64-bit integers that are the same on every device, in every process and run (splitmix64, Steele 2014)."""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # the increment and the two multipliers of splitmix64
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB
LOW_32 = (1 << 32) - 1


def mix(ids: Tensor, offset: int | Tensor) -> Tensor:
    """Scramble 64 bits one to one, like the first half of splitmix64's finaliser."""
    x = ids + offset
    x = x ^ ((x >> 32) & LOW_32)
    x.mul_(signed(FIRST))
    return x.bitwise_xor_((x >> 29).bitwise_and_((1 << 35) - 1))


def unmix(x: Tensor, offset: int | Tensor) -> Tensor:
    """The ids that `mix` made these of."""
    x = x ^ ((x >> 29) & ((1 << 35) - 1)) ^ ((x >> 58) & ((1 << 6) - 1))
    x = x * signed(pow(FIRST, -1, 1 << 64))
    return (x ^ ((x >> 32) & LOW_32)) - offset


def splitmix(seed: int, index: int) -> int:
    """The index-th number of splitmix64 from this seed, in [0, 2**64)."""
    x = (seed + (index + 1) * GOLDEN) % (1 << 64)
    x = (x ^ (x >> 30)) * FIRST % (1 << 64)
    x = (x ^ (x >> 27)) * SECOND % (1 << 64)
    return x ^ (x >> 31)


def signed(x: int) -> int:
    """The int64 with the bits of x."""
    return x - (1 << 64) if x >= 1 << 63 else x
