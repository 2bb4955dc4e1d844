"""Forms of one operation beside each other: checked against float64, and timed only where they are right."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from benchmarks._machine import Rates
from benchmarks._timing import Table, runs

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler says on stderr whenever it starts

Form: TypeAlias = Callable[[Any], Sequence[Tensor]]


class Comparison(NamedTuple):
    """One operation at one size, in our form, which comes first, and in those that a user would pick instead."""

    op: str
    sizes: Mapping[str, int]
    dtype: str
    batches: Sequence[Any]
    """What the forms are given, in turn, so that no call finds what the last one left in the cache."""
    exact: Form
    """Outputs, and gradients where there are any, in float64."""
    forms: Mapping[str, Form]
    """The same outputs in the same order."""
    allowed: float
    """How far a number may be from the exact one, of the largest of its tensor."""
    flops: float = 0.0
    """That no form can do without."""
    moved: float = 0.0
    """Bytes that no form can do without, read and written."""
    bars: Mapping[str, float] = {}
    """How many times faster than other forms ours is to be."""
    absent: Mapping[str, str] = {}
    """Peers that are not here, and why."""
    rounds: int = 7


class Row(NamedTuple):
    """What was seen of one form."""

    form: str
    error: float
    """Of the largest number of its tensor, the worst of all outputs."""
    seconds: float | None
    """The median; None of a form that is wrong, which is not timed."""
    spread: tuple[float, float] | None
    """The lower and upper quartile."""
    extra_bytes: int | None
    """The most that a call holds at once beside what it gives back."""
    of_floor: float | None
    """The time that the work takes at the measured rates, of the time that it took."""
    replayed: float | None = None
    """The median where a CUDA graph replays what a call did, so that the host launches nothing; None where none can."""
    kernels: int | None = None
    """How many a call launches on a GPU, copies included."""


def measure(one: Comparison, rates: Rates, device: torch.device) -> list[Row]:
    """Check every form on every batch, and time those that are right."""
    errors = dict.fromkeys(one.forms, 0.0)
    for batch in one.batches:
        want = one.exact(batch)
        errors = {name: max(errors[name], _error(form(batch), want)) for name, form in one.forms.items()}
        del want
    right = {name: form for name, form in one.forms.items() if errors[name] <= one.allowed}
    turns = {name: itertools.cycle(one.batches) for name in right}
    calls = {name: lambda name=name: right[name](next(turns[name])) for name in right}  # type: ignore[misc]
    held = {name: extra_bytes(call, device) for name, call in calls.items()}
    taken = runs(calls, rounds=one.rounds, device=device)
    on_gpu = dict.fromkeys(right, (None, None)) if device.type != "cuda" else _on_a_gpu(one, right, device)
    floor = rates.floor(one.flops, one.moved)
    rows = []
    for name in one.forms:
        if name not in right:
            rows.append(Row(name, errors[name], None, None, None, None))
            continue
        low, middle, high = statistics.quantiles(taken[name], n=4)
        share = floor / middle if floor else None
        rows.append(Row(name, errors[name], middle, (low, high), held[name], share, *on_gpu[name]))
    return rows


def is_wrong(rows: Sequence[Row]) -> bool:
    """Whether our form is, which a peer may be."""
    return rows[0].seconds is None


def missed(one: Comparison, rows: Sequence[Row]) -> list[str]:
    """The bars that are not met."""
    ours = rows[0].seconds
    if ours is None:
        return [f"{rows[0].form} is wrong by {rows[0].error:.2g} (allowed {one.allowed:.2g})"]
    times = {row.form: row.seconds / ours for row in rows if row.seconds is not None}
    short = {name: bar for name, bar in one.bars.items() if name in times and times[name] < bar}
    return [f"{times[name]:.2f} times {name}, not {bar:g}" for name, bar in short.items()]


def named_sizes(sizes: Mapping[str, int], without: str | None = None) -> str:
    """The sizes of an operation as text."""
    return ", ".join(f"{name} {size:,}" for name, size in sizes.items() if name != without)


def show(one: Comparison, rows: Sequence[Row]) -> None:
    """Print a table."""
    ours = rows[0].seconds
    cells: list[tuple[object, ...]] = []
    for row in rows:
        if row.seconds is None:
            cells.append((row.form, f"wrong by {row.error:.2g}: not timed", "", "", "", row.error))
            continue
        times = row.seconds / ours if ours else float("nan")
        mib = "" if row.extra_bytes is None else row.extra_bytes / 2**20
        share = "" if row.of_floor is None else f"{row.of_floor:.0%}"
        cells.append((row.form, 1000 * row.seconds, times, share, mib, row.error))
        if row.kernels is not None:
            cells[-1] += ("cannot" if row.replayed is None else 1000 * row.replayed, row.kernels)
    cells += [(name, f"absent: {why}", "", "", "", "") for name, why in one.absent.items()]
    sizes = named_sizes(one.sizes)
    bars = "".join(f", bar {bar:g} times {name}" for name, bar in one.bars.items())
    header: tuple[str, ...] = "form", "ms", "times ours", "of floor", "extra MiB", "error"
    if any(row.kernels is not None for row in rows):
        header += "ms replayed", "kernels"
    cells = [cell + ("",) * (len(header) - len(cell)) for cell in cells]
    Table(f"{one.op}: {sizes}, {one.dtype}{bars}", header, cells, missed(one, rows)).show()


def extra_bytes(call: Callable[[], Sequence[Tensor]], device: torch.device) -> int:
    """The most that torch holds at once during a call, beside what it held before and what is given back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        given = call()
        return torch.cuda.max_memory_allocated(device) - before - _num_bytes(given)
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        given = call()
    results: Any = profile.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(held, default=0) - _num_bytes(given)


def _on_a_gpu(
    one: Comparison, forms: Mapping[str, Form], device: torch.device
) -> dict[str, tuple[float | None, int | None]]:
    """Of each form the median seconds of a graph's replay, in turn as any other run, and the kernels of a call."""
    graphs = {name: _captured(form, one.batches) for name, form in forms.items()}
    turns = {name: itertools.cycle(some) for name, some in graphs.items() if some}
    calls = {name: lambda name=name: next(turns[name]).replay() for name in turns}  # type: ignore[misc]
    taken = {name: statistics.median(some) for name, some in runs(calls, rounds=one.rounds, device=device).items()}
    return {name: (taken.get(name), _num_kernels(form, one.batches[0])) for name, form in forms.items()}


def _captured(form: Form, batches: Sequence[Any]) -> list[torch.cuda.CUDAGraph]:
    """A graph of a call on each batch; none of a form that waits for the device, or has graphs of its own."""
    graphs = []
    try:
        for batch in batches:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                form(batch)
            torch.cuda.current_stream().wait_stream(aside)
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                form(batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()
        return []
    return graphs


def _num_kernels(form: Form, batch: Any) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        form(batch)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events() or ())


def _num_bytes(given: Sequence[Tensor]) -> int:
    """Of memory, which views share."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in given}.values())


def _error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest difference from what is exact, of the largest number of its tensor; infinite where shapes differ."""
    worst = 0.0
    if [one.shape for one in got] != [one.shape for one in want]:
        return float("inf")
    for one, other in zip(got, want, strict=True):
        apart = (one.double() - other).abs().max() / other.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        worst = max(worst, float("inf") if apart.isnan() else apart.item())
    return worst
