"""Run the Python of pages, a page's blocks in turn in one namespace: ``python tests/pages.py README.md``."""

from __future__ import annotations

import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).parts[0] not in {"generated", "gallery", "_build"}
)
WRITTEN = [*sorted(ROOT.glob("*.md")), *PAGES, *sorted((ROOT / "examples").rglob("*.md"))]
WRITTEN += sorted((ROOT / "benchmarks").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
OPENER = re.compile(r"[\s>*+\-\d.)]*(`{3,}|~{3,}|:{3,})(.*)")


class Fence(NamedTuple):
    opener: str  # the whole line
    line: int
    body: str


def fences(text: str) -> Iterator[Fence]:
    """Every fenced block, however it is indented and whatever it is fenced by."""
    lines = iter(enumerate(text.split("\n"), 1))
    for number, line in lines:
        found = OPENER.fullmatch(line)
        if found:
            body = []
            for _, inner in lines:
                if inner.lstrip(" >").rstrip() == found[1]:
                    break
                body.append(inner + "\n")
            yield Fence(line, number, "".join(body))


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
