"""Run the Python of pages, a page's blocks in turn in one namespace: ``python tests/pages.py README.md``."""

from __future__ import annotations

import pathlib
import re
import sys
import time
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run(page: pathlib.Path) -> dict[str, Any]:
    """The page's names after its last block; a block that fails says so with the page's own line."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * before + block.group(1), str(page), "exec"), names)
    return names


if __name__ == "__main__":
    for name in sys.argv[1:]:
        start = time.perf_counter()
        run(pathlib.Path(name))
        print(f"{name}: {time.perf_counter() - start:.1f} s")
