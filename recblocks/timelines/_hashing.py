"""Hashes and permutations of 64-bit integers that are the same in every process, on every machine, for ever."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recblocks._hashing import FIRST, GOLDEN, SECOND

Words = npt.NDArray[np.uint64]

_MASK64 = (1 << 64) - 1
_ROUNDS = 8


def mix64(words: Words) -> Words:
    """Map each 64-bit word to another, one to one and evenly (the finalizer of splitmix64, Steele et al. 2014)."""
    words = words + np.uint64(GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(FIRST)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(SECOND)
    return words ^ (words >> np.uint64(31))


def mix_integers(*integers: int) -> int:
    """Map a few integers, in this order, to one 64-bit word."""
    state = np.zeros(1, dtype=np.uint64)
    for integer in integers:
        state = mix64(state ^ np.array([integer & _MASK64], dtype=np.uint64))
    return int(state[0])


def permute(index: Words, count: int, *, key: int) -> Words:
    """Return where a keyed permutation of [0, count) sends each index, in constant memory.

    A balanced Feistel network permutes the smallest [0, 4^h) that holds ``count``; what falls outside [0, count) is
    permuted again until it falls inside (cycle walking; Black and Rogaway 2002), at most 4 times in the mean.

    Example:
        >>> sorted(permute(np.arange(10, dtype=np.uint64), 10, key=1).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.array([mix_integers(key, turn) for turn in range(_ROUNDS)], dtype=np.uint64)
    out = _feistel(index, half, mask, keys)
    outside = np.flatnonzero(out >= count)
    while outside.size:
        out[outside] = _feistel(out[outside], half, mask, keys)
        outside = outside[out[outside] >= count]
    return out


def _feistel(words: Words, half: np.uint64, mask: np.uint64, keys: Words) -> Words:
    left, right = words >> half, words & mask
    for key in keys:
        left, right = right, left ^ (mix64(right ^ key) & mask)
    return (left << half) | right
