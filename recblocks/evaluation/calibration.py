"""Whether predicted probabilities are as high as what happens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.evaluation._chunks import check_binary, run_starts


class Calibration(NamedTuple):
    """Predicted and observed rates of an action, by bin of the predicted one and overall.

    Attributes:
        predicted: (K,) float64, mean probability of each bin, ascending.
        observed: (K,) float64, share of the bin's rows where the action happened.
        num_rows: (K,) int64, rows of each bin.
        ratio: sum of all probabilities over the number of actions: above 1 the model promises too much.
        error: ``sum_k num_rows_k/N |predicted_k - observed_k|``, the expected calibration error.
    """

    predicted: Tensor
    observed: Tensor
    num_rows: Tensor
    ratio: float
    error: float


def calibration(probabilities: Tensor, labels: Tensor, *, num_bins: int = 10) -> Calibration:
    """Reliability curve over bins of equally many rows, its expected error, and predicted over observed.

    Args:
        probabilities: (N,) floating, one head's probabilities, in [0, 1].
        labels: (N,) bool or 0 and 1.
        num_bins: bins; equal probabilities share one, so there may be fewer.

    Returns:
        Calibration(predicted, observed, num_rows, ratio, error); ``ratio`` is infinite where the action never happened.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a probability outside [0, 1], another label, or no row.

    Note:
        Bins of equal width, as torchmetrics has them, would put all of a rare action into the first; scikit-learn's
        ``calibration_curve(strategy="quantile")`` gives the same curve without the counts that the error needs.

    Example:
        >>> found = calibration(torch.tensor([0.1, 0.3, 0.7, 0.9]), torch.tensor([0, 0, 1, 1]), num_bins=2)
        >>> [round(value, 6) for value in found.predicted.tolist()], found.observed.tolist(), round(found.error, 6)
        ([0.2, 0.8], [0.0, 1.0], 0.2)

    Source: Naeini, Cooper and Hauskrecht 2015, Obtaining well calibrated probabilities using Bayesian binning.
    """
    _checks.floating("probabilities", probabilities, "N")
    check_binary("labels", labels, probabilities.shape[0])
    _checks.positive_int("num_bins", num_bins)
    if not len(probabilities):
        raise ValueError("probabilities must hold at least one row, got none")
    if _checks.readable(probabilities):
        bad = ~((probabilities >= 0) & (probabilities <= 1))
        if bool(bad.any()):
            raise ValueError(f"probabilities must lie in [0, 1], got {probabilities[bad][0].item()!r}")
    bins = _equal_bins(probabilities, num_bins)
    count = torch.bincount(bins, minlength=num_bins)
    some = count > 0
    expected = torch.bincount(bins, weights=probabilities.double(), minlength=num_bins)[some]
    happened = torch.bincount(bins, weights=labels.double(), minlength=num_bins)[some]
    error = (expected - happened).abs().sum() / len(bins)
    ratio = expected.sum() / happened.sum()
    return Calibration(expected / count[some], happened / count[some], count[some], ratio.item(), error.item())


def _equal_bins(values: Tensor, num_bins: int) -> Tensor:
    """(N,) the bin of each row: its place in ascending order, that of the first of its equals, cut in equal parts."""
    ordered, order = values.sort()
    new = run_starts(ordered)
    first = new.nonzero().flatten()[new.cumsum(0) - 1]
    bins = torch.empty_like(first)
    bins[order] = first * num_bins // len(values)
    return bins
