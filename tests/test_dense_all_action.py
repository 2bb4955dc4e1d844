import functools
import math

import oracles
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from largest import Largest
from pooled_losses import BACKENDS, FAST, INTERPRETED, interpret_small_tiles, tiles_of
from torch.utils.checkpoint import checkpoint

import recblocks
from recblocks import (
    Anchors,
    LearnedTemperature,
    Timelines,
    dense_all_action_loss,
    dense_all_positives,
    equal_user_weights,
    own_positive_mask,
    positives_in_window,
    rank_weights,
    sampled_softmax_loss,
)
from recblocks.kernels.dense_all_action import chunked
from recblocks.kernels.dense_all_action import dispatch as pairs_dispatch
from recblocks.kernels.sampled_softmax.pool import Pool, Wanted
from recblocks.kernels.windows import windows

EPSILON = torch.finfo(torch.float64).eps
LATEST, EARLIEST = 2**63 - 1, -(2**63)
FLOATS = ("temperature", "log_q_positives", "log_q_negatives", "weights")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    interpret_small_tiles(monkeypatch, "sampled_softmax", "dense_all_action")
    with tiles_of(2):
        yield


def drawn(seed, rows, positives, negatives, dim, users=(1, 2, 3), times=range(12), items=6, dtype=torch.float64):
    """Arguments of the loss, all at random."""
    generator = torch.Generator().manual_seed(seed)

    def among(values, number):
        values = torch.tensor(list(values), dtype=torch.int64)
        return values[torch.randint(len(values), (number,), generator=generator)]

    embeddings = [torch.randn(n, dim, dtype=dtype, generator=generator) for n in (rows, positives, negatives)]
    return embeddings, {
        "query_users": among(users, rows),
        "query_times": among(times, rows),
        "positive_users": among(users, positives),
        "positive_times": among(times, positives),
        "positive_items": torch.randint(items, (positives,), generator=generator),
        "negative_items": torch.randint(items + 2, (negatives,), generator=generator),
        "window": 5,
        "log_q_positives": -0.1 - 5 * torch.rand(positives, dtype=dtype, generator=generator),
        "log_q_negatives": -0.1 - 5 * torch.rand(negatives, dtype=dtype, generator=generator),
        "weights": torch.rand(rows, dtype=dtype, generator=generator) + 0.1,
        "temperature": 0.5,
    }


@st.composite
def cases(draw):
    sizes = [draw(st.integers(0, most)) for most in (6, 7, 4)]
    users = draw(st.sampled_from([[0], [1, 2], [-1, LATEST, EARLIEST]]))
    times = draw(st.sampled_from([range(4), range(12), [EARLIEST, EARLIEST + 2, -1, 0, LATEST - 4, LATEST]]))
    seed = draw(st.integers(0, 2**31))
    embeddings, keywords = drawn(seed, *sizes, draw(st.integers(1, 4)), users, times, draw(st.sampled_from([2, 50])))
    keywords["window"] = draw(st.sampled_from([1, 3, 100, LATEST]))
    keywords["temperature"] = draw(st.sampled_from([0.3, 1.0]))
    keywords["correct_positive"] = draw(st.booleans())
    if draw(st.booleans()):
        del keywords["log_q_positives"], keywords["log_q_negatives"]
    kind = draw(st.sampled_from(["none", "some", "all"]))
    if kind == "none":
        del keywords["weights"]
    if kind == "some":
        keywords["weights"] *= torch.arange(sizes[0]) % 3 > 0
    return embeddings, keywords


def expected(embeddings, keywords):
    """Each query's loss, the number of its pairs and its weight, by the scalar oracle."""
    queries, positives, negatives = (one.tolist() for one in embeddings)

    def numbers(name, default):
        return keywords[name].tolist() if name in keywords else default

    log_q = numbers("log_q_positives", [0.0] * len(positives)), numbers("log_q_negatives", [0.0] * len(negatives))
    ids = [keywords[name].tolist() for name in ("positive_users", "positive_times", "positive_items")]
    positives = list(zip(positives, *ids, log_q[0], strict=True))
    negatives = list(zip(negatives, keywords["negative_items"].tolist(), log_q[1], strict=True))
    whose = keywords["query_users"].tolist(), keywords["query_times"].tolist()
    losses = [
        oracles.dense_all_action_row(
            query, positives, negatives, keywords["window"], keywords["temperature"], keywords["correct_positive"]
        )
        for query in zip(queries, *whose, strict=True)
    ]
    return losses, numbers("weights", [1.0] * len(queries))


def gradients(embeddings, keywords, loss_of=dense_all_action_loss, **more):
    inputs = [one.clone().requires_grad_() for one in embeddings]
    keywords = dict(keywords)
    for name in FLOATS:
        if name in keywords:
            value = torch.as_tensor(keywords[name], dtype=torch.float64 if isinstance(keywords[name], float) else None)
            keywords[name] = value.clone().requires_grad_()
            inputs.append(keywords[name])
    loss = loss_of(*inputs[:3], **keywords, **more)
    # Upstream gradients other than 1 tell queries apart, and find a gradient that forgets them.
    upstream = torch.linspace(2, 0.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    got = torch.autograd.grad(loss, inputs, upstream, allow_unused=True)
    return loss.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(got, inputs, strict=True)]


def by_pairs(queries, positives, negatives, *, weights=None, reduction="mean", **keywords):
    """The same by the loss of listed pairs."""
    later = keywords["positive_times"] - keywords["query_times"][:, None]
    met = (keywords["query_users"][:, None] == keywords["positive_users"]) & (later > 0) & (later <= keywords["window"])
    row, column = met.nonzero(as_tuple=True)
    log_q = keywords["log_q_positives"], keywords["log_q_negatives"]
    items = torch.cat([keywords["positive_items"], keywords["negative_items"]])
    losses = sampled_softmax_loss(
        queries,
        positives[column],
        torch.cat([positives, negatives]),
        log_q_positives=log_q[0][column],
        log_q_negatives=torch.cat(log_q),
        own=(keywords["query_users"], items, keywords["positive_users"], keywords["positive_items"]),
        temperature=keywords["temperature"],
        weights=None if weights is None else weights[row],
        pair_queries=row,
        reduction=reduction,
        backend="reference",
    )
    return losses if reduction != "none" else losses.new_zeros(queries.shape[0]).index_add(0, row, losses)


# Logits reach some 4 * 4 * 4 / 0.3, about 200; a difference of two such numbers is off by their rounding.
CLOSE = {"rtol": 1e3 * EPSILON, "atol": 1e3 * EPSILON}
# A gradient sums a few such differences; the temperature's multiplies them by logits and by 1 / τ.
GRADIENTS_CLOSE = {"rtol": 1e4 * EPSILON, "atol": 1e5 * EPSILON}


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@given(case=cases())
def test_equals_the_scalar_oracle(backend, case):
    embeddings, keywords = case
    rows, weights = expected(embeddings, keywords)
    losses = [loss if weight else 0.0 for (loss, _), weight in zip(rows, weights, strict=True)]
    total = math.fsum(loss * weight for loss, weight in zip(losses, weights, strict=True))
    pairs = math.fsum(count * weight for (_, count), weight in zip(rows, weights, strict=True))
    for reduction, want in [("none", losses), ("sum", total), ("mean", total / pairs if pairs else 0.0)]:
        got = dense_all_action_loss(*embeddings, **keywords, reduction=reduction, backend=backend)
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), **CLOSE)
    actions = [keywords[name] for name in ("query_users", "query_times", "positive_users", "positive_times")]
    assert positives_in_window(*actions, window=keywords["window"]).tolist() == [count for _, count in rows]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 3, 100, LATEST])
def test_windows_at_the_ends_of_int64(backend, window):
    embeddings, keywords = drawn(0, 8, 8, 4, 3, users=(1,))
    times = torch.tensor([EARLIEST, EARLIEST + 2, EARLIEST + 3, -1, 0, LATEST - 100, LATEST - 3, LATEST])
    keywords |= {"query_times": times, "positive_times": times, "window": window, "correct_positive": True}
    keywords["positive_items"], keywords["negative_items"] = torch.arange(8), torch.arange(8, 12)
    rows, _ = expected(embeddings, keywords)
    losses = dense_all_action_loss(*embeddings, **keywords, reduction="none", backend=backend)
    torch.testing.assert_close(losses, torch.tensor([loss for loss, _ in rows], dtype=torch.float64), **CLOSE)
    _, want = gradients(embeddings, keywords, backend="reference")
    torch.testing.assert_close(gradients(embeddings, keywords, backend=backend)[1], want, **GRADIENTS_CLOSE)
    assert sum(count for _, count in rows) == {1: 2, 3: 5, 100: 7, LATEST: 17}[window]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@given(case=cases(), rows=st.integers(1, 6))
def test_backends_agree_in_loss_and_every_gradient(reduction, case, rows):
    want_loss, want = gradients(*case, reduction=reduction, backend="reference")
    for backend in FAST:
        with tiles_of(rows):
            loss, got = gradients(*case, reduction=reduction, backend=backend)
        torch.testing.assert_close(loss, want_loss, **CLOSE)
        torch.testing.assert_close(got, want, **GRADIENTS_CLOSE)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_in_float32_it_is_what_it_is_in_float64(reduction, corrected, rows):
    """On a CPU that is softmax in C++, beside float64 in torch."""
    embeddings, keywords = drawn(3, 40, 60, 23, 8, users=range(9))
    embeddings = [one / 3 for one in embeddings]
    keywords["temperature"] = torch.tensor(0.5, dtype=torch.float64)
    want = gradients(embeddings, keywords, reduction=reduction, correct_positive=corrected, backend="reference")
    keywords |= {name: keywords[name].float() for name in FLOATS}
    embeddings = [one.float() for one in embeddings]
    with tiles_of(rows):
        got = gradients(embeddings, keywords, reduction=reduction, correct_positive=corrected, backend="chunked")
    # Logits of up to some 20 are off by half an epsilon of that each time they are rounded, which is a share of every
    # probability; sums of up to 83 such follow.
    allowed = 100 * torch.finfo(torch.float32).eps
    for one, exact in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=0, atol=allowed * exact.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("seed", range(8))
def test_equals_the_loss_of_listed_pairs_in_every_gradient(backend, reduction, seed):
    case = drawn(seed, 9, 11, 5, 3)
    want_loss, want = gradients(*case, loss_of=by_pairs, reduction=reduction)
    loss, got = gradients(*case, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, want_loss, **CLOSE)
    torch.testing.assert_close(got, want, **GRADIENTS_CLOSE)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@given(case=cases())
def test_gradients_are_those_of_finite_differences(backend, reduction, case):
    embeddings, keywords = case
    # A weight of 0 marks an absent query: the loss jumps there, and only the right side has a slope.
    assume("weights" not in keywords or keywords["weights"].all())
    keywords = keywords | {"temperature": torch.tensor(keywords["temperature"], dtype=torch.float64)}
    names = [name for name in FLOATS if name in keywords]
    inputs = [one.clone().requires_grad_() for one in (*embeddings, *[keywords[name] for name in names])]

    def loss(queries, positives, negatives, *others):
        changed = keywords | dict(zip(names, others, strict=True))
        return dense_all_action_loss(queries, positives, negatives, **changed, reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(loss, inputs)


def test_the_pairs_are_those_of_the_objective_that_lists_them():
    """Every action of some timelines as a query and as a positive: dense_all_positives lists the same pairs."""
    generator = torch.Generator().manual_seed(0)
    user = torch.randint(5, (60,), generator=generator)
    day = torch.randint(20, (60,), generator=generator)
    timelines = Timelines.from_arrays(user=user, time=86_400 * day, item=torch.arange(60), unit="s")
    anchors = Anchors(torch.arange(len(timelines)), timelines.starts)
    listed = dense_all_positives(timelines, anchors, max_len=60, positive=lambda one: one["item"] >= 0, window_days=4)
    query = listed.actions[listed.pair_row, listed.pair_slot]
    want = torch.bincount(query, minlength=60)
    users = timelines.users.repeat_interleave(timelines.ends - timelines.starts)
    times = timelines.columns["time"]
    assert torch.equal(positives_in_window(users, times, users, times, window=4 * 86_400), want)
    assert want.sum() > 60


# --- what is absent ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_queries_without_weight_or_pair_and_columns_nobody_sees_may_hold_anything(backend, reduction, poison):
    embeddings, keywords = drawn(0, 6, 8, 4, 3, users=(1,), items=3)
    keywords |= {"query_users": torch.tensor([1, 1, 1, 2, 9, 1]), "query_times": torch.tensor([0, 2, 1, 0, 0, 50])}
    keywords |= {"positive_users": torch.tensor([1, 1, 1, 2, 2, 2, 2, 1])}
    keywords |= {"positive_times": torch.tensor([1, 2, 3, 40, 50, 1, 2, 7])}
    keywords |= {"positive_items": torch.tensor([10, 11, 12, 10, 11, 12, 20, 20])}
    keywords |= {"negative_items": torch.tensor([10, 11, 30, 31])}
    keywords["weights"][1] = 0
    # Query 1 weighs nothing; 4 is nobody's and 5 too late. Items 10 to 12 and 20 are positives of users 1 and 2, so
    # that their columns are masked for all that count. Columns 3 and 4 are in no window, 7 in query 1's alone, and
    # 8 and 9 never are.
    want_loss, want = gradients(embeddings, keywords, reduction=reduction, backend=backend)
    poisoned = [one.clone() for one in embeddings]
    poisoned[0][[1, 4, 5]], poisoned[1][[3, 4, 7]], poisoned[2][[0, 1]] = poison, poison, poison
    log_q = keywords["log_q_positives"].clone(), keywords["log_q_negatives"].clone()
    log_q[0][[3, 4, 7]], log_q[1][[0, 1]] = poison, poison
    more = {"log_q_positives": log_q[0], "log_q_negatives": log_q[1]}
    loss, got = gradients(poisoned, keywords | more, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, want_loss, rtol=0, atol=0)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not want[0][[1, 4, 5]].any()
    assert not want[1][[3, 4, 7]].any()
    assert want[1][[0, 1, 2, 5, 6]].abs().sum(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_weights_a_query_without_a_pair_may_hold_nan(backend):
    embeddings, keywords = drawn(0, 6, 8, 4, 3)
    del keywords["weights"]
    keywords["query_times"][[1, 4]] = 10**6
    want_loss, want = gradients(embeddings, keywords, backend=backend)
    embeddings[0][[1, 4]] = math.nan
    loss, got = gradients(embeddings, keywords, backend=backend)
    torch.testing.assert_close(loss, want_loss, rtol=0, atol=0)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("trained", range(6))
def test_one_trained_input_gets_the_gradient_it_has_beside_the_others(trained, reduction, backend):
    embeddings, keywords = drawn(11, 7, 9, 5, 3)
    del keywords["weights"]
    want = gradients(embeddings, keywords, reduction=reduction, backend=backend)[1][trained]
    keywords["temperature"] = torch.tensor(0.5, dtype=torch.float64)
    inputs = [*embeddings, *[keywords[name] for name in FLOATS[:3]]]
    leaf = inputs[trained] = inputs[trained].clone().requires_grad_()
    changed = keywords | dict(zip(FLOATS, inputs[3:], strict=False))
    loss = dense_all_action_loss(*inputs[:3], **changed, reduction=reduction, backend=backend)
    loss.backward(torch.linspace(2, 0.5, loss.numel(), dtype=loss.dtype).view(loss.shape))
    torch.testing.assert_close(leaf.grad, want)
    assert want.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_positive_that_is_masked_for_all_is_still_a_positive(backend):
    """One user: every column is the user's own, nothing is left to be told from, and the loss is 0."""
    embeddings, keywords = drawn(0, 5, 5, 0, 3, users=(1,))
    loss, got = gradients(embeddings, keywords, backend=backend)
    assert loss == 0
    assert not any(one.any() for one in got)
    # With one random item more it is the logistic loss of the positives against that.
    embeddings, keywords = drawn(0, 5, 5, 1, 3, users=(1,))
    keywords["negative_items"] = torch.tensor([99])
    for name in ("log_q_positives", "log_q_negatives", "weights"):
        del keywords[name]
    loss = dense_all_action_loss(*embeddings, **keywords, reduction="sum", backend=backend)
    want = 0
    for i in range(5):
        for p in range(5):
            if 0 < keywords["positive_times"][p] - keywords["query_times"][i] <= 5:
                want += torch.nn.functional.softplus(embeddings[0][i] @ (embeddings[2][0] - embeddings[1][p]) / 0.5)
    torch.testing.assert_close(loss, want, **CLOSE)
    assert want > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_queries_that_meet_what_is_no_number_say_so(backend):
    embeddings, keywords = drawn(0, 4, 4, 2, 3, users=(1,))
    keywords |= {"query_users": torch.tensor([1, 1, 2, 2]), "query_times": torch.tensor([0, 10, 0, 10])}
    keywords |= {"positive_users": torch.tensor([1, 1, 2, 2]), "positive_times": torch.tensor([1, 11, 1, 11])}
    keywords |= {"positive_items": torch.tensor([5, 6, 5, 6]), "negative_items": torch.tensor([7, 8])}
    embeddings[1][1] = math.nan  # of item 6, which is masked for all and in the window of query 1
    losses = dense_all_action_loss(*embeddings, **keywords, reduction="none", backend=backend)
    assert losses.isfinite().tolist() == [True, False, True, True]


# --- invariances ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_queries_and_columns_does_not_matter(backend, seed):
    embeddings, keywords = drawn(seed, 7, 9, 5, 3)
    loss, got = gradients(embeddings, keywords, backend=backend)
    torch.manual_seed(seed)
    rows, columns, others = torch.randperm(7), torch.randperm(9), torch.randperm(5)
    order = dict.fromkeys(("query_users", "query_times", "weights"), rows)
    order |= {f"positive_{name}": columns for name in ("users", "times", "items")}
    order |= {"log_q_positives": columns, "log_q_negatives": others, "negative_items": others}
    shuffled = keywords | {name: keywords[name][one] for name, one in order.items()}
    embeddings = [one[how] for one, how in zip(embeddings, (rows, columns, others), strict=True)]
    other_loss, other = gradients(embeddings, shuffled, backend=backend)
    torch.testing.assert_close(other_loss, loss)
    orders = [rows, columns, others, ..., columns, others, rows]
    for one, mine, how in zip(other, got, orders, strict=True):
        torch.testing.assert_close(one, mine[how], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_user_weights_and_means_over_a_query_s_positives(backend):
    embeddings, keywords = drawn(3, 12, 14, 6, 3)
    actions = [keywords[name] for name in ("query_users", "query_times", "positive_users", "positive_times")]
    counts = positives_in_window(*actions, window=5)
    keywords["weights"] = equal_user_weights(keywords["query_users"], counts=counts)
    losses = dense_all_action_loss(*embeddings, **keywords, reduction="none", backend=backend)
    users = keywords["query_users"]
    means = [losses[users == user].sum() / counts[users == user].sum() for user in users[counts > 0].unique()]
    got = dense_all_action_loss(*embeddings, **keywords, backend=backend)
    torch.testing.assert_close(got, sum(means) / len(means), rtol=1e-6, atol=0)  # weights are float32
    scaled = keywords | {"weights": rank_weights(keywords["weights"].double(), counts=counts)}
    torch.testing.assert_close(dense_all_action_loss(*embeddings, **scaled, reduction="sum", backend=backend), got)


# --- numbers ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_only_a_rounding_of_the_inputs(backend, dtype):
    embeddings, keywords = drawn(1, 9, 11, 5, 4, dtype=torch.float32)
    keywords["temperature"] = 0.5
    halves = [one.to(dtype) for one in embeddings]
    loss, got = gradients(halves, keywords | {"temperature": torch.tensor(0.5)}, backend=backend)
    full = [one.float() for one in halves]
    want_loss, want = gradients(full, keywords | {"temperature": torch.tensor(0.5)}, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    for one, other in zip(got[:3], want, strict=False):
        assert one.dtype == dtype
        # Shares are rounded before they meet an embedding, in two sums, and so are these and their sum.
        lost = 4 * torch.finfo(dtype).eps if backend == "triton" else torch.finfo(dtype).eps
        assert (one.float() - other).norm() <= lost * other.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [-60.0, -12.0, 0.0, 12.0, 1e4])
def test_a_pair_s_loss_is_exact_in_both_tails(backend, gap):
    """One query, one positive and one negative that is ahead of it by the gap: softplus of it."""
    queries = torch.tensor([[1.0, 0.0]])
    got = dense_all_action_loss(
        queries, torch.tensor([[-gap, 0.0]]), torch.zeros(1, 2), query_users=torch.tensor([1]),
        query_times=torch.tensor([0]), positive_users=torch.tensor([1]), positive_times=torch.tensor([1]),
        positive_items=torch.tensor([1]), negative_items=torch.tensor([2]), window=1, backend=backend,
    )  # fmt: skip
    want = math.log1p(math.exp(gap)) if gap < 100 else gap
    # Some roundings of exp, log and a quotient; -60 is exact in float32.
    assert got.item() == pytest.approx(want, rel=8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by Triton's interpreter, where a slope is 1 / inf
@pytest.mark.parametrize("gap", [50.0, 85.0, 89.0, 92.0, 97.0, 103.0, 120.0])
def test_a_query_whose_positives_are_far_ahead_costs_the_others_nothing(backend, reduction, gap):
    """Of unit vectors at τ = .01. Near a gap of 92 what its columns sum to, over its slope, is no float32 any more."""
    embeddings, keywords = drawn(4, 6, 8, 200, 4, users=(1,), dtype=torch.float32)
    keywords["query_users"][-2:], keywords["positive_users"][-2:] = 2, 2
    keywords["query_times"][-2:], keywords["positive_times"][-2:] = 0, 1
    keywords["positive_items"][-2:] = torch.tensor([100, 101])
    del keywords["log_q_positives"], keywords["log_q_negatives"]
    for one in embeddings:
        one[:, 0] = 0
    embeddings[0][-2:] = embeddings[1][-2:] = torch.tensor([math.sqrt(gap / 2), 0, 0, 0])
    wide = [one.double() for one in embeddings]
    keywords |= {"weights": keywords["weights"].double(), "temperature": torch.tensor(0.5, dtype=torch.float64)}
    want = gradients(wide, keywords, reduction=reduction, backend="reference")
    keywords |= {"weights": keywords["weights"].float(), "temperature": torch.tensor(0.5)}
    got = gradients(embeddings, keywords, reduction=reduction, backend=backend)
    # Logits of up to some 20 beside each other, as where float32 and float64 are compared above.
    allowed = 100 * torch.finfo(torch.float32).eps
    for one, exact in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=0, atol=allowed * exact.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_huge_log_q_of_a_positive_that_is_not_corrected_costs_no_digits(backend):
    """Its column is masked for its own query, so that it does not matter at all."""
    embeddings, keywords = drawn(0, 6, 8, 4, 3, users=(1,), dtype=torch.float32)
    keywords |= {"correct_positive": False, "negative_items": torch.arange(100, 104)}
    want = dense_all_action_loss(*embeddings, **keywords, reduction="none", backend=backend)
    keywords["log_q_positives"] = torch.full((8,), 1e9)
    got = dense_all_action_loss(*embeddings, **keywords, reduction="none", backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert want.any()


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_over_the_number_of_pairs_is_a_mean_where_some_have_none(backend, readable, monkeypatch):
    embeddings, keywords = drawn(3, 12, 14, 6, 3)
    actions = [keywords[name] for name in ("query_users", "query_times", "positive_users", "positive_times")]
    counts = positives_in_window(*actions, window=5)
    assert (counts == 0).any()
    keywords["weights"] = 1 / counts.double()
    if not readable:
        monkeypatch.setattr(recblocks._checks, "readable", lambda _: False)
    losses = dense_all_action_loss(*embeddings, **keywords | {"weights": None}, reduction="none", backend=backend)
    want = (losses / counts)[counts > 0].mean()
    torch.testing.assert_close(dense_all_action_loss(*embeddings, **keywords, backend=backend), want)


@pytest.mark.parametrize("loss_of", [dense_all_action_loss, by_pairs])
@pytest.mark.parametrize("backend", FAST)
def test_a_graph_that_is_made_and_not_kept_has_no_second_derivative_either(backend, loss_of, monkeypatch):
    if loss_of is by_pairs:
        right = sampled_softmax_loss
        monkeypatch.setitem(
            globals(), "sampled_softmax_loss", lambda *x, **how: right(*x, **how | {"backend": backend})
        )
    embeddings, keywords = drawn(4, 7, 9, 5, 3)
    more = {} if loss_of is by_pairs else {"backend": backend}
    queries = embeddings[0].requires_grad_()
    loss = loss_of(*embeddings, **keywords, **more) * torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(loss, queries, create_graph=True, retain_graph=False)
    with pytest.raises(RuntimeError, match=r"no second derivative|second time"):
        torch.autograd.grad(first.square().sum(), queries, allow_unused=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_changes_nothing(backend, reduction):
    embeddings, keywords = drawn(1, 9, 11, 5, 4, dtype=torch.float32)
    want = dense_all_action_loss(*embeddings, **keywords, reduction=reduction, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = dense_all_action_loss(*embeddings, **keywords, reduction=reduction, backend=backend)
    assert torch.equal(got, want)


# --- the machinery ---


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivative_of_the_reference_and_a_clear_error_of_fast_backends(reduction, backend):
    embeddings, keywords = drawn(2, 4, 5, 3, 2)
    del keywords["weights"]
    keywords["temperature"] = torch.tensor(0.5, dtype=torch.float64)
    names = FLOATS[:3]
    inputs = [one.clone().requires_grad_() for one in (*embeddings, *[keywords[name] for name in names])]

    def loss(queries, positives, negatives, *others, backend="reference"):
        changed = keywords | dict(zip(names, others, strict=True))
        return dense_all_action_loss(queries, positives, negatives, **changed, reduction=reduction, backend=backend)

    assert torch.autograd.gradgradcheck(loss, inputs)
    first = torch.autograd.grad(loss(*inputs, backend=backend).sum(), inputs, create_graph=True)
    for one in first:
        with pytest.raises(RuntimeError, match=r"no second derivative; take backend='reference'"):
            torch.autograd.grad(one.square().sum(), inputs, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_to_one_graph_with_a_learned_temperature(backend, reduction):
    embeddings, keywords = drawn(4, 7, 9, 5, 3)
    learned = LearnedTemperature(0.5)

    def step(queries, positives, negatives, log_q, weights):
        more = keywords | {"temperature": learned(), "log_q_negatives": log_q, "weights": weights}
        losses = dense_all_action_loss(queries, positives, negatives, **more, reduction=reduction, backend=backend)
        return (losses * weights).sum()

    inputs = [*embeddings, keywords["log_q_negatives"], keywords["weights"]]
    inputs = [one.clone().requires_grad_() for one in inputs]
    want_loss = step(*inputs)
    want = torch.autograd.grad(want_loss, [*inputs, learned.rho])
    torch.compiler.reset()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(torch.autograd.grad(loss, [*inputs, learned.rho]), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_checkpointing_and_kept_graphs_give_the_same_gradients(backend, reduction):
    embeddings, keywords = drawn(5, 7, 9, 5, 3)
    keywords |= {"reduction": reduction, "backend": backend}
    checkpointed = functools.partial(checkpoint, dense_all_action_loss, use_reentrant=False)
    got, want = gradients(embeddings, keywords, loss_of=checkpointed), gradients(embeddings, keywords)
    torch.testing.assert_close(got, want)
    embeddings = [one.requires_grad_() for one in embeddings]
    loss = dense_all_action_loss(*embeddings, **keywords).sum()
    once = torch.autograd.grad(loss, embeddings, retain_graph=True)
    for factor in (2.0, 3.0):
        upstream = torch.tensor(factor, dtype=torch.float64)
        again = torch.autograd.grad(loss, embeddings, upstream, retain_graph=factor < 3)
        for one, other in zip(again, once, strict=True):
            torch.testing.assert_close(one, factor * other)


def test_functional_transforms_take_the_reference():
    embeddings, keywords = drawn(6, 5, 6, 3, 3)
    want = gradients(embeddings, keywords)[1][:3]
    got = torch.func.grad(lambda *x: 2 * dense_all_action_loss(*x, **keywords), argnums=(0, 1, 2))(*embeddings)
    torch.testing.assert_close(list(got), want)  # the helper's upstream gradient of a scalar is 2
    times = torch.stack([keywords["query_times"], keywords["query_times"] + 3])
    losses = torch.func.vmap(lambda x: dense_all_action_loss(*embeddings, **keywords | {"query_times": x}))(times)
    for loss, one in zip(losses, times, strict=True):
        torch.testing.assert_close(loss, dense_all_action_loss(*embeddings, **keywords | {"query_times": one}))
    for fast in FAST:
        with pytest.raises(RuntimeError, match=rf"'{fast}' takes no torch.func transform"):
            torch.func.grad(lambda *x, fast=fast: dense_all_action_loss(*x, **keywords, backend=fast))(*embeddings)


def operands(embeddings, keywords, corrected=True):
    """What the operators take: sorted queries, columns and ranges."""
    queries, positives, negatives = embeddings
    names = ("query_users", "query_times", "positive_users", "positive_times")
    found = windows(*[keywords[name] for name in names], 5)
    rows, order = found.row_order, found.column_order
    items = keywords["positive_items"][order]
    own = [keywords["query_users"][rows], torch.cat([items, keywords["negative_items"]]),
           keywords["positive_users"][order], items]  # fmt: skip
    bias = -torch.cat([keywords["log_q_positives"][order], keywords["log_q_negatives"]])
    pool = Pool(torch.cat([positives[order], negatives]), bias, None, own, None)
    return queries[rows], pool, found, chunked.Pairs(found.first_column, found.last_column, len(order), corrected)


@pytest.mark.parametrize("corrected", [True, False])
def test_registered_operators_pass_opcheck(corrected):
    queries, pool, found, pairs = operands(*drawn(7, 7, 9, 5, 3), corrected)
    inverse = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    given = queries.requires_grad_(), pool.negatives.requires_grad_(), pool.bias.requires_grad_(), inverse
    weights = torch.rand(7, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(chunked._weighted_sum, (*given, weights, *pairs, pool.own, [True] * 3))
    torch.library.opcheck(chunked._row_losses, (*given, *pairs, pool.own))
    if not INTERPRETED:
        return
    positives, shift = (one.detach()[:9].clone().requires_grad_() for one in (pool.negatives, pool.bias))
    log_sum_exp = torch.rand(7, dtype=torch.float64, requires_grad=True)
    given = queries, positives, shift if corrected else None, inverse, log_sum_exp
    ranges = [one.int() for one in found[2:]]
    torch.library.opcheck(pairs_dispatch._pairs_of_rows, (*given, ranges, True))
    frozen = [one if one is None else one.detach() for one in given]
    torch.library.opcheck(pairs_dispatch._pairs_of_rows, (*frozen, ranges, False))
    made = pairs_dispatch._pairs_of_rows(*frozen, ranges, True)[1:]
    for wanted in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(pairs_dispatch._gradients, (torch.rand(7).double(), *made, *frozen, ranges, wanted))


def test_nothing_of_rows_times_columns_is_held():
    rows, negatives, tile_rows = 96, 300, 4
    queries, pool, _, pairs = operands(*drawn(0, rows, rows, negatives, 3, users=range(20), items=1000))
    inverse, weights = torch.ones((), dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
    largest = Largest()
    with tiles_of(tile_rows), largest:
        chunked._sweep(queries, pool, inverse, pairs, weights, Wanted(True, True, True))
    assert tile_rows * (rows + negatives) <= largest.elements < rows * (rows + negatives) / 4


def test_no_step_waits_for_numbers_on_a_device():
    """The meta device has no numbers: an operation whose shape or branch depends on them fails there."""
    embeddings, keywords = drawn(8, 7, 9, 5, 3, dtype=torch.float32)
    for backend in FAST:
        leaves = [one.to("meta").requires_grad_() for one in embeddings]
        there = {name: one.to("meta") if torch.is_tensor(one) else one for name, one in keywords.items()}
        loss = dense_all_action_loss(*leaves, **there, backend=backend)
        assert [one.shape for one in torch.autograd.grad(loss, leaves)] == [(7, 3), (9, 3), (5, 3)]
    queries, pool, _, pairs = operands(*drawn(7, 7, 9, 5, 3))
    pool = pool._replace(negatives=pool.negatives.to("meta"), bias=pool.bias.to("meta"),
                         own=[one.to("meta") for one in pool.own])  # fmt: skip
    pairs = pairs._replace(first=pairs.first.to("meta"), last=pairs.last.to("meta"))
    weights = torch.ones(7, dtype=torch.float64, device="meta")
    swept = chunked._sweep(queries.to("meta"), pool, weights[0], pairs, weights, Wanted(True, True, True))
    assert [one.shape for one in swept] == [(7,), (7, 3), (14, 3), (14,), ()]


# --- bad arguments ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"queries": torch.ones(3)}, ValueError, "queries"),
        ({"positives": torch.ones(2, 4)}, ValueError, "positives"),
        ({"negatives": torch.ones(4, 2)}, ValueError, "negatives"),
        ({"query_users": torch.zeros(3).long()}, ValueError, "query_users"),
        ({"query_times": torch.zeros(2)}, TypeError, "query_times must be int64"),
        ({"positive_users": torch.zeros(3).long()}, ValueError, "positive_users"),
        ({"positive_times": torch.zeros(3).long()}, ValueError, "positive_times"),
        ({"positive_items": torch.zeros(3).long()}, ValueError, "positive_items"),
        ({"negative_items": torch.zeros(3).long()}, ValueError, "negative_items"),
        ({"window": 0}, ValueError, "window must be from 1 to .*got 0"),
        ({"window": 1.5}, TypeError, "window must be an int, got 1.5"),
        ({"weights": torch.tensor([1.0, -1])}, ValueError, "weights.*at least 0.*-1"),
        ({"weights": torch.ones(3)}, ValueError, "weights"),
        ({"log_q_positives": torch.zeros(2)}, ValueError, "log_q_positives and log_q_negatives must both be given"),
        ({"log_q_negatives": torch.zeros(4)}, ValueError, "log_q_positives and log_q_negatives must both be given"),
        ({"log_q_positives": torch.ones(2), "log_q_negatives": torch.zeros(4)}, ValueError, "log_q_positives.*most 0"),
        ({"log_q_positives": torch.zeros(2), "log_q_negatives": torch.ones(4)}, ValueError, "log_q_negatives.*most 0"),
        ({"log_q_positives": torch.zeros(2), "log_q_negatives": torch.zeros(3)}, ValueError, "log_q_negatives"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"temperature": torch.ones(1)}, ValueError, r"temperature.*\(\)"),
        ({"correct_positive": "no"}, TypeError, "correct_positive must be a bool, got 'no'"),
        ({"reduction": "avg"}, ValueError, "reduction.*'none'.*'avg'"),
    ],
)
def test_bad_arguments_are_named(backend, changes, error, words):
    ids = {name: torch.zeros(2).long() for name in ("query_users", "positive_users", "query_times", "positive_items")}
    arguments = {"queries": torch.ones(2, 3), "positives": torch.ones(2, 3), "negatives": torch.ones(4, 3), "window": 5}
    arguments |= ids | {"positive_times": torch.ones(2).long(), "negative_items": torch.arange(1, 5)}
    with pytest.raises(error, match=words):
        dense_all_action_loss(**arguments | changes, backend=backend)


def test_other_bad_arguments():
    ids = torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"backend must be one of.*'fast'"):
        dense_all_action_loss(
            *torch.ones(3, 2, 3), query_users=ids, query_times=ids, positive_users=ids, positive_times=ids,
            positive_items=ids, negative_items=ids, window=1, backend="fast",
        )  # fmt: skip
    with pytest.raises(ValueError, match="query_times"):
        positives_in_window(ids, ids[:1], ids, ids, window=1)
    with pytest.raises(ValueError, match="window"):
        positives_in_window(ids, ids, ids, ids, window=0)
    for weights_of in (equal_user_weights, lambda users, counts: rank_weights(users.float(), counts=counts)):
        with pytest.raises(ValueError, match="counts"):
            weights_of(ids, counts=ids[:1])
        with pytest.raises(TypeError, match="counts"):
            weights_of(ids, counts=ids.float())
        with pytest.raises(ValueError, match="counts must be finite and at least 0, got -1"):
            weights_of(ids, counts=ids - 1)


def test_masks_are_those_of_own_positives():
    """What a query's softmax leaves out, seen as the columns whose embedding has no gradient by its loss."""
    embeddings, keywords = drawn(9, 1, 6, 6, 3, users=(1, 2), times=[3], items=4)
    keywords["query_times"] = torch.tensor([2])
    got = gradients(embeddings, keywords, backend="chunked")[1]
    items = torch.cat([keywords["positive_items"], keywords["negative_items"]])
    hidden = own_positive_mask(keywords["query_users"], items, keywords["positive_users"], keywords["positive_items"])[
        0
    ]
    seen = torch.cat(got[1:3]).abs().sum(1) > 0
    mine = torch.nn.functional.pad(keywords["positive_users"] == keywords["query_users"], (0, 6))
    assert torch.equal(seen, ~hidden | mine)
    assert hidden.any()
    assert recblocks.__all__.count("dense_all_action_loss") == 1
