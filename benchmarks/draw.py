"""``python -m benchmarks.draw FILE FOLDER``: a page of tables and pictures of what ``--json FILE`` wrote down.

An operation that was measured at more than two sizes becomes curves of time and of extra memory; any other one bars.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from matplotlib.figure import Figure

from benchmarks._comparison import named_sizes
from benchmarks._report import HEADER, absences, cells
from benchmarks._timing import Table, three_digits

Result: TypeAlias = dict[str, Any]  # of one comparison, as `benchmarks._report.as_json` gives it

OURS, PEER, INK = "#2f6f8f", "#b9b2a6", "#333333"
MARKS = ("o", OURS), ("s", "#8f8778"), ("^", "#c08a4a"), ("D", "#7a9a5e"), ("v", "#a5687f")  # of curves, ours first


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draw", description=__doc__)
    parser.add_argument("file", type=pathlib.Path, help="what a run wrote down")
    parser.add_argument("folder", type=pathlib.Path, help="where index.md and the pictures go")
    given = parser.parse_args(arguments)
    write_page(json.loads(given.file.read_text()), given.folder)


def write_page(found: dict[str, Any], folder: pathlib.Path) -> None:
    """Write ``index.md`` and the pictures it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# Benchmarks", _machine(found)]
    for op, group in itertools.groupby(found["results"], lambda result: result["op"]):
        results = list(group)
        varying = _varying(results)
        pictures = [_curves(results, varying)] if varying is not None else [_bars(result) for result in results]
        parts.append(f"## {op[:1].upper()}{op[1:]}")
        for number, (picture, shown) in enumerate(
            zip(pictures, [results] if varying is not None else [[result] for result in results], strict=True)
        ):
            name = f"{re.sub('[^a-z0-9]+', '-', op.lower()).strip('-')}-{number}.svg"
            picture.savefig(folder / name, metadata={"Date": None})
            parts += [f"![{_alternative(shown)}]({name})", _table(shown)]
            parts += [f"Missed: {line}." for result in shown for line in result["missed"]]
    for one in found.get("tables", []):
        table = Table(**one)
        lines = [table.header, ("---",) * len(table.header), *table.cells()]
        parts += [f"## {table.title[:1].upper()}{table.title[1:]}", *["\n".join(_line([*line], 0) for line in lines)]]
        parts += [f"Missed: {line}." for line in table.missed]
    (folder / "index.md").write_text("\n\n".join(parts) + "\n")


def _machine(found: dict[str, Any]) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rates = "; ".join(
        f"products of {name} {one['flops'] / 1e9:,.0f} GFLOP/s, copies {one['bytes'] / 1e9:,.1f} GB/s"
        for name, one in found["rates"].items()
    )
    return (
        f"{machine['processor']}, {machine['threads']} threads; {versions}; commit {machine['commit'][:12]}. {rates}. "
        "Each form was checked against float64 on every batch before it was timed; medians of runs in turn, with "
        "quartiles as whiskers. Inputs are random, of fixed seeds from 0 on. The floor is the time that the work's "
        "products and bytes take at these rates; above 100% something was faster than the rates measured first."
    )


def _varying(results: Sequence[Result]) -> str | None:
    """The one size that differs over more than two results."""
    names = [name for name in results[0]["sizes"] if len({one["sizes"].get(name) for one in results}) > 1]
    return names[0] if len(results) > 2 and len(names) == 1 else None


def _bars(result: Result) -> Figure:
    """A bar a form, ours above the others, the floor as a line."""
    rows = [row for row in result["rows"] if row["seconds"] is not None]
    if not rows:
        return Figure(figsize=(7.5, 0.9))
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    times = [1000 * row["seconds"] for row in rows]
    spread = [
        [max(0, ms - 1000 * row["spread"][0]), max(0, 1000 * row["spread"][1] - ms)]
        for ms, row in zip(times, rows, strict=True)
    ]
    colours = [OURS if row is result["rows"][0] else PEER for row in rows]
    axes.barh(range(len(rows)), times, xerr=list(zip(*spread, strict=True)), color=colours, ecolor=INK, height=0.65)
    axes.set_yticks(range(len(rows)), [row["form"] for row in rows])
    axes.invert_yaxis()
    if rows[0]["of_floor"]:
        axes.axvline(times[0] * rows[0]["of_floor"], color=INK, linestyle="--", linewidth=1, label="floor")
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("ms")
    axes.set_title(f"{named_sizes(result['sizes'])}, {result['dtype']}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _curves(results: Sequence[Result], varying: str) -> Figure:
    """Time and extra memory of every form against the size that varies, both axes logarithmic."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    of_time, of_memory = figure.subplots(1, 2)
    for number, name in enumerate(row["form"] for row in results[0]["rows"]):
        rows = [(one["sizes"][varying], row) for one in results for row in one["rows"] if row["form"] == name]
        rows = [(size, row) for size, row in rows if row["seconds"] is not None]
        sizes = [size for size, _ in rows]
        mark, colour = MARKS[number % len(MARKS)]
        how = {"marker": mark, "color": colour, "label": name}
        of_time.plot(sizes, [1000 * row["seconds"] for _, row in rows], **how)
        of_memory.plot(sizes, [(row["extra_bytes"] or 0) / 2**20 for _, row in rows], **how)
        if number == 0 and all(row["of_floor"] for _, row in rows):
            floors = [1000 * row["seconds"] * row["of_floor"] for _, row in rows]
            of_time.plot(sizes, floors, color=INK, linestyle="--", linewidth=1, label="floor")
    of_time.set(yscale="log", xlabel=varying, ylabel="ms")
    of_memory.set(xlabel=varying, ylabel="extra MiB", ylim=(0, None))
    for axes in (of_time, of_memory):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda size, _: f"{size / 1024:g} k" if size >= 1024 else f"{size:g}")
        axes.spines[["top", "right"]].set_visible(False)
    names = of_time.get_legend_handles_labels()
    figure.legend(*names, frameon=False, fontsize=8, loc="outside lower center", ncols=len(names[0]))
    figure.suptitle(
        f"{named_sizes(results[0]['sizes'], varying)}, {results[0]['dtype']}", fontsize=9, x=0.01, ha="left"
    )
    return figure


def _alternative(results: Sequence[Result]) -> str:
    """What the picture shows, for those who do not see it."""
    first = results[0]["rows"][0]
    sizes = f"{len(results)} sizes" if len(results) > 1 else named_sizes(results[0]["sizes"])
    return f"time of {first['form']} beside {len(results[0]['rows']) - 1} others at {sizes}"


def _table(results: Sequence[Result]) -> str:
    on_gpu = any(row.get("kernels") is not None for result in results for row in result["rows"])
    header = ["sizes", *HEADER, "error"]
    header += ["ms replayed", "kernels"] * on_gpu
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for result in results:
        for row, form in zip(result["rows"], cells(result), strict=True):
            seen = [named_sizes(result["sizes"]), *form, f"{row['error']:.1e}"]
            if on_gpu and row["seconds"] is not None:
                replayed = row["replayed"]
                seen += ["cannot" if replayed is None else three_digits(1000 * replayed), f"{row['kernels']}"]
            lines.append(_line(seen, len(header)))
        lines += [_line([named_sizes(result["sizes"]), *absent], len(header)) for absent in absences(result)]
    return "\n".join(lines)


def _line(cells: list[str], length: int) -> str:
    return "| " + " | ".join(cells + [""] * (length - len(cells))) + " |"


if __name__ == "__main__":
    main()
