"""The three time encodings of an action at once: its time, how long before the latest action, how long after the next.

The plain form takes its sines and cosines in float64, where times of today have digits enough.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks._comparison import Comparison
from benchmarks._compiled import compiled
from recblocks import PINNERFORMER_PERIODS, LogPeriodicTimeEncoder, log_spaced_periods
from recblocks.features.time import encode_action_times, gap_to_next_older, time_since_latest

NUM_USERS, SLOTS, NUM_BATCHES = 256, 256, 4
BETWEEN = log_spaced_periods(32, shortest=1.0, longest=28 * 86400.0)
Encoders: TypeAlias = tuple[LogPeriodicTimeEncoder, LogPeriodicTimeEncoder, LogPeriodicTimeEncoder]
USES = PINNERFORMER_PERIODS, BETWEEN, BETWEEN


def times(generator: torch.Generator) -> Tensor:
    """(users, slots) in milliseconds, newest first: a year's actions."""
    ago = torch.rand(NUM_USERS, SLOTS, generator=generator, dtype=torch.float64) * 365 * 86_400_000
    return 1_760_000_000_000 - ago.long().sort(1).values


def spans(time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return time, time_since_latest(time), gap_to_next_older(time)


@torch.no_grad()
def ours(encoders: Encoders, time: Tensor) -> list[Tensor]:
    found = encode_action_times(time, None, None, encoders)
    if len(found) == 1:  # of one kernel
        found = list(found[0].split([encoder.out_dim for encoder in encoders], -1))
    return _apart(found)


def in_float64(time: Tensor) -> list[Tensor]:
    found = []
    for t, periods in zip(spans(time), USES, strict=True):
        seconds = t.double() / 1000
        angle = seconds[..., None] * (2 * math.pi / torch.tensor(periods, dtype=torch.float64, device=t.device))
        waves = torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)
        found.append(torch.cat([waves, seconds.log1p()[..., None]], -1).float())
    return _apart(found)


def exact(time: Tensor) -> list[Tensor]:
    """Turns in 80 bits, of which a time of today leaves 31 behind the point; then float64."""
    found = []
    for t, periods in zip(spans(time), USES, strict=True):
        turns = t.cpu().numpy().astype(np.longdouble)[..., None] / (np.array(periods, dtype=np.longdouble) * 1000)
        angle = torch.from_numpy((turns - np.floor(turns)).astype(np.float64)).to(t.device) * (2 * math.pi)
        waves = torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)
        found.append(torch.cat([waves, (t.double() / 1000).log1p()[..., None]], -1))
    return _apart(found)


def _apart(found: list[Tensor]) -> list[Tensor]:
    """Waves, of 1 at most, and logarithms, so that an error is of the one or of the other."""
    return [piece for one in found for piece in (one[..., :-1], one[..., -1])]


def comparisons(device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator().manual_seed(0)
    num = NUM_USERS * SLOTS
    width = sum(2 * len(periods) + 1 for periods in USES)
    first, second, third = (LogPeriodicTimeEncoder(periods, unit="ms", device=device) for periods in USES)
    yield Comparison(
        op="log-periodic time, three uses",
        sizes={"users": NUM_USERS, "slots": SLOTS},
        dtype="int64 to float32",
        batches=[times(generator).to(device) for _ in range(NUM_BATCHES)],
        exact=exact,
        forms={"recblocks": functools.partial(ours, (first, second, third)), "float64": in_float64}
        | compiled("float64", in_float64, device),
        allowed=2e-6,
        moved=num * (8 + 4 * width),
        bars={"float64": 3.0},
    )
