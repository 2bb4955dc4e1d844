import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

import recblocks as rb

RANK_METRICS = [rb.recall_per_user, rb.hit_rate_per_user, rb.reciprocal_rank_per_user, rb.ndcg_per_user]


@given(st.dictionaries(st.integers(-5, 5), st.lists(st.integers(0, 30), min_size=1, max_size=8)), st.integers(1, 20))
def test_each_metric_is_its_definition(ranks_of, k):
    users = [user for user, ranks in ranks_of.items() for _ in ranks]
    ranks = torch.tensor([rank for ranks in ranks_of.values() for rank in ranks], dtype=torch.int64)
    users = torch.tensor(users, dtype=torch.int64)
    shuffle = torch.randperm(len(users))
    for column, metric in enumerate(RANK_METRICS):
        options = {} if metric is rb.reciprocal_rank_per_user else {"k": k}
        got = metric(ranks[shuffle], users[shuffle], **options)
        assert got.user.tolist() == sorted(ranks_of)
        assert got.value.dtype == torch.float64
        want = [oracles.ranking_metrics(ranks_of[user], k)[column] for user in sorted(ranks_of)]
        # sums of at most 8 float64 terms in another order
        assert got.value.tolist() == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("k", [1, 3, 10, 50])
def test_without_ties_torchmetrics_and_scikit_learn_agree(k):
    # whole numbers, so no ties; above 0, because torchmetrics' recall drops the positives that score 0 or less
    scores = torch.stack([torch.randperm(50) for _ in range(30)]).float() + 1
    relevant = torch.rand(30, 50) < torch.linspace(0.02, 0.5, 30)[:, None]
    relevant[:, 7] = True
    query, item = relevant.nonzero(as_tuple=True)
    ranks = rb.positive_ranks(scores, (query, item))
    want = {
        rb.hit_rate_per_user: [retrieval_hit_rate(s, r, top_k=k) for s, r in zip(scores, relevant, strict=True)],
        rb.recall_per_user: [retrieval_recall(s, r, top_k=k) for s, r in zip(scores, relevant, strict=True)],
        rb.reciprocal_rank_per_user: [
            retrieval_reciprocal_rank(s, r, top_k=k) for s, r in zip(scores, relevant, strict=True)
        ],
        rb.ndcg_per_user: [retrieval_normalized_dcg(s, r, top_k=k) for s, r in zip(scores, relevant, strict=True)],
    }
    for metric, values in want.items():
        # torchmetrics computes in float32: half an ulp a term, at most 25 terms
        assert metric(ranks, query, k=k).value.tolist() == pytest.approx([float(v) for v in values], rel=25 * 6e-8)
    best = ndcg_score(relevant.numpy(), scores.numpy(), k=k)
    assert rb.ndcg_per_user(ranks, query, k=k).value.mean().item() == pytest.approx(best, rel=1e-12)


def test_ties_cost_here_what_scikit_learn_averages():
    scores, relevant = torch.zeros(1, 2), torch.tensor([[True, False]])
    ranks = rb.positive_ranks(scores, relevant.nonzero(as_tuple=True))
    half = 1 / torch.log2(torch.tensor(3.0)).item()
    assert rb.ndcg_per_user(ranks, torch.zeros(1, dtype=torch.int64), k=2).value.item() == pytest.approx(half)
    assert ndcg_score(relevant.numpy(), scores.numpy(), k=2) == pytest.approx((1 + half) / 2)


def test_a_reciprocal_rank_behind_k_is_zero():
    ranks, users = torch.tensor([4, 3]), torch.tensor([0, 1])
    assert rb.reciprocal_rank_per_user(ranks, users, k=4).value.tolist() == [0, 0.25]
    assert rb.reciprocal_rank_per_user(ranks, users).value.tolist() == [0.2, 0.25]


@pytest.mark.parametrize("metric", RANK_METRICS)
def test_no_positives_give_no_users(metric):
    none = torch.zeros(0, dtype=torch.int64)
    assert metric(none, none).value.shape == (0,)


@pytest.mark.parametrize("metric", RANK_METRICS)
@pytest.mark.parametrize(
    ("ranks", "users", "k", "error", "words"),
    [
        (torch.ones(2), torch.arange(2), 1, TypeError, ["ranks", "int64"]),
        (torch.arange(2), torch.arange(3), 1, ValueError, ["pair_user", "(2)", "(3,)"]),
        (torch.tensor([-1]), torch.tensor([0]), 1, ValueError, ["ranks", "at least 0", "-1"]),
        (torch.tensor([1]), torch.tensor([0]), 0, ValueError, ["k", "at least 1"]),
    ],
)
def test_bad_input(metric, ranks, users, k, error, words):
    with pytest.raises(error) as caught:
        metric(ranks, users, k=k)
    for word in words:
        assert word in str(caught.value)
