"""``python -m benchmarks [name ...]`` runs every ``bench_<name>.py`` beside this file, or the named ones."""

from __future__ import annotations

import argparse
import importlib
import pathlib
import platform

import torch


def main() -> None:
    names = sorted(path.stem.removeprefix("bench_") for path in pathlib.Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"one of: {', '.join(names)}; default: all")
    chosen = parser.parse_args().names or names
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(names)}")
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {machine}")
    for name in chosen:
        importlib.import_module(f"benchmarks.bench_{name}").main()


if __name__ == "__main__":
    main()
