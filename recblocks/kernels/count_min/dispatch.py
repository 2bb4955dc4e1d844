"""Counting and answering on an NVIDIA GPU, as two operators of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recblocks.kernels.dispatch import on_nvidia, transformed


def runs_on(ids: Tensor) -> bool:
    """Whether `add` and `answer` take them: on an NVIDIA GPU, with Triton, outside of transforms and exports."""
    return on_nvidia([ids]) and not transformed() and not torch.compiler.is_exporting()


@torch.library.custom_op("recblocks::count_min_add", mutates_args=("pending", "total"))
def add(
    ids: Tensor,
    amounts: Tensor | None,
    pending: Tensor,
    total: Tensor,
    offset: int,
    multipliers: list[int],
    sighting: int,
) -> None:
    """Add to each id's counters and to the total.

    Args:
        ids: (N,) int64.
        amounts: (N,) int64, fixed point; None: one sighting each.
        pending: (depth, width) int64, contiguous.
        total: () int64.
        offset: of the hash.
        multipliers: of the hash, one for every two rows.
        sighting: what one adds to a counter.
    """
    from recblocks.kernels.count_min import triton

    if ids.numel():
        amounts = None if amounts is None else amounts.contiguous()
        triton.add(ids.contiguous(), amounts, pending, total, offset, multipliers, sighting)


@torch.library.custom_op("recblocks::count_min_answer", mutates_args=())
def answer(ids: Tensor, synced: Tensor, pending: Tensor, offset: int, multipliers: list[int], sighting: int) -> Tensor:
    """How often each id was seen, in sightings, (N,) float64; arguments are those of `add`."""
    from recblocks.kernels.count_min import triton

    out = _answer_like(ids)
    if ids.numel():
        triton.smallest(out, ids.contiguous(), synced, pending, offset, multipliers, sighting)
    return out


@answer.register_fake
def _(ids: Tensor, *_: Any) -> Tensor:
    return _answer_like(ids)


def _answer_like(ids: Tensor) -> Tensor:
    return torch.empty(ids.shape, dtype=torch.float64, device=ids.device)
