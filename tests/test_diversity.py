import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from recblocks.evaluation.diversity import coverage_at_k, interest_entropy_at_k


@st.composite
def retrieved(draw):
    num_users, length, num_items = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(1, 10))
    row = st.lists(st.integers(0, num_items - 1), min_size=length, max_size=length)
    lists = draw(st.lists(row, min_size=num_users, max_size=num_users))
    topics = draw(st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 2), min_size=num_items, max_size=num_items))
    return lists, topics, draw(st.integers(1, length))


@given(retrieved())
def test_interest_entropy(world):
    lists, topics, k = world
    got = interest_entropy_at_k(torch.tensor(lists), torch.tensor(topics), k=k)
    assert got.item() == pytest.approx(oracles.interest_entropy_at_k(lists, topics, k), abs=1e-14)  # 8 terms below 1
    assert -1e-15 <= got.item() <= math.log(k) + 1e-14


@given(retrieved(), st.integers(1, 100))
def test_coverage(world, percent):
    lists, topics, k = world
    got = coverage_at_k(torch.tensor(lists), num_items=len(topics), k=k, p=percent / 100)
    assert got.item() == oracles.coverage_at_k(lists, len(topics), k, percent)


@given(retrieved())
def test_what_is_not_valid_is_absent(world):
    lists, topics, k = world
    items = torch.tensor(lists)
    padded = torch.cat([items[:, :k], torch.full((len(items), 3), -7)], dim=1)
    valid = torch.arange(k + 3) < k
    options = {"k": k + 3, "valid": valid.expand(len(items), -1)}
    assert interest_entropy_at_k(padded, torch.tensor(topics), **options) == interest_entropy_at_k(
        items, torch.tensor(topics), k=k
    )
    assert coverage_at_k(padded, num_items=10, **options) == coverage_at_k(items, num_items=10, k=k)


def test_a_user_without_results_is_left_out():
    items = torch.tensor([[0, 1], [0, 0]])
    valid = torch.tensor([[True, True], [False, False]])
    assert interest_entropy_at_k(items, torch.tensor([0, 1]), k=2, valid=valid).item() == pytest.approx(math.log(2))


def test_the_base_is_e_as_in_scipy_and_one_topic_each_gives_its_maximum():
    topics = torch.arange(350)
    items = torch.stack([torch.randperm(350)[:50] for _ in range(3)])
    assert interest_entropy_at_k(items, topics).item() == pytest.approx(math.log(50), rel=1e-12)
    assert interest_entropy_at_k(items, topics // 100, k=50).item() == pytest.approx(
        sum(entropy((row // 100).bincount().numpy()) for row in items) / 3, rel=1e-12
    )


def test_popularity_covers_almost_nothing_and_everyone_their_own_covers_the_share_p():
    assert coverage_at_k(torch.arange(10).expand(1000, 10), num_items=10**6).item() == 9e-6
    assert coverage_at_k(torch.arange(1000).view(100, 10), num_items=1000).item() == 0.9
    # 0.07 * 100 in floating point is above 7
    assert coverage_at_k(torch.arange(100).view(10, 10), num_items=100, p=0.07).item() == 0.07


ITEMS = torch.zeros(2, 10, dtype=torch.int64)
NONE = torch.zeros(2, 10, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: coverage_at_k(ITEMS.float(), num_items=5), TypeError, ["items", "int64"]),
        (lambda: coverage_at_k(ITEMS, num_items=5, k=11), ValueError, ["items", "k = 11", "(2, 10)"]),
        (lambda: coverage_at_k(ITEMS, num_items=5, p=0), ValueError, ["p", "above 0"]),
        (lambda: coverage_at_k(ITEMS, num_items=5, p=1.1), ValueError, ["p", "at most 1"]),
        (lambda: coverage_at_k(ITEMS, num_items=0), ValueError, ["num_items"]),
        (lambda: coverage_at_k(ITEMS + torch.arange(10), num_items=9), ValueError, ["num_items", "10", "9"]),
        (lambda: coverage_at_k(ITEMS, num_items=5, valid=NONE), ValueError, ["items", "none"]),
        (lambda: interest_entropy_at_k(ITEMS, torch.arange(3)), ValueError, ["items", "k = 50"]),
        (lambda: interest_entropy_at_k(ITEMS + 3, torch.arange(3), k=2), ValueError, ["items", "[0, 3)", "3"]),
        (lambda: interest_entropy_at_k(ITEMS, torch.ones(3), k=2), TypeError, ["topics", "int64"]),
        (lambda: interest_entropy_at_k(ITEMS, torch.arange(3), k=2, valid=NONE), ValueError, ["items", "none"]),
        (lambda: interest_entropy_at_k(ITEMS, torch.arange(3), k=2, valid=NONE[:1]), ValueError, ["valid"]),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
