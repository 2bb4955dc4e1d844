"""A report as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from recblocks import Interval

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { display: block; overflow-x: auto; border-collapse: collapse;
  font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .3rem .45rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal }
.ours { font-weight: 600; background: #eef4fb }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
figure { margin: 0 } img { max-width: 100% } figcaption { color: #555; font-size: 14px }
"""


class Table(NamedTuple):
    """Rows of text under headings; those numbered in ``marked`` stand out."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()


def interval_text(interval: Interval, sign: str = "") -> str:
    """A mean and its interval; with sign "+" as a difference."""
    return f"{interval.mean:{sign}.4f} [{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]"


def who_wins(ours: str, less: Mapping[str, Interval]) -> list[str]:
    """Say plainly who is better than ours, by how much more ours has than each of the others."""
    groups: dict[str, list[str]] = {"better": [], "equal": [], "worse": []}
    for name, interval in less.items():
        groups["worse" if interval.low > 0 else "better" if interval.high < 0 else "equal"].append(name)
    sentences = {
        "better": f"Better than {ours}: {'; '.join(groups['better'])}.",
        "equal": f"Not told apart from {ours}: {'; '.join(groups['equal'])}.",
        "worse": f"{ours} is better than: {'; '.join(groups['worse'])}.",
    }
    return [sentence for group, sentence in sentences.items() if groups[group]]


def write_page(
    path: pathlib.Path, title: str, tables: Sequence[Table], notes: Sequence[str], figures: dict[str, Figure]
) -> None:
    """Write the page; its plots are inside it."""
    said = "\n".join(f"<p>{html.escape(note)}</p>" for note in notes)
    plots = "\n".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{_png(figure)}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, figure in figures.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{"".join(map(_table, tables))}
{said}
<div class="plots">
{plots}
</div></body></html>
""",
        encoding="utf-8",
    )


def empty_plot(x: str, y: str) -> tuple[Figure, Axes]:
    """An empty plot in the house's style."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    drawn = figure.subplots()
    drawn.set(xlabel=x, ylabel=y)
    drawn.grid(alpha=0.3)
    drawn.spines[["top", "right"]].set_visible(False)
    return figure, drawn


def legend(drawn: Axes) -> None:
    """Name the lines beside the plot."""
    drawn.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def line(drawn: Axes, number: int, x: Sequence[float] | Tensor, y: Tensor, name: str, **style: object) -> None:
    """The number-th line of a plot; the first one stands out."""
    drawn.plot(
        x,
        y,
        color=f"C{number % 10}",
        linestyle="-" if number < 10 else "--",
        linewidth=2.5 if number == 0 else 1.3,
        label=name,
        **style,
    )


def curves(values: dict[str, list[float]], name: str) -> Figure:
    """What became of a number in training, by model: means of 20 steps."""
    figure, drawn = empty_plot("step", name)
    for number, (label, curve) in enumerate(values.items()):
        if curve:
            blocks = torch.tensor(curve).split(20)
            steps = torch.tensor([len(block) for block in blocks]).cumsum(0)
            line(drawn, number, steps, torch.stack([block.mean() for block in blocks]), label)
    legend(drawn)
    return figure


def _table(table: Table) -> str:
    heading = f"<h2>{html.escape(table.title)}</h2>" if table.title else ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.headings)
    body = "\n".join(
        f"<tr{' class=ours' if number in table.marked else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for number, row in enumerate(table.rows)
    )
    return f"{heading}<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>\n"


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return base64.b64encode(buffer.getvalue()).decode()
