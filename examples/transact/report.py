"""The report: tables in the terminal, and a page with calibration and loss."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import rich.table
from matplotlib.figure import Figure
from rich.console import Console

from examples.page import Table, curves, empty_plot, interval_text, legend, who_wins, write_page
from examples.transact.evaluate import Judged, Jury, K
from recblocks import Interval


def show(console: Console, tables: Sequence[Table], notes: Sequence[str]) -> None:
    """Print the tables."""
    for table in tables:
        printed = rich.table.Table(title=table.title)
        for place, heading in enumerate(table.headings):
            printed.add_column(heading, justify="left" if place == 0 else "right")
        for number, row in enumerate(table.rows):
            printed.add_row(*row, style="bold" if number in table.marked else None)
        console.print(printed)
    for note in notes:
        console.print(note)


def write(
    path: pathlib.Path, name: str, tables: Sequence[Table], figures: dict[str, Figure], notes: Sequence[str]
) -> None:
    """Write the page."""
    write_page(path, f"Rankers on {name}", tables, notes, figures)


def plots(jury: Jury, judged: Sequence[Judged], losses: dict[str, list[float]]) -> dict[str, Figure]:
    """All plots by caption."""
    figures = {
        f"Calibration of {head}: observed against predicted, ten bins": _calibration(jury, judged, place)
        for place, head in enumerate(jury.data.heads)
    }
    return figures | {"Loss, mean of 20 steps": curves(losses, "loss")}


class Less(NamedTuple):
    """What the first ranker has more than another, in one head; distinct categories are of no head."""

    hit: Interval
    auc: Interval
    chunk_auc: Interval
    topics: Interval


def compare(jury: Jury, judged: Sequence[Judged]) -> dict[str, dict[str, Less]]:
    """The first ranker less the others, by head: less everything in the primary one, less other rankers elsewhere."""
    first, *others = judged
    topics = {other.name: jury.less_diverse(first, other) for other in others}
    return {
        head: {
            other.name: Less(
                jury.less_hit(first, other, place),
                jury.less_auc(first, other, place),
                jury.less_chunk_auc(first, other, place),
                topics[other.name],
            )
            for other in others
            if other.is_model or head == jury.data.primary
        }
        for place, head in enumerate(jury.data.heads)
    }


def verdict(jury: Jury, judged: Sequence[Judged], less: Mapping[str, Mapping[str, Less]]) -> list[str]:
    """Say plainly who wins."""
    head, first = jury.data.primary, judged[0].name
    places = {f"HIT@{K}": 0, "AUC": 1, "AUC in requests": 2}
    return [
        f"By {measure} of {head}: "
        + " ".join(who_wins(first, {name: each[place] for name, each in less[head].items()}))
        for measure, place in places.items()
    ]


def tables(jury: Jury, judged: Sequence[Judged], less: Mapping[str, Mapping[str, Less]]) -> list[Table]:
    """One table a head with its bound, diversity, and what the first ranker wins or loses in each head."""
    result = []
    bounded = [*judged, jury.oracle()]
    for place, head in enumerate(jury.data.heads):
        rows = []
        for one in bounded:
            found = jury.head(one, place)
            calibrated = found.calibration
            rows.append(
                [one.name, interval_text(found.hit), interval_text(found.auc), interval_text(found.chunk_auc)]
                + (["", ""] if calibrated is None else [f"{calibrated.ratio:.2f}", f"{calibrated.error:.4f}"])
            )
        headings = ("ranker", f"HIT@{K} a request", "AUC", "AUC in requests", "predicted / observed", "error")
        result.append(Table(head, headings, rows, [0]))
    rows = [[one.name, interval_text(jury.diversity(one))] for one in judged]
    result.append(Table("Diversity", ("ranker", f"distinct categories in the top {K}"), rows, [0]))
    headings = ("less", f"HIT@{K} a request", "AUC", "AUC in requests", "distinct categories")
    for head, others in less.items():
        rows = [[name, *(interval_text(interval, "+") for interval in each)] for name, each in others.items()]
        if rows:
            result.append(Table(f"{judged[0].name} minus the others, {head}", headings, rows))
    return result


def _calibration(jury: Jury, judged: Sequence[Judged], head: int) -> Figure:
    figure, axes = empty_plot("predicted", "observed")
    most = 0.0
    for one in judged:
        if not one.is_model:
            continue
        found = jury.calibration(one, head)
        axes.plot(found.predicted, found.observed, marker="o", markersize=3, label=one.name)
        most = max(most, float(found.predicted.max()), float(found.observed.max()))
    axes.plot([0, most], [0, most], color="#888", linewidth=0.8, linestyle=":")
    legend(axes)
    return figure
