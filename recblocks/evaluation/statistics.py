"""Bootstrap intervals over users: of a mean, and of the difference of two models on the same users."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recblocks import _checks

_DRAWS_AT_A_TIME = 2**22


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Tensor,
    *,
    present: Tensor | None = None,
    weights: Tensor | None = None,
    level: float = 0.95,
    num_resamples: int = 10_000,
    generator: torch.Generator | None = None,
) -> Interval:
    """Mean over users with its percentile bootstrap interval: users are drawn again with replacement.

    With several columns (evaluation windows) the statistic is the mean over columns of each column's mean over its
    users; a user is drawn with all their columns, since a user's windows are not independent.

    Args:
        values: (U,) or (U, W) floating, one number a user, or one a user and window.
        present: bool like ``values``, True = the user has a number there; None: all. What stands elsewhere is not read.
        weights: floating or int64 like ``values``, how much a user's number counts in its column's mean, such as the
            `UserMeans.num_chunks` it is a mean of; None: all the same.
        level: coverage of the interval, in (0, 1).
        num_resamples: bootstrap samples.
        generator: source of randomness, on the device of ``values``.

    Returns:
        Interval(mean, low, high).

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a non-finite value that is present, a weight below 0, or a
            column without any user or weight.

    Note:
        A resample in which a column has no user leaves that column out of its mean; without any column it is dropped.

    Example:
        >>> bootstrap_mean(torch.full((5,), 0.25))
        Interval(mean=0.25, low=0.25, high=0.25)

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    values, counts = _matrix(values, present, weights)
    _checks.number("level", level, above=0, below=1)
    _checks.positive_int("num_resamples", num_resamples)
    resampled = _resampled_means(values, counts, num_resamples, generator)
    mean = (values.sum(0) / counts.sum(0)).mean()
    return Interval(mean.item(), *percentiles(resampled, level))


def paired_bootstrap(
    values: Tensor,
    other: Tensor,
    *,
    present: Tensor | None = None,
    weights: Tensor | None = None,
    level: float = 0.95,
    num_resamples: int = 10_000,
    generator: torch.Generator | None = None,
) -> Interval:
    """Mean of ``values - other`` with its interval: both models are judged on the same drawn users.

    An interval above 0 says that ``values`` is better beyond what the choice of users explains.

    Args:
        values: (U,) or (U, W) floating, one model's number for each user, or user and window.
        other: like ``values``, the other model's numbers of the same users in the same order.
        present: bool like ``values``; see `bootstrap_mean`.
        weights: like ``values``, the same for both models; see `bootstrap_mean`.
        level: coverage of the interval.
        num_resamples: bootstrap samples.
        generator: source of randomness, on the device of ``values``.

    Returns:
        Interval(mean, low, high) of the difference.

    Raises:
        TypeError, ValueError: as `bootstrap_mean`, or two different shapes.

    Example:
        >>> paired_bootstrap(torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0.25, 0.75, -0.25]))
        Interval(mean=0.25, low=0.25, high=0.25)

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    _checks.floating("values", values)
    _checks.floating("other", other, *values.shape)
    difference = values.double() - other.double()
    return bootstrap_mean(
        difference, present=present, weights=weights, level=level, num_resamples=num_resamples, generator=generator
    )


def percentiles(resampled: Tensor, level: float) -> tuple[float, float]:
    """The ends of the percentile interval of (num_resamples,) statistics; those that are NaN are left out."""
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=resampled.device)
    low, high = resampled.nanquantile(tails).tolist()
    return low, high


def times_drawn(
    num_users: int, num_resamples: int, at_a_time: int, *, generator: torch.Generator | None, device: torch.device
) -> Iterator[Tensor]:
    """(R, num_users) float64, how often each of R <= ``at_a_time`` resamples draws each user, until all are through."""
    for start in range(0, num_resamples, at_a_time):
        rows = min(at_a_time, num_resamples - start)
        drawn = torch.randint(num_users, (rows, num_users), generator=generator, device=device)
        cells = drawn + num_users * torch.arange(rows, device=device)[:, None]
        yield torch.bincount(cells.flatten(), minlength=rows * num_users).view(rows, num_users).double()


def _matrix(values: Tensor, present: Tensor | None, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Check; then values times weights (U, W), 0 where absent, and the weights (U, W), both float64."""
    _checks.floating("values", values)
    if values.ndim not in (1, 2):
        raise ValueError(f"values must have shape (U,) or (U, W), got {_checks.describe(values)}")
    if values.ndim == 2 and values.shape[1] == 0:
        raise ValueError(f"values must have at least one column, got {_checks.describe(values)}")
    if present is None:
        present = torch.ones_like(values, dtype=torch.bool)
    _checks.mask("present", present, *values.shape)
    if _checks.readable(values) and not bool(values[present].isfinite().all()):
        raise ValueError("values must be finite where present, got NaN or infinity")
    if _checks.readable(present) and not bool(present.any(0).all()):
        raise ValueError("present must leave every column at least one user, got a column with none")
    shape = (values.shape[0], -1) if values.ndim == 1 else values.shape
    counts = present.double() if weights is None else _counts(weights, present)
    return (values.double().masked_fill(~present, 0.0) * counts).view(shape), counts.view(shape)


def _counts(weights: Tensor, present: Tensor) -> Tensor:
    """Check the weights; then float64, 0 where absent."""
    _checks.tensor("weights", weights, *present.shape, dtype=(torch.float32, torch.float64, torch.int64))
    _checks.not_negative("weights", weights[present])
    counts = weights.double().masked_fill(~present, 0.0)
    if _checks.readable(counts) and not bool(counts.any(0).all()):
        raise ValueError("weights must be above 0 somewhere in every column, got a column of zeros")
    return counts / counts.amax(0)  # only shares matter, and sums of huge weights would overflow


def _resampled_means(values: Tensor, counts: Tensor, num_resamples: int, generator: torch.Generator | None) -> Tensor:
    """(num_resamples,) the statistic of each resample, from how often it draws each user."""
    num_users = values.shape[0]
    at_a_time = max(1, _DRAWS_AT_A_TIME // num_users)
    drawn = times_drawn(num_users, num_resamples, at_a_time, generator=generator, device=values.device)
    return torch.cat([((times @ values) / (times @ counts)).nanmean(1) for times in drawn])
