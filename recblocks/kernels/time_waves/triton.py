"""Times, how long before the latest they were and how long after the next older, encoded by one Triton kernel.

On CUDA, or anywhere in the interpreter. Waves are made as in `waves.cpp`: the place in a period is a count of 2**-32 of
a turn, of which integers drop the whole turns, and every wave is a sine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TIME, SINCE_LATEST, GAP = 0, 1, 2  # what of an action's time is encoded

_SINCE_LATEST, _GAP = tl.constexpr(SINCE_LATEST), tl.constexpr(GAP)
_NONE = tl.constexpr(2**31 - 1)  # behind every slot
_HALF_A_TURN = tl.constexpr(-(2**31))
_TURN = tl.constexpr(6.283185307179586)
_MOST_SLOTS, _STEP = 32, 64
_TILE = 1024  # waves that are made at once


@triton.jit
def _sine(turn):
    """Of int32 counts of 2**-32 of a turn, folded into a quarter to either side, where a polynomial is within 5e-9."""
    folded = tl.where((turn ^ (turn << 1)) < 0, _HALF_A_TURN - turn, turn)
    x = folded.to(tl.float32) * (_TURN / 4294967296.0)
    square = x * x
    more = -0.16666657 + square * (0.008333017 + square * (-0.00019806615 + square * 2.6000548e-6))
    return x + x * square * more


@triton.jit
def _neighbours(valid, row, slot, num_slots, MASKED: tl.constexpr, STEP: tl.constexpr):
    """The row's first valid slot, and for each slot the next valid one behind it; _NONE where there is none."""
    first = tl.full((), _NONE, tl.int32)
    older = tl.full(slot.shape, _NONE, tl.int32)
    for begin in range(0, num_slots, STEP):
        other = begin + tl.arange(0, STEP)
        real = other < num_slots
        if MASKED:
            real = tl.load(valid + row * num_slots + other, real, 0) != 0
        first = tl.minimum(first, tl.min(tl.where(real, other, _NONE)))
        behind = real[None, :] & (other[None, :] > slot[:, None])
        older = tl.minimum(older, tl.min(tl.where(behind, other[None, :], _NONE), 1))
    return first, older


@triton.jit
def _put(
    to,
    span,
    inside,
    frequencies,
    phases,
    per_second,
    quarters,
    NUM: tl.constexpr,
    WAVES: tl.constexpr,
    PHASED: tl.constexpr,
):
    """The waves of one span of time a slot, and then its logarithm."""
    wave = tl.arange(0, WAVES)
    wanted = wave < 2 * NUM
    frequency = tl.load(frequencies + wave // 2, wanted, 0)
    ahead = (quarters + 1 - wave % 2) << 30
    added = tl.zeros((WAVES,), tl.float32)
    if PHASED:
        phase = tl.load(phases + wave, wanted, 0.0)
        added = phase * 0.0  # of a phase that is no number
        turns = tl.where(added == 0, phase, 0.0).to(tl.float64) / _TURN
        ahead += ((turns - tl.floor(turns)) * 4294967296.0).to(tl.int64).to(tl.int32)
    turn = (span[:, None] * frequency[None, :] >> 32).to(tl.int32) + ahead[None, :]
    tl.store(to[:, None] + wave[None, :], _sine(turn) + added[None, :], inside[:, None] & wanted[None, :])
    seconds = tl.maximum(span, 0).to(tl.float64) / per_second
    tl.store(to + 2 * NUM, tl.log(seconds + 1.0).to(tl.float32), inside)


@triton.jit
def encode(
    out,
    time,
    valid,
    frequencies,
    phases,
    per_second,
    quarters,
    num_slots,
    KINDS: tl.constexpr,
    PERIODS: tl.constexpr,
    WAVES: tl.constexpr,
    PHASED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALONE: tl.constexpr,
    MASKED: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Some slots of a row a program: of every kind the waves, and then the logarithm."""
    num_parts = tl.cdiv(num_slots, SLOTS)
    row = (tl.program_id(0) // num_parts).to(tl.int64)
    slot = tl.program_id(0) % num_parts * SLOTS + tl.arange(0, SLOTS)
    inside = slot < num_slots
    real = inside
    if MASKED:
        real = tl.load(valid + row * num_slots + slot, inside, 0) != 0
    here = time + row * num_slots
    t = tl.load(here + slot, real, 0)
    if not ALONE:
        first, older = _neighbours(valid, row, slot, num_slots, MASKED, STEP)
    to = out + (row * num_slots + slot) * COLUMNS
    begin = 0
    for which in tl.static_range(len(KINDS)):
        span = t
        if KINDS[which] == _SINCE_LATEST:
            span = tl.where(real, tl.load(here + first, first < num_slots, 0) - t, 0)
        if KINDS[which] == _GAP:
            has_older = real & (older < num_slots)
            span = tl.where(has_older, t - tl.load(here + older, has_older, 0), 0)
        _put(
            to + begin,
            span,
            inside,
            frequencies[which],
            phases[which],
            per_second,
            quarters,
            PERIODS[which],
            WAVES[which],
            PHASED[which],
        )
        begin += 2 * PERIODS[which] + 1


def fill(
    out: Tensor,
    time: Tensor,
    valid: Tensor | None,
    kinds: Sequence[int],
    frequencies: Sequence[Tensor],
    phases: Sequence[Tensor | None],
    per_second: int,
    quarters: int,
) -> None:
    """Write the features of all kinds, side by side, into ``out``; all are contiguous.

    Args:
        out: (B, M, columns) float32.
        time: (B, M) int64.
        valid: (B, M) bool, or None: all are.
        kinds: of TIME, SINCE_LATEST and GAP.
        frequencies: of each kind (1 or more, P) int64, turns per unit of time, in 2**-64.
        phases: of each kind (2P,) float32, or None: zeros.
        per_second: how many units of time.
        quarters: of a turn that every wave is ahead.
    """
    num_rows, num_slots = time.shape
    if out.numel() == 0:
        return
    sizes = sizes_of(kinds, [one.shape[-1] for one in frequencies], [one is not None for one in phases])
    each = zip(frequencies, phases, strict=True)
    given = tuple(frequencies), tuple(one if phase is None else phase for one, phase in each)
    mask = None if valid is None else valid.view(torch.uint8)
    with torch.cuda.device_of(out):
        encode[(num_rows * triton.cdiv(num_slots, sizes["SLOTS"]),)](
            out, time, mask, *given, per_second, quarters, num_slots, MASKED=mask is not None, **sizes
        )


def sizes_of(kinds: Sequence[int], num_periods: Sequence[int], phased: Sequence[bool]) -> dict[str, Any]:
    """What the kernel is built for."""
    waves = tuple(1 << (2 * num - 1).bit_length() for num in num_periods)
    columns = sum(2 * num + 1 for num in num_periods)
    sizes: dict[str, Any] = {
        "KINDS": tuple(kinds),
        "PERIODS": tuple(num_periods),
        "WAVES": waves,
        "PHASED": tuple(phased),
    }
    return sizes | {
        "COLUMNS": columns,
        "SLOTS": min(_MOST_SLOTS, max(1, _TILE // max(waves))),
        "STEP": _STEP,
        "ALONE": set(kinds) == {TIME},
    }
