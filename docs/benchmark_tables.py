"""The directive ``benchmark``: what the recorded run saw of operations whose names begin as it says."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from benchmarks._report import HEADER, absences, cells
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
            absent = [(*each, "", "", "") for each in absences(result)]
            made += [table(HEADER, [*cells(result), *absent])]
            made += [nodes.paragraph(text=f"Missed: {line}.") for line in result["missed"]]
        for one in tables:
            made += [nodes.paragraph(text=f"{one.title[:1].upper()}{one.title[1:]}."), table(one.header, one.cells())]
            made += [nodes.paragraph(text=f"Missed: {line}.") for line in one.missed]
        machine = found["machine"]
        said = f"{machine['processor']}, {machine['threads']} threads, commit {machine['commit'][:12]}: medians."
        return [*made, nodes.paragraph(text=said)]


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
