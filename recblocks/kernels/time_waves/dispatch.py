"""The log-periodic time encoding as an operator of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from recblocks.kernels.dispatch import watched
from recblocks.kernels.time_waves import cpp


def runs_on(t: Tensor, frequencies: Tensor, phase: Tensor | None) -> bool:
    """Whether `encode_times` takes them: in float32 on a CPU, where there is a compiler of C++.

    What compiles, exports, traces or transforms sees plain torch, and so does what asks for a time's gradient, or for
    any in forward mode.
    """
    given = [one for one in (t, frequencies, phase) if one is not None]
    if any(one.device.type != "cpu" for one in given) or watched():
        return False
    if any(forward_ad.unpack_dual(one).tangent is not None for one in given):  # type: ignore[no-untyped-call]
        return False
    in_float32 = phase is None or phase.dtype != torch.float64
    return in_float32 and not t.requires_grad and cpp.is_available()


@torch.library.custom_op("recblocks::encode_times", mutates_args=(), device_types="cpu")
def encode_times(t: Tensor, frequencies: Tensor, phase: Tensor | None, per_second: int, quarters: int) -> Tensor:
    """`recblocks.log_periodic_features`, with each wave ahead by quarters of a turn.

    Args:
        t: (...) int64, or float64 that int64 holds, on a CPU.
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
