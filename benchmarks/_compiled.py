"""torch.compile as a peer, in its three modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MODES = "default", "max-autotune", "reduce-overhead"


def compiled(name: str, form: Callable[..., Any], device: torch.device) -> dict[str, Callable[..., Any]]:
    """A form compiled in each mode; reduce-overhead is of CUDA graphs, which a CPU has none of."""
    modes = MODES if device.type == "cuda" else MODES[:2]
    return {
        f"{name}, compiled, {mode}": torch.compile(form, fullgraph=True, dynamic=False, mode=mode) for mode in modes
    }
