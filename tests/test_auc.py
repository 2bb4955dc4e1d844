import math

import oracles
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import recblocks as rb
from recblocks.evaluation import auc as module
from recblocks.evaluation.statistics import times_drawn

IDS = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)])
ROWS = st.lists(
    st.tuples(IDS, IDS, st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 7.0]), st.integers(0, 1)),
    min_size=1,
    max_size=16,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(rows):
    user, chunk, score, label = zip(*rows, strict=True)
    return torch.tensor(score), torch.tensor(label), torch.tensor(user), torch.tensor(chunk)


def chunk_aucs(rows):
    """{user: [AUC of each chunk that has one]}."""
    found = {}
    for user, chunk in sorted({row[:2] for row in rows}):
        members = [row for row in rows if row[:2] == (user, chunk)]
        value = oracles.auc([row[2] for row in members], [row[3] for row in members])
        if value is not None:
            found.setdefault(user, []).append(value)
    return found


@given(ROWS)
def test_chunk_auc_is_the_mean_over_chunks_with_both_labels(rows):
    score, label, user, chunk = tensors(rows)
    want = chunk_aucs(rows)
    got = rb.chunk_auc_per_user(score, label, user, chunk)
    assert got.user.tolist() == list(want)
    assert got.num_chunks.tolist() == [len(values) for values in want.values()]
    # sums of at most 8 float64 quotients
    assert got.value.tolist() == pytest.approx([sum(v) / len(v) for v in want.values()], rel=1e-14)
    every = [value for values in want.values() for value in values]
    if every:
        mean = rb.chunk_auc(score, label, user, chunk)
        assert mean.item() == pytest.approx(sum(every) / len(every), rel=1e-14)
        interval = rb.bootstrap_mean(got.value, weights=got.num_chunks, num_resamples=3)
        assert interval.mean == pytest.approx(mean.item(), rel=1e-14)
    order = torch.randperm(len(rows))
    again = rb.chunk_auc_per_user(score[order], label[order], user[order], chunk[order])
    assert torch.equal(again.value, got.value)


def test_scikit_learn_agrees_chunk_by_chunk():
    torch.manual_seed(2)
    user, chunk = torch.randint(30, (3000,)), torch.randint(5, (3000,))
    label = torch.rand(3000) < 0.2
    score = (torch.randn(3000) + label).round(decimals=1)
    values = []
    for u in range(30):
        for c in range(5):
            inside = (user == u) & (chunk == c)
            if 0 < label[inside].sum() < inside.sum():
                values.append(roc_auc_score(label[inside], score[inside]))
    assert rb.chunk_auc(score, label, user, chunk).item() == pytest.approx(sum(values) / len(values), rel=1e-13)


@given(ROWS)
def test_auc_is_its_definition_and_the_bootstrap_is_around_it(rows):
    score, label, user, _ = tensors(rows)
    want = oracles.auc(score.tolist(), label.tolist())
    assume(want is not None)
    assert rb.auc(score, label).item() == pytest.approx(want, abs=1e-14)
    # in float64 the counts are exact, the quotient rounds once
    assert rb.auc_bootstrap(score, label, user, num_resamples=1).mean == pytest.approx(want, abs=1e-15)


@given(ROWS, st.sampled_from([1, 2, 3, 32]), st.sampled_from([1, 100]))
def test_each_resample_is_the_auc_of_the_drawn_users_rows(rows, block, cells):
    score, label, user, _ = tensors(rows)
    assume(0 < label.sum() < len(rows))
    other = torch.randint(4, (len(rows),), generator=seeded()).float()
    before = module._BLOCK, module._CELLS_AT_A_TIME
    module._BLOCK, module._CELLS_AT_A_TIME = block, cells
    try:
        _, got = module._bootstrap([score, other], label, user, 0.95, 12, seeded(), ("scores", "other"))
    finally:
        module._BLOCK, module._CELLS_AT_A_TIME = before
    users = sorted({row[0] for row in rows})
    at_a_time = max(1, cells // max(len(users), *(len(set(s[label == 1].tolist())) for s in (score, other))))
    drawn = torch.cat(list(times_drawn(len(users), 12, at_a_time, generator=seeded(), device=score.device)))
    for model, values in zip((score, other), got.tolist(), strict=True):
        for value, times in zip(values, drawn.long().tolist(), strict=True):
            copies = [row for row, one in enumerate(user.tolist()) for _ in range(times[users.index(one)])]
            want = oracles.auc([model[row].item() for row in copies], [label[row].item() for row in copies])
            if want is None:
                assert math.isnan(value)
            else:
                assert value == pytest.approx(want, abs=1e-15)  # counts of a few rows are exact in float32 too


def clustered(num_users=400, rows=10):
    """Users differ in how much they click, so that rows of one user are not independent."""
    user = torch.arange(num_users).repeat_interleave(rows)
    taste = torch.randn(num_users)[user]
    label = torch.rand(len(user)) < (taste - 1).sigmoid()
    return taste + torch.randn(len(user)), taste + 2 * torch.randn(len(user)), label, user


def test_float32_weights_lose_nothing_that_counts():
    torch.manual_seed(4)
    score, _, label, user = clustered(500, 40)
    _, (got,) = module._bootstrap([score], label, user, 0.95, 5, seeded())
    (drawn,) = times_drawn(500, 5, 10**9, generator=seeded(), device=score.device)
    for value, times in zip(got.tolist(), drawn, strict=True):
        # sums of positive float32 products, each off by 6e-8 of itself
        assert value == pytest.approx(roc_auc_score(label, score, sample_weight=times[user]), rel=6e-8)


def test_the_interval_is_as_wide_as_independent_worlds_differ():
    """200 worlds: their AUCs' deviation has a relative error of 1/sqrt(2 * 200) = 5 %, the interval's of 2.7 % / 1.96
    and its own spread between worlds; 4 of the first. Drawing rows instead of users would be 35 % too narrow.
    """
    values, widths = [], []
    for world in range(200):
        torch.manual_seed(world)
        score, _, label, user = clustered(150, 8)
        interval = rb.auc_bootstrap(score, label, user, num_resamples=200, generator=seeded(world))
        values.append(interval.mean)
        widths.append(interval.high - interval.low)
    deviation = torch.tensor(values).std().item()
    assert sum(widths) / len(widths) == pytest.approx(2 * 1.96 * deviation, rel=0.2)


def test_pairing_removes_what_both_models_share():
    torch.manual_seed(0)
    score, other, label, user = clustered()
    one, two = (rb.auc_bootstrap(s, label, user, generator=seeded()) for s in (score, other))
    got = rb.paired_auc_bootstrap(score, other, label, user, generator=seeded())
    assert got.mean == pytest.approx(one.mean - two.mean, abs=1e-15)
    assert got.high - got.low < math.hypot(one.high - one.low, two.high - two.low)
    back = rb.paired_auc_bootstrap(other, score, label, user, generator=seeded())
    assert back == pytest.approx((-got.mean, -got.high, -got.low), abs=1e-12)
    assert rb.paired_auc_bootstrap(score, score, label, user, num_resamples=50) == (0, 0, 0)


def test_the_generator_and_the_level_decide():
    torch.manual_seed(0)
    score, _, label, user = clustered(50)
    state = torch.get_rng_state()
    one = rb.auc_bootstrap(score, label, user, generator=seeded(1))
    assert one == rb.auc_bootstrap(score, label, user, generator=seeded(1))
    assert one != rb.auc_bootstrap(score, label, user, generator=seeded(2))
    wide = rb.auc_bootstrap(score, label, user, level=0.99, generator=seeded(1))
    assert wide.low < one.low < one.mean < one.high < wide.high
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resample_with_one_label_is_dropped():
    # two users with one label each: half of the resamples draw one of them twice
    score, label = torch.tensor([0.1, 0.7]), torch.tensor([False, True])
    assert rb.auc_bootstrap(score, label, torch.tensor([3, 4]), num_resamples=100) == (1, 1, 1)


SCORE, LABEL, SAME = torch.zeros(3), torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rb.auc(SAME, LABEL), TypeError, ["scores", "float32"]),
        (lambda: rb.auc(SCORE / 0, LABEL), ValueError, ["scores", "NaN"]),
        (lambda: rb.auc(SCORE, LABEL * 2), ValueError, ["labels", "0 or 1", "2.0"]),
        (lambda: rb.auc(SCORE, LABEL / 0), ValueError, ["labels", "0 or 1", "nan"]),
        (lambda: rb.chunk_auc(SCORE, -LABEL, SAME, SAME), ValueError, ["labels", "0 or 1", "-1.0"]),
        (lambda: rb.auc_bootstrap(SCORE, LABEL + 1, SAME), ValueError, ["labels", "0 or 1", "2.0"]),
        (lambda: rb.auc(SCORE, LABEL[1:]), ValueError, ["labels", "(2,)"]),
        (lambda: rb.auc(SCORE, SCORE), ValueError, ["labels", "both 0 and 1"]),
        (lambda: rb.auc(SCORE[:0], SCORE[:0]), ValueError, ["labels", "both 0 and 1"]),
        (lambda: rb.chunk_auc(SCORE, SCORE, SAME, SAME), ValueError, ["labels", "chunk"]),
        (lambda: rb.chunk_auc(SCORE, LABEL[:, None], SAME, SAME), ValueError, ["labels", "(3, 1)"]),
        (lambda: rb.chunk_auc(SCORE, LABEL, SAME, SAME[1:]), ValueError, ["chunk", "(2,)"]),
        (lambda: rb.chunk_auc(SCORE / 0, LABEL, SAME, SAME), ValueError, ["scores", "NaN"]),
        (lambda: rb.auc_bootstrap(SCORE, LABEL, SAME.int()), TypeError, ["user", "int64"]),
        (lambda: rb.auc_bootstrap(SCORE, 1 - SCORE, SAME), ValueError, ["labels", "both 0 and 1"]),
        (lambda: rb.auc_bootstrap(SCORE, LABEL, SAME, level=1), ValueError, ["level", "below 1"]),
        (lambda: rb.auc_bootstrap(SCORE, LABEL, SAME, num_resamples=0), ValueError, ["num_resamples"]),
        (lambda: rb.paired_auc_bootstrap(SCORE, SCORE[1:], LABEL, SAME), ValueError, ["labels", "(2)"]),
        (lambda: rb.paired_auc_bootstrap(SCORE, SCORE / 0, LABEL, SAME), ValueError, ["other", "NaN"]),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
