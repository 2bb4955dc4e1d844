"""Nothing that looks like code on a page escapes: it runs, or a rule here says why not."""

import ast
import re

import pages
import pytest

# What MyST makes parts of the site of; `plot` and the like stand inside eval-rst.
DIRECTIVES = r"{benchmark} .+", r"{eval-rst}", r"{include} \.\./(?:CHANGELOG|CONTRIBUTING)\.md", r"{toctree}"
OPENERS = re.compile(rf"```(?:python|bash|text|{'|'.join(DIRECTIVES)})")
RST = re.compile(r"^\s*\.\. (\S+)::", re.MULTILINE)
RST_DIRECTIVES = {"autoclass", "autoexception", "autofunction", "autosummary", "plot", "py:data"}
NOT_INSTALLED = {pages.DOCS / "migrate" / "keras_rs.md", pages.DOCS / "migrate" / "tfrs.md"}
HIDDEN = re.compile(r"::\s*$|^\s*(?:\.\. (?:code|code-block|sourcecode|parsed-literal)::|```|~~~)", re.MULTILINE)


def escapes(text):
    """The lines of a page whose code no test would run."""
    outside = text.split("\n")
    for fence in pages.fences(text):
        if not OPENERS.fullmatch(fence.opener):
            yield f"{fence.line}: {fence.opener}"
        if fence.opener == "```{eval-rst}":
            unknown = {*RST.findall(fence.body)} - RST_DIRECTIVES
            if unknown or re.search(r">>> |^(?!\s*\.\. ).*::$", fence.body, re.MULTILINE):
                yield f"{fence.line}: {fence.opener} {unknown or 'with code'}"
        lines = fence.body.count("\n") + 2
        outside[fence.line - 1 : fence.line - 1 + lines] = ["fenced"] * lines
    for number, (before, line) in enumerate(zip(["", *outside], outside, strict=False), 1):
        if line.startswith(("    ", "\t")) and not before.strip():
            yield f"{number}: {line}"
        if re.search(r"<(?:pre|code)\b|>>> ", line):
            yield f"{number}: {line}"


@pytest.mark.parametrize("page", pages.WRITTEN, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_every_block_of_a_page_is_of_a_kind_that_is_checked(page):
    text = page.read_text()
    assert not [*escapes(text)]
    openers = {fence.opener for fence in pages.fences(text)}
    assert "```python" not in openers or page in {*pages.PAGES, pages.ROOT / "README.md"}, "nothing runs this page"
    assert "```text" not in openers or page in NOT_INSTALLED
    assert len(pages.BLOCK.findall(text)) == sum(fence.opener == "```python" for fence in pages.fences(text))


@pytest.mark.parametrize(
    "escaped",
    [
        "```py\n1 / 0\n```",
        "```python3\n1 / 0\n```",
        "```pycon\n>>> 1 / 0\n```",
        "```python \n1 / 0\n```",
        "````python\n1 / 0\n````",
        "```\n1 / 0\n```",
        "~~~python\n1 / 0\n~~~",
        "   ```python\n   1 / 0\n   ```",
        "- ```python\n  1 / 0\n  ```",
        "> ```python\n> 1 / 0\n> ```",
        "```{code-block} python\n1 / 0\n```",
        "```{literalinclude} x.py\n```",
        ":::{code-block} python\n1 / 0\n:::",
        "```{eval-rst}\n.. code-block:: python\n\n   1 / 0\n```",
        "```{eval-rst}\n>>> 1 / 0\n```",
        "```{eval-rst}\nSo::\n\n   1 / 0\n```",
        "so:\n\n    1 / 0\n",
        "<pre>1 / 0</pre>",
    ],
)
def test_code_that_would_escape_is_found(escaped):
    assert [*escapes(f"# A page\n\n{escaped}\n")]


@pytest.mark.parametrize("page", sorted(NOT_INSTALLED), ids=lambda page: page.stem)
def test_code_of_libraries_that_are_not_installed_is_python_at_least(page):
    text = page.read_text()
    blocks = [fence.body for fence in pages.fences(text) if fence.opener == "```text"]
    assert blocks
    for block in blocks:
        ast.parse(block)
    before = text[: text.index("```text")].rstrip().split("\n\n")[-1]
    assert "only parsed, not run" in before


def test_the_only_pages_that_are_not_markdown_are_headers():
    others = {str(path.relative_to(pages.DOCS)) for path in pages.DOCS.rglob("*.rst")}
    assert {name for name in others if not name.startswith(("generated", "_build"))} == {"gallery/GALLERY_HEADER.rst"}


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield getattr(node, "name", path.stem), ast.get_docstring(node) or ""


def test_code_in_docstrings_is_doctests():
    package = pages.ROOT / "recblocks"
    hidden = {
        f"{path.relative_to(package)}: {name}"
        for path in package.rglob("*.py")
        for name, text in docstrings(path)
        if HIDDEN.search(text)
    }
    assert not hidden
