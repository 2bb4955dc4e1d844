"""`CountMinSketch.update` against Apache datasketches' count-min sketch, which takes one id a call."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import datasketches
import torch
from torch import Tensor

from benchmarks._timing import Table, interleaved
from recblocks import CountMinSketch

BAR = 5  # times as fast as Apache's
IDS_A_ROUND = 1 << 18
BATCHES = 4  # other ids each round, so that none of their counters wait in the cache
ROUNDS = 9


def zipf_ids(num: int, distinct: int, generator: torch.Generator) -> Tensor:
    """Ids whose popularity falls as one over their rank, spread over all of int64."""
    rank = torch.exp(torch.rand(num, generator=generator, dtype=torch.float64) * torch.tensor(float(distinct)).log())
    return rank.long() * 0x9E3779B97F4A7C1


def check(width: int, depth: int, ids: Tensor) -> None:
    """Neither undercounts, and each is over by more than e / width of the total for at most a share exp(-depth)."""
    ours, theirs = CountMinSketch(width, depth), datasketches.count_min_sketch(depth, width)
    ours.update(ids)
    for item in ids.tolist():
        theirs.update(item)
    distinct, counts = ids.unique(return_counts=True)
    answers = {
        "ours": ours.query(distinct),
        "Apache": torch.tensor([theirs.get_estimate(item) for item in distinct.tolist()], dtype=torch.float64),
    }
    bound = torch.e * len(ids) / width
    for name, answer in answers.items():
        over = answer - counts
        if (over < 0).any() or (over > bound).double().mean() > torch.exp(torch.tensor(-float(depth))):
            raise AssertionError(f"{name}: not a count-min sketch at width {width}, depth {depth}")


def row(num_ids: int, epsilon: float, delta: float) -> tuple[object, ...]:
    ours = CountMinSketch.from_error(epsilon, delta)
    theirs = datasketches.count_min_sketch(ours.depth, ours.width)
    generator = torch.Generator().manual_seed(0)
    calls = max(IDS_A_ROUND // num_ids, 1)
    batches = [zipf_ids(num_ids, 10**6, generator) for _ in range(BATCHES * calls)]
    check(ours.width, ours.depth, batches[0][:50_000])
    lists = [batch.tolist() for batch in batches]
    tensors, from_tensors, from_lists = cycle(batches), cycle(batches), cycle(lists)

    def apache(ids: list[int]) -> None:
        deque(map(theirs.update, ids), maxlen=0)

    seconds = interleaved(
        {
            "ours": lambda: [ours.update(next(tensors)) for _ in range(calls)],
            "Apache, from a tensor": lambda: [apache(next(from_tensors).tolist()) for _ in range(calls)],
            "Apache, from a list": lambda: [apache(next(from_lists)) for _ in range(calls)],
        },
        rounds=ROUNDS,
    )
    our_time, *their_times = [1e9 * each / (calls * num_ids) for each in seconds.values()]
    return (num_ids, f"{ours.depth} x {ours.width}", our_time, *their_times, *[each / our_time for each in their_times])


def missed(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    return [
        f"{times:.2f} times Apache, from a {given}, not {BAR}: {num_ids:,} ids a call, {shape}"
        for num_ids, shape, *_, of_tensor, of_list in rows
        for given, times in (("tensor", of_tensor), ("list", of_list))
        if times < BAR
    ]


def tables() -> Iterator[Table]:
    rows = [
        row(8192, 1e-3, 0.01),
        row(8192, 1e-4, 0.01),
        row(65_536, 1e-4, 0.01),
        row(65_536, 1e-5, 0.01),
        row(1_048_576, 1e-4, 0.01),
        row(1_048_576, 1e-5, 0.001),
    ]
    yield Table(
        "sketch update, nanoseconds an id; Apache's by map(), from the same tensor or from a ready list "
        f"(bar: {BAR} times)",
        ("ids a call", "depth x width", "ours", "Apache, tensor", "Apache, list", "times", "times"),
        rows,
        missed(rows),
    )
