import functools
import math
import sys

import oracles
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from largest import Largest
from pooled_losses import BACKENDS, FAST, INTERPRETED, interpret_small_tiles, tiles_of
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from recblocks import LearnedTemperature, equal_user_weights, own_positive_mask, sampled_softmax_loss
from recblocks.kernels.own_positives import owned_ranges
from recblocks.kernels.sampled_softmax import chunked
from recblocks.kernels.sampled_softmax import dispatch as softmax_dispatch
from recblocks.kernels.sampled_softmax.dispatch import resolve
from recblocks.kernels.sampled_softmax.pool import Pool, Wanted

EPSILON = torch.finfo(torch.float64).eps
LIMITS = [0, 1, -1, 2**63 - 1, -(2**63), 2**63 - 2]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    interpret_small_tiles(monkeypatch, "sampled_softmax")
    if INTERPRETED:
        monkeypatch.setattr("recblocks.kernels.sampled_softmax.triton._LEAST_SWEPT", 4)
    with tiles_of(2):
        yield


@st.composite
def cases(draw, max_rows=5, max_pairs=6, max_columns=5):
    """Arguments of the loss in float64, of every kind: pairs or rows, mask, ids or neither, log q, weights."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    pairs, columns, dim = draw(st.integers(0, max_pairs)), draw(st.integers(0, max_columns)), draw(st.integers(1, 4))
    paired = draw(st.booleans())
    rows = draw(st.integers(1, max_rows)) if paired else pairs
    keywords = {"temperature": draw(st.sampled_from([0.05, 0.3, 1.0, 7.0]))}
    if paired:
        keywords["pair_queries"] = torch.randint(rows, (pairs,), generator=generator)
    if draw(st.booleans()):
        keywords["log_q_positives"] = -5 * torch.rand(pairs, dtype=torch.float64, generator=generator)
        keywords["log_q_negatives"] = -5 * torch.rand(columns, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        keywords["weights"] = torch.tensor(
            draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=pairs, max_size=pairs)), dtype=torch.float64
        )
    keywords["correct_positive"] = draw(st.booleans())
    mask = draw(st.sampled_from(["none", "masked", "own"]))
    if mask == "masked":
        share = draw(st.sampled_from([0.1, 0.5, 1.0]))
        keywords["masked"] = torch.rand(rows, columns, generator=generator) < share
    if mask == "own":
        users, items = st.sampled_from(LIMITS[:3]), st.sampled_from(LIMITS)
        row_users = draw(st.lists(users, min_size=rows, max_size=rows))
        known = draw(st.lists(st.tuples(users, items), max_size=8))
        column_items = draw(st.lists(items, min_size=columns, max_size=columns))
        keywords["own"] = tuple(
            torch.tensor(ids, dtype=torch.int64)
            for ids in (row_users, column_items, [u for u, _ in known], [i for _, i in known])
        )
    return (normal(rows, dim), normal(pairs, dim), normal(columns, dim)), keywords


def expected(embeddings, keywords):
    """Each pair's loss by the scalar oracle."""
    queries, positives, negatives = (x.tolist() for x in embeddings)
    query_of = keywords.get("pair_queries", torch.arange(len(positives))).tolist()
    log_q_positives = keywords.get("log_q_positives", torch.zeros(len(positives))).tolist()
    log_q_negatives = keywords.get("log_q_negatives", torch.zeros(len(negatives))).tolist()
    if not keywords["correct_positive"]:
        log_q_positives = [0.0] * len(positives)
    weights = keywords.get("weights", torch.ones(len(positives))).tolist()
    losses = []
    for pair, row in enumerate(query_of):
        seen = list(range(len(negatives)))
        if "masked" in keywords:
            seen = [c for c in seen if not keywords["masked"][row, c]]
        if "own" in keywords:
            row_users, column_items, users, items = (ids.tolist() for ids in keywords["own"])
            known = list(zip(users, items, strict=True))
            seen = [c for c in seen if not oracles.is_own_positive(row_users[row], column_items[c], known)]
        columns = [(negatives[c], log_q_negatives[c]) for c in seen]
        loss = oracles.sampled_softmax_pair(
            queries[row], positives[pair], log_q_positives[pair], columns, keywords["temperature"]
        )
        losses.append(loss if weights[pair] else 0.0)
    return losses, weights


def leaves(embeddings, keywords):
    """Copies that ask for a gradient, of the embeddings and of every float argument."""
    embeddings = [x.clone().requires_grad_() for x in embeddings]
    keywords = dict(keywords)
    for name in ("log_q_positives", "log_q_negatives", "weights"):
        if name in keywords:
            keywords[name] = keywords[name].clone().requires_grad_()
    keywords["temperature"] = torch.tensor(keywords["temperature"], dtype=torch.float64, requires_grad=True)
    names = ["temperature", "log_q_positives", "log_q_negatives", "weights"]
    return embeddings, keywords, [*embeddings, *[keywords[name] for name in names if name in keywords]]


def gradients(embeddings, keywords, loss_of=sampled_softmax_loss, **more):
    embeddings, keywords, inputs = leaves(embeddings, keywords)
    loss = loss_of(*embeddings, **keywords, **more)
    # Upstream gradients other than 1 tell pairs apart, and find a gradient that forgets them.
    upstream = torch.linspace(2, 0.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    got = torch.autograd.grad(loss, inputs, upstream, allow_unused=True)
    return loss.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(got, inputs, strict=True)]


# Logits reach 4 * 4 * 4 / 0.05, about 1000; a difference of two such numbers is off by their rounding.
FLOAT64_CLOSE = {"rtol": 1e3 * EPSILON, "atol": 1e4 * EPSILON}


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@given(case=cases())
def test_equals_the_scalar_oracle(backend, case):
    embeddings, keywords = case
    losses, weights = expected(embeddings, keywords)
    for reduction, want in [
        ("none", losses),
        ("sum", math.fsum(v * w for v, w in zip(losses, weights, strict=True))),
        ("mean", oracles.weighted_mean(losses, weights)),
    ]:
        got = sampled_softmax_loss(*embeddings, **keywords, reduction=reduction, backend=backend)
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), **FLOAT64_CLOSE)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@given(case=cases(), rows=st.integers(1, 6))
def test_backends_agree_in_loss_and_every_gradient(reduction, case, rows):
    want_loss, want = gradients(*case, reduction=reduction, backend="reference")
    for backend in FAST:
        with tiles_of(rows):
            loss, got = gradients(*case, reduction=reduction, backend=backend)
        torch.testing.assert_close(loss, want_loss, **FLOAT64_CLOSE)
        # The temperature's gradient is a sum of logits of up to 1000 over τ = 0.05.
        torch.testing.assert_close(got, want, rtol=1e4 * EPSILON, atol=1e7 * EPSILON)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@given(case=cases(max_rows=3, max_pairs=3, max_columns=3))
def test_gradients_are_those_of_finite_differences(backend, reduction, case):
    embeddings, keywords = case
    assume(keywords["temperature"] >= 0.3)  # at 0.05 the curvature is too much for a step of 1e-6
    # A weight of 0 marks an absent row: the loss jumps there, and only the right side has a slope.
    assume("weights" not in keywords or keywords["weights"].all())
    embeddings, keywords, inputs = leaves(embeddings, keywords)
    names = [name for name in ("temperature", "log_q_positives", "log_q_negatives", "weights") if name in keywords]
    if "log_q_positives" in keywords:  # away from 0, which a step may not exceed
        with torch.no_grad():
            keywords["log_q_positives"] -= 0.1
            keywords["log_q_negatives"] -= 0.1

    def loss(queries, positives, negatives, *others):
        changed = keywords | dict(zip(names, others, strict=True))
        return sampled_softmax_loss(queries, positives, negatives, **changed, reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(loss, inputs)


def random_case(rows=6, columns=9, dim=4, dtype=torch.float64):
    embeddings = [torch.randn(n, dim, dtype=dtype) for n in (rows, rows, columns)]
    log_q = -torch.rand(rows + columns, dtype=dtype)
    users, items = torch.randint(3, (rows,)), torch.randint(6, (columns,))
    keywords = {
        "log_q_positives": log_q[:rows],
        "log_q_negatives": log_q[rows:],
        "own": (users, items, users, torch.randint(6, (rows,))),
        "weights": torch.rand(rows, dtype=dtype) + 0.1,
        "temperature": 0.5,
    }
    return embeddings, keywords


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivative_of_the_reference_and_a_clear_error_of_fast_backends(reduction, backend):
    embeddings, keywords = random_case(3, 4, 2)
    del keywords["weights"]
    embeddings, keywords, inputs = leaves(embeddings, keywords)
    names = ["temperature", "log_q_positives", "log_q_negatives"]

    def loss(queries, positives, negatives, *others):
        changed = keywords | dict(zip(names, others, strict=True))
        return sampled_softmax_loss(queries, positives, negatives, **changed, reduction=reduction, backend="reference")

    assert torch.autograd.gradgradcheck(loss, inputs)
    second = {}
    for one in ("reference", backend):
        value = sampled_softmax_loss(*embeddings, **keywords, reduction=reduction, backend=one).sum()
        second[one] = torch.autograd.grad(value, inputs, create_graph=True)
    # Where only log-sum-exps come from an operator, the positives' second derivatives exist and are exact.
    outside = {1, 4} if reduction == "none" or backend == "triton" else set()
    for index, (one, want) in enumerate(zip(second[backend], second["reference"], strict=True)):
        if index in outside:
            got = torch.autograd.grad(one.square().sum(), inputs, allow_unused=True, retain_graph=True)
            want = torch.autograd.grad(want.square().sum(), inputs, allow_unused=True, retain_graph=True)
            torch.testing.assert_close(got, want)
        else:
            with pytest.raises(RuntimeError, match=r"no second derivative; take backend='reference'"):
                torch.autograd.grad(one.square().sum(), inputs, allow_unused=True, retain_graph=True)


# --- closed forms and worked examples ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_figure_5_of_pinnerformer(backend):
    """Users 1, 1, 2, 3 engaged with pins 1, 2, 3, 4; pins 91 and 92 are random negatives."""
    users, pins = torch.tensor([1, 1, 2, 3]), torch.tensor([1, 2, 3, 4])
    own = (users, torch.tensor([1, 2, 3, 4, 91, 92]), users, pins)
    hidden = [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert own_positive_mask(*own).int().tolist() == hidden
    zeros = torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(6, 8)
    losses = sampled_softmax_loss(*zeros, own=own, reduction="none", backend=backend)
    # All logits are 0: the positive among itself and 4 columns, or 5.
    torch.testing.assert_close(losses, torch.tensor([5.0, 5.0, 6.0, 6.0]).log())
    mean = sampled_softmax_loss(*zeros, own=own, weights=equal_user_weights(users), backend=backend)
    torch.testing.assert_close(mean, (torch.tensor(5.0).log() + 2 * torch.tensor(6.0).log()) / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_log_q_and_mask_it_is_cross_entropy(backend):
    (u, p, n), _ = random_case()
    logits = torch.cat([(u * p).sum(1, keepdim=True), u @ n.t()], 1) / 0.2
    want = F.cross_entropy(logits, torch.zeros(len(u), dtype=torch.int64))
    torch.testing.assert_close(sampled_softmax_loss(u, p, n, temperature=0.2, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_log_q_changes_nothing_and_the_positive_may_stay_uncorrected(backend):
    (u, p, n), _ = random_case()
    log_q = {"log_q_positives": torch.full((6,), -3.0), "log_q_negatives": torch.full((9,), -3.0)}
    plain = sampled_softmax_loss(u, p, n, backend=backend)
    torch.testing.assert_close(sampled_softmax_loss(u, p, n, **log_q, backend=backend), plain)
    # log(q m) of m columns of which each has q: what is left of eq. 2 when the positive is not divided by its q.
    count = torch.full((9,), 2.0)
    got = sampled_softmax_loss(u, p, n, log_q_negatives=count, correct_positive=False, backend=backend)
    logits = torch.cat([(u * p).sum(1, keepdim=True), u @ n.t() - 2], 1)
    torch.testing.assert_close(got, F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64)))


@pytest.mark.parametrize("backend", BACKENDS)
@given(column=st.integers(0, 8), poison=st.sampled_from([math.nan, math.inf, -math.inf, 1e300]))
def test_a_masked_column_is_a_deleted_one_whatever_it_holds(backend, column, poison):
    torch.manual_seed(column)
    (u, p, n), keywords = random_case()
    item = 10**6
    row_users, column_items, users, items = keywords["own"]
    others = [c for c in range(9) if c != column]
    want = gradients(
        (u, p, n[others]),
        keywords
        | {"own": (row_users, column_items[others], users, items)}
        | {"log_q_negatives": keywords["log_q_negatives"][others]},
        backend=backend,
    )
    n[column], keywords["log_q_negatives"][column] = poison, poison
    column_items[column] = item
    everyone = torch.arange(3)
    own = (row_users, column_items, torch.cat([users, everyone]), torch.cat([items, torch.full((3,), item)]))
    masks = {"own": {"own": own}, "masked": {"own": None, "masked": own_positive_mask(*own)}}
    for mask in masks.values():
        loss, got = gradients((u, p, n), keywords | mask, backend=backend)
        torch.testing.assert_close(loss, want[0])
        for index, one in enumerate(got):
            if index in (2, 5):  # of the negatives and of their log q
                assert not one[column].any()
                one = one[others]
            torch.testing.assert_close(one, want[1][index])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_row_of_weight_0_is_absent_whatever_it_holds(backend, reduction):
    (u, p, n), keywords = random_case()
    row_users, column_items, users, items = keywords["own"]
    present = [0, 1, 3, 4, 5]
    fewer = {name: keywords[name][present] for name in ("log_q_positives", "weights")}
    fewer["own"] = (row_users[present], column_items, users, items)
    want = gradients((u[present], p[present], n), keywords | fewer, reduction=reduction, backend=backend)
    u[2], p[2], keywords["log_q_positives"][2], keywords["weights"][2] = math.nan, math.inf, math.nan, 0
    loss, got = gradients((u, p, n), keywords, reduction=reduction, backend=backend)
    if reduction == "none":  # other rows, other upstream gradients
        assert loss[2] == 0
        torch.testing.assert_close(loss[present], want[0])
        assert all(one.isfinite().all() for one in got)
        assert not any(got[index][2].any() for index in (0, 1, 4))
        return
    torch.testing.assert_close(loss, want[0])
    for index, one in enumerate(got[:-1]):
        if index in (0, 1, 4):  # of the queries, the positives and their log q
            assert not one[2].any()
            one = one[present]
        torch.testing.assert_close(one, want[1][index])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_masked_for_the_present_rows_may_hold_nan(backend):
    (u, p, n), _ = random_case()
    weights = torch.tensor([1.0, 1, 0, 1, 1, 0], dtype=torch.float64)
    masked = torch.zeros(6, 9, dtype=torch.bool)
    masked[weights > 0, 4] = True
    want = sampled_softmax_loss(u, p, n, masked=masked, weights=weights, backend=backend)
    n[4] = math.nan
    torch.testing.assert_close(sampled_softmax_loss(u, p, n, masked=masked, weights=weights, backend=backend), want)
    users = torch.tensor([1, 1, 2, 1, 1, 2])
    own = (users, torch.arange(9), torch.tensor([1, 1]), torch.tensor([4, 4]))
    torch.testing.assert_close(sampled_softmax_loss(u, p, n, own=own, weights=weights, backend=backend), want)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter's max passes over NaN
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_the_rows_that_see_what_is_no_number_say_so(backend, poison):
    (u, p, n), _ = random_case()
    masked = torch.zeros(6, 9, dtype=torch.bool)
    masked[torch.arange(6) != 2, 4] = True
    want = sampled_softmax_loss(u, p, n, masked=masked, reduction="none", backend=backend)
    n[4], u[2] = poison, u[2].abs()
    got = sampled_softmax_loss(u, p, n, masked=masked, reduction="none", backend=backend)
    assert not got[2].isfinite()
    others = torch.arange(6) != 2
    torch.testing.assert_close(got[others], want[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_log_q_of_a_column_masked_for_the_present_rows_may_be_nan(backend):
    embeddings, keywords = random_case()
    keywords["weights"] = torch.tensor([1.0, 1, 0, 1, 1, 0], dtype=torch.float64)
    masked = torch.zeros(6, 9, dtype=torch.bool)
    masked[keywords["weights"] > 0, 4] = True
    keywords |= {"own": None, "masked": masked}
    want_loss, want = gradients(embeddings, keywords, backend=backend)
    keywords["log_q_negatives"][4] = math.nan
    loss, got = gradients(embeddings, keywords, backend=backend)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter's max passes over NaN
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_everything_masked_is_0_with_gradient_0(backend, reduction):
    (u, p, n), keywords = random_case()
    for negatives, masked in [
        (n, torch.ones(6, 9, dtype=torch.bool)),
        (n * math.nan, torch.ones(6, 9) > 0),
        (n[:0], None),
    ]:
        more = {"own": None, "masked": masked, "log_q_negatives": keywords["log_q_negatives"][: len(negatives)]}
        with torch.autograd.detect_anomaly():
            loss, got = gradients((u, p, negatives), keywords | more, reduction=reduction, backend=backend)
        assert not loss.any()
        assert not any(one.any() for one in got)


def test_second_derivative_is_0_too_where_everything_is_masked():
    (u, p, n), _ = random_case()
    masked = torch.zeros(6, 9, dtype=torch.bool)
    masked[2] = True
    u.requires_grad_()
    loss = sampled_softmax_loss(u, p, n, masked=masked, backend="reference")
    (first,) = torch.autograd.grad(loss, u, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), u)
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert not second[2].any()
    assert second[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_rows_and_weights_of_0_give_0_and_stay_in_the_graph(backend, reduction):
    (u, p, n), _ = random_case()
    for rows, weights in [(0, None), (6, torch.zeros(6, dtype=torch.float64))]:
        keywords = {"temperature": 0.1} | ({} if weights is None else {"weights": weights})
        loss, got = gradients((u[:rows], p[:rows], n), keywords, reduction=reduction, backend=backend)
        assert not loss.any()
        assert not any(one.any() for one in got)


# --- invariances ---


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 100))
def test_orders_of_rows_columns_and_known_pairs_do_not_matter(backend, seed):
    torch.manual_seed(seed)
    (u, p, n), keywords = random_case()
    loss, got = gradients((u, p, n), keywords, backend=backend)
    rows, columns, known = torch.randperm(6), torch.randperm(9), torch.randperm(6)
    row_users, column_items, users, items = keywords["own"]
    shuffled = keywords | {
        "log_q_positives": keywords["log_q_positives"][rows],
        "log_q_negatives": keywords["log_q_negatives"][columns],
        "weights": keywords["weights"][rows],
        "own": (row_users[rows], column_items[columns], users[known], items[known]),
    }
    other_loss, other = gradients((u[rows], p[rows], n[columns]), shuffled, backend=backend)
    torch.testing.assert_close(other_loss, loss)
    orders = [rows, rows, columns, ..., rows, columns, rows]
    for one, mine, order in zip(other, got, orders, strict=True):
        torch.testing.assert_close(one, mine[order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_that_stands_twice_counts_twice(backend):
    (u, p, n), _ = random_case()
    log_q = {"log_q_positives": torch.full((6,), -2.0)}
    twice = torch.cat([n, n[:1]])
    got = sampled_softmax_loss(u, p, twice, **log_q, log_q_negatives=torch.full((10,), -2.0), backend=backend)
    doubled = torch.full((9,), -2.0, dtype=torch.float64)
    doubled[0] -= math.log(2)
    torch.testing.assert_close(got, sampled_softmax_loss(u, p, n, **log_q, log_q_negatives=doubled, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 100))
def test_pair_queries_equal_one_row_a_positive(backend, seed):
    torch.manual_seed(seed)
    embeddings, keywords = random_case(7, 9)
    queries = torch.randn(4, 4, dtype=torch.float64)
    row_users = torch.randint(3, (4,))
    pair_queries = torch.randint(3, (7,))  # unsorted, and query 3 has no pair
    _, *ids = keywords["own"]
    paired = keywords | {"pair_queries": pair_queries, "own": (row_users, *ids)}
    repeated = keywords | {"own": (row_users[pair_queries], *ids)}
    want_loss, want = gradients((queries[pair_queries], *embeddings[1:]), repeated, backend=backend)
    queries[3] = math.nan
    loss, got = gradients((queries, *embeddings[1:]), paired, backend=backend)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(got[0], torch.zeros(4, 4, dtype=torch.float64).index_add_(0, pair_queries, want[0]))
    torch.testing.assert_close(got[1:], want[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rows_of_the_batch_do_not_change_a_row(backend):
    (u, p, n), keywords = random_case()
    del keywords["weights"]
    together = sampled_softmax_loss(u, p, n, **keywords, reduction="none", backend=backend)
    for row in range(6):
        own = (keywords["own"][0][row : row + 1], *keywords["own"][1:])
        alone = keywords | {"own": own, "log_q_positives": keywords["log_q_positives"][row : row + 1]}
        got = sampled_softmax_loss(u[row : row + 1], p[row : row + 1], n, **alone, reduction="none", backend=backend)
        torch.testing.assert_close(got[0], together[row])


# --- numbers ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, 1e18, -1e4, -1e18])
def test_extreme_logits_stay_finite(backend, scale):
    """Scores 4e4 to 4e36 apart (scale ± 4 on four dimensions): the loss is that gap, or 0, and gradients are exact."""
    u = torch.full((2, 4), abs(scale) ** 0.5 if abs(scale) < 1e10 else abs(scale), requires_grad=True)
    p = torch.full(
        (2, 4), math.copysign(abs(scale) ** 0.5 if abs(scale) < 1e10 else abs(scale), scale), requires_grad=True
    )
    n = torch.zeros(3, 4, requires_grad=True)
    loss = sampled_softmax_loss(u, p, n, reduction="none", backend=backend)
    gap = -(u * p).sum(1).detach()
    # Three columns at 0: log 3 vanishes beside the gap in float32, whose spacing at 4e4 is 4e-3.
    torch.testing.assert_close(loss.detach(), gap.clamp(min=0), rtol=1e-4, atol=0)
    loss.sum().backward()
    lost = float(scale < 0)  # the share of the probability that is not the positive's
    torch.testing.assert_close(p.grad, -lost * u.detach())
    torch.testing.assert_close(n.grad, (lost * u.detach() * 2 / 3)[:1].expand(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_only_a_rounding_of_the_inputs(backend, dtype):
    embeddings, keywords = random_case(dtype=torch.float32)
    halves = [x.to(dtype).requires_grad_() for x in embeddings]
    loss = sampled_softmax_loss(*halves, **keywords, backend=backend)
    full = [x.detach().float().requires_grad_() for x in halves]
    want = sampled_softmax_loss(*full, **keywords, backend=backend)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)
    loss.backward()
    want.backward()
    for one, other in zip(halves, full, strict=True):
        assert one.grad.dtype == dtype
        if backend == "triton" and dtype == torch.bfloat16:
            # Probabilities are rounded to bfloat16 before they meet it again, and the sum then is.
            torch.testing.assert_close(one.grad.float(), other.grad, rtol=2**-8, atol=2**-8 * other.grad.abs().max())
        else:
            assert torch.equal(one.grad, other.grad.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_changes_nothing(backend, reduction):
    embeddings, keywords = random_case(dtype=torch.float32)
    want = gradients(embeddings, keywords, reduction=reduction, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(embeddings, keywords, reduction=reduction, backend=backend)
    assert torch.equal(got[0], want[0])
    # The reference's backward runs under whatever autocast its caller's backward runs under.
    if backend in FAST:
        assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.1])
def test_float32_gradient_of_a_small_temperature(backend, temperature):
    unit = [F.normalize(torch.randn(rows, 32, dtype=torch.float64), dim=1) for rows in (40, 40, 60)]
    _, want = gradients(unit, {"temperature": temperature}, backend="reference")  # of 2 times the loss
    single = torch.tensor(temperature, requires_grad=True)
    (2 * sampled_softmax_loss(*[x.float() for x in unit], temperature=single, backend=backend)).backward()
    # dl/dτ is an average of differences of scores (at most 1) over τ²; each score is off by 32 roundings, and so is
    # each logit, which moves a probability by that over τ.
    bound = 32 * torch.finfo(torch.float32).eps / temperature**2 * (1 + 1 / temperature)
    assert abs(single.grad.item() - want[3].item()) < bound


def test_gradient_modes_give_the_same_loss():
    for reduction in ("none", "mean"):
        embeddings, keywords = random_case(dtype=torch.float32)
        frozen = sampled_softmax_loss(*embeddings, **keywords, reduction=reduction)
        trained = sampled_softmax_loss(*[x.requires_grad_() for x in embeddings], **keywords, reduction=reduction)
        with torch.no_grad():
            silent = sampled_softmax_loss(*embeddings, **keywords, reduction=reduction)
        assert torch.equal(frozen, trained.detach())
        assert torch.equal(frozen, silent)
        assert not silent.requires_grad


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("trained", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_trained_input_gets_the_gradient_it_has_beside_the_others(trained, reduction, backend):
    embeddings, keywords = random_case()
    want = gradients(embeddings, keywords, reduction=reduction, backend=backend)[1][trained]
    embeddings = [x.clone().requires_grad_(index == trained) for index, x in enumerate(embeddings)]
    loss = sampled_softmax_loss(*embeddings, **keywords, reduction=reduction, backend=backend)
    loss.backward(torch.linspace(2, 0.5, loss.numel(), dtype=loss.dtype).view(loss.shape))
    torch.testing.assert_close(embeddings[trained].grad, want)


# --- the machinery ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("paired", [False, True])
def test_compiles_to_one_graph_with_a_learned_temperature(backend, reduction, paired):
    embeddings, keywords = random_case()
    if paired:
        keywords["pair_queries"] = torch.randperm(6)
    learned = LearnedTemperature(0.5)

    def step(queries, positives, negatives, log_q, weights):
        more = keywords | {"temperature": learned(), "log_q_negatives": log_q, "weights": weights}
        loss = sampled_softmax_loss(queries, positives, negatives, **more, reduction=reduction, backend=backend)
        return (loss * weights).sum()

    inputs = [*embeddings, keywords["log_q_negatives"], keywords["weights"]]
    inputs = [x.clone().requires_grad_() for x in inputs]
    inputs_and_rho = [*inputs, learned.rho]
    want_loss = step(*inputs)
    want = torch.autograd.grad(want_loss, inputs_and_rho)
    torch.compiler.reset()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs_and_rho), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_temperature_needs_no_graph_break(backend):
    embeddings, _ = random_case()

    def loss(u, p, n, tau):
        return sampled_softmax_loss(u, p, n, temperature=tau, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for tau in (0.5, 0.25, 0.125):
        torch.testing.assert_close(compiled(*embeddings, tau), loss(*embeddings, tau))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_activation_checkpointing_gives_the_same_gradients(backend, reduction):
    embeddings, keywords = random_case()
    keywords |= {"reduction": reduction, "backend": backend}
    checkpointed = functools.partial(checkpoint, sampled_softmax_loss, use_reentrant=False)
    got, want = gradients(embeddings, keywords, loss_of=checkpointed), gradients(embeddings, keywords)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_graph_that_is_kept_can_be_gone_through_again(backend, reduction):
    embeddings, keywords = random_case()
    embeddings, keywords, inputs = leaves(embeddings, keywords)
    inputs = inputs[:-1]  # without the weights, which losses one by one do not know
    loss = sampled_softmax_loss(*embeddings, **keywords, reduction=reduction, backend=backend).sum()
    want = torch.autograd.grad(loss, inputs, retain_graph=True)
    twice = torch.autograd.grad(loss, inputs, torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    last = torch.autograd.grad(loss, inputs, torch.tensor(3.0, dtype=torch.float64))
    for one, double, triple in zip(want, twice, last, strict=True):
        torch.testing.assert_close(double, 2 * one)
        torch.testing.assert_close(triple, 3 * one)


def test_functional_transforms_take_the_reference():
    embeddings, _ = random_case()
    want = gradients(embeddings, {"temperature": 1.0})[1][:3]
    # The helper's upstream gradient of a scalar is 2.
    got = torch.func.grad(lambda *x: 2 * sampled_softmax_loss(*x), argnums=(0, 1, 2))(*embeddings)
    torch.testing.assert_close(list(got), want)
    stacked = [torch.stack([x, 2 * x]) for x in embeddings]
    losses = torch.func.vmap(sampled_softmax_loss)(*stacked)
    for index, loss in enumerate(losses):
        torch.testing.assert_close(loss, sampled_softmax_loss(*[x[index] for x in stacked]))
    for fast in FAST:
        with pytest.raises(RuntimeError, match=rf"'{fast}' takes no torch.func transform; take 'auto' or 'reference'"):
            torch.func.grad(lambda *x, fast=fast: sampled_softmax_loss(*x, backend=fast))(*embeddings)


def test_a_float32_temperature_of_zero_is_refused_beside_float64_embeddings():
    embeddings = [torch.ones(2, 3, dtype=torch.float64) for _ in range(3)]
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="temperature must be finite and at least"):
            sampled_softmax_loss(*embeddings, temperature=torch.tensor(0.0), backend=backend)


def test_vmap_maps_masks_log_q_pairs_and_weights():
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(3)]
    log_q = -torch.rand(4, dtype=torch.float64, generator=generator)
    masked = torch.rand(4, 4, generator=generator) < 0.4
    pairs = torch.tensor([0, 0, 3, 1])
    mapped = {
        "masked": (torch.rand(5, 4, 4, generator=generator) < 0.5, {}),
        "log_q_negatives": (-torch.rand(5, 4, dtype=torch.float64, generator=generator),
                            {"log_q_positives": log_q, "masked": masked}),
        "pair_queries": (torch.randint(4, (5, 4), generator=generator), {}),
        "weights": (torch.rand(5, 4, dtype=torch.float64, generator=generator), {"pair_queries": pairs}),
    }  # fmt: skip
    for name, (values, fixed) in mapped.items():

        def loss(value, name=name, fixed=fixed):
            return sampled_softmax_loss(*embeddings, **fixed, **{name: value})

        want = torch.stack([loss(value) for value in values])
        # one product of batches in place of several: sums of 4 numbers in another order
        torch.testing.assert_close(torch.func.vmap(loss)(values), want, rtol=8 * EPSILON, atol=8 * EPSILON)


@pytest.mark.parametrize("mask", ["none", "masked", "own"])
def test_registered_operators_pass_opcheck(mask):
    embeddings, keywords = random_case()
    queries, positives, negatives = [x.requires_grad_() for x in embeddings]
    bias = (-keywords["log_q_negatives"]).requires_grad_()
    inverse = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    masked = torch.rand(6, 9) < 0.3 if mask == "masked" else None
    masks = (masked, list(keywords["own"]) if mask == "own" else [], None)
    shift = torch.rand(6, dtype=torch.float64, requires_grad=True)
    for pair_queries, weights, moved in [
        (None, keywords["weights"], None),
        (torch.randperm(6), keywords["weights"].clone().requires_grad_(), shift),
    ]:
        pool = negatives, bias, inverse, weights, pair_queries, *masks
        torch.library.opcheck(chunked._weighted_sum, (queries, positives, moved, *pool, [True] * 4))
    torch.library.opcheck(chunked._log_sum_exp, (queries, negatives, bias, inverse, *masks))
    backward = [x.detach() if isinstance(x, torch.Tensor) else x for x in (queries, negatives, bias, inverse, *masks)]
    torch.library.opcheck(
        chunked._log_sum_exp_backward, (torch.rand(6, dtype=torch.float64), *backward, [True, False, True])
    )
    if not INTERPRETED:
        return
    ranges = owned_ranges(*keywords["own"])
    owned = [*ranges[:2], *ranges.of_rows, *ranges.of_columns] if mask == "own" else []
    for with_mean in (True, False):
        one = queries if with_mean else queries.detach()
        given = one, negatives, bias, inverse if with_mean else inverse.detach(), masked, owned, None, with_mean
        torch.library.opcheck(softmax_dispatch._softmax_of_rows, given)
    log_sum_exp, mean = (one.detach() for one in softmax_dispatch._softmax_of_rows(*given[:-1], True))
    slopes = torch.rand(6, dtype=torch.float64)
    given = slopes, log_sum_exp, mean, *backward[:5], owned
    for wanted in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
        torch.library.opcheck(softmax_dispatch._gradients, (*given, wanted))


@pytest.mark.parametrize(
    "owners", ["few", "one user owns every column", "every user owns one item that fills the pool"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # in C++, and not
def test_nothing_of_rows_times_columns_is_held(owners, dtype):
    rows, columns, tile_rows = 64, 300, 4
    row_users, column_items = torch.arange(rows) % 20, torch.arange(columns)
    users, items = row_users.clone(), torch.arange(rows)
    if owners == "one user owns every column":
        row_users = torch.zeros_like(row_users)
        users, items = torch.zeros_like(column_items), column_items
    elif owners != "few":
        column_items, items = torch.zeros_like(column_items), torch.zeros_like(items)
    own = [row_users, column_items, users, items]
    queries, negatives = torch.randn(rows, 3, dtype=dtype), torch.randn(columns, 3, dtype=dtype)
    pool = Pool(negatives, None, None, own, None)
    largest = Largest()
    with tiles_of(tile_rows), largest:
        swept = chunked.sweep(
            queries,
            pool,
            torch.ones((), dtype=dtype),
            lambda _, rows, *__: torch.ones(rows.stop - rows.start, dtype=dtype),
            Wanted(True, True, True),
        )
    assert tile_rows * columns <= largest.elements < rows * columns / 4
    masked = queries @ negatives.t()
    masked[own_positive_mask(*own)] = -torch.inf
    torch.testing.assert_close(swept[0], masked.logsumexp(1))


@pytest.mark.parametrize("mask", ["none", "masked", "own"])
def test_no_step_waits_for_numbers_on_a_device(mask):
    """The meta device has no numbers: an operation whose shape or branch depends on them fails there."""
    embeddings, keywords = random_case(dtype=torch.float32)

    def meta(x):
        return x.to("meta")

    own = [meta(ids) for ids in keywords["own"]] if mask == "own" else []
    masked = torch.empty(6, 9, dtype=torch.bool, device="meta") if mask == "masked" else None
    queries, _, negatives = (meta(x) for x in embeddings)
    pool = Pool(negatives, meta(keywords["log_q_negatives"]), masked, own, torch.empty(6, device="meta") > 0)
    inverse = torch.ones((), device="meta")
    swept = chunked.sweep(
        queries, pool, inverse, lambda log_sum_exp, rows, *_: log_sum_exp[rows], Wanted(True, True, True)
    )
    assert [one.shape for one in swept] == [(6,), (6, 4), (9, 4), (9,), ()]
    if INTERPRETED:
        for one in (queries, negatives):
            one.requires_grad_()
        log_sum_exp = softmax_dispatch.log_sum_exp(queries, pool, inverse)
        grads = torch.autograd.grad(log_sum_exp.sum(), (queries, negatives))
        assert [one.shape for one in (log_sum_exp, *grads)] == [(6,), (6, 4), (9, 4)]


# --- bad arguments ---


def _call(**changes):
    arguments = {"queries": torch.ones(2, 3), "positives": torch.ones(2, 3), "negatives": torch.ones(4, 3)} | changes
    return sampled_softmax_loss(**arguments)


def _log_q(positive, negative):
    return {
        "log_q_positives": torch.tensor([-1.0, positive]),
        "log_q_negatives": torch.tensor([-1.0, -1, -1, negative]),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"queries": torch.ones(3)}, ValueError, "queries"),
        ({"queries": [[1.0]]}, TypeError, "queries"),
        ({"queries": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "queries"),
        ({"positives": torch.ones(3, 3)}, ValueError, "positives"),
        ({"positives": torch.ones(2, 4)}, ValueError, "positives"),
        ({"negatives": torch.ones(4, 2)}, ValueError, "negatives"),
        ({"masked": torch.ones(2, 3) > 0}, ValueError, "masked"),
        ({"masked": torch.ones(2, 4)}, TypeError, "masked.*bool"),
        ({"masked": torch.ones(2, 4) > 0, "own": [torch.zeros(2).long()] * 4}, ValueError, "masked and own"),
        ({"own": [torch.zeros(2).long()] * 3}, ValueError, "own"),
        ({"own": [torch.zeros(2).long()] * 4}, ValueError, "column_items"),
        ({"own": [torch.zeros(2), *[torch.zeros(4).long()] * 3]}, TypeError, "row_users"),
        ({"own": 5}, ValueError, "own must be .*got 5"),
        ({"weights": torch.ones(3)}, ValueError, "weights"),
        ({"weights": torch.tensor([1.0, -1])}, ValueError, "weights.*at least 0.*-1"),
        ({"weights": torch.tensor([1.0, math.nan])}, ValueError, "weights.*nan"),
        ({"pair_queries": torch.tensor([0, 2])}, ValueError, "pair_queries.*below 2.*2"),
        ({"pair_queries": torch.tensor([-1, 0])}, ValueError, "pair_queries.*-1"),
        ({"pair_queries": torch.tensor([0.0, 1])}, TypeError, "pair_queries"),
        ({"log_q_positives": torch.zeros(2)}, ValueError, "log_q_negatives"),
        ({"log_q_negatives": torch.zeros(4)}, ValueError, "log_q_positives"),
        (_log_q(0.5, -1), ValueError, "log_q_positives.*at most 0.*0.5"),
        (_log_q(-1, 0.5), ValueError, "log_q_negatives.*at most 0.*0.5"),
        (_log_q(math.nan, -1), ValueError, "log_q_positives.*nan"),
        (_log_q(-1, -math.inf), ValueError, "log_q_negatives.*-inf"),
        (_log_q(-1, math.inf) | {"correct_positive": False}, ValueError, "log_q_negatives.*inf"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": 1e-40}, ValueError, "temperature must be .*at least 1.17.*e-38, got 1e-40"),
        ({"temperature": torch.tensor(1e-40)}, ValueError, "temperature must be .*at least 1.17.*e-38, got"),
        ({"temperature": torch.tensor(0.0)}, ValueError, "temperature"),
        ({"temperature": torch.tensor(math.nan)}, ValueError, "temperature"),
        ({"correct_positive": "no"}, TypeError, "correct_positive must be a bool, got 'no'"),
        ({"temperature": torch.ones(1)}, ValueError, r"temperature.*\(\)"),
        ({"temperature": torch.ones((), dtype=torch.int64)}, TypeError, "temperature"),
        ({"temperature": LearnedTemperature}, TypeError, "temperature"),
        ({"reduction": "avg"}, ValueError, "reduction.*'none'.*'avg'"),
    ],
)
def test_bad_arguments_are_named(backend, changes, error, words):
    with pytest.raises(error, match=words):
        _call(**changes, backend=backend)


def test_backends_have_names():
    with pytest.raises(ValueError, match=r"backend must be one of.*'chunked'.*'triton'.*'fast'"):
        _call(backend="fast")
    small = torch.float32, 64
    assert resolve("auto", torch.device("mps"), *small) == "reference"
    assert resolve("auto", torch.device("cpu"), *small) == "chunked"
    for backend in BACKENDS:
        assert resolve(backend, torch.device("cpu"), *small) == backend


def test_a_gpu_takes_triton_where_its_kernels_are_good_for_something(monkeypatch):
    gpu = torch.device("cuda")
    for has, capability, dtype, dim, want in [
        (True, (9, 0), torch.bfloat16, 256, "triton"),
        (True, (8, 0), torch.float32, 64, "triton"),
        (True, (8, 0), torch.float16, 64, "triton"),
        (False, (9, 0), torch.float32, 64, "chunked"),
        (True, (7, 5), torch.float32, 64, "chunked"),
        (True, (9, 0), torch.float64, 64, "chunked"),
        (True, (9, 0), torch.float32, 65, "chunked"),
        (True, (9, 0), torch.bfloat16, 257, "chunked"),
    ]:
        monkeypatch.setattr(softmax_dispatch, "HAS_TRITON", has)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert resolve("auto", gpu, dtype, dim) == want
    with pytest.raises(
        ValueError, match=r"'triton' must get embeddings of at most 64 numbers of torch.float32, got 65"
    ):
        resolve("triton", gpu, torch.float32, 65)
    monkeypatch.setattr(softmax_dispatch, "HAS_TRITON", False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        resolve("triton", gpu, torch.float32, 64)
