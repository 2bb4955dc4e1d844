import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from recblocks import calibration

ROWS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]) | st.floats(0, 1), st.integers(0, 1)), min_size=1
)


@given(ROWS, st.integers(1, 12))
def test_bins_errors_and_ratio(rows, num_bins):
    probabilities, labels = (list(column) for column in zip(*rows, strict=True))
    p, y = torch.tensor(probabilities, dtype=torch.float64), torch.tensor(labels)
    got = calibration(p, y, num_bins=num_bins)
    assert got.error == pytest.approx(oracles.calibration_error(probabilities, labels, num_bins), abs=1e-14)
    assert 1 <= len(got.num_rows) <= num_bins
    assert got.num_rows.sum() == len(rows)
    assert (got.num_rows > 0).all()
    assert (got.predicted.diff() > -1e-15).all()
    assert (got.observed * got.num_rows).sum().item() == pytest.approx(sum(labels), rel=1e-14)
    if any(labels):
        assert got.ratio == pytest.approx(math.fsum(probabilities) / sum(labels), rel=1e-13)
    order = torch.randperm(len(rows))
    again = calibration(p[order], y[order], num_bins=num_bins)
    assert torch.equal(again.num_rows, got.num_rows)
    assert again.error == pytest.approx(got.error, abs=1e-14)


def test_scikit_learn_has_the_same_curve():
    torch.manual_seed(0)
    p = torch.rand(1000, dtype=torch.float64) ** 3
    y = torch.rand(1000) < p
    got = calibration(p, y)
    observed, predicted = calibration_curve(y.numpy(), p.numpy(), n_bins=10, strategy="quantile")
    assert got.num_rows.tolist() == [100] * 10
    assert got.predicted.tolist() == pytest.approx(predicted.tolist(), rel=1e-13)
    assert got.observed.tolist() == pytest.approx(observed.tolist(), rel=1e-13)


def test_true_probabilities_are_calibrated_and_doubled_ones_are_not():
    torch.manual_seed(0)
    p = torch.rand(100_000) * 0.1
    y = torch.rand(100_000) < p
    # the number of actions is 5000 with a deviation below 71: 5 of those
    assert calibration(p, y).ratio == pytest.approx(1, abs=5 * 71 / 5000)
    # each of the 10 bins is off by 0.8 deviations in the mean, at most sqrt(.1 / 10 000) = .0032
    assert calibration(p, y).error < 0.0032
    assert calibration(2 * p, y).ratio == pytest.approx(2, abs=10 * 71 / 5000)
    assert calibration(2 * p, y).error == pytest.approx(0.05, abs=0.0032)


def test_an_action_that_never_happened_has_an_infinite_ratio():
    assert calibration(torch.tensor([0.5]), torch.tensor([False])).ratio == math.inf


def test_equal_probabilities_share_a_bin():
    got = calibration(torch.tensor([0.5] * 9 + [0.75]), torch.tensor([0, 1] * 5), num_bins=5)
    assert got.num_rows.tolist() == [9, 1]


P, Y = torch.full((3,), 0.5), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: calibration(Y, Y), TypeError, ["probabilities", "float32"]),
        (lambda: calibration(P + 1, Y), ValueError, ["probabilities", "[0, 1]", "1.5"]),
        (lambda: calibration(P / 0 * 0, Y), ValueError, ["probabilities", "[0, 1]", "nan"]),
        (lambda: calibration(P, Y[:1]), ValueError, ["labels", "(1,)"]),
        (lambda: calibration(P, -Y), ValueError, ["labels", "0 or 1", "-1"]),
        (lambda: calibration(P[:0], Y[:0]), ValueError, ["probabilities", "none"]),
        (lambda: calibration(P, Y, num_bins=0), ValueError, ["num_bins", "at least 1"]),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
