"""The site's pages: their figures are drawn by code that runs, and every public name has its place."""

import ast
import difflib
import importlib.util
import pathlib
import re
import sys
import textwrap

import pages
import pytest

import recblocks

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if not {"generated", "gallery", "_build"} & {*page.parts})
PLOT = re.compile(r"^\.\. plot::\n((?:   .*\n|\n)+)", re.MULTILINE)
REFERENCE = re.compile(r"^\.\. (?:auto\w+|py:data):: recblocks\.(\w+)$", re.MULTILINE)
FIGURES = [
    pytest.param(match.group(1), id=f"{page.stem}-{number}")
    for page in PAGES
    for number, match in enumerate(PLOT.finditer(page.read_text()))
]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if pages.BLOCK.search(page.read_text())], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs(page):
    pages.run(page)


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
    before, after = pages.BLOCK.findall((DOCS / "start.md").read_text())
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


def test_every_public_name_is_listed():
    text = (DOCS / "api.md").read_text()
    listed = re.findall(r"^   recblocks\.(\w+)$", text, re.MULTILINE) + re.findall(r"{py:data}`recblocks\.(\w+)`", text)
    assert sorted(listed) == sorted(recblocks.__all__)


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    listed = [name for name in listed if not name.startswith("generated/")]
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES} - {"index"}
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("page", sorted((DOCS / "blocks").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_of_a_block_has_its_parts(page):
    text = page.read_text()
    parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
    known = ["Example", "Shapes", "Pitfalls", "Reference", "Cost", "Source", "Tests"]
    assert parts == [part for part in known if part in parts], "in this order"
    assert {"Example", "Shapes", "Reference", "Source", "Tests"} <= {*parts}
    purpose = re.split(r"\n\n(?=\$\$|```|## )", text.split("\n\n", 1)[1])[0]
    assert len(purpose) <= 400
    assert re.search(r"^```python$", text.split("## Example")[1].split("## Shapes")[0], re.MULTILINE)
    assert re.findall(r"`tests/test_\w+\.py`", text.split("## Tests")[1])


def test_every_equation_table_and_figure_of_the_papers_has_its_line():
    page = (DOCS / "paper_to_code.md").read_text().lower()
    printed = {  # read off the papers
        "pinnerformer": {"equation": 3, "table": 10, "figure": 6},
        "rethinking": {"table": 2, "figure": 2},
        "transact": {"equation": 4, "table": 9, "figure": 6},
    }
    parts = {part.split()[0]: part for part in page.split("\n## ")[1:]}
    for paper, kinds in printed.items():
        for kind, last in kinds.items():
            named: set[int] = set()
            for numbers in re.findall(rf"{kind}s? (\d+(?:(?:, | and | to )\d+)*)", parts[paper]):
                named.update(map(int, re.findall(r"\d+", numbers)))
                named.update(*(range(int(low), int(high)) for low, high in re.findall(r"(\d+) to (\d+)", numbers)))
            assert named == set(range(1, last + 1)), f"{paper}: {kind}"


def test_the_commands_of_the_pages_are_there():
    root = DOCS.parent
    defined = ast.parse((root / "noxfile.py").read_text()).body
    sessions = {one.name for one in defined if isinstance(one, ast.FunctionDef) and one.decorator_list}
    for page in [root / "README.md", root / "CONTRIBUTING.md", *PAGES]:
        text = page.read_text()
        assert {*re.findall(r"nox -s (\w+)", text)} <= sessions, page.name
        for module in re.findall(r"python -m ((?:benchmarks|examples)[\w.]*)", text):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"


def test_a_link_that_leads_nowhere_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.delitem(sys.modules, "check_links", raising=False)
    check_links = importlib.import_module("check_links")
    (tmp_path / "a b.html").write_text('<a id="here" href="#here">x</a> <a href="https://else.where/">y</a>')
    (tmp_path / "c.html").write_text(
        '<a href="a%20b.html#here">1</a> <a href="a%20b.html#gone">2</a> <img src="no.svg"> <a href="#top">3</a>'
    )
    assert list(check_links.broken(tmp_path)) == [
        "c.html: #top has no such place",
        "c.html: a%20b.html#gone has no such place",
        "c.html: no.svg is not there",
    ]


def test_the_files_that_a_page_names_are_there():
    for page in PAGES:
        for path in re.findall(r"`([a-z]\w*/[\w/]+\.(?:py|md))`", page.read_text()):
            assert (DOCS.parent / path).is_file(), f"{page.name}: {path}"
