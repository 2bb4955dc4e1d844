"""C++ that the machine's own compiler builds, once a user: what of a block runs in it on a CPU.

The first call builds, in about a second, into the user's cache folder. The compiler is what ``$CXX`` names, else c++,
g++ or clang++. Where there is none the blocks are plain torch, which gives the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from recblocks._files import replacing, user_cache

_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared")
_HEADER = pathlib.Path(__file__).with_name("every_width.h")  # the one that sources include
_LOADED_IN = os.getpid()


def compiler() -> list[str] | None:
    """The command that compiles C++, None where there is none.

    Raises:
        RuntimeError: ``$CXX`` is no command.
    """
    named = os.environ.get("CXX", "").strip()
    if named:
        try:
            return shlex.split(named)
        except ValueError as error:
            raise RuntimeError(f"CXX must be a command, got {named!r}: {error}") from error
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if found is None else [found]


def constant(function: Callable[[], bool]) -> Callable[[], bool]:
    """`torch.compiler.assume_constant_result`, which would take a second to import torch's compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_available(load: Callable[[], ctypes.CDLL], what: str) -> bool:
    """Whether a library is built, or can be and is now; a compiler that fails is warned of, once.

    Args:
        load: gives the library.
        what: becomes of what is given, for the warning.
    """
    built, unsaid = _first_try(load)
    if unsaid:
        warnings.warn(f"{what} in plain torch, as {unsaid.pop()}", RuntimeWarning, stacklevel=3)
    return built


@functools.cache
def _first_try(load: Callable[[], ctypes.CDLL]) -> tuple[bool, list[str]]:
    """Whether there is a library, and what is to be said where a compiler made none."""
    try:
        if compiler() is None:
            return False, []
        load()
    except (OSError, RuntimeError) as error:
        return False, [str(error)]
    return True, []


def library(
    sources: Sequence[pathlib.Path], functions: Mapping[str, Sequence[Any]], flags: Sequence[str] = ()
) -> ctypes.CDLL:
    """The functions of some files: those that are kept, or else those that are built now, and kept.

    Args:
        sources: of C++, which become one library with the name of the first.
        functions: the types of the arguments of each, as ctypes has them; all give an int.
        flags: for the compiler, beside those that all sources have.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: what it built cannot be loaded.
    """
    command = compiler()
    if command is None:
        raise RuntimeError(
            "backend 'cpp' needs a C++ compiler: install g++ or clang++, or name one in the variable CXX"
        )
    texts = [source.read_bytes() for source in (*sources, _HEADER)]
    made_from = (*texts, *map(str.encode, (*command, *_FLAGS, *flags, sys.platform, platform.machine())))
    name = f"{sources[0].stem}-{hashlib.sha256(b' '.join(made_from)).hexdigest()[:16]}.so"
    try:
        return _load(user_cache() / name, functions)
    except (OSError, RuntimeError, AttributeError):  # it is not there, or of another machine, or there is no home
        pass
    with tempfile.TemporaryDirectory() as folder:
        fresh = pathlib.Path(folder) / name
        kept = _build(command, flags, sources, fresh) and _keep(fresh)
        try:
            return _load(fresh, functions)
        except OSError:
            if not kept:
                raise
            return _load(user_cache() / name, functions)  # where nothing in the folder for scratch files may be run


def num_threads() -> int:
    """As torch has it; one in a process that was forked, which has none of the threads that OpenMP counts on."""
    return 1 if os.getpid() != _LOADED_IN else torch.get_num_threads()


def _keep(path: pathlib.Path) -> bool:
    """Whether it is in the user's cache folder now; where nothing can be kept, each process builds its own."""
    with contextlib.suppress(OSError, RuntimeError):
        user_cache().mkdir(parents=True, exist_ok=True)
        with replacing(user_cache() / path.name) as scratch:
            shutil.copyfile(path, scratch)
        return True
    return False


def _load(path: pathlib.Path, functions: Mapping[str, Sequence[Any]]) -> ctypes.CDLL:
    built = ctypes.CDLL(str(path))
    for name, types in functions.items():
        getattr(built, name).argtypes = types
    return built


def _build(command: list[str], flags: Sequence[str], sources: Sequence[pathlib.Path], path: pathlib.Path) -> bool:
    """Whether it is built with OpenMP, whose threads are torch's own where both are GNU's, or else without."""
    for threads in (["-fopenmp"], []):
        try:
            done = subprocess.run(
                [*command, *_FLAGS, *flags, *threads, *map(str, sources), "-o", str(path)],
                capture_output=True,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise RuntimeError(f"{shlex.join(command)} cannot be run: {error}") from error
        if done.returncode == 0:
            return bool(threads)
    raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
