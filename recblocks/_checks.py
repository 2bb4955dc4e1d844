"""Argument errors: every message names the argument, what it got and what it takes."""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Collection
from types import ModuleType
from typing import SupportsIndex

import torch
from torch import Tensor
from torch.nn import Parameter

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = sys.float_info.max
_MOST_SAID = 300  # characters of an argument in a message


def describe(value: object) -> str:
    """Say in a few words what an argument was, for an error message."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    said = repr(value)
    return f"{said if len(said) <= _MOST_SAID else said[:_MOST_SAID] + '...'} ({type(value).__name__})"


def tensor(
    name: str, value: object, *shape: int | str | None, dtype: torch.dtype | Collection[torch.dtype] | None = None
) -> None:
    """Require a tensor; each entry of ``shape`` is a size, or a name or None for any size; no entries: any shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    if shape:
        fits = value.ndim == len(shape) and all(
            not isinstance(want, int) or got == want for got, want in zip(value.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} must have shape ({wanted}), got {describe(value)}")
    if dtype is not None:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if value.dtype not in allowed:
            names = " or ".join(str(one).removeprefix("torch.") for one in allowed)
            raise TypeError(f"{name} must be {names}, got {describe(value)}")


def floating(name: str, value: object, *shape: int | str | None) -> None:
    """Require a floating-point tensor of the given shape."""
    tensor(name, value, *shape, dtype=_FLOATS)


def integers(name: str, value: object, *shape: int | str | None) -> None:
    """Require an int64 tensor of the given shape (ids, times and indices are int64 everywhere)."""
    tensor(name, value, *shape, dtype=torch.int64)


def mask(name: str, value: object, *shape: int | str | None) -> None:
    """Require a bool tensor of the given shape."""
    tensor(name, value, *shape, dtype=torch.bool)


def choice(name: str, value: object, options: Collection[object]) -> None:
    """Require one of the listed values."""
    if value not in tuple(options):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {describe(value)}")


def positive_int(name: str, value: object) -> None:
    """Require an int of at least 1."""
    _int_of_at_least(1, name, value)


def count(name: str, value: object) -> None:
    """Require an int of at least 0."""
    _int_of_at_least(0, name, value)


def _int_of_at_least(least: int, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def integer(name: str, value: object, *, at_least: int = -(2**63), at_most: int = 2**63 - 1) -> int:
    """Return an integer of Python, numpy or torch inside the bounds, int64's if none are stated, as an int."""
    try:
        if isinstance(value, bool) or not isinstance(value, SupportsIndex):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {describe(value)}") from None
    if not at_least <= found <= at_most:
        raise ValueError(f"{name} must be from {at_least} to {at_most}, got {found}")
    return found


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Require a finite Python number inside the stated bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    inside = (
        -_LARGEST <= value <= _LARGEST  # an int beyond it has no float
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )
    if not inside:
        bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
        stated = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
        raise ValueError(f"{name} must be {' and '.join(['finite', *stated])}, got {value!r}")


def readable(value: Tensor) -> bool:
    """Whether a check may look at the numbers: eagerly on a CPU, where it costs no device sync and no graph break.

    Subclasses (FakeTensor, DTensor) and the tensors inside a torch.func transform do not show theirs.
    """
    if torch.compiler.is_compiling() or value.device.type != "cpu":
        return False
    return type(value) in (Tensor, Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(value)


def not_negative(name: str, value: Tensor) -> None:
    """Require finite numbers of at least 0, where they can be read."""
    if readable(value):
        bad = ~((value >= 0) & value.isfinite())
        if bad.any():
            raise ValueError(f"{name} must be finite and at least 0, got {value[bad][0].item()!r}")


def none_late(late: Tensor) -> None:
    """Require that no valid action is after its row's request, where that can be read."""
    if readable(late) and bool(late.any()):
        raise ValueError(f"action_time must not be after request_time where valid, got {int(late.sum())} that are")


def offsets(name: str, value: object, total: int) -> None:
    """Require (B+1,) int64 offsets of packed sequences: from 0 to ``total``, never descending."""
    integers(name, value, None)
    assert isinstance(value, Tensor)
    if value.shape[0] == 0:
        raise ValueError(f"{name} must have shape (B+1,) with B of at least 0, got {describe(value)}")
    if readable(value):
        if value[0] != 0 or value[-1] != total:
            first, last = int(value[0]), int(value[-1])
            raise ValueError(f"{name} must run from 0 to {total}, got {describe(value)} from {first} to {last}")
        if bool((value.diff() < 0).any()):
            raise ValueError(f"{name} must never descend, got {describe(value)} that does")


def optional(module: str, install: str) -> ModuleType:
    """Import an optional package, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs the package {module.split('.')[0]!r}; install it with: {install}") from error
