"""``python -m benchmarks [name ...]`` runs every ``bench_<name>.py`` beside this file, or the named ones.

What has ``comparisons`` is checked against float64 and timed beside its peers; the others have ``tables`` of their own,
and raise where what they time is wrong. ``--json`` writes both down. Exits with 1 where a form of ours is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
from typing import Any

import torch

from benchmarks._comparison import is_wrong, measure, show
from benchmarks._machine import Rates, described, measure_rates, show_rates
from benchmarks._report import as_json, show_beside, write
from benchmarks._timing import keep_memory


def main(arguments: list[str] | None = None) -> int:
    names = sorted(path.stem.removeprefix("bench_") for path in pathlib.Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"one of: {', '.join(names)}; default: all")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="where to write what was seen")
    parser.add_argument("--against", type=pathlib.Path, metavar="FILE", help="what an earlier run wrote")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(names))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(names)}")
    earlier = None if given.against is None else json.loads(given.against.read_text())
    keep_memory()
    machine = described(given.device)
    print(f"{machine['processor']}, {machine['threads']} threads, {machine['versions']}, commit {machine['commit']}")
    rates: dict[str, Rates] = {}
    results: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    wrong = False

    def found_so_far() -> dict[str, Any]:
        measured = {name: one._asdict() for name, one in rates.items()}
        return {"machine": machine, "rates": measured, "results": results, "tables": tables}

    def keep() -> None:
        """After each result, so that a run which is stopped has written what it saw."""
        if given.json is not None:
            write(given.json, found_so_far())

    for name in given.names or names:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        torch.manual_seed(0)
        for seen in module.tables() if hasattr(module, "tables") else ():
            seen.show()
            tables.append(seen._asdict())
            keep()
        for one in module.comparisons(given.device) if hasattr(module, "comparisons") else ():
            torch.compiler.reset()  # there is a limit to how often one function is compiled
            factors = "bfloat16" if one.dtype == "bfloat16" else "float32"
            if factors not in rates:
                rates[factors] = measure_rates(given.device, getattr(torch, factors))
                show_rates(factors, rates[factors])
            rows = measure(one, rates[factors], given.device)
            show(one, rows)
            results.append(as_json(one, rows))
            wrong |= is_wrong(rows)
            keep()
    keep()
    if earlier is not None:
        show_beside(earlier, found_so_far())
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
