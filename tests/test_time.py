import copy
import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracles
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from recblocks.features import time as time_module
from recblocks.features.time import (
    PINNERFORMER_PERIODS,
    LogPeriodicTimeEncoder,
    gap_to_next_older,
    log_periodic_features,
    log_spaced_periods,
    time_since_latest,
)
from recblocks.kernels import building
from recblocks.kernels.time_waves import cpp
from recblocks.kernels.time_waves.dispatch import encode_times

RELATIVE_PERIODS = log_spaced_periods(32, shortest=1, longest=28 * 86400)
PERIODS = PINNERFORMER_PERIODS + RELATIVE_PERIODS
UNITS = {"s": 1, "ms": 1000}
# The issue's bar. _encode derives 1e-6 for the waves; log1p is rounded once, by half of float32's 1.9e-6 at 21.
TOLERANCE = 2e-6


@pytest.fixture(scope="module", params=["cpp", "torch"], autouse=True)
def backend(request):
    """Every test runs in C++ and in plain torch."""
    if request.param == "cpp" and building.compiler() is None:
        pytest.skip("needs a C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(time_module, "runs_on", lambda *_: False)
        yield request.param


def expected(times, periods, phase, unit):
    rows = [oracles.log_periodic_features(t, periods, phase, UNITS[unit]) for t in times]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("unit", ["s", "ms"])
@hypothesis.given(seconds=st.integers(0, 1_800_000_000), rest=st.integers(0, 999))
def test_every_feature_is_within_2e_6_of_the_formula(unit, seconds, rest):
    t = seconds if unit == "s" else 1000 * seconds + rest
    got = log_periodic_features(torch.tensor([t]), periods=PERIODS, unit=unit)
    want = expected([t], PERIODS, [0.0] * 88, unit)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE)
    # The logarithm, below 32, is rounded only once: half of 2**-19.
    torch.testing.assert_close(got[:, -1].double(), want[:, -1], rtol=0, atol=1.0001 * 2**-20)


@pytest.mark.parametrize("unit", ["s", "ms"])
@hypothesis.given(seconds=st.floats(0, 1.8e9))
def test_a_float64_time_keeps_its_fraction(unit, seconds):
    t = seconds * UNITS[unit]
    got = log_periodic_features(torch.tensor([t], dtype=torch.float64), periods=PERIODS, unit=unit)
    torch.testing.assert_close(got.double(), expected([t], PERIODS, [0.0] * 88, unit), rtol=0, atol=TOLERANCE)


@hypothesis.given(t=st.integers(-(10**12), 10**12), data=st.data())
def test_the_phase_shifts_a_cosine_and_its_sine_each_by_its_own(t, data):
    phase = data.draw(st.lists(st.floats(-7, 7, width=32), min_size=4, max_size=4))
    got = log_periodic_features(torch.tensor([t]), periods=[900.0, 7.5], phase=torch.tensor(phase), unit="ms")
    # The phase itself, up to 7, rounds the sum by at most 4.8e-7 more.
    torch.testing.assert_close(got.double(), expected([t], [900.0, 7.5], phase, "ms"), rtol=0, atol=TOLERANCE)


@hypothesis.given(
    t=st.integers(-(10**12), 10**12),
    period=st.floats(1e-3, 1e10),
    as_float=st.booleans(),
    unit=st.sampled_from(list(UNITS)),
)
def test_any_period_shorter_than_the_unit_or_longer_than_the_time(t, period, as_float, unit):
    dtype = torch.float64 if as_float else torch.int64
    got = log_periodic_features(torch.tensor([t], dtype=dtype), periods=[period], unit=unit)
    torch.testing.assert_close(got.double(), expected([t], [period], [0.0] * 2, unit), rtol=0, atol=TOLERANCE)


def test_a_fraction_of_a_period_that_is_shorter_than_the_unit():
    t = torch.tensor([1_700_000_000.125, -0.875], dtype=torch.float64)
    got = log_periodic_features(t, periods=[1.0, 0.5, 0.25])
    # 0.125 s is an eighth, a quarter and a half of a turn.
    half = 0.5**0.5
    torch.testing.assert_close(got[:, :6], torch.tensor([[half, half, 0.0, 1.0, -1.0, 0.0]] * 2), rtol=0, atol=1e-6)


def test_one_millisecond_is_seen_at_the_timestamps_of_today():
    t = torch.tensor([1_700_000_000_000, 1_700_000_000_001])
    features = log_periodic_features(t, periods=[1.0], unit="ms")
    # A turn is 1000 ms; one millisecond from a whole second moves the sine by sin(0.002π).
    torch.testing.assert_close(features[1, 1] - features[0, 1], torch.tensor(0.00628314), rtol=0, atol=TOLERANCE)


def test_a_negative_time_has_the_logarithm_of_zero():
    assert log_periodic_features(torch.tensor([-5]), periods=[60.0])[0, -1] == 0


def test_the_periods_of_the_paper():
    hours = [0.25, 0.5, 0.75, 1, 2, 4, 8, 16, 24, 7 * 24, 28 * 24, 365 * 24]
    assert list(PINNERFORMER_PERIODS) == [3600 * hour for hour in hours]


@hypothesis.given(num=st.integers(2, 40), shortest=st.floats(1e-3, 1e3), factor=st.floats(1.01, 1e7))
def test_log_spaced_periods_have_exact_ends_and_one_ratio(num, shortest, factor):
    periods = log_spaced_periods(num, shortest=shortest, longest=shortest * factor)
    assert len(periods) == num
    assert periods[0] == shortest
    assert periods[-1] == shortest * factor
    ratios = [b / a for a, b in itertools.pairwise(periods)]
    # exp and log are each right to about 1e-16 of an exponent below 17.
    assert ratios == pytest.approx([factor ** (1 / (num - 1))] * (num - 1), rel=1e-13)


def test_the_module_is_the_function_with_its_phase():
    encoder = LogPeriodicTimeEncoder(PINNERFORMER_PERIODS, unit="ms")
    assert (encoder.out_dim, encoder.phase.shape) == (25, (24,))
    t = torch.randint(1_700_000_000_000, (3, 5))
    torch.testing.assert_close(
        encoder(t), log_periodic_features(t, periods=PINNERFORMER_PERIODS, unit="ms"), rtol=0, atol=0
    )
    torch.nn.init.normal_(encoder.phase)
    want = log_periodic_features(t, periods=PINNERFORMER_PERIODS, phase=encoder.phase, unit="ms")
    torch.testing.assert_close(encoder(t), want, rtol=0, atol=0)
    fixed = LogPeriodicTimeEncoder(torch.tensor([60.0, 90.0]), learn_phase=False)
    assert list(fixed.parameters()) == []
    assert fixed.state_dict() == {}
    torch.testing.assert_close(fixed(t), log_periodic_features(t, periods=[60.0, 90.0]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_cast_rounds_the_periods(dtype):
    encoder = LogPeriodicTimeEncoder(PERIODS, unit="ms")
    t = torch.randint(1_700_000_000_000, (20,))
    want = encoder(t)
    cast = copy.deepcopy(encoder).to(dtype)
    assert cast.phase.dtype == dtype
    got = cast(t)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The same integers either way; a float64 phase only skips the roundings to float32.
    tolerance = TOLERANCE if dtype == torch.float64 else 0
    torch.testing.assert_close(got.float(), want, rtol=0, atol=tolerance)


def test_the_phase_has_the_right_gradient():
    phase = torch.randn(4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[5, 70_000], [123_456_789, 0]])
    assert torch.autograd.gradcheck(lambda p: log_periodic_features(t, periods=[60.0, 900.0], phase=p), phase)


# torch warns of its own deprecated function while inductor loads.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_compiled_features_drop_the_whole_turns_just_as_exactly(compiler, dtype):
    t = torch.tensor([1_700_000_000_123, 1_699_999_999_999, 0, -1], dtype=dtype)
    compiled = torch.compile(log_periodic_features, backend=compiler, fullgraph=True)
    got = compiled(t, periods=PERIODS, unit="ms")
    want = expected(t.tolist(), PERIODS, [0.0] * 88, "ms")
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(1,), (7, 73), (512,), (513,), (2, 3, 97)])
@pytest.mark.parametrize("num_periods", [1, 2, 7, 33])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_any_number_of_times_and_periods_in_memory_as_it_likes(shape, num_periods, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(num_periods)
    t = torch.randint(-(10**9), 1_800_000_000, (*shape, 2), generator=generator).to(dtype)[..., 0]
    t = t + torch.rand(shape, generator=generator).to(dtype)  # of float64 a part
    phase = torch.randn(4 * num_periods, generator=generator)[::2]
    periods = [3600.0 / (1 + at) for at in range(num_periods)]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **how: empty(*args, **how).fill_(float("nan")))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(log_periodic_features(t.mT if t.ndim == 2 else t, periods=periods, phase=phase))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    got = found[0]
    times = (t.mT if t.ndim == 2 else t).flatten().tolist()
    want = expected(times, periods, phase.tolist(), "s").view(got.shape)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE)


def test_a_time_s_features_do_not_depend_on_those_beside_it():
    t = torch.randint(1_700_000_000_000, (1000,), generator=torch.Generator().manual_seed(0))
    whole = log_periodic_features(t, periods=PERIODS, unit="ms")
    for at in (0, 1, 511, 512, 998):
        assert torch.equal(log_periodic_features(t[at : at + 2], periods=PERIODS, unit="ms"), whole[at : at + 2])


@pytest.mark.parametrize("size", [(), (3,), (0,), (5, 257)])
def test_the_phase_has_the_gradient_of_float64_and_its_gradient(size):
    generator = torch.Generator().manual_seed(1)
    t = torch.randint(1_700_000_000, size, generator=generator)
    phase = torch.randn(6, generator=generator)
    weights = torch.randn(*size, 7, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        own = phase.to(dtype).requires_grad_()
        features = log_periodic_features(t, periods=[60.0, 900.0, 7.5], phase=own)
        (first,) = torch.autograd.grad((features * weights).sum(), own, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), own)
        found.append((first, second))
    # Each of n waves is within 1e-6, and a float32 sum of n rounds by at most n 2**-24 of what it sums: below 2e-6 n of
    # the largest weight, 4.2, together. The second is twice the first, below 4.2 n, times as much again.
    num = max(t.numel(), 1)
    torch.testing.assert_close(found[0][0].double(), found[1][0], rtol=0, atol=8.4e-6 * num)
    torch.testing.assert_close(found[0][1].double(), found[1][1], rtol=0, atol=4 * 4.2 * num * 8.4e-6 * num)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_phase_that_is_no_number_is_seen_in_its_own_wave(wrong):
    got = log_periodic_features(torch.arange(5), periods=[60.0, 900.0], phase=torch.tensor([0.0, 1.0, wrong, 2.0]))
    assert got[:, 2].isnan().all()
    assert got[:, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("phase", [-1e6, -6.2831855, -1e-9, 6.2831855, 1e4, 3e38])
def test_a_phase_of_many_turns(phase, backend):
    got = log_periodic_features(torch.tensor([12, 59]), periods=[60.0], phase=torch.tensor([phase, phase]))
    exact = torch.tensor(phase, dtype=torch.float32).item()
    if backend == "cpp" and abs(phase) < 1e7:  # plain torch adds it in float32; beyond, float64 too rounds its turns
        want = expected([12, 59], [60.0], [exact, exact], "s")
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE)
    assert (got[:, :2].abs() <= 1 + TOLERANCE).all()


def test_a_time_s_own_gradient_is_that_of_its_logarithm():
    t = torch.tensor([5.0, 70.0], dtype=torch.float64, requires_grad=True)
    log_periodic_features(t, periods=[60.0])[:, -1].sum().backward()
    torch.testing.assert_close(t.grad, 1 / (1 + t.detach()), rtol=1e-6, atol=0)


# torch warns of its own deprecated function while it loads what forward mode needs.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_gives_the_gradients_of_backward():
    t, phase, ahead = torch.arange(12).view(3, 4), torch.randn(4), torch.randn(4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(phase, ahead)
        got = forward_ad.unpack_dual(log_periodic_features(t, periods=[60.0, 900.0], phase=dual)).tangent
    want = torch.autograd.functional.jacobian(
        lambda own: log_periodic_features(t, periods=[60.0, 900.0], phase=own), phase
    )
    torch.testing.assert_close(got, want @ ahead, rtol=0, atol=4 * 4 * TOLERANCE)  # four terms, of numbers below 4


def test_inside_transforms_and_modes():
    t, phase = torch.arange(12).view(3, 4), torch.randn(4)
    want = log_periodic_features(t, periods=[60.0, 900.0], phase=phase)
    one = functools.partial(log_periodic_features, periods=[60.0, 900.0])
    got = torch.func.vmap(lambda row: one(row, phase=phase))(t)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
    slope = torch.func.grad(lambda own: one(t, phase=own).sum())(phase)
    own = phase.clone().requires_grad_()
    one(t, phase=own).sum().backward()
    torch.testing.assert_close(slope, own.grad, rtol=0, atol=12 * TOLERANCE)
    with FakeTensorMode() as mode:
        assert one(mode.from_tensor(t), phase=mode.from_tensor(phase)).shape == (3, 4, 5)
    assert one(t.to("meta"), phase=phase.to("meta")).shape == (3, 4, 5)


def test_the_operator_is_one_of_torch(backend):
    if backend == "torch":
        pytest.skip("is C++")
    frequencies = torch.tensor(time_module._fixed_point_frequencies([60.0, 7.5], "s"))
    for t in (torch.arange(6).view(2, 3), torch.rand(5, dtype=torch.float64)):
        for phase in (None, torch.randn(4), torch.randn(4, requires_grad=True)):
            torch.library.opcheck(encode_times, (t, frequencies, phase, 1, 0))


def test_without_a_compiler_it_is_plain_torch(monkeypatch):
    monkeypatch.setattr(building, "compiler", lambda: None)
    monkeypatch.setattr(cpp, "library", functools.cache(cpp.library.__wrapped__))
    t = torch.randint(1_700_000_000, (9,))
    got = log_periodic_features(t, periods=PERIODS)
    torch.testing.assert_close(got.double(), expected(t.tolist(), PERIODS, [0.0] * 88, "s"), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("unit", ["s", "ms"])
def test_empty_times_and_scalars_keep_their_shape(unit):
    assert log_periodic_features(torch.empty(0, 3, dtype=torch.int64), periods=[1.0], unit=unit).shape == (0, 3, 3)
    assert log_periodic_features(torch.tensor(7), periods=[1.0], unit=unit).shape == (3,)


sequences = st.lists(st.tuples(st.integers(-(2**61), 2**61), st.booleans()), max_size=6)


@hypothesis.given(rows=st.lists(sequences, max_size=4))
def test_differences_are_those_of_the_valid_actions_padded_and_packed(rows):
    slots = max(map(len, rows), default=0)
    garbage = (-(2**63), False)
    padded = [row + [garbage] * (slots - len(row)) for row in rows]
    time = torch.tensor([[t for t, _ in row] for row in padded], dtype=torch.int64).reshape(len(rows), slots)
    valid = torch.tensor([[v for _, v in row] for row in padded], dtype=torch.bool).reshape(len(rows), slots)
    packed = time[valid]
    offsets = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0))
    for function, oracle in [
        (time_since_latest, oracles.time_since_latest),
        (gap_to_next_older, oracles.gap_to_next_older),
    ]:
        want = [oracle([t for t, _ in row], [v for _, v in row]) for row in padded]
        got = function(time, valid)
        assert got.tolist() == want
        assert function(packed, offsets=offsets).tolist() == got[valid].tolist()
        whole = min(map(len, rows), default=0)
        full = [oracle([t for t, _ in row[:whole]], [True] * whole) for row in rows]
        assert function(time[:, :whole]).tolist() == full


@pytest.mark.parametrize("function", [time_since_latest, gap_to_next_older])
def test_nan_at_an_invalid_slot_changes_nothing(function):
    time = torch.tensor([[90.5, float("nan"), 70.25, float("inf")]], dtype=torch.float64)
    valid = torch.tensor([[True, False, True, False]])
    assert function(time, valid).tolist() == function(time.nan_to_num(posinf=3.0), valid).tolist()


def test_periods_may_be_an_array_or_a_tensor():
    t = torch.arange(50)
    want = log_periodic_features(t, periods=[7.0, 2.5])
    for periods in (np.array([7, 2.5], dtype=np.float32), torch.tensor([7, 2.5]), (7, 2.5)):
        assert torch.equal(log_periodic_features(t, periods=periods), want)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: log_periodic_features(torch.ones(2), periods=[1.0]), TypeError, ["t must be", "float32"]),
        (lambda: log_periodic_features(torch.ones(2).half(), periods=[1.0]), TypeError, ["t must be", "float16"]),
        (lambda: log_periodic_features(torch.ones(2).int(), periods=[1.0]), TypeError, ["t must be", "int32"]),
        (lambda: log_periodic_features(torch.arange(2), periods=[1.0], unit="min"), ValueError, ["unit", "'min'"]),
        (lambda: log_periodic_features(torch.arange(2), periods=[]), ValueError, ["periods", "none"]),
        (lambda: log_periodic_features(torch.arange(2), periods=[1.0, 0.0]), ValueError, ["periods[1]", "above 0"]),
        (lambda: log_periodic_features(torch.arange(2), periods=[float("inf")]), ValueError, ["periods[0]", "inf"]),
        (
            lambda: log_periodic_features(torch.arange(2), periods=[1.0], phase=torch.ones(3)),
            ValueError,
            ["phase", "(2)", "(3,)"],
        ),
        (
            lambda: log_periodic_features(torch.tensor([float("nan")]).double(), periods=[1.0]),
            ValueError,
            ["t must be finite"],
        ),
        (
            lambda: log_periodic_features(torch.tensor([2.0**63]).double(), periods=[1.0]),
            ValueError,
            ["t must", "int64"],
        ),
        (lambda: log_periodic_features(torch.arange(2), periods=[1.0], unit=["s"]), ValueError, ["unit", "['s']"]),
        (lambda: log_periodic_features(torch.arange(2), periods=[10**400]), ValueError, ["periods[0]", "finite"]),
        (lambda: LogPeriodicTimeEncoder(5), TypeError, ["periods", "sequence", "5 (int)"]),
        (lambda: LogPeriodicTimeEncoder(torch.tensor(5.0)), TypeError, ["periods", "sequence", "float32"]),
        (lambda: LogPeriodicTimeEncoder([1.0])(torch.ones(2)), TypeError, ["t must be", "float32"]),
        (lambda: LogPeriodicTimeEncoder([-1.0]), ValueError, ["periods[0]", "above 0"]),
        (lambda: LogPeriodicTimeEncoder([1.0], unit="h"), ValueError, ["unit", "'h'"]),
        (lambda: log_spaced_periods(1, shortest=1, longest=2), ValueError, ["num", "at least 2"]),
        (lambda: log_spaced_periods(3, shortest=2, longest=2), ValueError, ["longest", "above 2"]),
        (lambda: time_since_latest(torch.ones(2, 3)), TypeError, ["time", "float32"]),
        (lambda: time_since_latest(torch.arange(3)), ValueError, ["time", "(B, M)", "(3,)"]),
        (
            lambda: time_since_latest(torch.ones(2, 3).long(), torch.ones(2, 3)),
            TypeError,
            ["valid", "bool", "float32"],
        ),
        (
            lambda: gap_to_next_older(torch.arange(3), torch.ones(3).bool(), offsets=torch.tensor([0, 3])),
            ValueError,
            ["valid", "offsets"],
        ),
        (
            lambda: gap_to_next_older(torch.arange(3), offsets=torch.tensor([0, 2])),
            ValueError,
            ["offsets", "from 0 to 3", "from 0 to 2"],
        ),
        (
            lambda: gap_to_next_older(torch.arange(3), offsets=torch.tensor([0, 2, 1, 3])),
            ValueError,
            ["offsets", "never descend"],
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_a_module_made_in_inference_mode_loads_outside_of_it():
    with torch.inference_mode():
        module = LogPeriodicTimeEncoder([60.0])
    other = LogPeriodicTimeEncoder([60.0])
    module.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(module(torch.tensor([7])), other(torch.tensor([7])))
