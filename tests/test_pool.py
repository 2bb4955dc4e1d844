import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recblocks import mixed_negative_pool, own_positive_mask
from recblocks.negatives import pool as pool_module


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    num_positives=st.integers(0, 50),
    cap=st.integers(0, 50),
    num_random=st.integers(0, 50),
    num_candidates=st.integers(1, 10),
    seed=st.integers(0, 100),
)
def test_parts_have_the_sizes_and_ranges_asked_for(num_positives, cap, num_random, num_candidates, seed):
    arguments = {"max_in_batch": cap, "num_random": num_random}
    state = torch.get_rng_state()
    pool = mixed_negative_pool(num_positives, num_candidates, **arguments, generator=seeded(seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert pool.num_in_batch == len(pool.in_batch) == min(num_positives, cap)
    assert pool.num_random == len(pool.random) == num_random
    assert pool.in_batch.tolist() == sorted(set(pool.in_batch.tolist()) & set(range(num_positives)))
    assert set(pool.random.tolist()) <= set(range(num_candidates))
    assert pool.in_batch.dtype == pool.random.dtype == torch.int64
    again = mixed_negative_pool(num_positives, num_candidates, **arguments, generator=seeded(seed))
    assert torch.equal(pool.in_batch, again.in_batch)
    assert torch.equal(pool.random, again.random)


def test_paper_s_caps_are_the_defaults():
    pool = mixed_negative_pool(6000, 1000, generator=seeded())
    assert (pool.num_in_batch, pool.num_random) == (5000, 8192)
    assert len(pool.random.unique()) <= 1000  # 8192 draws from 1000 candidates: duplicates stay


def test_every_positive_and_every_candidate_is_as_likely():
    draws, generator = 2000, seeded(1)
    pools = [mixed_negative_pool(20, 10, max_in_batch=5, num_random=4, generator=generator) for _ in range(draws)]
    in_batch = torch.cat([pool.in_batch for pool in pools]).bincount(minlength=20)
    random = torch.cat([pool.random for pool in pools]).bincount(minlength=10)
    # Binomial: 2000 draws at 5/20, 8000 at 1/10; 4 standard deviations leave one in 500 for 30 numbers.
    assert ((in_batch - draws / 4).abs() < 4 * (draws * 1 / 4 * 3 / 4) ** 0.5).all()
    assert ((random - 4 * draws / 10).abs() < 4 * (4 * draws * 1 / 10 * 9 / 10) ** 0.5).all()


def test_figure_5():
    users, items = torch.tensor([1, 1, 2, 3]), torch.tensor([101, 102, 103, 104])
    corpus = torch.tensor([201, 202])
    pool = mixed_negative_pool(4, 2, num_random=2, generator=seeded())
    columns = torch.cat([items[pool.in_batch], corpus[pool.random]])
    masked = own_positive_mask(users, columns, users, items)
    assert masked[:, :4].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert not masked[:, 4:].any()


def test_mask_is_reachable_from_the_room():
    assert pool_module.own_positive_mask is own_positive_mask


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_positives": -1}, ValueError, "num_positives"),
        ({"num_positives": 1.0}, TypeError, "num_positives"),
        ({"num_positives": 0.0}, TypeError, "num_positives"),
        ({"num_candidates": 0}, ValueError, "num_candidates"),
        ({"max_in_batch": -1}, ValueError, "max_in_batch"),
        ({"num_random": -5}, ValueError, "num_random"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        mixed_negative_pool(**{"num_positives": 3, "num_candidates": 3, **arguments})
