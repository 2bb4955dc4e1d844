"""The fused lookup as two operators of torch, and which backend runs them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.kernels.dispatch import transformed
from recblocks.kernels.fused_lookup import cpp
from recblocks.kernels.fused_lookup.asked import Asked

BACKENDS = ("auto", "reference", "cpp", "triton")

_HAS_TRITON = importlib.util.find_spec("triton") is not None


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
        if not _HAS_TRITON:
            _checks.optional("triton", "pip install triton")
        return backend
    if backend == "reference" or torch.compiler.is_exporting() or transformed():
        return None
    if device.type == "cuda":
        return "triton" if _HAS_TRITON else None
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
        places: (4, features) int64, what is taken there of each feature.
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
        _kernels(backend).fill_rows(found, asked.contiguous(), _repeat(ids, feature))
    return found


@torch.library.custom_op("recblocks::fused_lookup_vectors", mutates_args=())
def lookup_vectors(
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
    num_features: int | None,
    mean: bool,
    backend: str,
) -> Tensor:
    """float32 vectors of the ids, or the sum or mean of each bag, (B, num_features, D) or (..., D); no gradient.

    Args:
        ids: (...) int64; (N,) with offsets.
        feature: as `lookup_rows` takes it, int64; (num_features, 1) with offsets.
        places: (4, features) int64.
        keys: (B, 8) int64.
        rows: (B, 8) int32.
        hashed: (3,) int64.
        begins: (P + 1,) int64.
        weight: (R, D) float32, float16, bfloat16 or int8.
        scale: (R,) float32, what each row is multiplied with.
        offsets: (num_features B + 1,) int64, where the bags begin and the last one ends.
        num_features: the ids, or bags, of a feature stand behind those of the one before, and come out row by row;
            None: ids come out as they stand.
        mean: instead of the sum.
        backend: what `resolve` says.

    Raises:
        TypeError, ValueError: tensors of another dtype or device, or ids, or bags, that are no whole number for each
            feature.
    """
    asked = Asked(ids, feature, places, keys, rows, hashed, begins)
    asked.check(offsets, weight, scale)
    if scale is not None:
        _checks.tensor("scale", scale, weight.shape[0], dtype=torch.float32)
    out = _vectors_like(ids, weight, offsets, num_features)
    if out.numel():
        weight = weight.contiguous()
        scale, offsets = (None if one is None else one.contiguous() for one in (scale, offsets))
        repeat = _repeat(ids, feature) if offsets is None else _repeat(offsets[1:], feature)
        if num_features is None:
            num_rows = 1
        elif (num_rows := out.shape[0]) * num_features != (ids.numel() if offsets is None else offsets.numel() - 1):
            raise ValueError(f"num_features must divide the ids, or bags, got {num_features}")
        _kernels(backend).fill_vectors(
            out, asked.contiguous(), weight, scale, offsets, repeat=repeat, num_rows=num_rows, mean=mean
        )
    return out


@lookup_rows.register_fake
def _(*given: Any) -> Tensor:
    asked = Asked(*given[:7])
    asked.check()
    return torch.empty_like(asked.ids, memory_format=torch.contiguous_format)


@lookup_vectors.register_fake
def _(*given: Any) -> Tensor:
    asked, (weight, scale, offsets, num_features) = Asked(*given[:7]), given[7:11]
    asked.check(offsets, weight, scale)
    return _vectors_like(asked.ids, weight, offsets, num_features)


def _vectors_like(ids: Tensor, weight: Tensor, offsets: Tensor | None, num_features: int | None) -> Tensor:
    num = ids.numel() if offsets is None else offsets.shape[0] - 1
    shape = ids.shape if num_features is None else (num // num_features, num_features)
    return torch.empty((*shape, weight.shape[1]), dtype=torch.float32, device=weight.device)


def _repeat(given: Tensor, feature: Tensor) -> int:
    """How many ids, or bags, one after the other, each number of a feature is for."""
    repeat, rest = divmod(given.numel(), feature.numel()) if feature.numel() else (0, given.numel())
    if rest:
        raise ValueError(f"feature must have a number for so many of {given.numel()} each, got {feature.numel()}")
    return repeat or 1


def _kernels(backend: str) -> ModuleType:
    return importlib.import_module(f"recblocks.kernels.fused_lookup.{backend}")
