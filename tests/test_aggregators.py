import hypothesis
import hypothesis.strategies as st
import oracles
import pytest
import torch

from recblocks.sequence.aggregators import AveragePooling, CNNAggregator, LSTMAggregator, RNNAggregator, average_pool

IN, OUT, SLOTS = 3, 4, 6
# Float64, a few hundred operations on numbers below 100: 1e-14 off is typical, under 1e-12 certain. A mistake moves an
# output by more than 1e-3.
EXACT = {"rtol": 0, "atol": 1e-12}

masks = (
    st.integers(1, SLOTS)
    .flatmap(lambda slots: st.lists(st.lists(st.booleans(), min_size=slots, max_size=slots), min_size=1, max_size=4))
    .map(torch.tensor)
)


def actions(*shape):
    return torch.randn(*shape, IN, dtype=torch.float64)


def noisy(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def cnn(kernel_size=3):
    return noisy(CNNAggregator(IN, channels=OUT, kernel_size=kernel_size, dtype=torch.float64))


def recurrent(kind, num_layers=2):
    return noisy(kind(IN, hidden_dim=OUT, num_layers=num_layers, dtype=torch.float64))


MAKERS = {
    "average": lambda: AveragePooling(IN),
    "cnn": cnn,
    "rnn": lambda: recurrent(RNNAggregator),
    "lstm": lambda: recurrent(LSTMAggregator),
}
each_aggregator = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def assert_each_row(module, valid, oracle):
    x = actions(*valid.shape)
    got = module(x, valid)
    assert got.shape == (len(valid), module.out_dim)
    want = [oracle(one, real) for one, real in zip(x.tolist(), valid.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), **EXACT)


@hypothesis.given(valid=masks)
def test_the_average_of_what_is_valid(valid):
    assert_each_row(AveragePooling(IN), valid, lambda x, real: oracles.average_pool(x, real, IN))


@hypothesis.given(valid=masks, kernel_size=st.integers(1, SLOTS + 2))
def test_the_greatest_answer_of_each_filter(valid, kernel_size):
    module = cnn(kernel_size)
    weight, bias = module.filters.weight.tolist(), module.filters.bias.tolist()
    assert_each_row(module, valid, lambda x, real: oracles.cnn_aggregate(x, real, weight, bias))


@pytest.mark.parametrize("kind", [RNNAggregator, LSTMAggregator])
@hypothesis.given(valid=masks, num_layers=st.integers(1, 3))
def test_the_state_after_the_newest_action_read_from_the_oldest(kind, valid, num_layers):
    module = recurrent(kind, num_layers)
    weights = {name: value.tolist() for name, value in module.state_dict().items()}
    options = num_layers, OUT, kind is LSTMAggregator
    assert_each_row(module, valid, lambda x, real: oracles.recurrent_aggregate(x, real, weights, *options))


@pytest.mark.parametrize(("kind", "theirs"), [(RNNAggregator, torch.nn.RNN), (LSTMAggregator, torch.nn.LSTM)])
def test_torchs_own_layers_take_and_give_the_same(kind, theirs):
    layers = theirs(IN, OUT, num_layers=2, batch_first=True, dtype=torch.float64)
    module = kind(IN, hidden_dim=OUT, dtype=torch.float64)
    assert {name: value.shape for name, value in module.state_dict().items()} == {
        name: value.shape for name, value in layers.state_dict().items()
    }
    module.load_state_dict(layers.state_dict())
    x = actions(3, SLOTS)
    want = layers(x.flip(1))[0][:, -1]
    torch.testing.assert_close(module(x, torch.ones(3, SLOTS, dtype=torch.bool)), want, rtol=0, atol=0)
    torch.manual_seed(1)
    layers.reset_parameters()
    torch.manual_seed(1)
    module.reset_parameters()
    for name, value in layers.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)


def test_hand_worked_averages():
    x = torch.tensor([[[1.0], [8.0], [3.0]], [[5.0], [6.0], [7.0]]])
    valid = torch.tensor([[True, False, True], [False, False, False]])
    assert average_pool(x, valid).tolist() == [[2.0], [0.0]]


def test_an_average_in_float16_does_not_overflow():
    x = torch.full((1, 50, 1), 6e4, dtype=torch.float16)
    assert torch.equal(average_pool(x, torch.ones(1, 50, dtype=torch.bool)), x[:, 0])


@each_aggregator
@hypothesis.given(valid=masks, poison=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300]))
def test_what_stands_at_an_invalid_slot_changes_no_output_and_no_gradient(make, valid, poison):
    module, x = make(), actions(*valid.shape)

    def run(x):
        x = x.clone().requires_grad_()
        out = module(x, valid)
        loss = (out * torch.arange(1.0, module.out_dim + 1)).sum()
        return out, torch.autograd.grad(loss, [x, *module.parameters()])

    out, grads = run(x)
    got, got_grads = run(x.masked_fill(~valid[..., None], poison))
    assert torch.equal(got, out)
    for ours, theirs in zip(got_grads, grads, strict=True):
        assert torch.equal(ours, theirs)
    assert (grads[0][~valid] == 0).all()


@each_aggregator
@hypothesis.given(valid=masks)
def test_a_row_does_not_depend_on_its_batch_or_on_more_padding(make, valid):
    module, x = make(), actions(*valid.shape)
    out = module(x, valid)
    for row in range(len(valid)):
        torch.testing.assert_close(module(x[row : row + 1], valid[row : row + 1])[0], out[row], **EXACT)
    more = SLOTS - valid.shape[1]
    longer = torch.cat([x, actions(len(x), more)], dim=1)
    torch.testing.assert_close(module(longer, torch.nn.functional.pad(valid, (0, more))), out, **EXACT)


@each_aggregator
def test_nothing_valid_gives_zeros_and_a_zero_gradient(make):
    module, x = make(), actions(2, SLOTS).requires_grad_()
    out = module(x, torch.zeros(2, SLOTS, dtype=torch.bool))
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), [x, *module.parameters()]):
        assert (grad == 0).all()


@each_aggregator
@pytest.mark.parametrize("shape", [(0, SLOTS), (2, 0), (0, 0)])
def test_no_slot_or_no_row_gives_zeros(make, shape):
    module = make()
    out = module(actions(*shape), torch.ones(shape, dtype=torch.bool))
    assert out.shape == (shape[0], module.out_dim)
    assert (out == 0).all()


@each_aggregator
def test_gradients(make):
    module = make()
    valid = torch.tensor([[True, False, True, True], [False, True, False, False]])
    inputs = (actions(2, 4).requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: module(x, valid), inputs)


@each_aggregator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_float_input_gives_the_dtype_of_the_parameters(make, dtype):
    module = make().to(dtype)
    x = actions(2, SLOTS).to(dtype if not list(module.parameters()) else torch.float64)
    valid = torch.ones(2, SLOTS, dtype=torch.bool)
    assert module(x, valid).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x.to(dtype), valid).dtype == dtype


def test_the_sizes_of_the_paper():
    assert CNNAggregator(IN).filters.weight.shape == (256, IN, 4)
    for kind in (RNNAggregator, LSTMAggregator):
        module = kind(IN)
        assert (module.num_layers, module.out_dim) == (2, 256)


def call(x=None, valid=None, module=None):
    x = actions(2, 3) if x is None else x
    valid = torch.ones(2, 3, dtype=torch.bool) if valid is None else valid
    return lambda: (module or cnn())(x, valid)


@each_aggregator
def test_bad_sequences_are_named(make):
    for x, valid, error, words in [
        (torch.ones(2, 3, 4), None, ValueError, ["x", "(B, S, 3)", "(2, 3, 4)"]),
        (torch.ones(2, 3), None, ValueError, ["x", "(B, S, 3)", "(2, 3)"]),
        (torch.ones(2, 3, 3).long(), None, TypeError, ["x", "int64"]),
        (None, torch.ones(2, 3), TypeError, ["valid", "bool", "float32"]),
        (None, torch.ones(2, 4).bool(), ValueError, ["valid", "(2, 3)", "(2, 4)"]),
    ]:
        with pytest.raises(error) as caught:
            call(x, valid, make())()
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: AveragePooling(0), ValueError, ["in_dim", "at least 1"]),
        (lambda: CNNAggregator(3, channels=0), ValueError, ["channels", "at least 1"]),
        (lambda: CNNAggregator(3, kernel_size=2.0), TypeError, ["kernel_size", "int"]),
        (lambda: RNNAggregator(0), ValueError, ["in_dim", "at least 1"]),
        (lambda: RNNAggregator(3, hidden_dim=-1), ValueError, ["hidden_dim", "at least 1"]),
        (lambda: LSTMAggregator(3, num_layers=0), ValueError, ["num_layers", "at least 1"]),
        (lambda: LSTMAggregator(3, hidden_dim="4"), TypeError, ["hidden_dim", "int"]),
    ],
)
def test_bad_sizes_are_named(build, error, words):
    with pytest.raises(error) as caught:
        build()
    for word in words:
        assert word in str(caught.value)
