"""Results as JSON, and beside earlier ones."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks._comparison import Comparison, Row, missed
from benchmarks._timing import Table, three_digits


def as_json(one: Comparison, rows: Sequence[Row]) -> dict[str, Any]:
    """What was seen of a comparison, without its batches and forms, which may be large."""
    return {
        "op": one.op,
        "sizes": dict(one.sizes),
        "dtype": one.dtype,
        "allowed": one.allowed,
        "bars": dict(one.bars),
        "missed": missed(one, rows),
        "absent": dict(one.absent),
        "rows": [row._asdict() for row in rows],
    }


HEADER = "form", "ms", "times ours", "of floor", "extra MiB"


def cells(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Each form of what `as_json` gave as text, under `HEADER`."""
    ours = result["rows"][0]["seconds"]
    found: list[tuple[str, ...]] = []
    for row in result["rows"]:
        if row["seconds"] is None:
            found.append((row["form"], "wrong: not timed", "", "", ""))
            continue
        times = f"{row['seconds'] / ours:.2f}" if ours else ""
        share = "" if row["of_floor"] is None else f"{row['of_floor']:.0%}"
        extra = "" if row["extra_bytes"] is None else three_digits(row["extra_bytes"] / 2**20)
        found.append((row["form"], three_digits(1000 * row["seconds"]), times, share, extra))
    return found


def absences(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Peers that were not there, and why."""
    return [(name, f"absent: {why}") for name, why in result["absent"].items()]


def write(path: pathlib.Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, allow_nan=True) + "\n")


def show_beside(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Print what takes another time than it took in an earlier run; of another machine that is said."""
    before = {key: row for key, row in _by_key(earlier) if row["seconds"] is not None}
    rows: list[tuple[object, ...]] = []
    for key, row in _by_key(now):
        old = before.get(key)
        if old is not None and row["seconds"] is not None:
            op, sizes, dtype, form = key
            rows.append((op, sizes, dtype, form, 1000 * old["seconds"], 1000 * row["seconds"]))
            rows[-1] += (row["seconds"] / old["seconds"],)
    header = "op", "sizes", "dtype", "form", "ms before", "ms now", "now of before"
    Table(f"beside {earlier['machine']['commit'][:12]}", header, rows).show()
    for name in ("processor", "device", "threads", "versions"):
        then, there = earlier["machine"][name], now["machine"][name]
        if then != there:
            print(f"  another {name}: {then} before, {there} now")


def _by_key(found: dict[str, Any]) -> list[tuple[tuple[str, str, str, str], dict[str, Any]]]:
    return [
        ((one["op"], " ".join(f"{size}" for size in one["sizes"].values()), one["dtype"], row["form"]), row)
        for one in found["results"]
        for row in one["rows"]
    ]
