"""What the losses over a pool of columns share: the temperature, log q, and each row's log-sum-exp by any backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.kernels import dispatch
from recblocks.kernels.own_positives import own_positive_mask
from recblocks.kernels.sampled_softmax import chunked
from recblocks.kernels.sampled_softmax.dispatch import log_sum_exp as triton_log_sum_exp
from recblocks.kernels.sampled_softmax.pool import Pool, clear_unused


def inverse_of(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1/τ, (), in the dtype and on the device of ``like``."""
    smallest = torch.finfo(like.dtype).tiny  # whose inverse is finite
    if not isinstance(temperature, Tensor):
        _checks.number("temperature", temperature, at_least=smallest)
        return torch.full((), 1 / temperature, dtype=like.dtype, device=like.device)
    _checks.floating("temperature", temperature)
    if temperature.ndim != 0:
        raise ValueError(f"temperature must be a number or have shape (), got {_checks.describe(temperature)}")
    if _checks.readable(temperature) and not smallest <= temperature.item() < torch.inf:
        raise ValueError(f"temperature must be finite and at least {smallest:g}, got {temperature.item()!r}")
    return temperature.to(like).reciprocal()


def check_log_q(name: str, log_q: Tensor | None, normalised: bool, absent: Callable[[], Tensor]) -> None:
    """Require finite log probabilities; only a bad one costs a look at what is absent and may hold anything."""
    if log_q is None or not _checks.readable(log_q):
        return
    bad = ~log_q.isfinite()
    if normalised:
        bad |= log_q > 0
    if bad.any():
        bad &= ~absent()
        if bad.any():
            wanted = "finite and at most 0" if normalised else "finite"
            raise ValueError(f"{name} must be {wanted}, got {log_q[bad][0].item()!r}")


def unless_all(present: Tensor | None) -> Tensor | None:
    """None where it is known that all are present, which saves a copy of what they mask."""
    return None if present is None or (_checks.readable(present) and present.all()) else present


def clear(x: Tensor, present: Tensor | None) -> Tensor:
    """Zeros in place of absent rows, so that NaN there meets no product."""
    if present is None:
        return x
    return x.masked_fill(~present.view(-1, *[1] * (x.ndim - 1)), 0)


def _log_sum_exp(queries: Tensor, pool: Pool, inverse_temperature: Tensor) -> Tensor:
    """The reference: all logits at once, (U,) -inf where every column is masked."""
    negatives, bias, masked, own, _ = clear_unused(pool)
    logits = (queries * inverse_temperature) @ negatives.t()
    if bias is not None:
        logits = logits + bias
    if own:
        masked = own_positive_mask(own[0], own[1], own[2], own[3])
    if masked is None:
        return torch.logsumexp(logits, dim=1)
    # The gradient of a row of nothing but -inf is NaN: its logits become 0, and its result is replaced.
    empty = masked.all(1)
    if dispatch.transformed():  # vmap has no in-place call on what it did not map
        logits = logits.masked_fill(masked, -torch.inf).masked_fill(empty[:, None], 0)
    else:
        logits.masked_fill_(masked, -torch.inf).masked_fill_(empty[:, None], 0)
    return torch.logsumexp(logits, dim=1).masked_fill(empty, -torch.inf)


LOG_SUM_EXP = {"reference": _log_sum_exp, "chunked": chunked.log_sum_exp, "triton": triton_log_sum_exp}
