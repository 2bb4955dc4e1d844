"""Hash, probe and gather in one pass on a CPU: `lookup.cpp`, which `recblocks.kernels.building` builds."""

from __future__ import annotations

import ctypes
import functools
import itertools
import pathlib
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from recblocks.kernels import building
from recblocks.kernels.fused_lookup.apart import LOOK, Apart, Lying
from recblocks.kernels.fused_lookup.asked import ELEMENTS, Asked

BLOCK = 64  # ids that `lookup.cpp` looks up at a time


class _Table(ctypes.Structure):
    _fields_ = (
        ("places", ctypes.c_void_p),
        ("num_features", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("hashed", ctypes.c_void_p),
        ("num_buckets", ctypes.c_int64),
        ("begins", ctypes.c_void_p),
        ("num_parts", ctypes.c_int64),
    )


class _Ids(ctypes.Structure):
    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("num_ids", ctypes.c_int64),
        ("feature", ctypes.c_void_p),
        ("repeat", ctypes.c_int64),
    )


class _Weight(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
    )


class _Weights(ctypes.Structure):
    _fields_ = (
        ("every", ctypes.POINTER(_Weight)),
        ("num_weights", ctypes.c_int64),
        ("element", ctypes.c_int64),
    )


class _Out(ctypes.Structure):
    _fields_ = (
        ("vectors", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
    )


@building.constant
def is_available() -> bool:
    """Whether it is built, or can be and is now; a compiler that fails is warned of, once."""
    return building.is_available(library, "ids are looked up")


@functools.cache
def library() -> ctypes.CDLL:
    """The functions of the C++ beside this file; errors are `building.library`'s."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    given = ctypes.POINTER(_Ids), ctypes.POINTER(_Table)
    out_of = ctypes.POINTER(_Out), *given, ctypes.POINTER(_Weights)
    functions = {
        "fill_rows": (pointer, *given, number),
        "lay": (ctypes.POINTER(Apart), pointer, pointer, number),
        "fill_vectors": (*out_of, pointer, number, number),
        "look": LOOK,
        "fill_apart": (*map(ctypes.POINTER, (_Out, Apart, _Table, _Weights)), number),
    }
    here = pathlib.Path(__file__)
    return building.library([here.with_name("lookup.cpp"), here.with_name("apart.cpp")], functions)


def fill_rows(found: Tensor, asked: Asked, repeat: int) -> None:
    """What `lookup_rows` gives, into ``found``; all are contiguous."""
    wrong = library().fill_rows(found.data_ptr(), *_given(asked, repeat), building.num_threads())
    if wrong:
        raise _error(wrong, asked, None)


def fill_vectors(
    out: Tensor,
    asked: Asked,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    offsets: Tensor | None,
    counts: Sequence[int],  # noqa: ARG001 (for backends that go by widths)
    repeat: int,
) -> None:
    """What `lookup_vectors` gives, into ``out``; all are contiguous."""
    num_bags = 0 if offsets is None else offsets.numel() - 1
    where = _Out(out.data_ptr(), *out.shape), *_given(asked, repeat), _weights(weights, scales)
    wrong = library().fill_vectors(*where, _pointer(offsets), num_bags, building.num_threads())
    if wrong:
        raise _error(wrong, asked, offsets)


def fill_apart(out: Tensor, features: Lying, asked: Asked, weights: Sequence[Tensor], scales: Sequence[Tensor]) -> bool:
    """What `lookup_vectors` gives, into ``out``, of features that lie apart; all else is contiguous.

    Args:
        out: (B, columns).
        features: in their order.
        asked: places and id table.
        weights: of each width.
        scales: like `lookup_vectors`'.

    Returns:
        whether it was done, which it is not where anything is wrong: who looks at each feature says what.
    """
    given = _Out(out.data_ptr(), *out.shape), features.apart, _table(asked), _weights(weights, scales)
    return not library().fill_apart(*given, building.num_threads())


def lay(ids: Sequence[Tensor], offsets: Sequence[Tensor] | None) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Lay features side by side: in one pass, where `torch.cat` looks at each of hundreds of tensors many times.

    Args:
        ids: (N) int64 of each feature, contiguous, on a CPU; without offsets as many of each.
        offsets: (B + 1) of each likewise, where its bags begin and the last one ends; None where ids have no bags.

    Returns:
        (ΣN) all ids; (F B + 1) where the bags begin among them and the last one ends, and (F,) how many ids of each
        feature, None where there are no bags. None where offsets do not run from 0 to the number of ids.
    """
    sizes = array("q", map(Tensor.numel, ids)) if offsets is not None else array("q", ids[0].shape) * len(ids)
    num_rows = 0 if offsets is None else offsets[0].shape[0] - 1
    every = torch.empty(sum(sizes), dtype=torch.int64, device="cpu")
    begins = None if offsets is None else torch.empty(len(ids) * num_rows + 1, dtype=torch.int64, device="cpu")
    where = array("q", map(Tensor.data_ptr, ids)), sizes, array("q", map(Tensor.data_ptr, offsets or ()))
    apart = Apart(*(some.buffer_info()[0] or None for some in where), len(ids), num_rows)
    wrong = library().lay(apart, every.data_ptr(), _pointer(begins), building.num_threads())
    if wrong:
        return None
    return every, begins, torch.frombuffer(sizes, dtype=torch.int64) if offsets is not None else None


def _given(asked: Asked, repeat: int) -> tuple[_Ids, _Table]:
    return _Ids(asked.ids.data_ptr(), asked.ids.numel(), asked.feature.data_ptr(), repeat), _table(asked)


def _table(asked: Asked) -> _Table:
    places, keys, rows, hashed, begins = (one.data_ptr() for one in asked[2:])
    buckets, parts = asked.keys.shape[0], asked.begins.shape[0] - 1
    return _Table(places, asked.places.shape[1], keys, rows, hashed, buckets, begins, parts)


def _weights(weights: Sequence[Tensor], scales: Sequence[Tensor]) -> _Weights:
    pairs = itertools.zip_longest(weights, scales)
    every = [_Weight(one.data_ptr(), *one.shape, _pointer(scale)) for one, scale in pairs]
    return _Weights((_Weight * len(every))(*every), len(every), ELEMENTS.index(weights[0].dtype))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _error(wrong: int, asked: Asked, offsets: Tensor | None) -> Exception:
    """What is wrong, by the numbers that `lookup.cpp` gives."""
    if wrong == 1:
        least, most = asked.feature.aminmax()
        return IndexError(f"feature must be from 0 to {asked.places.shape[1] - 1}, got {int(least)} to {int(most)}")
    if wrong == 2 and offsets is not None:
        some = ", ".join(map(str, offsets[:9].tolist()))
        return ValueError(f"offsets must ascend from 0 to the number of ids, got {some}, ...")
    what = "parts of the id table, weights, rows of these and columns of the output"
    return IndexError(f"places must name {what}, got {asked.places[:, :9].tolist()}")
