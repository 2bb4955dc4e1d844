"""Bootstrap intervals over users: of a mean, and of the difference of two models on the same users."""

from __future__ import annotations

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
        level: coverage of the interval, in (0, 1).
        num_resamples: bootstrap samples.
        generator: source of randomness, on the device of ``values``.

    Returns:
        Interval(mean, low, high).

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a non-finite value that is present, or a column without any user.

    Note:
        A resample in which a column has no user leaves that column out of its mean; without any column it is dropped.

    Example:
        >>> bootstrap_mean(torch.full((5,), 0.25))
        Interval(mean=0.25, low=0.25, high=0.25)

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    values, present = _matrix(values, present)
    _checks.number("level", level, above=0, below=1)
    _checks.positive_int("num_resamples", num_resamples)
    resampled = _resampled_means(values, present, num_resamples, generator)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=values.device)
    mean = (values.sum(0) / present.sum(0)).mean()
    low, high = resampled.nanquantile(tails).tolist()
    return Interval(mean.item(), low, high)


def paired_bootstrap(
    values: Tensor,
    other: Tensor,
    *,
    present: Tensor | None = None,
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
    return bootstrap_mean(difference, present=present, level=level, num_resamples=num_resamples, generator=generator)


def _matrix(values: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check; then values (U, W) with 0 where absent, and presence (U, W), both float64."""
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
    return values.double().masked_fill(~present, 0.0).view(shape), present.double().view(shape)


def _resampled_means(values: Tensor, present: Tensor, num_resamples: int, generator: torch.Generator | None) -> Tensor:
    """(num_resamples,) the statistic of each resample, from how often it draws each user."""
    num_users, device = values.shape[0], values.device
    step = max(1, _DRAWS_AT_A_TIME // num_users)
    means = []
    for start in range(0, num_resamples, step):
        rows = min(step, num_resamples - start)
        drawn = torch.randint(num_users, (rows, num_users), generator=generator, device=device)
        cells = drawn + num_users * torch.arange(rows, device=device)[:, None]
        times = torch.bincount(cells.flatten(), minlength=rows * num_users).view(rows, num_users).double()
        means.append(((times @ values) / (times @ present)).nanmean(1))
    return torch.cat(means)
