"""Hash, probe and gather of all features in one Triton kernel; on CUDA, or anywhere in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recblocks._hashing import GOLDEN, signed
from recblocks.kernels.fused_lookup.asked import Asked
from recblocks.kernels.triton_hashing import LOW_32, MULTIPLIER, mix

BUCKET = 8
_GOLDEN = tl.constexpr(signed(GOLDEN))
_BUCKET = tl.constexpr(BUCKET)
_COLUMN, _MEAN = tl.constexpr(5), tl.constexpr(6)  # of what is said of each feature
_MOST_IDS = 32  # of a program; each of them reads a cache line of keys


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
    mixed = (mix(ids + tl.load(hashed)) + part * tl.load(hashed + 2)) * tl.load(hashed + 1)
    at = _slot_in(((mixed >> 32) & LOW_32) * num_buckets >> 32, mixed, mask, keys)
    at = tl.maximum(at, _slot_in((mixed & LOW_32) * num_buckets >> 32, mixed, mask & (at < 0), keys))
    found = tl.load(rows + at, at >= 0, -1).to(tl.int64)
    found = tl.where((found >= begin) & (found < end), found, -1)
    unseen = first + (((mix(ids + _GOLDEN) * MULTIPLIER >> 32) & LOW_32) * num_unseen >> 32)
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
def _rows_from(start, end, repeat, asked, num_features, num_buckets, IDS: tl.constexpr):
    """Of the ids from ``start`` on: where they stand, which of them are before the end, their features and rows."""
    ids, feature, places, keys, rows, hashed, begins = asked
    lane = tl.arange(0, IDS)
    at = start + lane
    mask = at < end
    numbers = tl.load(feature + _passed(start, lane, repeat)[0], mask, 0)
    place = _place_of(numbers, places, begins, num_features)
    return at, mask, numbers, _row_of(tl.load(ids + at, mask, 0), place, mask, keys, rows, hashed, num_buckets)


@triton.jit
def rows_of_ids(asked, out, num_ids, repeat, num_features, num_buckets, IDS: tl.constexpr):
    """Some ids a program: their rows."""
    start = tl.program_id(0).to(tl.int64) * IDS
    at, mask, _, row = _rows_from(start, num_ids, repeat, asked, num_features, num_buckets, IDS)
    tl.store(out + at, row, mask)


@triton.jit
def vectors_of_ids(
    asked,
    weights,
    scales,
    counts,
    out,
    repeat,
    num_rows,
    num_columns,
    num_features,
    num_buckets,
    DIMS: tl.constexpr,
    WIDTHS: tl.constexpr,
    IDS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Some ids of one width a program: their vectors, each in the columns of its feature."""
    places = asked[2]
    program, begin = tl.program_id(0).to(tl.int64), tl.cast(0, tl.int64)
    for which in tl.static_range(len(DIMS)):
        end = begin + tl.cast(repeat, tl.int64) * counts[which]
        num_programs = tl.cdiv(end - begin, IDS[which])
        if (program >= 0) & (program < num_programs):
            start = begin + program * IDS[which]
            _, mask, numbers, row = _rows_from(start, end, repeat, asked, num_features, num_buckets, IDS[which])
            vectors = _vectors_of(row, mask, weights[which], scales[which], DIMS[which], WIDTHS[which], SCALED)
            line = _passed(start, tl.arange(0, IDS[which]), num_rows)[1].to(tl.int64)
            to = line * num_columns + tl.load(places + _COLUMN * num_features + numbers, mask, 0)
            column = tl.arange(0, WIDTHS[which])
            wanted = mask[:, None] & (column < DIMS[which])[None, :]
            tl.store(out + to[:, None] + column[None, :], vectors, wanted)
        program -= num_programs
        begin = end


@triton.jit
def _sum_of(
    start,
    stop,
    ids,
    place,
    keys,
    rows,
    hashed,
    num_buckets,
    weight,
    scale,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    IDS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """(WIDTH,) the vectors of the ids of one bag, added up."""
    total = tl.zeros((WIDTH,), tl.float32)
    begin = start
    while begin < stop:
        at = begin + tl.arange(0, IDS)
        mask = at < stop
        asked = tl.load(ids + at, mask, 0)
        row = _row_of(asked, place, mask, keys, rows, hashed, num_buckets)
        total += tl.sum(_vectors_of(row, mask, weight, scale, DIM, WIDTH, SCALED), 0)
        begin += IDS
    return total


@triton.jit
def vectors_of_bags(
    asked,
    weights,
    scales,
    counts,
    offsets,
    out,
    repeat,
    num_rows,
    num_columns,
    num_features,
    num_buckets,
    DIMS: tl.constexpr,
    WIDTHS: tl.constexpr,
    IDS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One bag a program: the sum or mean of its ids' vectors, in the columns of its feature."""
    ids, feature, places, keys, rows, hashed, begins = asked
    bag, first = tl.program_id(0).to(tl.int64), tl.cast(0, tl.int64)
    start, stop = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    number = tl.load(feature + bag // repeat)
    place = _place_of(number, places, begins, num_features)
    size = tl.where(tl.load(places + _MEAN * num_features + number) != 0, tl.maximum(stop - start, 1), 1)
    to = out + bag % num_rows * num_columns + tl.load(places + _COLUMN * num_features + number)
    for which in tl.static_range(len(DIMS)):
        behind = first + tl.cast(repeat, tl.int64) * counts[which]
        if (bag >= first) & (bag < behind):
            table = ids, place, keys, rows, hashed, num_buckets, weights[which], scales[which]
            total = _sum_of(start, stop, *table, DIMS[which], WIDTHS[which], IDS[which], SCALED)
            column = tl.arange(0, WIDTHS[which])
            tl.store(to + column, total / size.to(tl.float32), column < DIMS[which])
        first = behind


def fill_rows(found: Tensor, asked: Asked, repeat: int) -> None:
    """What `lookup_rows` gives, into ``found``; all are contiguous."""
    num_ids = asked.ids.numel()
    numbers = num_ids, repeat, asked.places.shape[1], asked.keys.shape[0]
    with torch.cuda.device_of(found):
        rows_of_ids[(triton.cdiv(num_ids, _MOST_IDS),)](tuple(asked), found, *numbers, IDS=_MOST_IDS)


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
    each = zip(weights, scales or weights, counts, strict=True)
    wanted, by, nums = zip(*(one for one in each if one[2]), strict=True)
    sizes = sizes_of([weight.shape[1] for weight in wanted])
    given = tuple(asked), wanted, by, nums
    numbers = repeat, *out.shape, asked.places.shape[1], asked.keys.shape[0]
    scaled = bool(scales)
    with torch.cuda.device_of(out):
        if offsets is None:
            num_programs = sum(triton.cdiv(num * repeat, own) for num, own in zip(nums, sizes["IDS"], strict=True))
            vectors_of_ids[(num_programs,)](*given, out, *numbers, SCALED=scaled, **sizes)
        else:
            vectors_of_bags[(sum(nums) * repeat,)](*given, offsets, out, *numbers, SCALED=scaled, **sizes)


def sizes_of(dims: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """What a kernel is built for; so many ids a program that their vectors fit in registers."""
    widths = tuple(1 << (dim - 1).bit_length() for dim in dims)
    ids = tuple(min(_MOST_IDS, max(1, 512 // width)) for width in widths)
    return {"DIMS": tuple(dims), "WIDTHS": widths, "IDS": ids}
