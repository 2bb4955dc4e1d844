"""Hash, probe and gather in one pass on a CPU: C++ that the machine's own compiler builds, once a user.

The first call builds `lookup.cpp`, in about a second, into the user's cache folder. The compiler is what ``$CXX``
names, else c++, g++ or clang++. Where there is none the lookups are plain torch, which gives the same.
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

import torch
from torch import Tensor

from recblocks._files import replacing, user_cache

_SOURCE = pathlib.Path(__file__).with_name("lookup.cpp")
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared")
_ELEMENTS = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
_WRONG = {
    1: (IndexError, "feature must be numbers of features"),
    2: (ValueError, "offsets must ascend from 0 and reach no further than the ids"),
    3: (IndexError, "places must name rows that the weight has"),
}


class _Table(ctypes.Structure):
    _fields_ = (
        ("places", ctypes.c_void_p),
        ("num_features", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("hashed", ctypes.c_void_p),
        ("begins", ctypes.c_void_p),
        ("num_buckets", ctypes.c_int64),
    )


class _Ids(ctypes.Structure):
    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("num_ids", ctypes.c_int64),
        ("feature", ctypes.c_void_p),
        ("repeat", ctypes.c_int64),
    )


class _Out(ctypes.Structure):
    _fields_ = (
        ("vectors", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_features", ctypes.c_int64),
        ("dim", ctypes.c_int64),
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available() -> bool:
    """Whether it is built, or can be and is now; a compiler that fails is warned of, once."""
    return _is_built()


@functools.cache
def _is_built() -> bool:
    if compiler() is None:
        return False
    try:
        library()
    except (OSError, RuntimeError) as error:
        warnings.warn(f"ids are looked up in plain torch, as {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


def compiler() -> list[str] | None:
    """The command that compiles C++, None where there is none."""
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if found is None else [found]


@functools.cache
def library() -> ctypes.CDLL:
    """The two functions of `lookup.cpp`.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: what it built cannot be loaded.
    """
    command = compiler()
    if command is None:
        raise RuntimeError(
            "backend 'cpp' needs a C++ compiler: install g++ or clang++, or name one in the variable CXX"
        )
    made_from = (_SOURCE.read_bytes(), *map(str.encode, (*command, *_FLAGS, sys.platform, platform.machine())))
    path = user_cache() / f"lookup-{hashlib.sha256(b' '.join(made_from)).hexdigest()[:16]}.so"
    if path.exists():
        return _load(path)
    with tempfile.TemporaryDirectory() as folder:
        fresh = pathlib.Path(folder) / path.name
        _build(command, fresh)
        with contextlib.suppress(OSError):  # where nothing can be kept, each process builds its own
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as scratch:
                shutil.copyfile(fresh, scratch)
        return _load(fresh)


def fill_rows(
    found: Tensor,
    ids: Tensor,
    feature: Tensor,
    places: Tensor,
    keys: Tensor,
    rows: Tensor,
    hashed: Tensor,
    begins: Tensor,
    repeat: int,
) -> None:
    """What `lookup_rows` gives, into ``found``; all are contiguous."""
    given = _given(ids, feature, repeat), _table(places, keys, rows, hashed, begins)
    _check(library().fill_rows(found.data_ptr(), *given, torch.get_num_threads()))


def fill_vectors(
    out: Tensor,
    ids: Tensor,
    feature: Tensor,
    places: Tensor,
    keys: Tensor,
    rows: Tensor,
    hashed: Tensor,
    begins: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    offsets: Tensor | None,
    repeat: int,
    num_rows: int,
    mean: bool,
) -> None:
    """What `lookup_vectors` gives, into ``out``, by rows; all are contiguous."""
    given = _given(ids, feature, repeat), _table(places, keys, rows, hashed, begins)
    num_columns = out.numel() // (num_rows * weight.shape[1])
    where = _Out(out.data_ptr(), num_rows, num_columns, weight.shape[1])
    rows_of = weight.data_ptr(), _ELEMENTS.index(weight.dtype), weight.shape[0], _pointer(scale)
    _check(library().fill_vectors(where, *given, *rows_of, _pointer(offsets), mean, torch.get_num_threads()))


def _load(path: pathlib.Path) -> ctypes.CDLL:
    built = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    given = ctypes.POINTER(_Ids), ctypes.POINTER(_Table)
    built.fill_rows.argtypes = [pointer, *given, number]
    weight, bags = (pointer, number, number, pointer), (pointer, number)
    built.fill_vectors.argtypes = [ctypes.POINTER(_Out), *given, *weight, *bags, number]
    return built


def _given(ids: Tensor, feature: Tensor, repeat: int) -> _Ids:
    return _Ids(ids.data_ptr(), ids.numel(), feature.data_ptr(), repeat)


def _table(places: Tensor, keys: Tensor, rows: Tensor, hashed: Tensor, begins: Tensor) -> _Table:
    pointers = (one.data_ptr() for one in (keys, rows, hashed, begins))
    return _Table(places.data_ptr(), places.shape[1], *pointers, keys.shape[0])


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(code: int) -> None:
    if code:
        kind, must = _WRONG[code]
        raise kind(f"{must}, got others")


def _build(command: list[str], path: pathlib.Path) -> None:
    """With OpenMP, whose threads are torch's own where both are GNU's, or without where the compiler has none."""
    for threads in (["-fopenmp"], []):
        try:
            done = subprocess.run(
                [*command, *_FLAGS, *threads, str(_SOURCE), "-o", str(path)], capture_output=True, text=True
            )
        except OSError as error:
            raise RuntimeError(f"{shlex.join(command)} cannot be run: {error}") from error
        if done.returncode == 0:
            return
    raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
