"""``python docs/check_site.py FOLDER [PAGE ...]``: look at a built site in headless Chromium, as readers do.

Each page, or each of those that are named, 1280 and 390 pixels wide, light and dark, must not scroll sideways, draw its
formulas and figures, ask no other host for anything, say no error, and pass axe-core without a serious violation; the
search must find what readers look for. Pictures of the pages go into FOLDER's sibling ``screenshots``. $CHROMIUM names
the browser where it is not on the path.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import http.server
import itertools
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS, THEMES = (1280, 390), ("light", "dark")
SOUGHT = {"log_q": "blocks/negatives", "valid": "glossary", "window mask": "blocks/window_mask"}  # and a page to find
DRAWN = """() => ({
    formulas: [...document.querySelectorAll('.math')].filter(one => !one.querySelector('mjx-container')).length,
    wrong: [...document.querySelectorAll('mjx-merror')].map(one => one.textContent),
    figures: [...document.images].filter(one => !one.complete || !one.naturalWidth).map(one => one.src),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""
MATH_IS_READY = "() => !document.querySelector('.math') || window.MathJax?.startup?.promise?.then(() => true)"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and prints nothing."""

    def log_message(self, *_: Any) -> None:
        """Say nothing of a request."""


@contextlib.contextmanager
def served(folder: pathlib.Path) -> Iterator[str]:
    """The address of the folder, on this machine alone."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def faults_of(page: Page, address: str, name: str, axe: Axe) -> Iterator[str]:
    """What is wrong with one page as it is shown."""
    said: list[str] = []
    page.on("console", hear := lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("requestfinished", see := lambda request: said.append(request.url) if address not in request.url else None)
    page.on("requestfailed", see)
    page.goto(f"{address}/{name}", wait_until="load")
    page.evaluate("() => document.querySelectorAll('img[loading=lazy]').forEach(one => one.loading = 'eager')")
    page.wait_for_function(MATH_IS_READY)
    page.wait_for_load_state("networkidle")
    drawn = page.evaluate(DRAWN)
    if drawn["wide"] > 0:
        yield f"scrolls sideways by {drawn['wide']} px"
    if drawn["formulas"]:
        yield f"{drawn['formulas']} formulas are not drawn"
    yield from (f"formula: {text}" for text in drawn["wrong"])
    yield from (f"not drawn: {source}" for source in drawn["figures"])
    yield from (f"asked or said: {text}" for text in said if not text.startswith("data:"))
    for violation in axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]:
        if violation["impact"] in ("serious", "critical"):
            where = [" ".join(map(str, node["target"])) for node in violation["nodes"]]
            yield f"axe, {violation['impact']}: {violation['id']} at {len(where)} places, the first {where[0]}"
    page.remove_listener("console", hear)
    page.remove_listener("requestfinished", see)
    page.remove_listener("requestfailed", see)


def look(chromium: str, address: str, names: list[str], shots: pathlib.Path, width: int, theme: str) -> list[str]:
    """Every fault of every page, shown so wide and in that theme."""
    faults: list[str] = []
    axe = Axe()
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=chromium) as browser:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        for name in names:
            faults += [f"{name}, {width} px, {theme}: {fault}" for fault in faults_of(page, address, name, axe)]
            shot = shots / f"{width}-{theme}" / f"{name.removesuffix('.html').replace('/', '-')}.png"
            page.screenshot(path=shot, full_page=True)
    print(f"looked at {len(names)} pages, {width} px, {theme}", flush=True)
    return faults


def search(browser: Browser, address: str) -> Iterator[str]:
    """What the search does not find."""
    page = browser.new_page()
    for words, wanted in SOUGHT.items():
        page.goto(f"{address}/search.html?q={words}")
        page.wait_for_selector(".search-summary:not(:empty)")
        page.wait_for_function("() => document.querySelector('#search-progress')?.textContent !== 'Searching'")
        page.wait_for_load_state("networkidle")
        found = page.evaluate("() => [...document.querySelectorAll('ul.search li a')].map(one => one.pathname)")
        if any(wanted in path for path in found):
            print(f"search {words!r}: {len(found)} pages, {wanted} among them")
        else:
            yield f"search {words!r}: {wanted} is not among {len(found)} pages: {found}"
    page.close()


def main(folder: pathlib.Path, names: list[str]) -> int:
    """Print every fault and how many pages were looked at; 1 if there is any."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium: install one (Debian: apt-get install chromium), or name it in $CHROMIUM")
    names = names or sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.html") if "_static" not in path.parts
    )
    with served(folder) as address:
        with sync_playwright() as playwright, playwright.chromium.launch(executable_path=chromium) as browser:
            faults = list(search(browser, address))
        with concurrent.futures.ProcessPoolExecutor(2) as pool:
            of_all = functools.partial(look, chromium, address, names, folder.parent / "screenshots")
            for found in pool.map(of_all, *zip(*itertools.product(WIDTHS, THEMES), strict=True)):
                faults += found
    for fault in faults:
        print(fault)
    print(f"{len(names)} pages, {len(WIDTHS)} widths, {len(THEMES)} themes: {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]).absolute(), sys.argv[2:]))
