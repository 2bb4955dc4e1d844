"""The directive ``benchmark``: what the recorded run saw of operations whose names begin as it says."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from benchmarks._timing import Table

RECORDED = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "cpu-2-cores.json"


class Benchmark(SphinxDirective):
    """Tables of what was seen, bars that were missed, and on what machine."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Make the nodes of one place."""
        self.env.note_dependency(str(RECORDED))
        found, begin = json.loads(RECORDED.read_text()), self.arguments[0]
        results = [one for one in found["results"] if one["op"].startswith(begin)]
        tables = [Table(**one) for one in found.get("tables", []) if one["title"].startswith(begin)]
        if not results and not tables:
            raise self.error(f"no benchmark begins with {begin!r}")
        made: list[nodes.Node] = []
        for result in results:
            sizes = ", ".join(f"{name} {size:,}" for name, size in result["sizes"].items())
            made += [nodes.paragraph(text=f"{result['op'][:1].upper()}{result['op'][1:]}: {sizes}, {result['dtype']}.")]
            made += [table(("form", "ms", "times ours", "of floor", "extra MiB"), cells(result))]
            made += [nodes.paragraph(text=f"Missed: {line}.") for line in result["missed"]]
        for one in tables:
            made += [nodes.paragraph(text=f"{one.title[:1].upper()}{one.title[1:]}."), table(one.header, one.cells())]
        machine = found["machine"]
        said = f"{machine['processor']}, {machine['threads']} threads, commit {machine['commit'][:12]}: medians."
        return [*made, nodes.paragraph(text=said)]


def cells(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a comparison as text."""
    ours = result["rows"][0]["seconds"]
    rows = []
    for row in result["rows"]:
        if row["seconds"] is None:
            rows.append((row["form"], "wrong: not timed", "", "", ""))
            continue
        share = "" if row["of_floor"] is None else f"{row['of_floor']:.0%}"
        times = f"{row['seconds'] / ours:.2f}" if ours else ""
        rows.append((row["form"], f"{1000 * row['seconds']:.3g}", times, share, f"{row['extra_bytes'] / 2**20:.3g}"))
    return [*rows, *[(name, f"absent: {why}", "", "", "") for name, why in result["absent"].items()]]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> nodes.table:
    """As Sphinx draws one."""
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=1) for _ in header]
    group += nodes.thead("", _row(header))
    group += nodes.tbody("", *map(_row, rows))
    return nodes.table("", group)


def _row(texts: Sequence[str]) -> nodes.row:
    return nodes.row("", *[nodes.entry("", nodes.paragraph(text=text)) for text in texts])


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("benchmark", Benchmark)
    return {"parallel_read_safe": True}
