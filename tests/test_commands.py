"""The commands that pages tell readers to run: their sessions, modules, options, extras and versions are there."""

import argparse
import ast
import importlib
import importlib.util
import itertools
import pathlib
import re
import shlex

import pages
import pytest

KNOWN = {"git", "nox", "pip", "python", "torchrun"}
SPAN = re.compile(rf"`((?:{'|'.join(KNOWN)}) [^`]+)`")
OPTION = re.compile(r"`(?:-- )?(--[a-z][\w-]*)[^`]*`")
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (pages.ROOT / "constraints.txt").read_text(), re.MULTILINE))
OPTIONAL = (pages.ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
EXTRAS = {*re.findall(r"^(\w+) = \[", OPTIONAL, re.MULTILINE)}
NOX = (pages.ROOT / "noxfile.py").read_text()
SESSIONS = {
    one.name: ast.get_source_segment(NOX, one)
    for one in ast.parse(NOX).body
    if isinstance(one, ast.FunctionDef) and one.decorator_list
}


class Understood(Exception):
    """What a parser says once it knows every argument."""


def commands(text):
    """The words of every command of a page: those of bash blocks, and those in its sentences."""
    blocks = [fence.body for fence in pages.fences(text) if fence.opener == "```bash"]
    sentences = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for line in [*"".join(blocks).replace("\\\n", " ").splitlines(), *SPAN.findall(sentences)]:
        for is_and, words in itertools.groupby(shlex.split(line, comments=True), "&&".__eq__):
            if not is_and:
                yield [*words]


def check(words):
    """Raise for what a command names and is not there."""
    program, *arguments = words
    assert program in KNOWN, program
    if program == "pip":
        check_pip(arguments)
    elif program == "nox" and arguments:
        assert arguments[0] == "-s", arguments
        assert arguments[1] in SESSIONS, arguments[1]
        given = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
        if given:
            check_module(re.search(r'"-m", "((?:examples|benchmarks)[\w.]*)"', SESSIONS[arguments[1]])[1], given)
    elif program in ("python", "torchrun"):
        if "-m" in arguments:
            at = arguments.index("-m") + 1
            check_module(arguments[at], arguments[at + 1 :])
        else:
            assert any((pages.ROOT / word).is_file() for word in arguments), words


def check_pip(arguments):
    assert arguments[0] == "install", arguments
    for word in arguments[1:]:
        if word.startswith("-"):
            assert word in {"-c", "-e", "--constraint", "--editable", "--no-deps"}, word
            continue
        name, extras, version = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?(?:==([\w.]+))?", word).groups()
        if extras:
            assert name in {".", "recblocks"}, word
            assert {*extras.split(",")} <= EXTRAS, word
        if version:
            assert PINNED.get(name) == version, f"{word}: constraints.txt has {PINNED.get(name)}"


def check_module(name, arguments):
    """Let the module's own parser read the arguments, and stop there."""
    if name.partition(".")[0] not in {"examples", "benchmarks"}:
        assert name in PINNED, name
        return
    assert importlib.util.find_spec(name), name
    if not arguments or "--help" in arguments:
        return
    path = pathlib.Path(importlib.util.find_spec(name).origin)
    if path.name == "__init__.py":
        name, path = f"{name}.__main__", path.with_name("__main__.py")
    module, takes = importlib.import_module(name), re.search(r"tyro\.cli\((\w+)", path.read_text())
    if takes:
        pytest.importorskip("tyro").cli(getattr(module, takes[1]), args=arguments)
    else:
        check_argparse(module.main, arguments)


def check_argparse(main, arguments, parse=argparse.ArgumentParser.parse_args):
    def understood(parser, given):
        for name in getattr(parse(parser, given), "names", []):
            assert (pages.ROOT / "benchmarks" / f"bench_{name}.py").is_file(), name
        raise Understood

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", understood)
        with pytest.raises(Understood):
            main(arguments)


def options():
    """Every option of an example, a benchmark or a nox session."""
    for path in [*(pages.ROOT / "examples").rglob("*.py"), *(pages.ROOT / "benchmarks").glob("*.py")]:
        text = path.read_text()
        yield from re.findall(r'"(--[a-z-]+)"', text)
        for name in re.findall(r"^    (\w+): ", text, re.MULTILINE):
            yield "--" + name.replace("_", "-")


@pytest.mark.parametrize("page", pages.WRITTEN, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_what_the_commands_of_a_page_name_is_there(page):
    text = page.read_text()
    for words in commands(text):
        check(words)
    assert {*OPTION.findall(text)} <= {"--help", *options()}


@pytest.mark.parametrize(
    "command",
    [
        "conda install recblocks",
        "pip install recblocks[gone]",
        "pip install '.[data,gone]'",
        "pip install torchrec==1.7.0",
        "nox -s gone",
        "nox -s ranking -- --gone 3",
        "nox -s ranking -- --data gone",
        "nox -s bench -- --gone FILE",
        "nox -s bench -- gone",
        "python -m examples.gone",
        "python -m examples.pinnerformer --gone",
        "python -m benchmarks.draw FILE FOLDER --gone",
        "python gone.py",
        "pip install nox && nox -s gone",
    ],
)
def test_a_command_that_would_not_run_is_found(command):
    ((*_, words),) = [[*commands(f"```bash\n{command}  # why\n```\n")]]
    with pytest.raises((AssertionError, SystemExit)):
        check(words)
