import importlib.util
import warnings

import hypothesis
import hypothesis.strategies as st
import oracles
import pytest
import torch

from recblocks import CrossNetwork

finite = st.floats(-3, 3, width=32)
KINDS = [
    pytest.param({}, id="full rank"),
    pytest.param({"rank": 2}, id="low rank"),
    pytest.param({"rank": 2, "num_experts": 3}, id="experts"),
]


def drawn(**arguments):
    """A network whose biases are not 0 either."""
    module = CrossNetwork(**arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def experts_of(layer, gate):
    """The (U, C, Vᵀ) of every expert."""
    num_experts = len(gate.weight)
    downs = layer.down.weight.chunk(num_experts, 0)
    return list(zip(layer.up.weight.chunk(num_experts, 1), layer.mix, downs, strict=True))


def scalar(module, x):
    first = x
    for layer in module.layers:
        if isinstance(layer, torch.nn.Linear):
            x = oracles.cross_full_rank(first, x, layer.weight.tolist(), layer.bias.tolist())
            continue
        bias = layer.up.bias.tolist()
        if module.gate is None:
            x = oracles.cross_low_rank(first, x, layer.up.weight.tolist(), layer.down.weight.t().tolist(), bias)
        else:
            experts = [(u.tolist(), c.tolist(), v.t().tolist()) for u, c, v in experts_of(layer, module.gate)]
            x = oracles.cross_experts(first, x, experts, module.gate.weight.tolist(), bias)
    return x


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(
    rows=st.lists(st.lists(finite, min_size=4, max_size=4), min_size=1, max_size=3),
    num_layers=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_equals_the_equations_as_scalar_loops(kind, rows, num_layers, seed):
    torch.manual_seed(seed)
    module = drawn(in_dim=4, num_layers=num_layers, dtype=torch.float64, **kind)
    want = torch.tensor([scalar(module, row) for row in rows], dtype=torch.float64)
    got = module(torch.tensor(rows, dtype=torch.float64))
    # Degree 4 in numbers up to 3 with some twenty products a layer: values and sums below 1e6, float64 rounds at 1e-16.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_without_weights_the_input_passes_and_a_bias_of_1_adds_it_once_a_layer(kind):
    module, x = CrossNetwork(4, num_layers=3, **kind), torch.randn(5, 4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(module(x), x)
    with torch.no_grad():
        for layer in module.layers:
            (layer.bias if isinstance(layer, torch.nn.Linear) else layer.up.bias).fill_(1)
    torch.testing.assert_close(module(x), 4 * x, rtol=1e-6, atol=0)


def test_low_rank_is_full_rank_with_the_product_of_its_factors():
    low = drawn(in_dim=5, num_layers=2, rank=3, dtype=torch.float64)
    full = CrossNetwork(5, num_layers=2, dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(full.layers, low.layers, strict=True):
            ours.weight.copy_(theirs.up.weight @ theirs.down.weight)
            ours.bias.copy_(theirs.up.bias)
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(low(x), full(x), rtol=1e-12, atol=1e-12)


def from_torchrec(theirs, ours):
    """Take over the weights of one of torchrec's cross networks."""
    with torch.no_grad():
        for index, layer in enumerate(ours.layers):
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(theirs.kernels[index])
                layer.bias.copy_(theirs.bias[index].squeeze(1))
            elif ours.gate is None:
                layer.down.weight.copy_(theirs.V_kernels[index])
                layer.up.weight.copy_(theirs.W_kernels[index])
                layer.up.bias.copy_(theirs.bias[index])
            else:
                layer.down.weight.copy_(theirs.V_kernels[index].flatten(0, 1))
                layer.mix.copy_(theirs.C_kernels[index])
                layer.up.weight.copy_(torch.cat(list(theirs.U_kernels[index]), dim=1))
                layer.up.bias.copy_(theirs.bias[index].squeeze(1))
        if ours.gate is not None:
            ours.gate.weight.copy_(torch.cat([gate.weight for gate in theirs.gates]))


def gradient_of(network, x):
    x.requires_grad_()
    return torch.autograd.grad(network(x).square().sum(), x)[0]


@pytest.mark.skipif(
    importlib.util.find_spec("torchrec") is None, reason="torchrec is not installed; noxfile.py says how"
)
@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("CrossNet", {}, {}),
        ("LowRankCrossNet", {"low_rank": 5}, {"rank": 5}),
        ("LowRankMixtureCrossNet", {"low_rank": 5, "num_experts": 3}, {"rank": 5, "num_experts": 3}),
    ],
)
def test_equals_torchrec_given_its_weights(name, theirs, ours):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fbgemm's own deprecations while it is imported
        from torchrec.modules import crossnet

    peer = getattr(crossnet, name)(20, 3, **theirs)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.2)
    module = CrossNetwork(20, num_layers=3, **ours)
    from_torchrec(peer, module)
    x = torch.randn(50, 20)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        got, want = module.to(dtype)(x.to(dtype)), peer.to(dtype)(x.to(dtype))
        assert (want - x).abs().max() > 1  # the crosses matter
        # Of the largest number: sums of 20 products in another order, 2**-24 (2**-53) a step, in each of 3 layers.
        assert (got - want).abs().max() <= tolerance * want.abs().max()
        got, want = (gradient_of(network, x.to(dtype, copy=True)) for network in (module, peer))
        assert (got - want).abs().max() <= 4 * tolerance * want.abs().max()  # a step back for each step forward


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    module = drawn(in_dim=4, num_layers=2, dtype=torch.float64, **kind)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_leading_shapes_pass_through(kind):
    module = drawn(in_dim=4, num_layers=2, **kind)
    x = torch.randn(5, 3, 4)
    out = module(x)
    assert out.shape == x.shape
    # The same few products by another kernel: some 2**-24 of numbers up to about 20.
    torch.testing.assert_close(module(x[2, 1]), out[2, 1], rtol=1e-5, atol=1e-5)
    assert module(x[:0]).shape == (0, 3, 4)
    assert module(x.double()).dtype == torch.float32


@pytest.mark.parametrize(("num_experts", "rank"), [(1, None), (1, 8), (4, 8)])
def test_every_matrix_starts_by_xavier_s_rule_for_itself(num_experts, rank):
    module = CrossNetwork(200, num_layers=2, rank=rank, num_experts=num_experts)
    for layer in module.layers:
        if rank is None:
            wanted = [(layer.weight, 1 / 200)]
        else:
            wanted = [(layer.down.weight, 2 / 208), (layer.up.weight, 2 / 208)]
            assert torch.equal(layer.up.bias, torch.zeros(200))
        if num_experts > 1:
            wanted.append((layer.mix, 1 / 8))
        for weight, variance in wanted:
            # The mean square of n normal numbers is off by sqrt(2 / n) of itself at one sigma; here 5 of them.
            assert weight.square().mean().item() == pytest.approx(variance, rel=5 * (2 / weight.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: CrossNetwork(0, num_layers=1), ValueError, ["in_dim", "at least 1"]),
        (lambda: CrossNetwork(3, num_layers=0), ValueError, ["num_layers", "at least 1"]),
        (lambda: CrossNetwork(3, num_layers=1.0), TypeError, ["num_layers", "int"]),
        (lambda: CrossNetwork(3, num_layers=1, rank=0), ValueError, ["rank", "at least 1"]),
        (lambda: CrossNetwork(3, num_layers=1, rank=2, num_experts=0), ValueError, ["num_experts", "at least 1"]),
        (lambda: CrossNetwork(3, num_layers=1, num_experts=2), ValueError, ["rank", "None", "2 experts"]),
        (lambda: CrossNetwork(3, num_layers=1)(torch.ones(5, 4)), ValueError, ["x", "(..., 3)", "(5, 4)"]),
        (lambda: CrossNetwork(3, num_layers=1)(torch.tensor(1.0)), ValueError, ["x", "(..., 3)", "()"]),
        (lambda: CrossNetwork(3, num_layers=1)(torch.ones(3).long()), TypeError, ["x", "int64"]),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
