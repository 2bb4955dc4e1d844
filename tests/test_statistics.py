import math

import numpy as np
import oracles
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from recblocks.evaluation import statistics
from recblocks.evaluation.statistics import bootstrap_mean, paired_bootstrap


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_users():
    values = torch.rand(2000, dtype=torch.float64)
    got = bootstrap_mean(values, generator=seeded())
    error = values.std(correction=0).item() / math.sqrt(2000)
    assert got.mean == pytest.approx(values.mean().item(), rel=1e-12)
    # The 2.5 % quantile of 10 000 normal draws is itself off by sqrt(.025 * .975 / 10 000) / density(1.96) = 0.027
    # standard errors of the mean; 5 of those, and the skew of 2000 users adds nothing of that size.
    assert got.low == pytest.approx(got.mean - 1.96 * error, abs=5 * 0.027 * error)
    assert got.high == pytest.approx(got.mean + 1.96 * error, abs=5 * 0.027 * error)
    wide = bootstrap_mean(values, level=0.99, generator=seeded())
    assert wide.low < got.low < got.high < wide.high


def test_scipy_agrees_on_few_skewed_users():
    values = torch.distributions.Exponential(1.0).sample((25,)).double()
    got = bootstrap_mean(values, generator=seeded())
    want = scipy.stats.bootstrap(
        (values.numpy(),), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(0)
    )
    error = want.standard_error
    # both quantiles are Monte Carlo: sqrt(2) * 0.027 standard errors (see above), 5 of those
    assert got.low == pytest.approx(want.confidence_interval.low, abs=5 * 1.4 * 0.027 * error)
    assert got.high == pytest.approx(want.confidence_interval.high, abs=5 * 1.4 * 0.027 * error)


def test_pairing_removes_what_both_models_share():
    ease = torch.rand(300)
    better, worse = ease + 0.02 + 0.01 * torch.rand(300), ease
    assert bootstrap_mean(better).low < bootstrap_mean(worse).high  # apart, nothing can be said
    got = paired_bootstrap(better, worse)
    assert got.low > 0.02
    back = paired_bootstrap(worse, better)
    assert back.mean == pytest.approx(-got.mean)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=6),
    st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=6, max_size=6),
    st.integers(1, 30),
)
def test_each_resample_is_the_mean_over_columns_of_the_drawn_users(values, present, draws_at_a_time):
    present = present[: len(values)]
    present[0] = [True, True]
    table, there = torch.tensor(values, dtype=torch.float64), torch.tensor(present)
    poisoned = table.masked_fill(~there, math.nan)
    matrix, mask = statistics._matrix(poisoned, there)
    whole = statistics._DRAWS_AT_A_TIME
    statistics._DRAWS_AT_A_TIME = draws_at_a_time
    try:
        got = statistics._resampled_means(matrix, mask, 20, seeded())
    finally:
        statistics._DRAWS_AT_A_TIME = whole
    drawn = torch.randint(len(values), (20, len(values)), generator=seeded()).tolist()
    for mean, users in zip(got.tolist(), drawn, strict=True):
        if any(present[user][column] for user in users for column in range(2)):
            assert mean == pytest.approx(oracles.mean_over_columns(values, present, users), rel=1e-14)
    everyone = oracles.mean_over_columns(values, present, range(len(values)))
    assert bootstrap_mean(poisoned, present=there, num_resamples=5).mean == pytest.approx(everyone, rel=1e-14)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=6))
def test_a_weight_is_so_many_numbers_of_one_user(users):
    values, weights = (torch.tensor(column) for column in zip(*users, strict=True))
    matrix, counts = statistics._matrix(values.double(), None, weights)
    got = statistics._resampled_means(matrix, counts, 20, seeded())
    drawn = torch.randint(len(users), (20, len(users)), generator=seeded()).tolist()
    for mean, rows in zip(got.tolist(), drawn, strict=True):
        every = [users[row][0] for row in rows for _ in range(users[row][1])]
        assert mean == pytest.approx(sum(every) / len(every), rel=1e-14)  # whole numbers, one division
    interval = bootstrap_mean(values.double(), weights=weights, num_resamples=5)
    assert interval.mean == pytest.approx((values * weights).sum().item() / weights.sum().item(), rel=1e-14)


def test_a_weight_of_zero_is_absence_and_weights_go_through_the_pairing():
    values, present = torch.rand(30, 2), torch.rand(30, 2) < 0.6
    want = bootstrap_mean(values, present=present, generator=seeded())
    assert bootstrap_mean(values, weights=present.double(), generator=seeded()) == want
    masked = values.masked_fill(~present, math.nan)
    assert bootstrap_mean(masked, present=present, weights=torch.ones(30, 2), generator=seeded()) == want
    weights = torch.arange(30)
    got = paired_bootstrap(values[:, 0], values[:, 1], weights=weights, generator=seeded())
    assert got == bootstrap_mean(
        values[:, 0].double() - values[:, 1].double(), weights=weights.double(), generator=seeded()
    )


def test_a_resample_of_absent_users_only_is_dropped():
    assert bootstrap_mean(torch.tensor([1.0, math.nan]), present=torch.tensor([True, False])) == (1, 1, 1)


def test_the_generator_decides():
    values = torch.rand(50)
    assert bootstrap_mean(values, generator=seeded(1)) == bootstrap_mean(values, generator=seeded(1))
    assert bootstrap_mean(values, generator=seeded(1)) != bootstrap_mean(values, generator=seeded(2))
    state = torch.get_rng_state()
    bootstrap_mean(values, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """1000 worlds of 100 users with a known mean: 95 % of the intervals hold it, with a standard error of 0.7 %; a
    percentile interval over n users is too short by a factor of about sqrt((n - 1) / n) and 1.96 / t, 1 % here.
    """
    held = 0
    for world in range(1000):
        values = torch.rand(100, generator=seeded(world))
        got = bootstrap_mean(values, num_resamples=400, generator=seeded(world))
        held += got.low <= 0.5 <= got.high
    assert 0.92 < held / 1000 < 0.975


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: bootstrap_mean(torch.arange(3)), TypeError, ["values", "float32", "int64"]),
        (lambda: bootstrap_mean(torch.ones(2, 2, 2)), ValueError, ["values", "(U,)"]),
        (lambda: bootstrap_mean(torch.tensor([1.0, math.nan])), ValueError, ["values", "finite"]),
        (lambda: bootstrap_mean(torch.ones(0)), ValueError, ["present", "one user"]),
        (lambda: bootstrap_mean(torch.ones(2), present=torch.ones(3).bool()), ValueError, ["present", "(3,)"]),
        (lambda: bootstrap_mean(torch.ones(5, 0)), ValueError, ["values", "at least one column", "(5, 0)"]),
        (lambda: bootstrap_mean(torch.ones(2), weights=torch.ones(3)), ValueError, ["weights", "(3,)"]),
        (lambda: bootstrap_mean(torch.ones(2), weights=-torch.ones(2)), ValueError, ["weights", "at least 0", "-1"]),
        (lambda: bootstrap_mean(torch.ones(2), weights=torch.zeros(2)), ValueError, ["weights", "above 0"]),
        (lambda: bootstrap_mean(torch.ones(2), weights=torch.ones(2).bool()), TypeError, ["weights", "int64", "bool"]),
        (lambda: bootstrap_mean(torch.ones(2), level=0), ValueError, ["level", "above 0"]),
        (lambda: bootstrap_mean(torch.ones(2), level="95%"), TypeError, ["level", "number"]),
        (lambda: bootstrap_mean(torch.ones(2), num_resamples=1.5), TypeError, ["num_resamples", "int", "1.5"]),
        (lambda: bootstrap_mean(torch.ones(2), level=1), ValueError, ["level", "below 1"]),
        (lambda: bootstrap_mean(torch.ones(2), num_resamples=0), ValueError, ["num_resamples"]),
        (lambda: paired_bootstrap(torch.ones(2), torch.ones(3)), ValueError, ["other", "(2)", "(3,)"]),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_only_the_shares_of_the_weights_matter() -> None:
    values = torch.tensor([0.1, 0.7, 0.4, 0.9], dtype=torch.float64)
    weights = torch.tensor([1.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    small, huge = (
        bootstrap_mean(values, weights=weights * scale, num_resamples=50, generator=torch.Generator().manual_seed(0))
        for scale in (1.0, 2.0**1021)
    )
    assert small == huge
