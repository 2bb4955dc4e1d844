"""The site's pages: their figures are drawn by code that runs, and every public name has its place."""

import ast
import difflib
import importlib
import os
import re
import runpy
import subprocess
import sys
import textwrap

import pages
import pytest
from pages import DOCS, PAGES

import recblocks

PLOT = re.compile(r"^\.\. plot::\n((?:   .*\n|\n)+)", re.MULTILINE)
REFERENCE = re.compile(r"^\.\. (?:auto\w+|py:data):: recblocks\.(\w+)$", re.MULTILINE)
GALLERY = sorted((DOCS / "gallery").glob("*.py"))
FIGURES = [
    pytest.param(match.group(1), id=f"{page.stem}-{number}")
    for page in PAGES
    for number, match in enumerate(PLOT.finditer(page.read_text()))
]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if pages.BLOCK.search(page.read_text())], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs(page):
    if re.search(r"^from torchrec", page.read_text(), re.MULTILINE):
        pytest.importorskip("torchrec", reason="torchrec is not installed; the README says how")
    pages.run(page)


def test_ranks_of_the_guide_see_each_other_s_rows(tmp_path):
    (block,) = pages.BLOCK.findall((DOCS / "guides" / "ranks.md").read_text())
    script = tmp_path / "this_file.py"
    script.write_text(block + "    print(len(recblocks.gather_rows(queries)), 'rows')\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ran = subprocess.run(
        torchrun, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["64 rows"] * 2


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
    assert sum(bool(line.strip()) for line in before.splitlines()) <= 40
    changed = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line.startswith("+ ")]
    assert len(changed) <= 10
    for script in (before, after):
        exec(compile(script, "start.md", "exec"), {"__name__": "start"})
        first, last = map(float, capsys.readouterr().out.split("->"))
        assert last < 0.9 * first


def check_seed_and_data(text, code):
    """A figure's text names the seeds of its code and no other, and says where the data is from."""
    stated = re.search(r"no seed|seeds? (\d+(?: \(\w+\))?(?:,? (?:and )?\d+(?: \(\w+\))?)*)", text, re.IGNORECASE)
    assert stated
    used = {*re.findall(r"(?:manual_seed\(|\bseed=)(\d+)", code)}
    assert {*re.findall(r"\d+", stated[1] or "")} == used
    assert used or not re.search(r"torch\.(?:rand|multinomial|bernoulli)|_\(0, 1\)", code), "drawn without a seed"
    assert re.search(r"no data|simulated|invented", text, re.IGNORECASE)


def test_every_figure_states_its_seed_and_data():
    for page in PAGES:
        text = page.read_text()
        figures = [*PLOT.finditer(text)]
        assert len(figures) == text.count(".. plot::"), page.name
        assert not re.search(r"!\[|<img|\.\. (?:figure|image)::", text), f"{page.name}: a figure without its code"
        for match in figures:
            check_seed_and_data(text[match.end() :].strip("`\n").split("\n\n")[0], match.group(1))


@pytest.mark.parametrize("script", GALLERY, ids=lambda script: script.stem)
def test_a_script_of_the_gallery_states_seed_and_data_and_ends_with_what_it_claims(script):
    assert script.stem.startswith("plot_"), "the site runs no other"
    parsed = ast.parse(script.read_text())
    check_seed_and_data(" ".join(ast.get_docstring(parsed).split()), script.read_text())
    assert isinstance(parsed.body[-1], ast.Assert)


@pytest.mark.parametrize("script", GALLERY, ids=lambda script: script.stem)
def test_a_script_of_the_gallery_runs(script):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    runpy.run_path(str(script), run_name="__main__")
    assert pyplot.get_fignums()
    pyplot.close("all")


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


PRINTED = {  # read off the papers
    "pinnerformer": {"equation": 3, "table": 10, "figure": 6},
    "rethinking": {"table": 2, "figure": 2},
    "transact": {"equation": 4, "table": 9, "figure": 6},
}
SECTIONS = {  # read off their headings
    "pinnerformer": "1 2 3 3.1 3.2 3.3 3.3.1 3.3.2 3.4 3.4.1 3.4.2 3.4.3 3.5 3.6 4 4.1 4.2 4.2.1 4.2.2 4.2.3 4.2.4 "
    "4.2.5 4.2.6 4.2.7 4.3 4.3.1 4.3.2 5 A A.1 A.2 A.3 A.4 A.4.1 A.4.2 A.4.3 A.4.4",
    "rethinking": "1 2 2.1 2.1.1 2.1.2 2.1.3 2.2 2.3 3 3.1 3.2 4",
    "transact": "1 2 2.1 2.2 3 3.1 3.2 3.3 3.3.1 3.3.2 3.3.3 3.3.4 3.3.5 3.4 3.4.1 3.4.2 3.4.3 4 4.1 4.1.1 4.1.2 4.2 "
    "4.2.1 4.2.2 4.3 4.3.1 4.3.2 4.3.3 4.3.4 4.3.5 4.4 4.4.1 4.4.2 4.4.3 4.4.4 5 5.1 5.2 6 A B C",
}
NUMBERS = r"\d+(?![.\d])(?:(?:, | and | to )\d+(?![.\d]))*"


def lines_of_papers():
    """Of each paper, what the first column of its table says."""
    parts = (DOCS / "paper_to_code.md").read_text().split("\n## ")[1:]
    cells = [(part.split()[0].lower(), re.findall(r"^\| (.+?) \|", part, re.MULTILINE)[1:]) for part in parts]
    return dict(cells)


def test_every_equation_table_and_figure_of_the_papers_has_its_line():
    lines = lines_of_papers()
    for paper, kinds in PRINTED.items():
        for kind, last in kinds.items():
            named: set[int] = set()
            for numbers in re.findall(rf"{kind}s? ({NUMBERS})", "\n".join(lines[paper])):
                named.update(map(int, re.findall(r"\d+", numbers)))
                named.update(*(range(int(low), int(high)) for low, high in re.findall(r"(\d+) to (\d+)", numbers)))
            assert named == set(range(1, last + 1)), f"{paper}: {kind}"


def sections_named(lines):
    """3.4, A.1 and the like ahead of a line's colon, ranges written out, without the numbers of tables and figures."""
    for line in lines:
        places = re.sub(rf"(?:equation|table|figure)s? {NUMBERS}", "", line.split(":")[0])
        yield from re.findall(r"\b(?:[A-C]|\d+)(?:\.\d+)*\b", places)
        for within, low, high in re.findall(r"\b([A-C\d][.\d]*\.)(\d+) to \1(\d+)", places):
            yield from (f"{within}{last}" for last in range(int(low), int(high)))


def is_covered(section, printed, named):
    """Named, or all its parts are, or what it is a part of is named as a whole."""
    whole, parts = section.rpartition(".")[0], [one for one in printed if one.rpartition(".")[0] == section]
    if section in named or (parts and all(is_covered(one, printed, named) for one in parts)):
        return True
    return whole in named and not any(one.rpartition(".")[0] == whole for one in named)


def test_every_section_of_the_papers_has_its_line():
    lines = lines_of_papers()
    for paper, headings in SECTIONS.items():
        printed, named = headings.split(), {*sections_named(lines[paper])}
        assert named <= {*printed}, f"{paper} has none of {sorted(named - {*printed})}"
        assert not [one for one in printed if not is_covered(one, printed, named)], paper


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
