"""What ``import recblocks`` adds to a process that has imported torch."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks._timing import Table

BAR = 100  # milliseconds
CODE = "import time, torch; start = time.perf_counter(); import recblocks; print(time.perf_counter() - start)"


def _row(name: str, environment: dict[str, str]) -> tuple[str, float, float, float]:
    def once() -> float:
        run = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True, env=environment)
        return 1e3 * float(run.stdout)

    once()
    milliseconds = [once() for _ in range(7)]
    return name, min(milliseconds), statistics.median(milliseconds), max(milliseconds)


def missed(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    return [f"{median:.0f} ms {name}, not {BAR}" for name, _, median, _ in rows if median > BAR]


def tables() -> Iterator[Table]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as kept:
        rows = [
            _row("with bytecode, as pip installs it", {**inherited, "PYTHONPYCACHEPREFIX": kept}),
            _row(
                "every module compiled anew",
                {**inherited, "PYTHONPYCACHEPREFIX": f"{kept}/none", "PYTHONDONTWRITEBYTECODE": "1"},
            ),
        ]
    title = f"import recblocks, milliseconds beyond import torch (bar: {BAR})"
    yield Table(title, ("", "min", "median", "max"), rows, missed(rows))
