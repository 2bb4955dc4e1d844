"""The directive ``benchmark``: what the recorded run saw of operations whose names begin as it says."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from benchmarks._comparison import named_sizes
from benchmarks._report import HEADER, absences, cells
from benchmarks._timing import Table
from benchmarks.draw import Result

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"


class Benchmark(SphinxDirective):
    """Tables of what one recorded run saw, on what machine, and the bars that it or another run missed."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Make the nodes of one place."""
        begin = self.arguments[0]
        made: list[nodes.Node] = []
        for path in sorted(RESULTS.glob("*.json"), key=lambda path: path.stem):
            self.env.note_dependency(str(path))
            found = json.loads(path.read_text())
            results = [one for one in found["results"] if one["op"].startswith(begin)]
            tables = [Table(**one) for one in found.get("tables", []) if one["title"].startswith(begin)]
            if results or tables:
                made += _missed(results, tables, found["machine"]) if made else _seen(results, tables, found["machine"])
        if not made:
            raise self.error(f"no benchmark begins with {begin!r}")
        return made


def _seen(results: Sequence[Result], tables: Sequence[Table], machine: Mapping[str, Any]) -> list[nodes.Node]:
    """Everything, of the first run that has it."""
    made: list[nodes.Node] = []
    for op, of_one_op in itertools.groupby(results, key=lambda result: result["op"]):
        group = [*of_one_op]
        rows = [[*cells(result), *((*each, "", "", "") for each in absences(result))] for result in group]
        if len(group) == 1:
            made += [nodes.paragraph(text=f"{_named(group[0])}."), table(HEADER, rows[0])]
        else:
            of_sizes = [
                (named_sizes(result["sizes"]), *row) for result, some in zip(group, rows, strict=True) for row in some
            ]
            made += [nodes.paragraph(text=f"{_capital(op)}, {group[0]['dtype']}."), table(("sizes", *HEADER), of_sizes)]
        made += [
            nodes.paragraph(text=f"Missed: {named_sizes(one['sizes'])}: {line}.")
            for one in group
            for line in one["missed"]
        ]
    for one in tables:
        made += [nodes.paragraph(text=f"{_capital(one.title)}."), table(one.header, one.cells())]
        made += [nodes.paragraph(text=f"Missed: {line}.") for line in one.missed]
    return [*made, nodes.paragraph(text=f"{_on(machine)}: medians.")]


def _missed(results: Sequence[Result], tables: Sequence[Table], machine: Mapping[str, Any]) -> list[nodes.Node]:
    """What another run missed."""
    lines = [(_named(result), line) for result in results for line in result["missed"]]
    lines += [(_capital(one.title), line) for one in tables for line in one.missed]
    return [nodes.paragraph(text=f"Missed on {_on(machine)}. {what}: {line}.") for what, line in lines]


def _named(result: Result) -> str:
    return f"{_capital(result['op'])}: {named_sizes(result['sizes'])}, {result['dtype']}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _on(machine: Mapping[str, Any]) -> str:
    return f"{machine['processor']}, {machine['threads']} threads, commit {machine['commit'][:12]}"


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
