import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recblocks import LearnedTemperature


@given(minimum=st.floats(1e-3, 10), excess=st.floats(1e-3, 100))
def test_starts_at_init(minimum, excess):
    tau = LearnedTemperature(minimum + excess, minimum=minimum)()
    assert tau.shape == ()
    assert tau.dtype == torch.float32
    # ρ is rounded to float32: by at most EPSILON / 2 of |ρ| <= 100, or of |log excess| <= 7 times the excess.
    assert abs(tau.item() - minimum - excess) <= torch.finfo(torch.float32).eps * (minimum + 8 * excess)


@given(rho=st.floats(-1e4, 1e4), minimum=st.sampled_from([0.01, 0.5]))
def test_is_minimum_plus_softplus_and_never_below_the_minimum(rho, minimum):
    module = LearnedTemperature(1.0, minimum=minimum, dtype=torch.float64)
    with torch.no_grad():
        module.rho.fill_(rho)
    softplus = max(rho, 0) + math.log1p(math.exp(-abs(rho)))
    # Beyond 20 torch takes softplus(ρ) for ρ, which is off by at most exp(-20).
    assert module().item() == pytest.approx(minimum + softplus, rel=1e-15, abs=3e-9)
    assert module() >= minimum
    assert module.float()() >= torch.tensor(minimum)


def test_has_a_gradient_everywhere_near_the_minimum():
    module = LearnedTemperature(0.010001)
    module().backward()
    assert module.rho.grad > 0
    assert torch.autograd.gradcheck(lambda rho: 0.01 + torch.nn.functional.softplus(rho), module.rho.double())


def test_tau_is_float32_under_autocast_and_after_a_cast():
    module = LearnedTemperature(0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert module().dtype == torch.float32
    rounded = module.bfloat16()()
    assert rounded.dtype == torch.float32
    # ρ = -2.4 has 8 bits in bfloat16: τ - minimum = softplus(ρ) moves by at most 2.4 / 2^9 of itself.
    assert abs(rounded.item() - 0.1) < 0.09 * 2.4 / 2**9


def test_meta_device_then_reset_gives_the_same_start():
    module = LearnedTemperature(0.3, device="meta", dtype=torch.float64).to_empty(device="cpu")
    module.reset_parameters()
    assert module().item() == pytest.approx(0.3, rel=1e-14)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"init": 0.01}, ValueError, "init"),
        ({"init": 0.005}, ValueError, "init"),
        ({"init": math.nan}, ValueError, "init"),
        ({"init": "0.1"}, TypeError, "init"),
        ({"init": 1.0, "minimum": 0.0}, ValueError, "minimum"),
        ({"init": 1.0, "minimum": math.inf}, ValueError, "minimum"),
    ],
)
def test_bad_arguments_are_named(arguments, error, name):
    with pytest.raises(error, match=name):
        LearnedTemperature(**arguments)
