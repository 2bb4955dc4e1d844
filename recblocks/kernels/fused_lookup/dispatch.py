"""The fused lookup as two operators of torch, and which backend runs them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from recblocks import _checks
from recblocks.kernels.dispatch import HAS_TRITON, transformed, watched
from recblocks.kernels.fused_lookup import cpp
from recblocks.kernels.fused_lookup.apart import look
from recblocks.kernels.fused_lookup.asked import ELEMENTS, Asked

BACKENDS = ("auto", "reference", "cpp", "triton")

_PLAIN = frozenset((Tensor, Parameter))


def resolve(backend: str, device: torch.device) -> str | None:
    """Turn a ``backend=`` argument into the name of the backend that runs, None for plain torch.

    "auto" takes Triton's kernels on CUDA and C++ on a CPU, where these are to be had, and plain torch elsewhere, inside
    a torch.func transform, which the operators lack, and for what is exported, which then needs nothing but torch.

    Raises:
        ImportError, RuntimeError: for a backend that cannot be had.
        ValueError: for "cpp" on another device.
    """
    if backend == "cpp":
        if device.type not in ("cpu", "meta"):
            raise ValueError(f"backend 'cpp' must run on a CPU, got {device}")
        return backend
    if backend == "triton":
        if not HAS_TRITON:
            _checks.optional("triton", "pip install triton")
        return backend
    if backend == "reference" or torch.compiler.is_exporting() or transformed():
        return None
    if device.type == "cuda":
        return "triton" if HAS_TRITON else None
    return "cpp" if device.type == "cpu" and cpp.is_available() else None


@torch.library.custom_op("recblocks::fused_lookup_rows", mutates_args=())
def lookup_rows(
    ids: Tensor,
    feature: Tensor,
    places: Tensor,
    keys: Tensor,
    rows: Tensor,
    hashed: Tensor,
    begins: Tensor,
    backend: str,
) -> Tensor:
    """(...) the rows of the weight; like `recblocks.embedding._gather.lookup_rows` with ``places[:, feature]``.

    Args:
        ids: (...) int64, or (F, B).
        feature: of as many numbers as there are ids, int64, or (F, 1).
        places: (4 or more, features) int64, what is taken there of each feature.
        keys: (B, 8) int64.
        rows: (B, 8) int32.
        hashed: (3,) int64.
        begins: (P + 1,) int64.
        backend: what `resolve` says.
    """
    asked = Asked(ids, feature, places, keys, rows, hashed, begins)
    asked.check()
    found = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
    if ids.numel():
        _kernels(backend).fill_rows(found, asked.contiguous(), _repeat(ids.numel(), feature))
    return found


def _lookup_vectors(
    ids: Tensor,
    feature: Tensor,
    places: Tensor,
    keys: Tensor,
    rows: Tensor,
    hashed: Tensor,
    begins: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    offsets: Tensor | None,
    counts: Sequence[int],
    num_columns: int,
    pooled: bool,
    backend: str,
) -> Tensor:
    """float32 vectors of the ids, or the sum or mean of each bag, of features of several widths; no gradient.

    Args:
        ids: (...) int64; (N,) with offsets.
        feature: as `lookup_rows` takes it, int64; of bags, numbers that each stand for so many of them; features of
            one width one after the other, and the widths in the order of the weights.
        places: (7, features) int64, as `recblocks.embedding._layout.Layout.places` gives it.
        keys: (B, 8) int64.
        rows: (B, 8) int32.
        hashed: (3,) int64.
        begins: (P + 1,) int64.
        weights: (R, D) of each width; float32, float16, bfloat16 or int8, all of one.
        scales: (R,) float32 of each weight, what its rows are multiplied with; none, or as many as weights.
        offsets: int64, where the bags begin and the last one ends.
        counts: if pooled, how many numbers of ``feature`` are of features of each weight; else 1 of the weight that all
            are of, and 0 of the others.
        num_columns: of the output.
        pooled: the ids, or bags, of a feature stand behind those of the one before, as many of each, and come out row
            by row, each in the columns of its feature, every one of which is of one feature; else each has a row.
        backend: what `resolve` says.

    Returns:
        (ids, or bags, of a feature if pooled, or else of all, num_columns).

    Raises:
        TypeError, ValueError: tensors of another dtype or device, or ids, or bags, that are no whole number for each
            feature.
    """
    asked = Asked(ids, feature, places, keys, rows, hashed, begins)
    _check(asked, weights, scales, offsets, counts, num_columns, pooled)
    repeat = _repeat(ids.numel() if offsets is None else offsets.shape[0] - 1, feature)
    out = _vectors_like(asked, offsets, num_columns, pooled)
    if out.numel():
        weights, scales = ([one.contiguous() for one in every] for every in (weights, scales))
        offsets = None if offsets is None else offsets.contiguous()
        counts = counts if pooled else [count * feature.numel() for count in counts]
        _kernels(backend).fill_vectors(out, asked.contiguous(), weights, scales, offsets, counts, repeat)
    return out


lookup_vectors = torch.library.custom_op("recblocks::fused_lookup_vectors", _lookup_vectors, mutates_args=())


def vectors_of(
    asked: Asked,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    offsets: Tensor | None,
    counts: Sequence[int],
    num_columns: int,
    pooled: bool,
    backend: str,
) -> Tensor:
    """`lookup_vectors`, past torch's dispatcher where nothing there has to see it: the way through it takes .3 ms."""
    how = weights, scales, offsets, counts, num_columns, pooled, backend
    if watched() or _seen((*asked, *weights, *scales, offsets)):
        found: Tensor = lookup_vectors(*asked, *how)
        return found
    return _lookup_vectors(*asked, *how)


def vectors_apart(
    features: list[Any],
    table: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    num_columns: int,
) -> Tensor | None:
    """What `lookup_vectors` gives, by C++, of features that all pool and lie apart, without laying them side by side.

    Args:
        features: in their order (B) int64 ids, or (N) of bags and the (B + 1) offsets at which these begin.
        table: what stands in `Asked` behind the ids and their features.
        weights: like `lookup_vectors`'.
        scales: likewise.
        num_columns: of the output.

    Returns:
        None where torch has to see what is done, a few rows are not worth it, or anything is wrong with the features.
    """
    if watched() or _seen((*table, *weights, *scales)):
        return None
    # Of fewer rows the ids of one feature alone are too few to hide each other's waits for memory.
    lying = look(cpp.library(), features, cpp.BLOCK)
    if lying is None:
        return None
    asked = Asked(table[0], table[0], *table)
    _check_tensors(asked, weights, scales)
    out = torch.empty((lying.apart.num_rows, num_columns), dtype=torch.float32, device="cpu")
    every = ([one.contiguous() for one in some] for some in (weights, scales))
    return out if cpp.fill_apart(out, lying, asked.contiguous(), *every) else None


def _seen(given: Sequence[Tensor | None]) -> bool:
    """Whether a profiler, a mode of functions, a subclass of Tensor, autograd or a fake device has to see a call."""
    if torch._C._autograd._profiler_enabled() or torch._C._len_torch_function_stack() > 0:
        return True
    tensors = [one for one in given if one is not None]
    if not _PLAIN.issuperset(map(type, tensors)) or tensors[0].is_meta:
        return True
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


@lookup_rows.register_fake
def _(*given: Any) -> Tensor:
    asked = Asked(*given[:7])
    asked.check()
    return torch.empty_like(asked.ids, memory_format=torch.contiguous_format)


@lookup_vectors.register_fake
def _(*given: Any) -> Tensor:
    asked, (weights, scales, offsets, counts, num_columns, pooled) = Asked(*given[:7]), given[7:13]
    _check(asked, weights, scales, offsets, counts, num_columns, pooled)
    return _vectors_like(asked, offsets, num_columns, pooled)


def _check(
    asked: Asked,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    offsets: Tensor | None,
    counts: Sequence[int],
    num_columns: int,
    pooled: bool,
) -> None:
    _check_tensors(asked, weights, scales, offsets)
    in_all = asked.feature.numel() if pooled else 1
    if len(counts) != len(weights) or sum(counts) != in_all or min(counts) < 0:
        raise ValueError(f"counts must be one a weight, {in_all} in all, got {list(counts)}")
    wide = sum(count * weight.shape[1] for count, weight in zip(counts, weights, strict=True))
    if num_columns != wide:
        raise ValueError(f"num_columns must be what the features take, {wide}, got {num_columns}")


def _check_tensors(
    asked: Asked, weights: Sequence[Tensor], scales: Sequence[Tensor], offsets: Tensor | None = None
) -> None:
    asked.check(offsets, *weights, *scales)
    for weight in weights:
        _checks.tensor("weights", weight, "R", "D", dtype=ELEMENTS)
    if scales and len(scales) != len(weights):
        raise ValueError(f"scales must be one a weight, or none, got {len(scales)} and {len(weights)} weights")
    for weight, scale in zip(weights, scales, strict=False):
        _checks.tensor("scales", scale, weight.shape[0], dtype=torch.float32)
    if len({weight.dtype for weight in weights}) != 1:
        raise TypeError(f"weights must be of one dtype, got {[weight.dtype for weight in weights]}")
    if asked.places.shape[0] != 7:
        raise ValueError(f"places must have shape (7, features), got {_checks.describe(asked.places)}")


def _vectors_like(asked: Asked, offsets: Tensor | None, num_columns: int, pooled: bool) -> Tensor:
    num_rows = asked.ids.numel() if offsets is None else offsets.shape[0] - 1
    if pooled and asked.feature.numel():
        num_rows = num_rows // asked.feature.numel()
    return torch.empty((num_rows, num_columns), dtype=torch.float32, device=asked.ids.device)


def _repeat(given: int, feature: Tensor) -> int:
    """How many ids, or bags, one after the other, each number of a feature is for."""
    repeat, rest = divmod(given, feature.numel()) if feature.numel() else (0, given)
    if rest:
        raise ValueError(f"feature must have a number for so many of {given} each, got {feature.numel()}")
    return repeat or 1


def _kernels(backend: str) -> ModuleType:
    return importlib.import_module(f"recblocks.kernels.fused_lookup.{backend}")
