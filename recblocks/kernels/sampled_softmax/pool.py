"""What every backend of the sampled softmax takes and gives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.kernels.own_positives import owned_by_every_row


class Pool(NamedTuple):
    """The columns: their embeddings and biases, and for which rows they are masked."""

    negatives: Tensor
    bias: Tensor | None
    masked: Tensor | None
    own: list[Tensor]  # the four id vectors of `own_positive_mask`, or empty
    present: Tensor | None  # (U,) bool: the other rows count for nothing; None is all of them


class Wanted(NamedTuple):
    """Which gradients are asked for; the temperature's comes with the queries'."""

    queries: bool
    negatives: bool
    bias: bool


def wanted_now(queries: Tensor, pool: Pool, inverse_temperature: Tensor) -> Wanted:
    """What a call that makes gradients in its forward has to make."""
    if not torch.is_grad_enabled():
        return Wanted(False, False, False)
    return Wanted(
        queries.requires_grad or inverse_temperature.requires_grad,
        pool.negatives.requires_grad,
        pool.bias is not None and pool.bias.requires_grad,
    )


def empty_gradients(queries: Tensor, negatives: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for those of queries, negatives, bias and inverse temperature; empty where not wanted."""
    return (
        torch.empty_like(queries) if wanted.queries else queries.new_empty(0),
        torch.empty_like(negatives) if wanted.negatives else queries.new_empty(0),
        queries.new_empty(negatives.shape[0]) if wanted.bias else queries.new_empty(0),
        queries.new_empty(() if wanted.queries else 0),
    )


def unused_columns(masked: Tensor | None, own: list[Tensor], present: Tensor | None) -> Tensor:
    """(N,) bool, the columns that are masked for every present row; none where nothing masks."""
    if own:
        return owned_by_every_row(own[0], own[1], own[2], own[3], present)
    if masked is None:
        return torch.zeros((), dtype=torch.bool)
    return (masked if present is None else masked | ~present[:, None]).all(0)


def clear_unused(pool: Pool, used: Tensor | None = None) -> Pool:
    """Zeros in unused columns, because a probability of 0 times NaN is NaN.

    Args:
        pool: the columns and their masks.
        used: (P,) bool of the first P columns, True = leave it, whatever masks it.
    """
    if pool.masked is None and not pool.own:
        return pool
    if _finite(pool.negatives) and _finite(pool.bias):
        return pool
    unused = unused_columns(pool.masked, pool.own, pool.present)
    if used is not None:
        unused = unused & ~torch.nn.functional.pad(used, (0, unused.shape[0] - used.shape[0]))
    negatives = pool.negatives.masked_fill(unused[:, None], 0)
    return pool._replace(negatives=negatives, bias=None if pool.bias is None else pool.bias.masked_fill(unused, 0))


def _finite(x: Tensor | None) -> bool:
    """Whether it can be read that all numbers are finite."""
    return x is None or (_checks.readable(x) and bool(x.sum().isfinite()))


def refuse(*_: Any) -> None:
    """Instead of a second derivative."""
    raise RuntimeError(
        "fast backends of the sampled softmax have no second derivative; take backend='reference' for it"
    )
