"""Training pairs a second of one core, anchors included, from memory-mapped timelines; the bar is dense all action's.

The rate is by processor time, so that a busy machine does not change it; the wall time stands beside it.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch

from benchmarks._timing import Table, interleaved
from recblocks import (
    Examples,
    Timelines,
    all_action,
    dense_all_action,
    dense_all_positives,
    next_action,
    sample_anchors,
    sasrec,
    write_timelines,
)
from tests import oracles

BAR = 500  # thousand pairs a second
USERS, ACTIONS_PER_USER, DAYS = 2000, 600, 365  # Complete Journey's size, and its 600 lines a household
USERS_PER_BATCH, MAX_SEQUENCES, MAX_LEN, WINDOW_DAYS, MAX_LABELS = 64, 4, 256, 28, 32
OBJECTIVES: dict[str, Callable[..., Examples]] = {
    "next action": next_action,
    "SASRec": sasrec,
    "all action": functools.partial(all_action, window_days=WINDOW_DAYS, max_labels=MAX_LABELS),
    "dense all action": functools.partial(dense_all_action, window_days=WINDOW_DAYS, max_labels=MAX_LABELS),
    "every positive": functools.partial(dense_all_positives, window_days=WINDOW_DAYS),
}


def build(folder: str) -> Timelines:
    """Baskets: an action's time is one of a user's 60, so ties are common."""
    generator = torch.Generator().manual_seed(0)
    count = USERS * ACTIONS_PER_USER
    user = torch.arange(USERS).repeat_interleave(ACTIONS_PER_USER)
    baskets = torch.randint(DAYS * 86_400, (USERS, 60), generator=generator)
    basket = torch.randint(60, (count,), generator=generator)
    return write_timelines(
        folder,
        user=user,
        time=baskets[user, basket],
        item=torch.randint(60_000, (count,), generator=generator),
        action_type=torch.randint(4, (count,), generator=generator, dtype=torch.int8),
        duration=20 * torch.rand(count, generator=generator),
        unit="s",
    )


def positive(action: dict[str, torch.Tensor]) -> torch.Tensor:
    return (action["action_type"] < 2) & (action["duration"] > 10)


def batch(timelines: Timelines, name: str, users: torch.Tensor, generator: torch.Generator) -> Examples:
    anchors = sample_anchors(timelines, users, fraction=0.1, max_sequences=MAX_SEQUENCES, generator=generator)
    draws = {} if name == "every positive" else {"generator": generator}
    return OBJECTIVES[name](timelines, anchors, max_len=MAX_LEN, positive=positive, **draws)


def check(timelines: Timelines, name: str) -> None:
    """Of three users, every pair is one that the scalar definition allows, and there are as many as it says."""
    examples = batch(timelines, name, torch.arange(3), torch.Generator().manual_seed(1))
    flags = positive(timelines.columns)
    for row, user in enumerate(examples.users.tolist()):
        at = int(timelines.rows_of(torch.tensor([user])))
        start, end = int(timelines.starts[at]), int(timelines.ends[at])
        times, good = timelines.columns["time"][start:end].tolist(), flags[start:end].tolist()
        slots = oracles.input_slots(times, int(examples.actions[row, 0]) - start, MAX_LEN)
        allowed = {}
        for slot, place in enumerate(slots[:1] if name in ("next action", "all action") else slots):
            if name in ("next action", "SASRec"):
                allowed[slot] = {j for j in oracles.next_event(times, place, None) if good[j]}
            else:
                allowed[slot] = set(oracles.window_positives(times, good, place, WINDOW_DAYS * 86_400, None))
        here = examples.pair_row == row
        places = (examples.pair_label[here] - start).tolist()
        pairs = list(zip(examples.pair_slot[here].tolist(), places, strict=True))
        able = sum(bool(labels) for labels in allowed.values())
        every = sum(map(len, allowed.values()))
        wanted = {
            "all action": min(MAX_LABELS, every),
            "dense all action": min(MAX_LABELS, able),
            "every positive": every,
        }.get(name, len(pairs))
        if len(set(pairs)) != wanted or any(place not in allowed[slot] for slot, place in pairs):
            raise AssertionError(f"{name}: row {row} has pairs that the definition does not allow, or too few")


def missed(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    return [f"{rate} thousand pairs/s of {name}, not {BAR}" for name, *_, rate, bar in rows if bar and rate < BAR]


def tables() -> Iterator[Table]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            timelines = build(folder)
            for name in OBJECTIVES:
                check(timelines, name)
            order = torch.randperm(USERS, generator=torch.Generator().manual_seed(2))
            users = cycle(order.split(USERS_PER_BATCH))
            generator = torch.Generator().manual_seed(3)
            pairs: dict[str, list[int]] = {name: [] for name in OBJECTIVES}
            processor: dict[str, list[float]] = {name: [] for name in OBJECTIVES}

            def draw(name: str) -> None:
                start = time.process_time()
                pairs[name].append(batch(timelines, name, next(users), generator).pair_row.shape[0])
                processor[name].append(time.process_time() - start)

            calls = {name: functools.partial(draw, name) for name in OBJECTIVES}
            seconds = interleaved(calls, rounds=31)
    finally:
        torch.set_num_threads(threads)
    rows = []
    for name, wall in seconds.items():
        mean, spent = statistics.mean(pairs[name]), statistics.median(processor[name])
        bar = f">= {BAR}" if name == "dense all action" else ""
        rows.append((name, round(mean), 1e3 * wall, 1e3 * spent, round(mean / spent / 1e3), bar))
    title = f"anchors + pairs, one core: {USERS_PER_BATCH} users a batch, {MAX_SEQUENCES} sequences each of {MAX_LEN}"
    header = ("objective", "pairs", "wall ms", "core ms", "thousand pairs/s", "bar")
    yield Table(title, header, rows, missed(rows))
