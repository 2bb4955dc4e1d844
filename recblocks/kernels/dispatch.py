"""What an operation has to know of its surroundings before it takes a fast backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Asked once, since torch 2.11's compiler does not trace the question.
_WITH_AUTOCAST = {kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)}


def on_nvidia(given: Iterable[Tensor]) -> bool:
    """Whether all of them are on an NVIDIA GPU, and Triton's kernels are to be had."""
    return HAS_TRITON and torch.version.hip is None and all(one.device.type == "cuda" for one in given)


def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, ...) runs what is called now."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def watched() -> bool:
    """Whether torch's compiler, a tracer, a transform or a mode has to see each operator that is called now."""
    if torch.compiler.is_compiling() or transformed() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keep matrix products in the dtype of their arguments, whatever the caller's autocast says."""
    if device.type not in _WITH_AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
