"""Sequences of users who have done little and of users who have done much."""

from __future__ import annotations

import torch
from torch import Tensor


def sequences(rows: int, slots: int, width: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random x (rows, slots, width), and which of its slots are valid: any number of the first ones, but never none."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, slots + 1, (rows, 1), generator=generator)
    x = torch.randn(rows, slots, width, generator=generator)
    return x.to(device), (torch.arange(slots) < lengths).to(device)
