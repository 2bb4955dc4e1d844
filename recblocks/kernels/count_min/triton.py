"""Counting and answering, each in one Triton kernel; on CUDA, or anywhere in the interpreter.

They are two, since a program cannot read what another one of its own launch has added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recblocks.kernels.triton_hashing import LOW_32, mix

_IDS = 128  # of a program


@triton.jit
def _bucket(mixed, multiplier, ROW: tl.constexpr, width):
    """The id's counter in a row: floor(u x width / 2**32) of 32 bits u of one product, which serves two rows."""
    product = mixed * multiplier
    half = (product >> 32) & LOW_32 if ROW % 2 == 0 else product & LOW_32
    return half * width >> 32


@triton.jit
def count(ids, amounts, pending, total, offset, multipliers, each, num, width, DEPTH: tl.constexpr, IDS: tl.constexpr):
    """Some ids a program: ``each``, or their own amounts, to their counters in every row, and to the total."""
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    mask = at < num
    mixed = mix(tl.load(ids + at, mask, 0) + offset)
    amount = tl.full((IDS,), 0, tl.int64) + each
    if amounts is not None:
        amount = tl.load(amounts + at, mask, 0)
    for row in tl.static_range(DEPTH):
        bucket = _bucket(mixed, multipliers[row // 2], row, width)
        tl.atomic_add(pending + bucket, amount, mask, sem="relaxed")
        pending += width
    tl.atomic_add(total, tl.sum(tl.where(mask, amount, 0)), sem="relaxed")


@triton.jit
def answer(
    ids, synced, pending, out, offset, multipliers, sighting, num, width, DEPTH: tl.constexpr, IDS: tl.constexpr
):
    """Some ids a program: the smallest of their counters, in sightings."""
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    mask = at < num
    mixed = mix(tl.load(ids + at, mask, 0) + offset)
    smallest = tl.full((IDS,), 2**63 - 1, tl.int64)
    for row in tl.static_range(DEPTH):
        bucket = _bucket(mixed, multipliers[row // 2], row, width)
        smallest = tl.minimum(smallest, tl.load(synced + bucket, mask, 0) + tl.load(pending + bucket, mask, 0))
        synced += width
        pending += width
    tl.store(out + at, smallest.to(tl.float64) / sighting, mask)


def add(
    ids: Tensor,
    amounts: Tensor | None,
    pending: Tensor,
    total: Tensor,
    offset: int,
    multipliers: Sequence[int],
    sighting: int,
) -> None:
    """Add to each id's counters and to the total; all are contiguous.

    Args:
        ids: (N,) int64.
        amounts: (N,) int64; None: one sighting each.
        pending: (depth, width) int64.
        total: () int64.
        offset: of the hash.
        multipliers: one for every two rows.
        sighting: what one adds to a counter.
    """
    depth, width = pending.shape
    given = ids, amounts, pending, total, offset, tuple(multipliers), sighting, ids.numel(), width
    with torch.cuda.device_of(ids):
        count[(triton.cdiv(ids.numel(), _IDS),)](*given, DEPTH=depth, IDS=_IDS)


def smallest(
    out: Tensor, ids: Tensor, synced: Tensor, pending: Tensor, offset: int, multipliers: Sequence[int], sighting: int
) -> None:
    """Write how often each id was seen, in sightings, into ``out`` (N,) float64; the others as `add` takes them."""
    depth, width = pending.shape
    given = ids, synced, pending, out, offset, tuple(multipliers), sighting, ids.numel(), width
    with torch.cuda.device_of(ids):
        answer[(triton.cdiv(ids.numel(), _IDS),)](*given, DEPTH=depth, IDS=_IDS)
