"""Which backend an operation runs on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from recblocks import _checks

_PLANNED = ("triton",)


def resolve(backend: str, fast: str, device: torch.device) -> str:
    """Turn a ``backend=`` argument into the name of the backend that runs.

    Args:
        backend: "auto", "reference" or the name of the fast backend.
        fast: the operation's fast backend; "auto" takes it on a CPU and on CUDA, and the reference elsewhere and
            inside a torch.func transform.
        device: where the tensors are.

    Returns:
        "reference" or ``fast``.

    Raises:
        ValueError: for a name that is unknown, or planned and not built yet.
        RuntimeError: for the fast backend inside a torch.func transform (grad, vmap, ...), which its operators lack.

    Example:
        >>> resolve("auto", "chunked", torch.device("cpu"))
        'chunked'
    """
    if backend in _PLANNED:
        raise ValueError(f"backend {backend!r} does not exist yet; take 'auto', 'reference' or {fast!r}")
    _checks.choice("backend", backend, ("auto", "reference", fast))
    if transformed() and backend == fast:
        raise RuntimeError(f"backend {fast!r} takes no torch.func transform; take 'auto' or 'reference'")
    if backend != "auto":
        return backend
    return fast if device.type in ("cpu", "cuda") and not transformed() else "reference"


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
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
