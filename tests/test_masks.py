import hypothesis
import hypothesis.strategies as st
import oracles
import pytest
import torch

from recblocks.sequence.masks import RandomTimeWindowMask, random_time_window_mask

INT64 = st.integers(-(2**63), 2**63 - 1)
DAY = 24 * 3600 * 1000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def windows(rows, max_window, seed):
    """The T of every row, as the definition has it: what the same generator draws next, a number a row."""
    return [max_window * uniform for uniform in torch.rand(rows, generator=seeded(seed), dtype=torch.float64).tolist()]


@st.composite
def requests(draw):
    """Times of today's size, times anywhere in int64, and times around the request and its longest window."""
    rows, slots = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    max_window = draw(st.sampled_from([1, 3, 0.5, 2.5, DAY, 2**53]) | st.floats(1e-3, 2**53))
    request = [draw(st.integers(1_700_000_000_000, 1_700_000_000_999) | INT64) for _ in range(rows)]
    ages = st.integers(-3, 6) | st.integers(0, 2 * DAY) | st.integers(0, 2**54)
    near = [ages.map(lambda age, t=t: min(max(t - age, -(2**63)), 2**63 - 1)) for t in request]
    action = [draw(st.lists(INT64 | times, min_size=slots, max_size=slots)) for times in near]
    return action, request, slots, max_window


@hypothesis.given(given=requests(), seed=st.integers(0, 9))
def test_masked_is_the_open_interval_of_the_paper(given, seed):
    action, request, slots, max_window = given
    action_time = torch.tensor(action, dtype=torch.int64).view(len(request), slots)
    request_time = torch.tensor(request, dtype=torch.int64)
    got = random_time_window_mask(action_time, request_time, max_window=max_window, generator=seeded(seed))
    assert got.dtype == torch.bool
    drawn = windows(len(request), max_window, seed)
    assert got.tolist() == [oracles.time_window_mask(*row) for row in zip(action, request, drawn, strict=True)]


def test_neither_end_is_masked(monkeypatch):
    uniform = torch.full((1,), 0.5, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform)
    t = 1_700_000_000_000
    action_time = torch.tensor([[t + 1, t, t - 1, t - 4, t - 5, t - 6]])
    got = random_time_window_mask(action_time, torch.tensor([t]), max_window=10)
    assert got.tolist() == [[False, False, True, True, False, False]]


@pytest.mark.parametrize("seed", range(5))
def test_one_millisecond_decides_at_the_timestamps_of_today(seed):
    t = 1_700_000_000_000
    (window,) = windows(1, DAY, seed)
    ages = int(window) + torch.arange(-20, 21)
    got = random_time_window_mask(t - ages[None], torch.tensor([t]), max_window=DAY, generator=seeded(seed))
    assert got[0].tolist() == [age < window for age in ages.tolist()]
    assert got.sum() == 21


@pytest.mark.parametrize(
    ("action_time", "request_time", "masked"),
    [
        (2**63 - 1, -(2**63), False),  # the difference wraps to 1
        (-(2**63), 2**63 - 1, False),  # to -1
        (-(2**63), 0, False),  # to -2**63
        (0, -(2**63), False),
        (-(2**63), -(2**63) + 1, True),
        (2**63 - 2, 2**63 - 1, True),
    ],
)
def test_the_ends_of_int64(action_time, request_time, masked):
    # T > 1 but for one draw in 2**53.
    got = random_time_window_mask(torch.tensor([[action_time]]), torch.tensor([request_time]), max_window=2**53)
    assert got.tolist() == [[masked]]


def test_every_row_draws_its_own_window_uniformly():
    rows = 20_000
    request_time = torch.full((rows,), 1_700_000_000)
    action_time = request_time[:, None] - torch.arange(1, 101)
    masked = random_time_window_mask(action_time, request_time, max_window=100, generator=seeded())
    # Age a is masked where T > a, with probability 1 - a / 100; 5 standard errors of a share of 20 000 rows.
    share = masked.double().mean(0)
    want = 1 - torch.arange(1, 101) / 100
    assert ((share - want).abs() <= 5 * (want * (1 - want) / rows).sqrt()).all()
    # The mask is one window: what is nearer to the request than a masked action is masked too.
    assert (masked.int().diff(dim=1) <= 0).all()


def test_the_generator_decides_and_nothing_else_is_drawn_from():
    action_time = 1_700_000_000 - torch.arange(1, 100).expand(50, -1)
    request_time = torch.full((50,), 1_700_000_000)
    module = RandomTimeWindowMask(max_window=100)
    before = torch.get_rng_state()
    first = module(action_time, request_time, generator=seeded(3))
    assert torch.equal(first, random_time_window_mask(action_time, request_time, max_window=100, generator=seeded(3)))
    assert not torch.equal(first, module(action_time, request_time, generator=seeded(4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(module(action_time, request_time), module(action_time, request_time))


def test_evaluation_masks_nothing_and_draws_nothing():
    action_time = 1_700_000_000 - torch.arange(1, 100).expand(50, -1)
    generator = seeded()
    before = generator.get_state()
    module = RandomTimeWindowMask(max_window=1e9).eval()
    got = module(action_time, torch.full((50,), 1_700_000_000), generator=generator)
    assert got.dtype == torch.bool
    assert got.shape == action_time.shape
    assert not got.any()
    assert torch.equal(generator.get_state(), before)


@hypothesis.given(garbage=INT64, request=INT64)
def test_garbage_at_other_slots_changes_no_slot(garbage, request):
    action_time = torch.tensor([[request, garbage, max(request - 5, -(2**63)), garbage]])
    other = action_time.clone()
    other[0, [1, 3]] = 0
    request_time = torch.tensor([request])
    got = random_time_window_mask(action_time, request_time, max_window=10, generator=seeded())
    want = random_time_window_mask(other, request_time, max_window=10, generator=seeded())
    assert torch.equal(got[0, [0, 2]], want[0, [0, 2]])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_it_compiles_into_one_graph_in_training():
    module = RandomTimeWindowMask(max_window=100)
    action_time = 1_700_000_000 - torch.arange(1, 100).expand(50, -1)
    request_time = torch.full((50,), 1_700_000_000)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    got = compiled(action_time, request_time)
    torch.manual_seed(1)
    want = module(action_time, request_time)
    assert torch.equal(got, want)
    assert 0 < want.double().mean() < 1


def test_what_is_after_the_request_is_an_error_only_where_it_is_real():
    action_time, request_time = torch.tensor([[10, 11, 12]]), torch.tensor([10])
    modules = RandomTimeWindowMask(max_window=5), RandomTimeWindowMask(max_window=5).eval()
    for module in modules:
        assert not module(action_time, request_time).any()
        assert not module(action_time, request_time, valid=torch.tensor([[True, False, False]])).any()
        with pytest.raises(ValueError, match="action_time must not be after request_time where valid, got 2 that are"):
            module(action_time, request_time, valid=torch.tensor([[True, True, True]]))


def call(action_time=None, request_time=None, max_window=10, valid=None):
    action_time = torch.zeros(2, 3, dtype=torch.int64) if action_time is None else action_time
    request_time = torch.zeros(2, dtype=torch.int64) if request_time is None else request_time
    return random_time_window_mask(action_time, request_time, max_window=max_window, valid=valid)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: call(action_time=torch.zeros(2, 3)), TypeError, ["action_time", "int64", "float32"]),
        (lambda: call(action_time=torch.zeros(2).long()), ValueError, ["action_time", "(B, S)", "(2,)"]),
        (lambda: call(request_time=torch.zeros(2).double()), TypeError, ["request_time", "int64", "float64"]),
        (lambda: call(request_time=torch.zeros(3).long()), ValueError, ["request_time", "(2)", "(3,)"]),
        (lambda: call(request_time=torch.zeros(2, 1).long()), ValueError, ["request_time", "(2)", "(2, 1)"]),
        (lambda: call(valid=torch.zeros(2, 3)), TypeError, ["valid", "bool", "float32"]),
        (lambda: call(valid=torch.zeros(2, 4).bool()), ValueError, ["valid", "(2, 3)", "(2, 4)"]),
        (lambda: call(max_window=0), ValueError, ["max_window", "above 0"]),
        (lambda: call(max_window=float("nan")), ValueError, ["max_window", "finite"]),
        (lambda: call(max_window=2**53 + 1), ValueError, ["max_window", "at most"]),
        (lambda: call(max_window="1 day"), TypeError, ["max_window", "number", "1 day"]),
        (lambda: RandomTimeWindowMask(max_window=-1), ValueError, ["max_window", "above 0", "-1"]),
        (
            lambda: RandomTimeWindowMask(max_window=1).eval()(torch.zeros(2, 3), torch.zeros(2).long()),
            TypeError,
            ["action_time", "int64"],
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
