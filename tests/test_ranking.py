import math
from collections import defaultdict
from fractions import Fraction

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recblocks import (
    blend_scores,
    bootstrap_mean,
    distinct_in_top_k,
    distinct_per_user,
    hit_at_k,
    hit_per_user,
    paired_bootstrap,
)

IDS = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)])
SCORES = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, math.inf])


@st.composite
def judged(draw):
    """Rows of (user, chunk, score, labels of two heads, topic), at most 5 a chunk, in any order; and k."""
    chunks = draw(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6, unique=True))
    row = st.tuples(SCORES, st.lists(st.integers(0, 1), min_size=2, max_size=2), IDS)
    rows = [(*chunk, *one) for chunk in chunks for one in draw(st.lists(row, min_size=1, max_size=5))]
    return draw(st.permutations(rows)), draw(st.integers(1, 6))


def tensors(rows):
    user, chunk, score, labels, topic = zip(*rows, strict=True)
    return (
        torch.tensor(score),
        torch.tensor(labels),
        torch.tensor(user, dtype=torch.int64),
        torch.tensor(chunk, dtype=torch.int64),
        torch.tensor(topic, dtype=torch.int64),
    )


def by_user(rows):
    """{user: [rows of each chunk]}."""
    chunks = defaultdict(list)
    for row in rows:
        chunks[row[:2]].append(row)
    users = defaultdict(list)
    for (user, _), members in chunks.items():
        users[user].append(members)
    return dict(sorted(users.items()))


def expected(rows, k, measure):
    """Mean of what the first k rows measure over every order of one chunk."""
    scores = [row[2] for row in rows]
    return oracles.expected_over_orders(scores, k, lambda top: Fraction(measure([rows[place] for place in top])))


@given(judged())
def test_hits_are_the_mean_over_the_orders_of_ties(world):
    rows, k = world
    score, labels, user, chunk, _ = tensors(rows)
    got = hit_per_user(score, labels, user, chunk, k=k)
    users = by_user(rows)
    assert got.user.tolist() == list(users)
    for value, chunks in zip(got.value.tolist(), users.values(), strict=True):
        for head in range(2):
            want = sum(expected(rows, k, lambda top, head=head: sum(row[3][head] for row in top)) for rows in chunks)
            assert value[head] == pytest.approx(float(want), rel=1e-14)  # at most 30 float64 terms
    assert torch.equal(hit_at_k(score, labels, user, chunk, k=k), got.value.mean(0))


@given(judged())
def test_topics_are_the_mean_over_the_orders_of_ties(world):
    rows, k = world
    score, _, user, chunk, topic = tensors(rows)
    got = distinct_per_user(score, topic, user, chunk, k=k)
    users = by_user(rows)
    assert got.user.tolist() == list(users)
    assert got.num_chunks.tolist() == [len(chunks) for chunks in users.values()]
    every = []
    for value, chunks in zip(got.value.tolist(), users.values(), strict=True):
        want = [expected(rows, k, lambda top: len({row[4] for row in top})) for rows in chunks]
        every += want
        assert value == pytest.approx(float(sum(want) / len(want)), rel=1e-13)  # products of at most 5 quotients
    mean = distinct_in_top_k(score, topic, user, chunk, k=k)
    assert mean.item() == pytest.approx(float(sum(every) / len(every)), rel=1e-13)


@given(judged(), st.randoms())
def test_the_order_of_the_rows_changes_no_bit(world, random):
    rows, k = world
    shuffled = random.sample(rows, len(rows))
    score, labels, user, chunk, topic = tensors(rows)
    score2, labels2, user2, chunk2, topic2 = tensors(shuffled)
    assert torch.equal(hit_at_k(score, labels, user, chunk, k=k), hit_at_k(score2, labels2, user2, chunk2, k=k))
    assert torch.equal(
        distinct_in_top_k(score, topic, user, chunk, k=k), distinct_in_top_k(score2, topic2, user2, chunk2, k=k)
    )


def test_the_papers_example():
    """TransAct 4.2.1: sorted p1, p2, p3, ...; p1 and p4 repinned; hit@3 of repin is 1."""
    score = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    labels = torch.tensor([[1.0], [0.0], [0.0], [1.0], [0.0]])
    same = torch.zeros(5, dtype=torch.int64)
    assert hit_at_k(score, labels, same, same).tolist() == [1]


def test_users_without_hits_count_and_a_users_chunks_add_up():
    score = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.5])
    labels = torch.tensor([[True], [False], [True], [True], [False]])
    user, chunk = torch.tensor([5, 5, 5, 5, 6]), torch.tensor([0, 0, 1, 1, 0])
    assert hit_at_k(score, labels, user, chunk, k=1).tolist() == [1.0]  # two hits, two users
    assert hit_at_k(score, labels, user, chunk, k=2).tolist() == [1.5]


def test_a_constant_score_gives_the_random_hits_and_the_labels_the_most():
    torch.manual_seed(3)
    user, chunk = torch.randint(20, (2000,)), torch.randint(10, (2000,))
    labels = torch.rand(2000, 2) < torch.tensor([0.1, 0.4])
    groups = defaultdict(list)
    for row, key in enumerate(zip(user.tolist(), chunk.tolist(), strict=True)):
        groups[key].append(labels[row].tolist())
    for head in range(2):
        sums = [(sum(row[head] for row in rows), len(rows)) for rows in groups.values()]
        random = math.fsum(hits * min(1, 3 / size) for hits, size in sums) / 20
        most = sum(min(hits, 3) for hits, _ in sums) / 20
        assert hit_at_k(torch.zeros(2000), labels, user, chunk)[head].item() == pytest.approx(random, rel=1e-13)
        assert hit_at_k(labels[:, head].float(), labels, user, chunk)[head].item() == most


def test_models_are_paired_by_user():
    torch.manual_seed(1)
    user, chunk = torch.randint(200, (8000,)), torch.randint(4, (8000,))
    labels = torch.rand(8000, 1) < 0.2
    good = hit_per_user(labels[:, 0] + torch.randn(8000), labels, user, chunk)
    bad = hit_per_user(torch.randn(8000), labels, user, chunk)
    assert torch.equal(good.user, bad.user)
    assert paired_bootstrap(good.value[:, 0], bad.value[:, 0], num_resamples=500).low > 0
    topics = distinct_per_user(torch.randn(8000), torch.randint(9, (8000,)), user, chunk)
    interval = bootstrap_mean(topics.value, weights=topics.num_chunks, num_resamples=500)
    assert interval.low < interval.mean < interval.high < 3


def test_everything_fits_into_a_long_list():
    topic, same = torch.tensor([1, 1, 2, 3]), torch.zeros(4, dtype=torch.int64)
    assert distinct_in_top_k(torch.zeros(4), topic, same, same, k=100).item() == 3


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_blended_scores_are_the_sum_and_equal_rows_stay_tied(num_rows, num_heads, seed):
    torch.manual_seed(seed)
    one, utilities = torch.rand(num_heads), torch.randn(num_heads)
    got = blend_scores(torch.cat([torch.rand(3, num_heads), one.expand(num_rows, -1)]), utilities)
    want = math.fsum(p * u for p, u in zip(one.tolist(), utilities.tolist(), strict=True))
    assert got.dtype == torch.float64
    assert (got[3:] == got[3]).all()
    scale = (one * utilities).abs().sum().item()
    assert got[3].item() == pytest.approx(want, abs=12 * 2.2e-16 * scale)  # 12 float64 additions


def test_no_rows():
    none = torch.zeros(0, dtype=torch.int64)
    assert hit_per_user(torch.zeros(0), torch.zeros(0, 2), none, none).value.shape == (0, 2)
    assert distinct_per_user(torch.zeros(0), none, none, none).value.shape == (0,)


SCORE, LABELS, SAME = torch.zeros(3), torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
NONE = torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hit_at_k(SAME, LABELS, SAME, SAME), TypeError, ["scores", "float32", "int64"]),
        (lambda: hit_at_k(SCORE[None], LABELS, SAME, SAME), ValueError, ["scores", "(1, 3)"]),
        (lambda: hit_at_k(SCORE / 0, LABELS, SAME, SAME), ValueError, ["scores", "NaN"]),
        (lambda: hit_at_k(SCORE, LABELS[:, 0], SAME, SAME), ValueError, ["labels", "(3, H)"]),
        (lambda: hit_at_k(SCORE, LABELS + 0.5, SAME, SAME), ValueError, ["labels", "0 or 1", "0.5"]),
        (lambda: hit_at_k(SCORE, LABELS - 1, SAME, SAME), ValueError, ["labels", "0 or 1", "-1.0"]),
        (lambda: hit_at_k(SCORE, LABELS / 0, SAME, SAME), ValueError, ["labels", "0 or 1", "nan"]),
        (lambda: hit_at_k(SCORE, LABELS.long() + 2, SAME, SAME), ValueError, ["labels", "0 or 1", "2"]),
        (lambda: hit_at_k(SCORE, LABELS.to(torch.complex64), SAME, SAME), TypeError, ["labels", "bool", "complex64"]),
        (lambda: hit_at_k(SCORE, LABELS, SAME[:2], SAME), ValueError, ["user", "(3)", "(2,)"]),
        (lambda: hit_at_k(SCORE, LABELS, SAME, SAME.int()), TypeError, ["chunk", "int64", "int32"]),
        (lambda: hit_at_k(SCORE, LABELS, SAME, SAME, k=0), ValueError, ["k", "at least 1"]),
        (lambda: hit_at_k(SCORE[:0], LABELS[:0], NONE, NONE), ValueError, ["scores", "none"]),
        (lambda: distinct_in_top_k(SCORE, SCORE, SAME, SAME), TypeError, ["topics", "int64"]),
        (lambda: distinct_in_top_k(SCORE, SAME[:1], SAME, SAME), ValueError, ["topics", "(1,)"]),
        (lambda: distinct_in_top_k(SCORE, SAME, SAME, SAME, k=True), TypeError, ["k", "int"]),
        (lambda: distinct_in_top_k(SCORE[:0], NONE, NONE, NONE), ValueError, ["scores", "none"]),
        (lambda: blend_scores(SCORE, SCORE), ValueError, ["probabilities", "(N, H)"]),
        (lambda: blend_scores(LABELS / 0, SCORE[:2]), ValueError, ["probabilities", "NaN"]),
        (
            lambda: blend_scores(torch.full((3, 2), torch.inf), SCORE[:2]),
            ValueError,
            ["probabilities", "finite", "inf"],
        ),
        (lambda: distinct_in_top_k(SCORE / 0, SAME, SAME, SAME), ValueError, ["scores", "NaN"]),
        (lambda: blend_scores(LABELS, SCORE), ValueError, ["utilities", "(2)", "(3,)"]),
        (lambda: blend_scores(LABELS, SCORE[:2] / 0), ValueError, ["utilities", "finite"]),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
