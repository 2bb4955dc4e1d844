import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recblocks.evaluation._pairs import unique_pairs
from recblocks.evaluation.per_user import ndcg_per_user, reciprocal_rank_per_user
from recblocks.evaluation.retrieval import positive_ranks, recall_at_k, retrieval_ranks, retrieve, top_k

INNER = "inner_product"


def pairs(*rows):
    return tuple(torch.tensor([row[side] for row in rows], dtype=torch.int64) for side in (0, 1))


@st.composite
def worlds(draw):
    """Small integer vectors: every score is exact, and ties are common."""
    num_queries, num_items, dim = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    vector = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)
    queries = draw(st.lists(vector, min_size=num_queries, max_size=num_queries))
    corpus = draw(st.lists(vector, min_size=num_items, max_size=num_items))
    pair = st.tuples(st.integers(0, num_queries - 1), st.integers(0, num_items - 1))
    positives = draw(st.lists(pair, min_size=1, max_size=15))
    excluded = draw(st.lists(pair, max_size=15))
    in_corpus = draw(st.lists(st.booleans(), min_size=num_items, max_size=num_items))
    return queries, corpus, positives, excluded, in_corpus


def floats(x):
    return torch.tensor(x, dtype=torch.float32)


@given(worlds(), st.integers(1, 13), st.integers(1, 40))
def test_recall_is_the_printed_formula(world, k, max_elements):
    queries, corpus, positives, excluded, in_corpus = world
    got = recall_at_k(
        floats(queries),
        floats(corpus),
        pairs(*positives),
        k=k,
        excluded=pairs(*excluded),
        in_corpus=torch.tensor(in_corpus),
        max_elements=max_elements,
    )
    want = oracles.recall_at_k(queries, corpus, positives, k, in_corpus, set(excluded))
    assert got.item() == pytest.approx(want, rel=1e-12)  # a mean of at most 5 float64 fractions
    got = recall_at_k(floats(queries), floats(corpus), pairs(*positives), k=k)
    assert got.item() == pytest.approx(oracles.recall_at_k(queries, corpus, positives, k), rel=1e-12)


@given(worlds(), st.integers(1, 40))
def test_ranks_by_inner_product_and_from_scores(world, max_elements):
    queries, corpus, positives, excluded, in_corpus = world
    scores = floats(queries) @ floats(corpus).T
    options = {
        "excluded": pairs(*excluded),
        "in_corpus": torch.tensor(in_corpus),
        "max_elements": max_elements,
    }
    want = [
        oracles.positive_rank(
            scores[q].tolist(),
            p,
            {i for i, kept in enumerate(in_corpus) if not kept} | {i for user, i in excluded if user == q},
        )
        for q, p in positives
    ]
    assert positive_ranks(scores, pairs(*positives), **options).tolist() == want
    got = retrieval_ranks(floats(queries), floats(corpus), pairs(*positives), metric=INNER, **options)
    assert got.tolist() == want


@given(worlds(), st.randoms(use_true_random=False))
def test_the_order_of_corpus_queries_and_pairs_does_not_matter(world, random):
    queries, corpus, positives, _, _ = world
    places = list(range(len(corpus)))
    random.shuffle(places)  # the item at row i moves to row places[i]
    moved = [corpus[places.index(row)] for row in range(len(corpus))]
    renamed = [(q, places[p]) for q, p in positives]
    before = retrieval_ranks(floats(queries), floats(corpus), pairs(*positives))
    assert torch.equal(retrieval_ranks(floats(queries), floats(moved), pairs(*renamed)), before)
    order = list(range(len(positives)))
    random.shuffle(order)
    shuffled = retrieval_ranks(floats(queries), floats(corpus), pairs(*[positives[i] for i in order]))
    assert torch.equal(shuffled, before[order])


@given(worlds(), worlds(), st.integers(1, 12))
def test_more_items_never_help_and_a_longer_list_never_hurts(world, other, k):
    queries, corpus, positives, _, _ = world
    dim = len(queries[0])
    more = corpus + [(vector + [0] * dim)[:dim] for vector in other[1]]
    recall = recall_at_k(floats(queries), floats(corpus), pairs(*positives), k=k)
    assert recall_at_k(floats(queries), floats(more), pairs(*positives), k=k) <= recall
    assert recall_at_k(floats(queries), floats(corpus), pairs(*positives), k=k + 1) >= recall
    assert recall_at_k(floats(queries), floats(corpus), pairs(*positives), k=len(corpus)) == 1


def test_ties_hurt_and_the_positive_itself_does_not():
    items = floats([[1, 0], [1, 0], [1, 0], [0, 1]])
    assert retrieval_ranks(items[:1], items, pairs((0, 0), (0, 1), (0, 3))).tolist() == [2, 2, 3]
    assert recall_at_k(items[:1], items, pairs((0, 0)), k=2) == 0
    assert recall_at_k(items[:1], items, pairs((0, 0)), k=3) == 1


@pytest.mark.parametrize("metric", ["euclidean", INNER])
@pytest.mark.parametrize(("num_queries", "num_items", "dim"), [(1, 9, 256), (3, 31, 100), (17, 9, 256), (5, 101, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_embeddings_tie_exactly_whatever_the_product_rounds(num_queries, num_items, dim, metric, dtype):
    """A matrix product sums the columns at its edge in another order than the others."""
    corpus = torch.randn(num_items, dim).to(dtype)
    corpus[0, 0] = 0.0
    corpus[1::2] = corpus[0]
    corpus[-1] = corpus[0]
    corpus[-1, 0] = -0.0
    queries = torch.randn(num_queries, dim).to(dtype)
    twins = [0, *range(1, num_items, 2), num_items - 1]
    asked = pairs(*[(q, p) for q in range(num_queries) for p in twins])
    ranks = retrieval_ranks(queries, corpus, asked, metric=metric, max_elements=2 * num_items)
    ranks = ranks.view(num_queries, len(twins))
    assert (ranks == ranks[:, :1]).all()
    assert (ranks >= len(set(twins)) - 1).all()


def test_euclidean_is_the_distance_of_vectors_of_any_length_and_differs_from_the_inner_product():
    queries, corpus = torch.randn(7, 5, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    corpus *= torch.linspace(0.1, 5, 40)[:, None]
    asked = [(q, p) for q in range(7) for p in range(40)]
    distances = [[-oracles.euclidean_distance(q, p) for p in corpus.tolist()] for q in queries.tolist()]
    want = [oracles.positive_rank(distances[q], p) for q, p in asked]
    assert retrieval_ranks(queries, corpus, pairs(*asked)).tolist() == want
    assert retrieval_ranks(queries, corpus, pairs(*asked), metric=INNER).tolist() != want
    unit = torch.nn.functional.normalize(corpus, dim=1)
    assert torch.equal(
        retrieval_ranks(queries, unit, pairs(*asked)), retrieval_ranks(queries, unit, pairs(*asked), metric=INNER)
    )


def test_a_positive_outside_the_corpus_is_judged_and_counts_against_nobody():
    corpus = floats([[1, 0], [0, 1], [1, 0]])
    inside = torch.tensor([True, True, False])
    assert retrieval_ranks(corpus[:1], corpus, pairs((0, 0), (0, 2)), in_corpus=inside).tolist() == [0, 1]


def test_every_user_weighs_the_same_and_repeats_count_once():
    items = torch.eye(3)
    positives = pairs((0, 0), (0, 0), (0, 0), (0, 1), (2, 2))  # user 1 has none
    assert recall_at_k(items, items, positives, k=1) == pytest.approx((1 / 2 + 1) / 2)
    assert [x.tolist() for x in unique_pairs(positives)] == [[0, 0, 2], [0, 1, 2]]


def test_a_broken_score_never_scores():
    nan, inf = math.nan, math.inf
    scores = floats([[nan, nan, nan], [1, nan, 0], [-inf, -inf, 0]])
    assert positive_ranks(scores, pairs((0, 0), (1, 0), (1, 1), (2, 0))).tolist() == [2**53, 1, 2**53, 2]
    # -inf is a score like others: an excluded item does not tie with it
    assert positive_ranks(scores, pairs((2, 0)), excluded=pairs((2, 1), (2, 2), (2, 1))).tolist() == [0]
    for k in (3, 4, 100):
        assert recall_at_k(torch.full((1, 4), nan), torch.eye(4), pairs((0, 0)), k=k) == 0
    broken = torch.eye(4).index_fill(0, torch.tensor(2), nan)
    assert recall_at_k(torch.eye(4), broken, pairs((0, 2)), k=100) == 0
    alone = torch.tensor([False, False, True, False])  # nothing else is in the corpus
    assert recall_at_k(torch.eye(4), broken, pairs((0, 2)), k=1, in_corpus=alone) == 0
    ranks = positive_ranks(scores, pairs((0, 0)))
    user = torch.zeros(1, dtype=torch.int64)
    assert ndcg_per_user(ranks, user, k=100).value == 0
    assert reciprocal_rank_per_user(ranks, user).value < 1e-15


def test_autocast_and_gradients_change_nothing():
    queries, corpus = torch.randn(9, 32), torch.randn(200, 32)
    asked = pairs(*[(q, p) for q in range(9) for p in range(0, 200, 7)])
    want = retrieval_ranks(queries, corpus, asked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(retrieval_ranks(queries, corpus, asked), want)
    assert not recall_at_k(queries.requires_grad_(), corpus, asked).requires_grad


def test_half_precision_embeddings_are_compared_in_float32():
    """bfloat16 has 8 bits: its own product of these would tie 256.5 with 257 and 256."""
    corpus = torch.tensor([[256.0, 0.5], [256.0, 1.0], [256.0, 0.0]], dtype=torch.bfloat16)
    query = torch.ones(1, 2, dtype=torch.bfloat16)
    assert retrieval_ranks(query, corpus, pairs((0, 0)), metric=INNER).tolist() == [1]


@given(worlds(), st.integers(1, 14), st.integers(1, 40), st.sampled_from(["euclidean", INNER]))
def test_top_k_holds_the_best_allowed_items(world, k, max_elements, metric):
    queries, corpus, _, excluded, in_corpus = world
    options = {"excluded": pairs(*excluded), "in_corpus": torch.tensor(in_corpus), "max_elements": max_elements}
    found = retrieve(floats(queries), floats(corpus), k=k, metric=metric, **options)
    assert found.items.shape == found.scores.shape == found.valid.shape == (len(queries), k)
    for q, query in enumerate(queries):
        if metric == "euclidean":
            scores = [-sum((a - b) ** 2 for a, b in zip(query, item, strict=True)) for item in corpus]
        else:
            scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in corpus]
        allowed = [i for i in range(len(corpus)) if in_corpus[i] and (q, i) not in excluded]
        size = min(k, len(allowed))
        assert found.valid[q].tolist() == [place < size for place in range(k)]
        items = found.items[q, :size].tolist()
        assert len(set(items)) == size
        assert set(items) <= set(allowed)
        assert [scores[i] for i in items] == sorted((scores[i] for i in allowed), reverse=True)[:size]
        assert found.scores[q].tolist() == [scores[i] for i in items] + [-math.inf] * (k - size)
        assert found.items[q, size:].tolist() == [0] * (k - size)
    table = floats(queries) @ floats(corpus).T
    if metric == INNER:
        from_scores = top_k(table, k=k, **options)
        assert torch.equal(from_scores.scores, found.scores)
        assert torch.equal(from_scores.valid, found.valid)


def test_the_distance_of_an_item_from_itself_is_never_below_zero():
    vectors = torch.randn(200, 33) * 10  # twice the product less both norms rounds to either side of 0
    found = retrieve(vectors, vectors, k=1)
    assert (found.scores <= 0).all()
    assert torch.equal(found.items[:, 0], torch.arange(200))


def test_scores_of_minus_infinity_and_nan_come_last_but_before_what_is_excluded():
    scores = floats([[-math.inf, 5, math.nan, 7, math.inf]])
    found = top_k(scores, k=5, excluded=pairs((0, 3)))
    assert found.valid.tolist() == [[True, True, True, True, False]]
    assert found.items[0, :2].tolist() == [4, 1]
    assert set(found.items[0, 2:4].tolist()) == {0, 2}
    assert found.scores[0, 0] == math.inf


def test_empty_inputs():
    none = torch.zeros(0, dtype=torch.int64)
    assert retrieval_ranks(torch.ones(2, 3), torch.ones(4, 3), (none, none)).shape == (0,)
    assert retrieve(torch.ones(0, 3), torch.ones(4, 3), k=2).items.shape == (0, 2)
    assert not retrieve(torch.ones(2, 3), torch.ones(0, 3), k=2).valid.any()


GOOD = {"queries": torch.ones(2, 3), "corpus": torch.ones(4, 3), "positives": pairs((0, 1))}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"queries": torch.ones(2, 3, dtype=torch.int64)}, TypeError, ["queries", "float32", "int64"]),
        ({"corpus": torch.ones(4, 2)}, ValueError, ["corpus", "3", "(4, 2)"]),
        ({"positives": torch.ones(2)}, TypeError, ["positives", "tuple", "(query, item)"]),
        ({"positives": (torch.zeros(2), torch.zeros(2))}, TypeError, ["positives[0]", "int64"]),
        ({"positives": (torch.arange(2), torch.arange(1))}, ValueError, ["positives[1]", "(1,)"]),
        ({"positives": pairs((2, 0))}, ValueError, ["positives[0]", "[0, 2)", "2"]),
        ({"positives": pairs((0, -1))}, ValueError, ["positives[1]", "[0, 4)", "-1"]),
        ({"positives": (torch.arange(0), torch.arange(0))}, ValueError, ["positives", "at least one pair"]),
        ({"k": 0}, ValueError, ["k", "at least 1"]),
        ({"metric": "cosine"}, ValueError, ["metric", "euclidean", "cosine"]),
        ({"in_corpus": torch.ones(4)}, TypeError, ["in_corpus", "bool"]),
        ({"excluded": pairs((0, 4))}, ValueError, ["excluded[1]", "[0, 4)"]),
        ({"max_elements": 0}, ValueError, ["max_elements", "at least 1"]),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error) as caught:
        recall_at_k(**{**GOOD, **change})
    for word in words:
        assert word in str(caught.value)


def test_nan_comes_behind_every_score_and_is_an_item_all_the_same():
    nan, inf = torch.nan, torch.inf
    best = top_k(torch.tensor([[4.0, 3.0, 2.0, 1.0], [nan, 1.0, inf, -inf]]), k=3)
    assert best.items[0].tolist() == [0, 1, 2]
    assert best.items[1, :2].tolist() == [2, 1]
    assert best.items[1, 2] in (0, 3)
    assert best.valid.all()
    unmasked = top_k(torch.tensor([[1.0, -inf, 3.0]]), k=3)
    assert (unmasked.items.tolist(), unmasked.scores.tolist()) == ([[2, 0, 1]], [[3.0, 1.0, -inf]])
    assert unmasked.valid.all()
