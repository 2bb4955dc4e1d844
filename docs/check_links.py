"""``python docs/check_links.py FOLDER``: every link of a built site that stays within it leads somewhere."""

from __future__ import annotations

import pathlib
import sys
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser


class Links(HTMLParser):
    """Where a page's links lead, and where others may lead to in it."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take an element's links and its name."""
        for name, value in attrs:
            if value and name in ("href", "src") and tag != "base":
                self.targets.add(value)
            if value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)


def broken(folder: pathlib.Path) -> Iterator[str]:
    """Links to files that are not there, or to places that their pages do not have."""
    pages: dict[pathlib.Path, Links] = {}
    for path in sorted(folder.rglob("*.html")):
        pages[path] = links = Links()
        links.feed(path.read_text(encoding="utf-8"))
    for path, links in pages.items():
        for target in sorted(links.targets):
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            if not there.is_file():
                yield f"{path.relative_to(folder)}: {target} is not there"
            elif parts.fragment and there in pages and urllib.parse.unquote(parts.fragment) not in pages[there].anchors:
                yield f"{path.relative_to(folder)}: {target} has no such place"


if __name__ == "__main__":
    found = list(broken(pathlib.Path(sys.argv[1]).resolve()))
    print("\n".join(found) or "every link within leads somewhere")
    sys.exit(bool(found))
