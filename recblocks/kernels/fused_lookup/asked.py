"""What the fused lookup's operators are asked, as every backend takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS = (torch.float32, torch.float16, torch.bfloat16, torch.int8)  # of a weight, by the numbers of `lookup.cpp`


class Asked(NamedTuple):
    """Ids, and where to look for them."""

    ids: Tensor
    """(...) int64, or (F, B)."""
    feature: Tensor
    """Numbers of features, int64, each for as many ids, or bags, one after the other."""
    places: Tensor
    """(4 or more, features) int64, of which rows need four: `recblocks.embedding._layout.Layout.places`."""
    keys: Tensor
    """(B, 8) int64."""
    rows: Tensor
    """(B, 8) int32."""
    hashed: Tensor
    """(3,) int64."""
    begins: Tensor
    """(P + 1,) int64."""

    def check(self, offsets: Tensor | None = None, *others: Tensor | None) -> None:
        """Kernels read memory as what they expect: refuse another dtype, device or size."""
        for one in (*self._replace(rows=self.keys), offsets):
            if one is not None and one.dtype != torch.int64:
                raise TypeError(f"ids and what says where to look must be int64, got {one.dtype}")
        if self.rows.dtype != torch.int32 or self.rows.shape != self.keys.shape:
            raise ValueError(f"rows must be int32 like keys of shape {tuple(self.keys.shape)}, got {self.rows.dtype}")
        if self.places.shape[0] < 4:
            raise ValueError(f"places must have at least 4 rows, got {self.places.shape[0]}")
        for one in (*self, offsets, *others):
            if one is not None and one.device != self.ids.device:
                raise ValueError(f"all must be on one device, got {self.ids.device} and {one.device}")

    def contiguous(self) -> Asked:
        """The same, each in one piece of memory."""
        return Asked(*(one.contiguous() for one in self))
