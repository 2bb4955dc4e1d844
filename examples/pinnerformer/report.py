"""The report: a table in the terminal, and a page with plots that needs no other file."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import rich.table
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

import recblocks
from examples.page import Table, curves, empty_plot, legend, line, who_wins, write_page
from examples.pinnerformer.data import Dataset
from examples.pinnerformer.evaluate import LIST, Judged, K
from recblocks import Interval


@dataclasses.dataclass(frozen=True)
class Row:
    """One method in the table."""

    name: str
    first: Interval
    """Recall@10 in the first window."""
    mean: Interval
    """The mean over all windows."""
    less: Interval | None
    """PinnerFormer's mean minus this method's, over the same users; None for PinnerFormer itself."""
    coverage: float | None
    entropy: float | None


def compare(data: Dataset, judged: Sequence[Judged], *, num_resamples: int = 10_000) -> list[Row]:
    """Intervals of every method, and of its difference to the first one."""
    topics = data.topics[data.corpus]
    rows = []
    for one in judged:
        present = one.present

        def generator() -> torch.Generator:
            return torch.Generator().manual_seed(0)  # every method is judged on the same resamples

        less = None
        if one is not judged[0]:
            less = recblocks.paired_bootstrap(
                judged[0].recall, one.recall, present=present, num_resamples=num_resamples, generator=generator()
            )
        first, mean = (
            recblocks.bootstrap_mean(recall, present=there, num_resamples=num_resamples, generator=generator())
            for recall, there in ((one.recall[:, 0], present[:, 0]), (one.recall, present))
        )
        coverage = entropy = None
        if one.lists is not None:
            items, _, valid = one.lists
            coverage = float(recblocks.coverage_at_k(items, num_items=len(topics), k=K, valid=valid))
            entropy = float(recblocks.interest_entropy_at_k(items, topics, k=LIST, valid=valid))
        rows.append(Row(one.name, first, mean, less, coverage, entropy))
    return rows


def verdict(rows: Sequence[Row]) -> list[str]:
    """Say plainly who wins."""
    return who_wins(rows[0].name, {row.name: row.less for row in rows[1:] if row.less is not None})


def show(console: Console, title: str, rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Print the table."""
    table = rich.table.Table(title=title)
    for name in HEADINGS:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row), style="bold" if row.less is None else None)
    console.print(table)
    for note in notes:
        console.print(note)


HEADINGS = ("method", f"R@{K} first", f"R@{K} all windows", "PinnerFormer minus it", "coverage", "entropy")


def _cells(row: Row) -> list[str]:
    def with_ends(interval: Interval, sign: str = "") -> str:
        return f"{interval.mean:{sign}.4f} [{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]"

    return [
        row.name,
        f"{row.first.mean:.4f}",
        with_ends(row.mean),
        "" if row.less is None else with_ends(row.less, "+"),
        "" if row.coverage is None else f"{row.coverage:.4f}",
        "" if row.entropy is None else f"{row.entropy:.2f}",
    ]


def write(
    path: pathlib.Path, title: str, rows: Sequence[Row], notes: Sequence[str], figures: dict[str, Figure]
) -> None:
    """Write the page."""
    ours = [number for number, row in enumerate(rows) if row.less is None]
    write_page(path, title, [Table("", HEADINGS, [_cells(row) for row in rows], ours)], notes, figures)


def plots(
    data: Dataset, judged: Sequence[Judged], loss: dict[str, list[float]], temperature: dict[str, list[float]]
) -> dict[str, Figure]:
    """All plots by caption."""
    figures = {
        f"Recall@{K} by activity: five equal groups of users by their actions before the cut": _activity(data, judged)
    }
    if judged[0].recall.shape[1] > 1:
        figures = {f"Recall@{K} by window": _windows(judged)} | figures
    figures["Coverage: how few items account for the lists"] = _coverage(data, judged)
    figures["Loss, mean of 20 steps"] = curves(loss, "loss")
    figures["Learned temperature"] = curves(temperature, "temperature")
    return figures


def _windows(judged: Sequence[Judged]) -> Figure:
    figure, axes = empty_plot("window of 14 days after the cut", f"Recall@{K}")
    for number, one in enumerate(judged):
        means = (one.recall * one.present).sum(0) / one.present.sum(0)
        line(axes, number, range(1, len(means) + 1), means, one.name, marker="o", markersize=3)
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def _activity(data: Dataset, judged: Sequence[Judged]) -> Figure:
    figure, axes = empty_plot("median number of actions before the cut", f"Recall@{K}")
    past, _ = recblocks.split_by_time(data.judged, data.cut)
    actions = past.ends - past.starts
    groups = [group for group in actions.argsort().tensor_split(5) if len(group)]
    middles = [max(1.0, float(actions[group].float().median())) for group in groups]
    for number, one in enumerate(judged):
        means = [_mean_of(one, group) for group in groups]
        line(axes, number, middles, torch.tensor(means), one.name, marker="o", markersize=3)
    axes.set_xscale("log")
    axes.set_xticks(middles, [f"{middle:.0f}" for middle in middles])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def _mean_of(judged: Judged, users: Tensor) -> float:
    present = judged.present[users]
    return float((judged.recall[users] * present).sum() / present.sum())


def _coverage(data: Dataset, judged: Sequence[Judged]) -> Figure:
    figure, axes = empty_plot("share of the corpus", f"share of everybody's first {K}")
    for number, one in enumerate(judged):
        if one.lists is None:
            continue
        shown = one.lists.items[:, :K][one.lists.valid[:, :K]]
        counts = torch.unique(shown, return_counts=True)[1].sort(descending=True).values.cumsum(0)
        share = torch.arange(1, len(counts) + 1) / len(data.corpus)
        line(axes, number, share, counts / counts[-1], one.name)
    axes.axhline(0.9, color="#888", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    legend(axes)
    return figure
