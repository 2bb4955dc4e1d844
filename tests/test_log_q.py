import math

import oracles
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from recblocks import CountMinSketch, mixed_log_q, mixed_negative_pool, sampled_softmax_loss

COUNTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=6)
POOLS = st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(any)


@given(counts=COUNTS, rest=st.floats(1, 1e6), pool=POOLS, corpus=st.integers(1, 10**6), corrected=st.booleans())
def test_formula(counts, rest, pool, corpus, corrected):
    total = sum(counts) + rest
    got = mixed_log_q(
        torch.tensor(counts, dtype=torch.float64),
        torch.tensor(total, dtype=torch.float64),
        num_in_batch=pool[0],
        num_random=pool[1],
        num_candidates=corpus,
        correct_positive=corrected,
    )
    wanted = [oracles.mixed_log_q(count, total, *pool, corpus, corrected) for count in counts]
    # One rounding to float32 of a number below 40 (2^-19: half a unit in the last place above 32), before it float64.
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(wanted, rel=0, abs=2**-19)


@given(stream=st.lists(st.integers(0, 5), min_size=1, max_size=40), decays=st.integers(0, 3), pool=POOLS)
def test_never_above_one(stream, decays, pool):
    sketch = CountMinSketch(4, 2)
    sketch.update(torch.tensor(stream))
    for _ in range(decays):
        sketch.decay(0.9)
        sketch.update(torch.tensor(stream[:1]))
    assume(sketch.total >= 1)
    log_q = mixed_log_q(
        sketch.query(torch.arange(10)), sketch.total, num_in_batch=pool[0], num_random=pool[1], num_candidates=1
    )
    assert (log_q <= 0).all()


def test_a_single_item_that_is_everything_has_probability_one():
    assert mixed_log_q(torch.tensor([3.0]), 3, num_in_batch=7, num_random=3, num_candidates=1).tolist() == [0]


def test_without_random_columns_it_is_the_in_batch_q():
    counts = torch.tensor([6.0, 2.0, 0.0])
    log_q = mixed_log_q(counts, 8, num_in_batch=5, num_random=0, num_candidates=10)
    torch.testing.assert_close(log_q, torch.tensor([6 / 8, 2 / 8, 1 / 8]).log())


def test_without_in_batch_columns_it_is_a_constant_even_before_anything_was_counted():
    sketch = CountMinSketch(10, 2)
    log_q = mixed_log_q(sketch.query(torch.arange(3)), sketch.total, num_in_batch=0, num_random=4, num_candidates=50)
    torch.testing.assert_close(log_q, torch.full((3,), -math.log(50)))


def test_pool_size_cancels_and_a_constant_changes_nothing():
    queries, positives, negatives = (torch.randn(n, 8, dtype=torch.float64) for n in (5, 5, 20))
    q = {"num_in_batch": 0, "num_random": 20, "num_candidates": 50}
    plain = sampled_softmax_loss(queries, positives, negatives)
    corrected = sampled_softmax_loss(
        queries,
        positives,
        negatives,
        log_q_positives=mixed_log_q(torch.zeros(5), 0.0, **q),
        log_q_negatives=mixed_log_q(torch.zeros(20), 0.0, **q),
    )
    # The same float32 constant is subtracted from logits below 100 in float64.
    assert corrected.item() == pytest.approx(plain.item(), rel=0, abs=100 * 2**-50)


def test_uncorrected_positive_gets_the_expected_number_of_columns():
    counts = torch.tensor([50.0, 1.0])
    q = {"num_in_batch": 30, "num_random": 10, "num_candidates": 20}
    uncorrected = mixed_log_q(counts, 100, **q, correct_positive=False)
    torch.testing.assert_close(uncorrected.exp(), torch.tensor([30 * 0.5 + 10 / 20, 30 * 0.01 + 10 / 20]))
    assert uncorrected[0] > 0


def test_columns_really_hold_each_item_that_often():
    # 500 pools of 40 capped in-batch columns and 60 random ones; positives follow a power law over 30 of 50 candidates.
    generator = torch.Generator().manual_seed(3)
    corpus, seen, pools = 50, 30, 500
    weight = 1 / torch.arange(1.0, seen + 1)
    items = torch.arange(corpus) * 1000 - 7
    columns = []
    for _ in range(pools):
        positives = torch.multinomial(weight, 80, replacement=True, generator=generator)
        pool = mixed_negative_pool(80, corpus, max_in_batch=40, num_random=60, generator=generator)
        columns.append(torch.cat([positives[pool.in_batch], pool.random]))
    frequency = torch.cat(columns).bincount(minlength=corpus) / (100 * pools)
    sketch = CountMinSketch.from_error(1e-4, 1e-3)
    sketch.update(items[:seen], (weight / weight.sum() * 1e6).long())
    q = mixed_log_q(
        sketch.query(items), sketch.total, num_in_batch=pool.num_in_batch, num_random=60, num_candidates=corpus
    ).exp()
    assert q.sum().item() == pytest.approx(1, abs=1e-4)  # 20 items never seen count as seen once: 20 / 10^6 too much
    # 50 frequencies of 50000 draws each: 4.5 standard deviations leave one in 3000 to chance. The draws within a
    # pool are independent, or, in its in-batch part, negatively dependent at most.
    deviation = (q * (1 - q) / (100 * pools)).sqrt()
    assert ((frequency - q).abs() < 4.5 * deviation).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"counts": torch.tensor([1])}, TypeError, "counts"),
        ({"counts": torch.tensor([-1.0])}, ValueError, "counts"),
        ({"counts": torch.tensor([math.nan])}, ValueError, "counts"),
        ({"counts": torch.tensor([11.0])}, ValueError, "counts must be from 0 to the total 10, got 11 to 11"),
        ({"total": 0.0}, ValueError, "total"),
        ({"total": torch.tensor(0.5)}, ValueError, "total"),
        ({"total": torch.tensor([10.0])}, ValueError, "total"),
        ({"total": torch.tensor(10)}, TypeError, "total"),
        ({"total": math.inf}, ValueError, "total"),
        ({"total": "a"}, TypeError, "total must be a number, got 'a'"),
        ({"num_random": 0.0}, TypeError, "num_random"),
        ({"num_in_batch": -1}, ValueError, "num_in_batch"),
        ({"num_in_batch": 1.5}, TypeError, "num_in_batch"),
        ({"num_random": -1}, ValueError, "num_random"),
        ({"num_in_batch": 0, "num_random": 0}, ValueError, "at least 1, got 0"),
        ({"num_candidates": 0}, ValueError, "num_candidates"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"counts": torch.tensor([1.0]), "total": 10.0, "num_in_batch": 2, "num_random": 2, "num_candidates": 5}
    arguments |= change
    with pytest.raises(error, match=message):
        mixed_log_q(arguments.pop("counts"), arguments.pop("total"), **arguments)
