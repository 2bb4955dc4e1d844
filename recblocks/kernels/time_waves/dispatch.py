"""The log-periodic time encoding as operators of torch, of times and of all three spans of an action."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from recblocks.kernels.dispatch import on_nvidia, transformed, watched
from recblocks.kernels.time_waves import cpp


def runs_on(t: Tensor, frequencies: Tensor, phase: Tensor | None) -> bool:
    """Whether `encode_times` takes them: in float32 on a CPU with a compiler of C++, or int64 ones on an NVIDIA GPU.

    What compiles, exports, traces or transforms sees plain torch, and so does what asks for a time's gradient, or for
    any in forward mode.
    """
    given = [one for one in (t, frequencies, phase) if one is not None]
    if watched() or _in_forward_mode(given):
        return False
    if (phase is not None and phase.dtype == torch.float64) or t.requires_grad:
        return False
    if all(one.device.type == "cpu" for one in given):
        return bool(cpp.is_available())
    return on_nvidia(given) and t.dtype == torch.int64


def in_one_kernel(time: Tensor, phases: Sequence[Tensor | None]) -> bool:
    """Whether `encode_spans` takes them: int64 times and phases of float32 or less on an NVIDIA GPU, with Triton."""
    if transformed() or torch.compiler.is_exporting() or time.dtype != torch.int64:
        return False
    given = [one for one in phases if one is not None and one.dtype != torch.float64]
    return len(given) == len(phases) and on_nvidia([time, *given]) and not _in_forward_mode(given)


def _in_forward_mode(given: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling():
        return False
    return any(forward_ad.unpack_dual(one).tangent is not None for one in given)  # type: ignore[no-untyped-call]


@torch.library.custom_op("recblocks::encode_times", mutates_args=(), device_types="cpu")
def encode_times(t: Tensor, frequencies: Tensor, phase: Tensor | None, per_second: int, quarters: int) -> Tensor:
    """`recblocks.log_periodic_features`, with each wave ahead by quarters of a turn.

    Args:
        t: (...) int64, or on a CPU float64 that int64 holds.
        frequencies: (2, P) int64, turns per unit of time and per 2**-32 of it, in 2**-64.
        phase: (2P,) float32; None is zeros.
        per_second: how many units of time.
        quarters: 0; 1 gives the derivatives after the angle, and so on.

    Returns:
        (..., 2P+1) float32.
    """
    out = torch.empty((*t.shape, 2 * frequencies.shape[1] + 1), dtype=torch.float32, device=t.device)
    whole, part = whole_and_part(t)
    given = whole.contiguous(), None if part is None else part.contiguous()
    cpp.fill(out, *given, frequencies.contiguous(), None if phase is None else phase.contiguous(), quarters)
    out.select(-1, -1).copy_(log_seconds(t, per_second))
    return out


@encode_times.register_kernel("cuda")
def _encode_times_on_cuda(
    t: Tensor, frequencies: Tensor, phase: Tensor | None, per_second: int, quarters: int
) -> Tensor:
    from recblocks.kernels.time_waves import triton

    out = torch.empty((*t.shape, 2 * frequencies.shape[1] + 1), dtype=torch.float32, device=t.device)
    phases = [None if phase is None else phase.contiguous()]
    given = [triton.TIME], [frequencies.contiguous()], phases, per_second, quarters
    triton.fill(out, t.contiguous().view(1, -1), None, *given)
    return out


@encode_times.register_fake
def _(t: Tensor, frequencies: Tensor, *_others: Any) -> Tensor:
    return torch.empty((*t.shape, 2 * frequencies.shape[1] + 1), dtype=torch.float32, device=t.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch's signature)
    t, frequencies, phase, ctx.per_second, ctx.quarters = inputs
    ctx.save_for_backward(t, frequencies, phase)


def _backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor | None, None, None]:
    if not ctx.needs_input_grad[2]:
        return None, None, None, None, None
    ahead = encode_times(*ctx.saved_tensors, ctx.per_second, ctx.quarters + 1)
    each = (gradient * ahead)[..., :-1]
    return None, None, each.reshape(-1, each.shape[-1]).sum(0), None, None


encode_times.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("recblocks::encode_spans", mutates_args=())
def encode_spans(
    time: Tensor,
    valid: Tensor | None,
    frequencies: list[Tensor],
    phases: list[Tensor],
    per_second: int,
    quarters: int,
) -> Tensor:
    """An action's time, how long before the latest and how long after the next older it was, each like `encode_times`.

    Args:
        time: (B, M) int64, newest first.
        valid: (B, M) bool; None: all are.
        frequencies: of the three (2, P) int64.
        phases: of the three (2P,) float32.
        per_second: how many units of time.
        quarters: 0; 1 gives the derivatives after the angle, and so on.

    Returns:
        (B, M, 2P+1 of all three) float32; at an invalid slot those of 0.
    """
    from recblocks.kernels.time_waves import triton

    out = _spans_like(time, frequencies)
    kinds = triton.TIME, triton.SINCE_LATEST, triton.GAP
    given = [one.contiguous() for one in frequencies], [one.contiguous() for one in phases], per_second, quarters
    triton.fill(out, time.contiguous(), None if valid is None else valid.contiguous(), kinds, *given)
    return out


@encode_spans.register_fake
def _(time: Tensor, _valid: Tensor | None, frequencies: list[Tensor], *_others: Any) -> Tensor:
    return _spans_like(time, frequencies)


def _spans_like(time: Tensor, frequencies: list[Tensor]) -> Tensor:
    num_columns = sum(2 * one.shape[1] + 1 for one in frequencies)
    return torch.empty((*time.shape, num_columns), dtype=torch.float32, device=time.device)


def _save_spans(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch's signature)
    time, valid, frequencies, phases, ctx.per_second, ctx.quarters = inputs
    ctx.num = len(frequencies)
    ctx.save_for_backward(time, valid, *frequencies, *phases)


def _backward_of_spans(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    time, valid, *both = ctx.saved_tensors
    frequencies, phases = both[: ctx.num], both[ctx.num :]
    ahead = encode_spans(time, valid, frequencies, phases, ctx.per_second, ctx.quarters + 1)
    each = (gradient * ahead).flatten(0, 1).sum(0).split([2 * one.shape[1] + 1 for one in frequencies])
    return None, None, [None] * ctx.num, [one[:-1] for one in each], None, None


encode_spans.register_autograd(_backward_of_spans, setup_context=_save_spans)


def whole_and_part(t: Tensor) -> tuple[Tensor, Tensor | None]:
    """int64 times, and in 2**-32 what stands behind their point; None: nothing does."""
    if not t.is_floating_point():
        return t, None
    whole = t.floor()
    return whole.to(torch.int64), ((t - whole) * 2.0**32).to(torch.int64)


def log_seconds(t: Tensor, per_second: int) -> Tensor:
    """log1p of the seconds, in float64: at 1.7e9 s float32 would round its argument and its value."""
    seconds = t.clamp(min=0).to(torch.float64) / per_second
    return seconds.log1p()
