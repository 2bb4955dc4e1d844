"""What ``import recblocks`` adds to a process that has imported torch."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks._timing import table

CODE = "import time, torch; start = time.perf_counter(); import recblocks; print(time.perf_counter() - start)"


def main() -> None:
    def once() -> float:
        return float(subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout)

    once()
    seconds = [once() for _ in range(7)]
    row = tuple(1e3 * value for value in (min(seconds), statistics.median(seconds), max(seconds)))
    table("import recblocks, milliseconds beyond import torch (bar: 100)", ("min", "median", "max"), [row])
