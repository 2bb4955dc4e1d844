"""A fused lookup for serving: read-only, its rows in float32, float16 or int8."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recblocks import _checks
from recblocks._memory import copied, in_huge_pages
from recblocks.embedding._buckets import BUCKET, Slots, empty, hash_of, num_buckets_of
from recblocks.embedding._gather import kernel_vectors, pool, restore_dtypes, rows_of, vectors_in_order
from recblocks.embedding._id_table_state import capacities_of
from recblocks.embedding._layout import Vectors, holds_all
from recblocks.embedding._packing import Group, Ids, PackedIds, groups_of, pack
from recblocks.embedding.fused_lookup import FusedEmbeddingLookup
from recblocks.kernels.fused_lookup import dispatch

_DTYPES = (torch.float32, torch.float16, torch.int8)
_LARGEST = 127


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 with a scale each: ``w ≈ s q``, ``s = max |w| / 127`` of the row, off by at most ``s / 2``.

    Args:
        weight: (R, D).

    Returns:
        (R, D) int8 and (R,) float32; a row of zeros has scale 0.

    Raises:
        TypeError, ValueError: another dtype or shape.

    Example:
        >>> quantize_rows(torch.tensor([[0.5, -1.27], [0.0, 0.0]]))
        (tensor([[  50, -127],
                [   0,    0]], dtype=torch.int8), tensor([0.0100, 0.0000]))
    """
    _checks.floating("weight", weight, "R", "D")
    if weight.shape[1] == 0:
        raise ValueError(f"weight must have at least one column, got {_checks.describe(weight)}")
    scale = weight.float().abs().amax(1) / _LARGEST
    rows = (weight.float() / torch.where(scale > 0, scale, 1)[:, None]).round()
    return rows.to(torch.int8), scale


class ServingLookup(nn.Module):
    """What a `FusedEmbeddingLookup` gives, from a copy of its rows that is only read.

    It has no weights to train, and no bookkeeping: of a row of 32 numbers it keeps 128, 64 or 36 bytes, and 14.1 more
    by which it is found. Vectors are float32, and so are their sums.

    Args:
        lookup: what is served; it may go on training.
        dtype: of the rows: torch.float32, torch.float16, or torch.int8 with a scale a row, as `quantize_rows` makes.
        backend: like `FusedEmbeddingLookup`'s.

    Raises:
        TypeError, ValueError: for something else.

    Example:
        >>> from recblocks import EmbeddingTable, IdFeature
        >>> lookup = FusedEmbeddingLookup({"item": EmbeddingTable(1000, dim=8)}, {"item": IdFeature("item")})
        >>> batch = {"item": torch.tensor([2**40, -1])}
        >>> lookup.insert(batch)
        {'item': 2}
        >>> served = ServingLookup(lookup, dtype=torch.int8)
        >>> torch.allclose(served(batch).pooled, lookup(batch).pooled, rtol=0, atol=2e-4)
        True

    Source:
        TransAct, section 3.4.2; int8 rows with a scale each as in fbgemm's inference tables.
    """

    keys: Tensor
    rows: Tensor
    hashed: Tensor
    begins: Tensor
    places: Tensor

    def __init__(
        self,
        lookup: FusedEmbeddingLookup,
        *,
        dtype: torch.dtype = torch.float16,
        backend: Literal["auto", "reference", "cpp", "triton"] = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("backend", backend, dispatch.BACKENDS)
        self.backend = backend
        if not isinstance(lookup, FusedEmbeddingLookup):
            raise TypeError(f"lookup must be a FusedEmbeddingLookup, got {_checks.describe(lookup)}")
        _checks.choice("dtype", dtype, _DTYPES)
        self.dtype, self.layout, self._capacities = dtype, lookup.layout, lookup.table.capacities
        with lookup.table.reading("a copy"):
            for name, tensor in (*lookup.table.slots._asdict().items(), ("places", lookup.places)):
                self.register_buffer(name, copied(tensor))
            for dim, weight in lookup.weights.items():
                rows, scale = quantize_rows(weight) if dtype == torch.int8 else (weight, None)
                rows = copied(rows.detach(), dtype)
                if not weight.is_meta and bool((rows.isinf() & weight.isfinite()).any()):
                    raise ValueError(f"lookup must have weights that {dtype} can hold, got {weight.abs().max().item()}")
                self.register_buffer(f"weight_{dim}", rows)
                self.register_buffer(f"scale_{dim}", None if scale is None else scale.detach())

    def reset_parameters(self) -> None:
        """Hold no id, and zeros for those that are unseen."""
        keys, rows = empty(self.keys.shape[0], self.keys.device)
        begins = torch.tensor([0, *itertools.accumulate(self._capacities)])
        places = torch.tensor(self.layout.places(self._capacities))
        fixed = {"keys": keys, "rows": rows, "hashed": torch.tensor(hash_of(0)), "begins": begins, "places": places}
        for name, tensor in self.named_buffers():
            tensor.copy_(fixed.get(name, torch.zeros((), dtype=tensor.dtype)))

    def forward(self, features: Mapping[str, Ids] | PackedIds) -> Vectors:
        """Look all features up, like `FusedEmbeddingLookup.forward`."""
        backend = self._backend
        slots = Slots(self.keys, self.rows, self.hashed, self.begins)
        if backend is not None:
            weights = [self.get_buffer(f"weight_{dim}") for dim in self.layout.dims]
            quantized = self.dtype == torch.int8
            scales = [self.get_buffer(f"scale_{dim}") for dim in self.layout.dims if quantized]
            return kernel_vectors(backend, features, slots, self.places, weights, scales, self.layout)
        groups = groups_of(self.layout, features, self.places.device, backend)
        rows = rows_of(groups, slots, self.places, None)
        found = [self._vectors(group, their) for group, their in zip(groups, rows, strict=True)]
        return vectors_in_order(self.layout, groups, found)

    def pack(self, features: Mapping[str, Ids]) -> PackedIds:
        """Lay the ids of all features side by side, like `FusedEmbeddingLookup.pack`."""
        return pack(self.layout, features, self.places.device, self._backend)

    def get_extra_state(self) -> Tensor:
        """What the lookup was made for."""
        return self.layout.described()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: what differs was refused before anything was loaded."""

    def extra_repr(self) -> str:
        """Name the dtype of the rows, and how many features there are."""
        return f"dtype={self.dtype}, num_features={len(self.layout.features)}"

    @property
    def _backend(self) -> str | None:
        return dispatch.resolve(self.backend, self.places.device)

    def _vectors(self, group: Group, rows: Tensor) -> Tensor:
        dim = self.layout.dim_of[group.names[0]]
        weight = self.get_buffer(f"weight_{dim}")
        if self.dtype == torch.float32 and group.offsets is not None:
            return pool(weight, group.offsets, group.kind, rows)
        found = weight.index_select(0, rows.flatten()).float()
        if self.dtype == torch.int8:
            found = found * self.get_buffer(f"scale_{dim}").index_select(0, rows.flatten())[:, None]
        return found.view(*rows.shape, dim) if group.offsets is None else pool(found, group.offsets, group.kind)

    def _shapes(self, capacities: list[int]) -> dict[str, tuple[int, ...]]:
        slots = num_buckets_of(sum(capacities)), BUCKET
        shapes: dict[str, tuple[int, ...]] = {"keys": slots, "rows": slots, "hashed": (3,)}
        shapes |= {"begins": (len(capacities) + 1,), "places": (7, len(self.layout.features))}
        for dim, num_rows in self.layout.num_rows(capacities).items():
            shapes |= {f"weight_{dim}": (num_rows, dim), f"scale_{dim}": (num_rows,)}
        return shapes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ServingLookup:
        """Move, and cast nothing: what the rows are was said when it was made."""
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_dtypes(self, kept)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take over another one, whatever its capacities, of the same features and dtype."""
        self.layout.refuse_others(state_dict.get(f"{prefix}_extra_state"))
        own = dict(self.named_buffers(recurse=False))
        if holds_all(state_dict, [prefix + name for name in own]):
            capacities = capacities_of(state_dict[f"{prefix}begins"])
            if len(capacities) != len(self._capacities) or min(capacities) < 1:
                raise ValueError(f"state_dict must hold {len(self._capacities)} tables, got of {capacities[:5]} rows")
            shapes = self._shapes(capacities)
            for name, tensor in own.items():
                of = f"state_dict[{prefix + name!r}]"
                _checks.tensor(of, state_dict[prefix + name], *shapes[name], dtype=tensor.dtype)
            self.layout.refuse_places(state_dict[f"{prefix}places"], capacities, prefix)
            self._capacities = capacities
            for name, tensor in own.items():
                if tensor.shape != state_dict[prefix + name].shape:
                    fresh = torch.empty_like(state_dict[prefix + name], device=tensor.device)
                    setattr(self, name, in_huge_pages(fresh))
        super()._load_from_state_dict(state_dict, prefix, *args)
