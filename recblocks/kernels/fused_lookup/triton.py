"""Hash, probe and gather in a Triton kernel, one launch a width; on CUDA, or anywhere in the interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from recblocks._hashing import FIRST, GOLDEN, signed
from recblocks.kernels.fused_lookup.asked import Asked

BUCKET = 8
_LOW_32 = tl.constexpr((1 << 32) - 1)
_LOW_35 = tl.constexpr((1 << 35) - 1)
_GOLDEN, _FIRST = tl.constexpr(signed(GOLDEN)), tl.constexpr(signed(FIRST))
_BUCKET = tl.constexpr(BUCKET)
_COLUMN, _MEAN = tl.constexpr(5), tl.constexpr(6)  # of what is said of each feature
_MOST_IDS = 32  # of a program; each of them reads a cache line of keys


@triton.jit
def _mix(x):
    x = x ^ ((x >> 32) & _LOW_32)
    x = x * _FIRST
    return x ^ ((x >> 29) & _LOW_35)


@triton.jit
def _slot_in(bucket, hashes, mask, keys):
    """The slot of each hash in the bucket named, -1 where it does not stand there."""
    at = bucket[:, None] * _BUCKET + tl.arange(0, _BUCKET)[None, :]
    equal = (tl.load(keys + at, mask[:, None], 0) == hashes[:, None]) & mask[:, None]
    return tl.max(tl.where(equal, at, -1), 1)


@triton.jit
def _place_of(feature, places, begins, num_features):
    """What a feature's rows follow from: its part, shift, rows for unseen ids, and the part's rows of the id table."""
    part = tl.load(places + feature)
    shift = tl.load(places + num_features + feature)
    first = tl.load(places + 2 * num_features + feature)
    num_unseen = tl.load(places + 3 * num_features + feature)
    return part, shift, first, num_unseen, tl.load(begins + part), tl.load(begins + part + 1)


@triton.jit
def _row_of(ids, place, mask, keys, rows, hashed, num_buckets):
    """The row of the weight for each id; the second bucket is read only for what the first does not hold."""
    part, shift, first, num_unseen, begin, end = place
    mixed = (_mix(ids + tl.load(hashed)) + part * tl.load(hashed + 2)) * tl.load(hashed + 1)
    at = _slot_in(((mixed >> 32) & _LOW_32) * num_buckets >> 32, mixed, mask, keys)
    at = tl.maximum(at, _slot_in((mixed & _LOW_32) * num_buckets >> 32, mixed, mask & (at < 0), keys))
    found = tl.load(rows + at, at >= 0, -1).to(tl.int64)
    found = tl.where((found >= begin) & (found < end), found, -1)
    unseen = first + (((_mix(ids + _GOLDEN) * _FIRST >> 32) & _LOW_32) * num_unseen >> 32)
    return tl.where(found < 0, unseen, found + shift)


@triton.jit
def _vectors_of(row, mask, weight, scale, DIM: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr):
    """(ids, WIDTH) float32, zeros where masked and behind the last column."""
    column = tl.arange(0, WIDTH)
    wanted = mask[:, None] & (column < DIM)[None, :]
    vectors = tl.load(weight + row[:, None] * DIM + column[None, :], wanted, 0.0).to(tl.float32)
    if SCALED:
        vectors = vectors * tl.load(scale + row, mask, 0.0)[:, None]
    return vectors


@triton.jit
def _passed(start, lane, size):
    """What start + lane is when divided, and what is left; 64 bits are divided once, for lanes have few."""
    left = (start % size).to(tl.int32) + lane
    return start // size + left // size, left % size


@triton.jit
def one_each(
    ids,
    feature,
    places,
    keys,
    rows,
    hashed,
    begins,
    weight,
    scale,
    out,
    num_ids,
    repeat,
    num_rows,
    num_columns,
    num_features,
    num_buckets,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    GATHERS: tl.constexpr,
    IDS: tl.constexpr,
):
    """Some ids a program: their rows, or else their vectors, each in the columns of its feature."""
    start, lane = tl.program_id(0).to(tl.int64) * IDS, tl.arange(0, IDS)
    at = start + lane
    mask = at < num_ids
    numbers = tl.load(feature + _passed(start, lane, repeat)[0], mask, 0)
    asked = tl.load(ids + at, mask, 0)
    place = _place_of(numbers, places, begins, num_features)
    row = _row_of(asked, place, mask, keys, rows, hashed, num_buckets)
    if GATHERS:
        vectors = _vectors_of(row, mask, weight, scale, DIM, WIDTH, SCALED)
        line = _passed(start, lane, num_rows)[1].to(tl.int64)
        to = line * num_columns + tl.load(places + _COLUMN * num_features + numbers, mask, 0)
        column = tl.arange(0, WIDTH)
        wanted = mask[:, None] & (column < DIM)[None, :]
        tl.store(out + to[:, None] + column[None, :], vectors, wanted)
    else:
        tl.store(out + at, row, mask)


@triton.jit
def bags(
    ids,
    feature,
    places,
    keys,
    rows,
    hashed,
    begins,
    weight,
    scale,
    offsets,
    out,
    repeat,
    num_rows,
    num_columns,
    num_features,
    num_buckets,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    IDS: tl.constexpr,
):
    """One bag a program: the sum or mean of its ids' vectors, in the columns of its feature."""
    bag = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    number = tl.load(feature + bag // repeat)
    place = _place_of(number, places, begins, num_features)
    total = tl.zeros((WIDTH,), tl.float32)
    begin = start
    while begin < stop:
        at = begin + tl.arange(0, IDS)
        mask = at < stop
        asked = tl.load(ids + at, mask, 0)
        row = _row_of(asked, place, mask, keys, rows, hashed, num_buckets)
        total += tl.sum(_vectors_of(row, mask, weight, scale, DIM, WIDTH, SCALED), 0)
        begin += IDS
    size = tl.where(tl.load(places + _MEAN * num_features + number) != 0, tl.maximum(stop - start, 1), 1)
    column = tl.arange(0, WIDTH)
    to = bag % num_rows * num_columns + tl.load(places + _COLUMN * num_features + number)
    tl.store(out + to + column, total / size.to(tl.float32), column < DIM)


def fill_rows(found: Tensor, asked: Asked, repeat: int) -> None:
    """What `lookup_rows` gives, into ``found``; all are contiguous."""
    sizes, ids = sizes_of(1), asked.ids
    numbers = ids.numel(), repeat, 1, 1, asked.places.shape[1], asked.keys.shape[0]
    one_each[_grid(ids, sizes)](*asked, ids, ids, found, *numbers, SCALED=False, GATHERS=False, **sizes)


def fill_vectors(
    out: Tensor,
    asked: Asked,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    offsets: Tensor | None,
    counts: Sequence[int],
    repeat: int,
) -> None:
    """What `lookup_vectors` gives, into ``out``; all are contiguous."""
    numbers = repeat, *out.shape, asked.places.shape[1], asked.keys.shape[0]
    ids, feature = asked.ids.flatten(), asked.feature.flatten()
    ends = list(itertools.accumulate(counts))
    each = zip(weights, scales or weights, counts, ends, strict=True)
    for weight, scale, begin, end in ((weight, scale, end - count, end) for weight, scale, count, end in each if count):
        sizes: dict[str, Any] = {"SCALED": bool(scales), **sizes_of(weight.shape[1])}
        own = asked._replace(feature=feature[begin:end])
        if offsets is None:
            own = own._replace(ids=ids[begin * repeat : end * repeat])
            one_each[_grid(own.ids, sizes)](*own, weight, scale, out, own.ids.numel(), *numbers, GATHERS=True, **sizes)
        else:
            bags[((end - begin) * repeat,)](*own, weight, scale, offsets[begin * repeat :], out, *numbers, **sizes)


def sizes_of(dim: int) -> dict[str, int]:
    """What a kernel is built for; so many ids a program that their vectors fit in registers."""
    width = 1 << (dim - 1).bit_length()
    return {"DIM": dim, "WIDTH": width, "IDS": min(_MOST_IDS, max(1, 512 // width))}


def _grid(ids: Tensor, sizes: dict[str, int]) -> tuple[int]:
    return (-(-ids.numel() // sizes["IDS"]),)
