"""The fused lookup as two operators of torch, and which backend runs them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from recblocks import _checks

BACKENDS = ("auto", "reference", "triton")

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve(backend: str, device: torch.device) -> str | None:
    """Turn a ``backend=`` argument into the name of the backend that runs, None for plain torch."""
    if backend == "reference" or (backend == "auto" and not (device.type == "cuda" and _HAS_TRITON)):
        return None
    if not _HAS_TRITON:
        _checks.optional("triton", "pip install triton")
    return "triton"


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
    """(...) the rows of the weight; like `recblocks.embedding._gather.lookup_rows` with ``places[:, feature]``."""
    found = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
    if ids.numel():
        _kernels(backend).fill_rows(found, *_contiguous(ids, feature, places, keys, rows, hashed, begins))
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
    mean: bool,
    backend: str,
) -> Tensor:
    """(..., D) float32 vectors of the ids, or (bags, D) their sum or mean; no gradient.

    Args:
        ids: (...) int64; (N,) with offsets.
        feature: (F,) that broadcasts against ids, or (N,), int64.
        places: (4, F) int64, what `recblocks.embedding._gather.lookup_rows` takes of each feature.
        keys: (B, 8) int64.
        rows: (B, 8) int32.
        hashed: (3,) int64.
        begins: (P + 1,) int64.
        weight: (R, D) float32, float16, bfloat16 or int8.
        scale: (R,) float32, what each row is multiplied with.
        offsets: (bags + 1,) int64, where the bags begin and the last one ends.
        mean: instead of the sum.
        backend: what `resolve` says.
    """
    shape = ids.shape if offsets is None else (offsets.shape[0] - 1,)
    out = torch.empty((*shape, weight.shape[1]), dtype=torch.float32, device=ids.device)
    if out.numel():
        given = _contiguous(ids, feature, places, keys, rows, hashed, begins, weight)
        scale, offsets = (None if one is None else one.contiguous() for one in (scale, offsets))
        _kernels(backend).fill_vectors(out, *given, scale, offsets, mean)
    return out


@lookup_rows.register_fake
def _(ids: Tensor, *_: object) -> Tensor:
    return torch.empty_like(ids, memory_format=torch.contiguous_format)


@lookup_vectors.register_fake
def _(ids: Tensor, *others: object) -> Tensor:
    weight, _, offsets, *_ = others[6:]
    assert isinstance(weight, Tensor)
    shape = (offsets.shape[0] - 1,) if isinstance(offsets, Tensor) else ids.shape
    return torch.empty((*shape, weight.shape[1]), dtype=torch.float32, device=weight.device)


def _kernels(backend: str) -> ModuleType:
    return importlib.import_module(f"recblocks.kernels.fused_lookup.{backend}")


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]
