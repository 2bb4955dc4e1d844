"""Each session makes a virtual environment of its own and installs what it needs, pinned by constraints.txt."""

import pathlib
import tempfile

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests", "docs", "wheel"]
nox.options.error_on_external_run = True

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def install(session: nox.Session, extra: str) -> None:
    session.install("--constraint", "constraints.txt", "--editable", f".[{extra}]")


def install_torchrec(session: nox.Session) -> None:
    """torchrec requires a CUDA build of fbgemm by name; on a CPU its parts are installed one by one."""
    session.install("--constraint", "constraints.txt", "fbgemm-gpu-cpu", "tensordict", "pyre-extensions", "tqdm")
    session.install("--constraint", "constraints.txt", "--no-deps", "torchrec")


@nox.session
def tests(session: nox.Session) -> None:
    """Lint, types, the house's import rule, unit and property tests, doctests, README blocks."""
    install(session, "test")
    install_torchrec(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")
    session.run("pytest", "-n", "2", *session.posargs, env=ONE_THREAD)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into docs/_build/html, warnings being errors; run its doctests and gallery, follow its links."""
    install(session, "docs")
    install_torchrec(session)
    for builder in ("html", "doctest"):
        command = ("sphinx-build", "-W", "--keep-going", "-b", builder, "docs", f"docs/_build/{builder}")
        session.run(*command, env=ONE_THREAD)
    session.run("python", "docs/check_links.py", "docs/_build/html")


@nox.session
def site(session: nox.Session) -> None:
    """Look at the site that `nox -s docs` built, in headless Chromium ($CHROMIUM, else chromium on the path)."""
    session.install("--constraint", "constraints.txt", "playwright", "axe-playwright-python")
    session.run("python", "docs/check_site.py", "docs/_build/html")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build sdist and wheel, check them, and run the README's code and the newcomer's from the wheel alone."""
    session.install("--constraint", "constraints.txt", "build", "twine", "hatchling", "hatch-vcs")
    with tempfile.TemporaryDirectory() as scratch:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", f"{scratch}/dist")
        (built,), (sdist,) = (map(str, pathlib.Path(scratch, "dist").glob(ending)) for ending in ("*.whl", "*.tar.gz"))
        session.run("twine", "check", "--strict", built, sdist)
        session.run("python", "-m", "venv", f"{scratch}/clean")
        run_from_wheel(session, f"{scratch}/clean/bin/python", built, "--constraint", "constraints.txt")


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """The README's code from the wheel on the oldest Python, torch and numpy that are supported."""
    from_new_wheel(session, "torch==2.11.0", "numpy==1.26.0")


@nox.session(python="3.13")
def highest(session: nox.Session) -> None:
    """The README's code from the wheel on the newest Python that is supported, the newest torch and numpy."""
    from_new_wheel(session)


def from_new_wheel(session: nox.Session, *requirements: str) -> None:
    """Build a wheel apart from the session's environment, and run from it what a newcomer would."""
    with tempfile.TemporaryDirectory() as scratch:
        session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", scratch, ".")
        (built,) = pathlib.Path(scratch).glob("*.whl")
        run_from_wheel(session, "python", str(built), *requirements)


def run_from_wheel(session: nox.Session, python: str, built: str, *requirements: str) -> None:
    """Install the wheel, and run the README's code and the newcomer's outside of the checkout."""
    session.run(python, "-m", "pip", "install", built, *requirements, external=True)
    runner, *pages = (str(pathlib.Path(name).absolute()) for name in ("tests/pages.py", "README.md", "docs/start.md"))
    with tempfile.TemporaryDirectory() as elsewhere, session.chdir(elsewhere):
        # isolated, so that what is imported is the wheel
        session.run(python, "-I", runner, *pages, external=True, env=ONE_THREAD)


@nox.session
def demo(session: nox.Session) -> None:
    """Train PinnerFormer on a year of shopping and judge it beside its baselines (under 4 minutes)."""
    install(session, "examples")
    session.run("python", "-m", "examples.pinnerformer", *session.posargs, env=ONE_THREAD)


@nox.session
def ranking(session: nox.Session) -> None:
    """Train the hybrid ranker with TransAct and without, and judge both on what stores promoted."""
    install(session, "examples")
    session.run("python", "-m", "examples.transact", *session.posargs, env=ONE_THREAD)


@nox.session
def sharded(session: nox.Session) -> None:
    """Train the hybrid ranker on raw ids, their tables sharded over two ranks by torchrec."""
    install(session, "examples")
    install_torchrec(session)
    options = session.posargs or ["--data", "simulator", "--models", "transact"]
    command = ("torchrun", "--nproc-per-node", "2", "-m", "examples.transact", "--sharded", "--raw-ids", "16")
    session.run(*command, *options, env=ONE_THREAD)


@nox.session
def plans(session: nox.Session) -> None:
    """Print how torchrec would spread the ranker's tables over 1, 8 and 64 GPUs, and what each would hold."""
    install(session, "examples")
    install_torchrec(session)
    session.run("python", "-m", "examples.transact.plans", *session.posargs)


@nox.session
def ranking_claims(session: nox.Session) -> None:
    """Train rankers, three seeds each, and say which claims of TransAct come out; -- --data chooses on what (hours)."""
    install(session, "examples")
    session.run("python", "-m", "examples.transact.claims", *session.posargs, env=ONE_THREAD)


@nox.session
def worlds(session: nox.Session) -> None:
    """Train on three simulated worlds, three seeds each, and say which claims of the paper come out (hours)."""
    install(session, "examples")
    session.run("python", "-m", "examples.pinnerformer.worlds", *session.posargs, env=ONE_THREAD)


@nox.session
def slow(session: nox.Session) -> None:
    """What the everyday run leaves out: compilation with inductor, memory at 100 million actions."""
    install(session, "test")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """The property tests with new random examples, many more of them."""
    install(session, "test")
    session.run("pytest", "-n", "2", *session.posargs, env={**ONE_THREAD, "RECBLOCKS_HYPOTHESIS": "fuzz"})


@nox.session
def bench(session: nox.Session) -> None:
    """The speed tables of benchmarks/; name one to run it alone: nox -s bench -- sketch."""
    install(session, "test")
    install_torchrec(session)  # fbgemm stands beside some rows
    session.run("python", "-m", "benchmarks", *session.posargs)
