"""The softmax of a tile in C++, beside float64."""

import functools
import math

import pytest
import torch
from poison import inside_nan
from pooled_losses import tiles_of

from recblocks import sampled_softmax_loss
from recblocks.kernels import building
from recblocks.kernels.own_positives import OwnPositives
from recblocks.kernels.sampled_softmax import cpp

pytestmark = pytest.mark.skipif(building.compiler() is None, reason="needs a C++ compiler")

EPSILON = torch.finfo(torch.float32).eps
TOO_SMALL = math.exp(-87)  # whose exponentials are no normal numbers
# One, primes, a lane, a block of sums, and one beside each.
WIDTHS = [1, 2, 7, 31, 32, 33, 97, 1023, 1024, 1025, 1055, 1056, 1057, 2048, 2053, 5003]


def exponentials(tile, bias=None, *own):
    """Exponentials, log-sum-exp and totals; what lies around all that is given is NaN, and is not written."""
    around = torch.full((tile.numel() + 64,), torch.nan)
    inner = around[32:-32].view(tile.shape)
    inner.copy_(tile)
    log_sum_exp, totals = cpp.exponentials_(inner, None if bias is None else inside_nan(bias), *own)
    assert around[:32].isnan().all()
    assert around[-32:].isnan().all()
    return inner, log_sum_exp, totals


def softmax(tile, bias=None, *own):
    """Probabilities and log-sum-exp."""
    got, log_sum_exp, totals = exponentials(tile, bias, *own)
    return got / totals[:, None], log_sum_exp


def allowed(logits):
    """Of a probability, as a share of it, and of a log-sum-exp.

    Bias, maximum and the whole powers of two come off with half an epsilon of the largest number each, the series with
    four, and the sums of 32 and their total with 16.
    """
    return EPSILON * (2 * logits.abs().max().item() + 20)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_softmax_and_the_log_sum_exp(width, spread, biased):
    logits, bias = spread * torch.randn(5, width), torch.randn(width) if biased else None
    exact = logits.double() + (0 if bias is None else bias.double())
    got, log_sum_exp = softmax(logits, bias)
    share = allowed(exact)
    torch.testing.assert_close(got.double(), exact.softmax(1), rtol=share, atol=TOO_SMALL)
    torch.testing.assert_close(log_sum_exp.double(), exact.logsumexp(1), rtol=0, atol=share)


def test_exponentials_are_right_all_the_way_down():
    # The first logit is the maximum, so the others become e**x.
    x = torch.linspace(-86.9, 0.0, 100_003)
    got = exponentials(torch.cat([torch.zeros(1), x])[None])[0][0].double()
    assert got[0] == 1
    # e**r is rounded once, from .707 on, by up to .71 epsilon of it; its terms are rounded where they are smaller.
    torch.testing.assert_close(got[1:], x.double().exp(), rtol=1.5 * EPSILON, atol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_totals_are_the_sums_of_the_exponentials(width):
    got, log_sum_exp, totals = exponentials(3 * torch.randn(5, width))
    # Up to 32 are added in float32, and the total is rounded.
    torch.testing.assert_close(totals.double(), got.double().sum(1), rtol=17 * EPSILON, atol=0)
    assert (got.amax(1) == 1).all()
    assert log_sum_exp.isfinite().all()


@pytest.mark.parametrize("start", [0, 3])
def test_what_a_row_owns_has_no_probability(start):
    row_users, column_items = torch.randint(4, (8,)), torch.randint(9, (41,))
    row_users[4] = 77  # who owns nothing
    positive_users, positive_items = torch.randint(4, (12,)), torch.randint(12, (12,))
    ids = row_users, column_items, positive_users, positive_items
    pairs = set(zip(positive_users.tolist(), positive_items.tolist(), strict=True))
    masked = torch.tensor([[(user, item) in pairs for item in column_items.tolist()] for user in row_users.tolist()])
    masked = masked[start : start + 5]
    logits, bias = torch.randn(5, 41), torch.randn(41)
    got, log_sum_exp = softmax(logits, bias, OwnPositives(*ids).owned, start)
    exact = (logits.double() + bias).masked_fill(masked, -torch.inf)
    assert masked.any()
    assert torch.equal(got == 0, masked)
    torch.testing.assert_close(got.double(), exact.softmax(1), rtol=allowed(logits + bias), atol=TOO_SMALL)
    torch.testing.assert_close(log_sum_exp.double(), exact.logsumexp(1), rtol=0, atol=allowed(logits + bias))


def test_a_row_may_own_every_column():
    users, items = torch.tensor([5, 6]), torch.arange(40)
    own = OwnPositives(users, items, torch.full((40,), 5), items).owned
    bias = torch.where(items == 0, torch.nan, 0.0)
    got, log_sum_exp, totals = exponentials(torch.randn(2, 40), bias, own)
    assert (got[0] == 0).all()
    assert log_sum_exp[0] == -torch.inf
    assert totals[0] == 1
    assert totals[1].isnan()


def test_a_million_columns_lose_no_digits():
    # In one float32 each of them would be rounded the same way, and a thousandth of the sum be lost.
    logits = torch.full((1, 2**20), -1.23)
    logits[0, 7] = 0
    got, log_sum_exp = softmax(logits)
    exact = logits.double()
    torch.testing.assert_close(log_sum_exp.double(), exact.logsumexp(1), rtol=0, atol=allowed(exact))
    torch.testing.assert_close(got.double(), exact.softmax(1), rtol=allowed(exact), atol=0)


def test_what_is_too_small_for_a_normal_number_is_zero():
    got, log_sum_exp = softmax(torch.tensor([[5.0, -82.5, -1e30, -torch.inf]]))
    assert got.tolist() == [[1, 0, 0, 0]]
    assert log_sum_exp.tolist() == [5]


@pytest.mark.parametrize("width", [1, 32, 33, 1057])
def test_a_row_of_nothing_has_no_probability(width):
    logits = torch.randn(3, width)
    logits[1] = -torch.inf
    for bias in (None, torch.randn(width)):
        got, log_sum_exp = softmax(logits, bias)
        assert (got[1] == 0).all()
        assert log_sum_exp.isneginf().tolist() == [False, True, False]
        torch.testing.assert_close(got[::2].sum(1), torch.ones(2), rtol=width * EPSILON, atol=0)


@pytest.mark.parametrize("at", [0, 31, 32, 1056])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_row(at, bad):
    logits = torch.randn(3, 1057)
    logits[1, at] = bad
    got, log_sum_exp = softmax(logits)
    assert got.isnan().all(1).tolist() == [False, True, False]
    assert log_sum_exp.isnan().tolist() == [False, True, False]


def test_a_row_of_nothing_but_a_nan_is_nan():
    got, log_sum_exp = softmax(torch.tensor([[-torch.inf, torch.nan, -torch.inf]]))
    assert got.isnan().all()
    assert log_sum_exp.isnan().all()


@pytest.mark.parametrize("at", [3, 40])
def test_the_bias_of_a_masked_column_is_not_seen(at):
    logits, bias = torch.randn(2, 41), torch.randn(41)
    bias[at] = torch.nan
    logits[0, at] = -torch.inf
    got, _ = softmax(logits, bias)
    assert got[0, at] == 0
    assert got.isnan().all(1).tolist() == [False, True]


def test_a_bias_may_lie_in_any_way():
    logits, bias = torch.randn(4, 70), torch.randn(70, 2)[:, 1]
    got = logits.clone()
    _, totals = cpp.exponentials_(got, bias)
    torch.testing.assert_close(got / totals[:, None], (logits + bias).softmax(1), rtol=1e-5, atol=0)


def test_no_rows_are_no_rows():
    assert [one.shape for one in cpp.exponentials_(torch.empty(0, 5), None)] == [(0,), (0,)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same(threads):
    logits = torch.randn(101, 333)
    want = exponentials(logits)
    torch.set_num_threads(threads)
    try:
        got = exponentials(logits)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("in_cpp", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("mask", ["none", "masked", "own"])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_the_loss_in_float32_is_that_in_float64(monkeypatch, in_cpp, reduction, mask, rows):
    taken = []

    def takes(tile, takes=cpp.takes):
        taken.append(in_cpp and takes(tile))
        return taken[-1]

    monkeypatch.setattr(cpp, "takes", takes)
    num_rows, num_columns = 37, 83
    pair_queries, users = torch.randint(num_rows, (50,)), torch.randint(9, (num_rows,))
    masked = torch.rand(num_rows, num_columns) < 0.3
    masked[5] = True
    own = users, torch.randint(20, (num_columns,)), users[pair_queries], torch.randint(20, (50,))
    weights = torch.rand(50)
    given = [torch.randn(num, 8) / 3 for num in (num_rows, 50, num_columns)]
    given += [-5 * torch.rand(50), -5 * torch.rand(num_columns), torch.tensor(0.2)]

    def loss(dtype, backend):
        leaves = [one.to(dtype).requires_grad_() for one in given]
        queries, positives, negatives, log_q_positives, log_q_negatives, temperature = leaves
        result = sampled_softmax_loss(
            queries,
            positives,
            negatives,
            log_q_positives=log_q_positives,
            log_q_negatives=log_q_negatives,
            masked=masked if mask == "masked" else None,
            own=own if mask == "own" else None,
            temperature=temperature,
            weights=weights.to(dtype),
            pair_queries=pair_queries,
            reduction=reduction,
            backend=backend,
        )
        return [result.detach(), *torch.autograd.grad(result.sum(), leaves)]

    with tiles_of(rows):
        got = loss(torch.float32, "chunked")
    want = loss(torch.float64, "reference")
    assert taken
    assert all(one == in_cpp for one in taken)
    # Logits of up to some 20 are off by half an epsilon of that each time they are rounded, which is a share of every
    # probability; sums of up to 83 such follow.
    for one, exact in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=0, atol=100 * EPSILON * exact.abs().max().item())


def test_float64_and_a_machine_without_a_compiler_are_plain_torch(monkeypatch):
    assert cpp.takes(torch.empty(2, 2))
    assert not cpp.takes(torch.empty(2, 2, dtype=torch.float64))
    assert not cpp.takes(torch.empty(2, 2, device="meta"))
    monkeypatch.setattr(building, "compiler", lambda: None)
    monkeypatch.setattr(cpp, "library", functools.cache(cpp.library.__wrapped__))
    assert not cpp.takes(torch.empty(2, 2))


def test_a_compiler_that_fails_is_warned_of_once_and_the_loss_is_made(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(cpp, "library", functools.cache(cpp.library.__wrapped__))
    given = [torch.randn(num, 4, requires_grad=True) for num in (3, 3, 6)]
    with pytest.warns(RuntimeWarning, match="the loss's softmax is made in plain torch, as false failed"):
        got = sampled_softmax_loss(*given, backend="chunked")
    torch.testing.assert_close(got, sampled_softmax_loss(*given, backend="reference"), rtol=1e-5, atol=0)
    sampled_softmax_loss(*given, backend="chunked")
