import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recblocks as rb
from recblocks.evaluation import retrieval
from recblocks.evaluation.protocols import PROTOCOLS, embedding_points, in_window, protocol_ranks, reference_times

DAY = 86_400


@given(
    st.integers(-(10**12), 10**12),
    st.integers(1, 20),
    st.integers(1, 100),
    st.sampled_from(["s", "ms"]),
    st.sampled_from(PROTOCOLS),
    st.data(),
)
def test_each_positive_is_predicted_from_the_printed_moment(start, num_days, day, unit, protocol, data):
    length = day * {"s": 1, "ms": 1000}[unit]
    window = {"start": start, "num_days": num_days, "day": day, "unit": unit}
    edges = st.integers(0, num_days).map(lambda n: n * length) | st.integers(0, num_days - 1).map(
        lambda n: n * length + 1
    )
    times = data.draw(st.lists(edges | st.integers(-3, num_days * length + 3), min_size=1, max_size=20))
    times = torch.tensor(times) + start
    inside = in_window(times, **window)
    assert inside.tolist() == [start < t <= start + num_days * length for t in times.tolist()]
    cuts = reference_times(times[inside], protocol=protocol, **window)
    want = [oracles.reference_time(t, start, protocol, num_days, length) for t in times[inside].tolist()]
    assert cuts.tolist() == want
    assert (cuts < times[inside]).all()
    if protocol == "daily":
        staleness = times[inside] - cuts
        assert ((staleness > length) & (staleness <= 2 * length)).all()


def test_the_papers_fourteen_days():
    """t = 0: the second day, (1 d, 2 d], is predicted from the embedding computed at 0."""
    times = torch.tensor([1, DAY, DAY + 1, 2 * DAY, 13 * DAY + 1, 14 * DAY])
    assert (reference_times(times, start=0, protocol="daily") // DAY).tolist() == [-1, -1, 0, 0, 12, 12]
    assert reference_times(times, start=0, protocol="once").tolist() == [0] * 6
    assert reference_times(times, start=0, protocol="realtime").tolist() == (times - 1).tolist()
    milliseconds = reference_times(times * 1000, start=0, protocol="daily", unit="ms")
    assert torch.equal(milliseconds, 1000 * reference_times(times, start=0, protocol="daily"))


@given(st.lists(st.tuples(st.integers(-3, 3) | st.just(2**62), st.integers(-4, 4)), max_size=20))
def test_every_point_is_embedded_once(pairs):
    users = torch.tensor([user for user, _ in pairs], dtype=torch.int64)
    cuts = torch.tensor([cut for _, cut in pairs], dtype=torch.int64)
    points = embedding_points(users, cuts)
    assert list(zip(points.user.tolist(), points.cut.tolist(), strict=True)) == sorted(set(pairs))
    assert torch.equal(points.user[points.query], users)
    assert torch.equal(points.cut[points.query], cuts)


@st.composite
def histories(draw):
    """Three users' actions before and in a window of four days of ten seconds after time 0; item = corpus row."""
    action = st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(-25, 45))
    return draw(st.lists(action, min_size=1, max_size=25))


def latest_item(history, user, cut):
    """What the last action up to the cut was; the largest row among equals, so that the answer is one."""
    seen = [(time, item) for who, item, time in history if who == user and time <= cut]
    return max(seen)[1] if seen else 0


@given(histories(), st.sampled_from(PROTOCOLS), st.integers(1, 5))
def test_ranks_are_those_of_each_positives_own_moment(history, protocol, batch_size):
    corpus = torch.tensor([[float(row), 0.0] for row in range(6)])
    asked = []

    def embed(users, cuts):
        assert len(users) == len(cuts) <= batch_size
        asked.extend(zip(users.tolist(), cuts.tolist(), strict=True))
        rows = [latest_item(history, user - 100, cut) for user, cut in asked[-len(users) :]]
        return corpus[torch.tensor(rows)]

    users, items, times = (torch.tensor(column) for column in zip(*history, strict=True))
    judged = protocol_ranks(
        embed,
        corpus,
        (users + 100, items, times),
        start=0,
        protocol=protocol,
        num_days=4,
        day=10,
        batch_size=batch_size,
    )
    assert len(asked) == len(set(asked))
    assert judged.pair.tolist() == [i for i, (_, _, time) in enumerate(history) if 0 < time <= 40]
    assert torch.equal(judged.pair_user, users[judged.pair] + 100)
    for rank, pair in zip(judged.ranks.tolist(), judged.pair.tolist(), strict=True):
        user, item, time = history[pair]
        cut = oracles.reference_time(time, 0, protocol, 4, 10)
        assert cut < time
        scores = [-abs(latest_item(history, user, cut) - other) for other in range(6)]
        assert rank == oracles.positive_rank(scores, item)


@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
def test_metric_and_corpus_are_those_asked_for(metric, monkeypatch):
    corpus = torch.randn(30, 4, dtype=torch.float64) * torch.linspace(0.1, 5, 30)[:, None]
    corpus[7] = corpus[3]
    vectors = torch.randn(20, 4, dtype=torch.float64)
    inside = torch.rand(30) < 0.6
    users, items = torch.arange(20).repeat(3), torch.randint(30, (60,))
    prepared = []
    monkeypatch.setattr(retrieval, "_repeated_rows", lambda x, f=retrieval._repeated_rows: prepared.append(1) or f(x))
    judged = protocol_ranks(
        lambda user, _: vectors[user], corpus, (users, items, torch.ones_like(users)),
        start=0, protocol="once", metric=metric, in_corpus=inside, batch_size=3, max_elements=70,
    )  # fmt: skip
    assert len(prepared) == 1, "the corpus is prepared once, not once a batch"
    outside = set((~inside).nonzero()[:, 0].tolist())
    for rank, user, item in zip(judged.ranks.tolist(), users.tolist(), items.tolist(), strict=True):
        if metric == "euclidean":
            scores = [-oracles.euclidean_distance(vectors[user].tolist(), other) for other in corpus.tolist()]
        else:
            scores = (vectors[user] @ corpus.T).tolist()
        assert rank == oracles.positive_rank(scores, item, outside)


def test_fresher_embeddings_predict_a_drifting_user_better():
    """A user who moves one item a day: daily lags two items behind, realtime one."""
    corpus = torch.arange(40.0)[:, None]
    times = torch.arange(1, 15) * DAY - 5
    users, items = torch.zeros(14, dtype=torch.int64), torch.arange(1, 15)

    def embed(user, cut):
        assert (user == 0).all()
        return corpus[(cut + 5).div(DAY, rounding_mode="floor").clamp(min=0)]

    recall = {}
    for protocol in PROTOCOLS:
        judged = protocol_ranks(embed, corpus, (users, items, times), start=0, protocol=protocol)
        recall[protocol] = rb.recall_per_user(judged.ranks, judged.pair_user, k=3).value.item()
    # One step away stands behind two (the nearest, and the tie on the other side), two steps away behind four; items 1
    # and 2 are within reach of item 0, which has neighbours on one side only.
    assert recall == {"once": 2 / 14, "daily": 2 / 14, "realtime": 1.0}


def test_a_start_out_of_numpy_is_a_start():
    times = torch.tensor([101, 110])
    for protocol in PROTOCOLS:
        window = {"protocol": protocol, "num_days": 2, "day": 10}
        expected = reference_times(times, start=100, **window)
        assert torch.equal(reference_times(times, start=np.int64(100), **window), expected)


def constant(users, cuts):
    assert users.shape == cuts.shape
    return torch.ones(len(users), 2)


def test_nothing_in_the_window():
    none = torch.zeros(1, dtype=torch.int64)
    judged = protocol_ranks(constant, torch.ones(3, 2), (none,) * 3, start=0, protocol="daily")
    assert judged.ranks.shape == judged.pair_user.shape == judged.pair.shape == (0,)


TIME = torch.tensor([5])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: reference_times(TIME, start=0, protocol="weekly"), ValueError, ["protocol", "'realtime'", "'weekly'"]),
        (lambda: reference_times(TIME, start=5, protocol="once"), ValueError, ["positive_time", "start = 5", "1 of 1"]),
        (lambda: reference_times(TIME.float(), start=0, protocol="once"), TypeError, ["time", "int64", "float32"]),
        (lambda: in_window(TIME, start=0.5), TypeError, ["start", "int", "0.5"]),
        (lambda: in_window(TIME, start=True), TypeError, ["start", "int", "True"]),
        (lambda: in_window(TIME, start=2**63), ValueError, ["start", f"got {2**63}"]),
        (lambda: in_window(TIME, start=0, unit="min"), ValueError, ["unit", "'ms'", "'min'"]),
        (lambda: in_window(TIME, start=0, num_days=0), ValueError, ["num_days", "at least 1"]),
        (lambda: in_window(TIME, start=0, day=0), ValueError, ["day", "at least 1"]),
        (lambda: embedding_points(TIME, torch.arange(2)), ValueError, ["cuts", "(1)", "(2,)"]),
        (lambda: judge(positives=(TIME, TIME)), TypeError, ["positives", "(user, item, time)"]),
        (lambda: judge(positives=(TIME, TIME, TIME)), ValueError, ["positives[1]", "[0, 3)", "5"]),
        (lambda: judge(embed=lambda *_: torch.ones(1, 7)), ValueError, ["embed", "(1, 2)", "(1, 7)"]),
        (lambda: judge(metric="cosine"), ValueError, ["metric", "cosine"]),
        (lambda: judge(in_corpus=torch.ones(4).bool()), ValueError, ["in_corpus", "(3)", "(4,)"]),
        (lambda: judge(batch_size=0), ValueError, ["batch_size", "at least 1"]),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def judge(embed=constant, positives=(TIME, TIME - 4, TIME), **options):
    return protocol_ranks(embed, torch.ones(3, 2), positives, start=0, protocol="once", **options)
