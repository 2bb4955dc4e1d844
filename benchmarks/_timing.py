"""Medians of interleaved runs, so that a machine whose speed drifts is unfair to nobody."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


def keep_memory() -> None:
    """Have glibc keep what it was given back, as it does in a process that has run for long.

    Else it is a process's luck which call gets its output from the system page by page: 10 MB of it cost 1 to 5 ms.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def runs(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 7, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Run every call once to warm up, then in turn (A B A B ...); the seconds of each run of each."""

    def wait() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 7, device: torch.device | None = None
) -> dict[str, float]:
    """The median of `runs` of each call."""
    return {name: statistics.median(some) for name, some in runs(calls, rounds=rounds, device=device).items()}


def three_digits(value: float) -> str:
    """Three digits, and no exponent where it is large."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


class Table(NamedTuple):
    """What is printed, and written down, of what was seen."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[object, ...]]
    missed: Sequence[str] = ()
    """The bars that are not met."""

    def cells(self) -> list[tuple[str, ...]]:
        """The rows as text."""
        return [
            tuple(three_digits(cell) if isinstance(cell, float) else str(cell) for cell in row) for row in self.rows
        ]

    def show(self) -> None:
        """Print the rows as aligned columns, and the bars that are not met."""
        cells = [self.header, *self.cells()]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.header))]
        print(f"\n{self.title}")
        for row in cells:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for line in self.missed:
            print(f"  missed: {line}")
