"""Actions a second of the three simulated worlds, at their full size; the bar is 300 thousand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks._timing import Table, interleaved
from recblocks import INTERESTS, MARKOV, UNIFORM, World, simulate

BAR = 300  # thousand actions a second


def check(world: World) -> tuple[int, int]:
    """Refuse to time a simulation whose tables do not fit together; its numbers of actions and impressions."""
    one = simulate(world)
    user, time = one.actions["user"], one.actions["time"]
    assert bool(((time.diff() > 0) | (user.diff() > 0)).all()), "actions must run by user, then time"
    acted = one.impressions["action_type"] >= 0
    assert torch.equal(one.impressions["item"][acted], one.actions["item"]), "every action must be an impression"
    assert torch.equal(one.actions["time"], simulate(world).actions["time"]), "a seed must repeat itself"
    return user.numel(), acted.numel()


def missed(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    return [f"{rate:.0f} thousand actions/s of {name}, not {BAR}" for name, *_, rate in rows if rate < BAR]


def tables() -> Iterator[Table]:
    worlds = {"interests": INTERESTS, "markov": MARKOV, "uniform": UNIFORM}
    sizes = {name: check(world) for name, world in worlds.items()}
    seconds = interleaved({name: lambda world=world: simulate(world) for name, world in worlds.items()}, rounds=5)
    rows = [(name, *sizes[name], seconds[name], sizes[name][0] / seconds[name] / 1e3) for name in worlds]
    header = ("world", "actions", "impressions", "seconds", "thousand actions/s")
    yield Table(f"Simulator, {torch.get_num_threads()} thread(s)", header, rows, missed(rows))
