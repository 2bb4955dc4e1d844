"""Where the features of a batch lie: their tensors seen in one pass, by `apart.cpp`."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

_VERSION = 1  # of DLPack, whose structures stay as they are within one


class Apart(ctypes.Structure):
    """Features that lie here and there, as `lookup.cpp` takes them."""

    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("num_features", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
    )


class _Python(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("list_item", "tuple_item", "tuple_size", "type_of", "let_go", "tell", "tensor", "tuple")
    )


class _Exchange(ctypes.Structure):
    """DLPack's exchange of tensors in C."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("from_python", ctypes.c_void_p),
        ("to_python", ctypes.c_void_p),
        ("tell", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )


_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p
LOOK = ctypes.POINTER(_Python), ctypes.py_object, _NUMBER, _NUMBER, _POINTER, _POINTER, _POINTER
"""The arguments of the function that looks."""


class Lying(NamedTuple):
    """Features of as many rows each, ids or bags of them, which are as they must be but for the numbers in offsets."""

    apart: Apart
    memory: tuple[Any, ...]
    """What ``apart`` points into."""


def look(library: ctypes.CDLL, features: list[Any], least_rows: int) -> Lying | None:
    """Look at (B,) int64 ids, or pairs of (N,) ids and (B + 1,) offsets, of each feature.

    Returns:
        None where one is anything else, not in one piece on a CPU, rows differ, there are fewer than these, or torch
        has no such exchange.
    """
    python = _python()
    if python is None:
        return None
    num = len(features)
    ids, sizes, offsets = (array("q", bytes(8 * num)) for _ in range(3))
    where = [some.buffer_info()[0] for some in (ids, sizes, offsets)]
    call = _with_lock(library)
    try:
        num_rows = call(python, features, num, least_rows, *where)
    except Exception:  # of a tensor without memory: whoever looks at each says so
        return None
    return None if num_rows < 0 else Lying(Apart(*where, num, num_rows), (features, ids, sizes, offsets))


@functools.cache
def _with_lock(library: ctypes.CDLL) -> Callable[..., int]:
    """The function that looks, which calls Python's and so must hold its lock."""
    return ctypes.PYFUNCTYPE(ctypes.c_int64, *LOOK)(("look", library))


@functools.cache
def _python() -> _Python | None:
    """What `apart.cpp` calls; None where torch has no such exchange."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    unwrap = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    exchange = _Exchange.from_address(unwrap(capsule, b"dlpack_exchange_api"))
    if exchange.major != _VERSION or not exchange.tell:
        return None
    names = "PyList_GetItem", "PyTuple_GetItem", "PyTuple_Size", "PyObject_Type", "Py_DecRef"
    functions = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in names]
    return _Python(*functions, exchange.tell, id(Tensor), id(tuple))
