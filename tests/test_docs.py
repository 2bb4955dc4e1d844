"""The site's pages: their figures are drawn by code that runs, and every public name has its place."""

import difflib
import pathlib
import re
import textwrap

import pytest

import recblocks

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PLOT = re.compile(r"^\.\. plot::\n((?:   .*\n|\n)+)", re.MULTILINE)
REFERENCE = re.compile(r"^\.\. (?:auto\w+|py:data):: recblocks\.(\w+)$", re.MULTILINE)
FIGURES = [
    pytest.param(match.group(1), id=f"{page.stem}-{number}")
    for page in PAGES
    for number, match in enumerate(PLOT.finditer(page.read_text()))
]


@pytest.mark.parametrize("figure", FIGURES)
def test_figures_are_drawn(figure):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    alternative, code = figure.strip("\n").split("\n\n", 1)
    assert alternative.strip().startswith(":alt: ")
    with pyplot.rc_context({"figure.constrained_layout.use": True}):
        exec(compile(textwrap.dedent(code), "figure", "exec"), {})
    assert pyplot.get_fignums()
    pyplot.close("all")


def test_a_newcomer_changes_ten_lines_and_the_loss_falls(capsys):
    before, after = re.findall(r"^```python\n(.*?)^```", (DOCS / "start.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(before.splitlines()) <= 45
    changed = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line.startswith("+ ")]
    assert len(changed) <= 10
    for script in (before, after):
        exec(compile(script, "start.md", "exec"), {"__name__": "start"})
        first, last = map(float, capsys.readouterr().out.split("->"))
        assert last < 0.9 * first


def test_every_figure_states_its_seed_and_data():
    for page in PAGES:
        for match in PLOT.finditer(page.read_text()):
            caption = page.read_text()[match.end() :].strip("`\n").split("\n\n")[0]
            assert re.search(r"[Nn]o seed|Seed \d|seed \d", caption), page.name
            assert re.search(r"no data|[Ss]imulated|invented", caption), page.name


def test_every_public_name_stands_on_one_page():
    names = [name for page in PAGES for name in REFERENCE.findall(page.read_text())]
    assert sorted(names) == sorted(recblocks.__all__)


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES} - {"index"}
    assert sorted(listed) == sorted(pages)


def test_the_files_that_a_page_names_are_there():
    for page in PAGES:
        for path in re.findall(r"`([a-z]\w*/[\w/]+\.(?:py|md))`", page.read_text()):
            assert (DOCS.parent / path).is_file(), f"{page.name}: {path}"
