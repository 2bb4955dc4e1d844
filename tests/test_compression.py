import hypothesis
import hypothesis.strategies as st
import oracles
import pytest
import torch

from recblocks.sequence.compression import OutputCompression, compress_output

WIDTH, MAX_LEN = 3, 6

masks = (
    st.integers(1, MAX_LEN)
    .flatmap(lambda slots: st.lists(st.lists(st.booleans(), min_size=slots, max_size=slots), min_size=1, max_size=4))
    .map(torch.tensor)
)


def outputs(*shape):
    return torch.randn(*shape, WIDTH, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def table_4(num_columns, num_slots, seed=0):
    """The eight rows of the paper's table: (the block, which columns it takes, whether it pools)."""
    drawn = {"columns": "random", "max_len": MAX_LEN, "max_pool": False}
    one = OutputCompression(1, **drawn, generator=seeded(seed))
    some = OutputCompression(num_columns, **drawn, generator=seeded(seed))
    everything = list(range(num_slots))
    return {
        "a random col": (one, one.slots.tolist(), False),
        "first col": (OutputCompression(1, max_pool=False), [0], False),
        "random K cols": (some, some.slots.tolist(), False),
        "first K cols": (OutputCompression(num_columns, max_pool=False), list(range(num_columns)), False),
        "all cols": (OutputCompression(num_slots, columns="all", max_pool=False), everything, False),
        "max pooling": (OutputCompression(0), [], True),
        "first K cols + max pool": (OutputCompression(num_columns), list(range(num_columns)), True),
        "all cols + max pool": (OutputCompression(num_slots, columns="all"), everything, True),
    }


ROWS_OF_TABLE_4 = list(table_4(1, 1))


@pytest.mark.parametrize("row_of_table", ROWS_OF_TABLE_4)
@hypothesis.given(valid=masks, num_columns=st.integers(1, MAX_LEN), seed=st.integers(0, 5))
def test_each_row_of_table_4(row_of_table, valid, num_columns, seed):
    block, columns, max_pool = table_4(num_columns, valid.shape[1], seed)[row_of_table]
    x = outputs(*valid.shape)
    got = block(x, valid)
    assert got.shape == (len(valid), block.out_columns * WIDTH)
    want = [
        oracles.compress_output(one, real, columns, max_pool, WIDTH)
        for one, real in zip(x.tolist(), valid.tolist(), strict=True)
    ]
    assert got.tolist() == want


@hypothesis.given(
    valid=masks, columns=st.lists(st.integers(0, 2 * MAX_LEN), max_size=5).map(lambda c: torch.tensor(c).long())
)
def test_any_columns_in_any_order_and_beyond_the_sequence(valid, columns):
    x = outputs(*valid.shape)
    for max_pool in (True, False):
        got = compress_output(x, columns, valid, max_pool=max_pool)
        for row in range(len(valid)):
            one = x[row].tolist(), valid[row].tolist(), columns.tolist()
            assert got[row].tolist() == oracles.compress_output(*one, max_pool, WIDTH)


def test_a_hand_worked_example():
    x = torch.tensor([[[-1.0, -2.0], [5.0, 5.0], [-3.0, -1.0]]])
    got = OutputCompression(2)(x, torch.tensor([[True, False, True]]))
    assert got.tolist() == [[-1.0, -2.0, 0.0, 0.0, -1.0, -1.0]]


@pytest.mark.parametrize("row_of_table", ROWS_OF_TABLE_4)
@hypothesis.given(valid=masks, poison=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300]))
def test_what_stands_at_an_invalid_slot_changes_no_output_and_no_gradient(row_of_table, valid, poison):
    block, _, _ = table_4(3, valid.shape[1])[row_of_table]
    x = outputs(*valid.shape)

    def run(x):
        x = x.clone().requires_grad_()
        out = block(x, valid)
        (grad,) = torch.autograd.grad((out * torch.arange(1.0, out.shape[1] + 1)).sum(), x)
        return out, grad

    out, grad = run(x)
    got, got_grad = run(x.masked_fill(~valid[..., None], poison))
    assert torch.equal(got, out)
    assert torch.equal(got_grad, grad)
    assert (grad[~valid] == 0).all()


@hypothesis.given(valid=masks)
def test_a_row_does_not_depend_on_its_batch_or_on_more_padding(valid):
    x = outputs(*valid.shape)
    more = MAX_LEN - valid.shape[1]
    longer = torch.cat([x, outputs(len(x), more)], dim=1)
    longer_valid = torch.nn.functional.pad(valid, (0, more))
    for name, (block, _, _) in table_4(4, valid.shape[1]).items():
        out = block(x, valid)
        for row in range(len(valid)):
            assert torch.equal(block(x[row : row + 1], valid[row : row + 1])[0], out[row])
        if not name.startswith("all"):
            assert torch.equal(block(longer, longer_valid), out)


def test_nothing_valid_gives_zeros_and_a_zero_gradient():
    x = outputs(2, 4).requires_grad_()
    out = OutputCompression(3)(x, torch.zeros(2, 4, dtype=torch.bool))
    assert out.tolist() == [[0.0] * 4 * WIDTH] * 2
    out.sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_no_slot_or_no_row_gives_zeros(shape):
    out = OutputCompression(3)(outputs(*shape), torch.ones(shape, dtype=torch.bool))
    assert out.shape == (shape[0], 4 * WIDTH)
    assert (out == 0).all()


def test_gradients():
    valid = torch.tensor([[True, False, True, True], [False, True, False, False]])
    for block, _, _ in table_4(2, 4).values():
        assert torch.autograd.gradcheck(block, (outputs(2, 4).requires_grad_(), valid))


@hypothesis.given(num_slots=st.integers(1, MAX_LEN), seed=st.integers(0, 20))
def test_random_columns_are_distinct_ascending_and_the_generators(num_slots, seed):
    options = {"columns": "random", "max_len": MAX_LEN}
    before = torch.get_rng_state()
    slots = OutputCompression(num_slots, **options, generator=seeded(seed)).slots
    assert torch.equal(torch.get_rng_state(), before)
    assert slots.dtype == torch.int64
    assert slots[0] >= 0
    assert slots[-1] < MAX_LEN
    assert (slots.diff() > 0).all()
    assert torch.equal(OutputCompression(num_slots, **options, generator=seeded(seed)).slots, slots)


def test_every_slot_is_drawn_equally_often():
    generator, times = seeded(), 3000
    block = OutputCompression(2, columns="random", max_len=MAX_LEN)
    drawn = torch.zeros(MAX_LEN)
    for _ in range(times):
        block.reset_parameters(generator=generator)
        drawn[block.slots] += 1
    # A slot is drawn with probability 1/3; 5 standard errors.
    share = 2 / MAX_LEN
    assert ((drawn / times - share).abs() <= 5 * (share * (1 - share) / times) ** 0.5).all()


def test_random_columns_are_saved_and_stay_the_same_whatever_the_mode():
    options = {"columns": "random", "max_len": 50, "max_pool": False}
    block, other = (OutputCompression(10, **options, generator=seeded(seed)) for seed in (1, 2))
    x, valid = outputs(3, 50), torch.rand(3, 50) < 0.8
    want = block(x, valid)
    assert not torch.equal(other(x, valid), want)
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x, valid), want)
    assert torch.equal(block.eval()(x, valid), want)
    assert OutputCompression(10).state_dict() == {}


def build(num_slots, **options):
    return lambda: OutputCompression(num_slots, **options)


def call(*shape, block=None, valid=None):
    valid = torch.ones(shape, dtype=torch.bool) if valid is None else valid
    return lambda: (block or OutputCompression(2))(outputs(*shape), valid)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (build(-1), ValueError, ["num_slots", "at least 0", "-1"]),
        (build(1.0), TypeError, ["num_slots", "int", "1.0"]),
        (build(0, max_pool=False), ValueError, ["num_slots", "at least 1", "0"]),
        (build(0, columns="all"), ValueError, ["num_slots", "at least 1"]),
        (build(0, columns="random", max_len=3), ValueError, ["num_slots", "at least 1"]),
        (build(3, columns="last"), ValueError, ["columns", "'first'", "'random'", "'all'", "'last'"]),
        (build(3, columns="random"), TypeError, ["max_len", "int", "None"]),
        (build(3, columns="random", max_len=2), ValueError, ["max_len", "num_slots = 3", "2"]),
        (build(3, max_len=5), ValueError, ["max_len", "None", "first", "5"]),
        (build(3, columns="all", max_len=3), ValueError, ["max_len", "None", "all", "3"]),
        (call(2, 3, block=OutputCompression(4, columns="all")), ValueError, ["x", "num_slots = 4", "(2, 3, 3)"]),
        (call(2, 5, block=OutputCompression(4, columns="all")), ValueError, ["x", "num_slots = 4", "(2, 5, 3)"]),
        (
            call(2, 5, block=OutputCompression(1, columns="random", max_len=4)),
            ValueError,
            ["x", "max_len = 4", "(2, 5, 3)"],
        ),
        (call(2), ValueError, ["x", "(B, S, D)", "(2, 3)"]),
        (call(2, 3, valid=torch.ones(2, 4).bool()), ValueError, ["valid", "(2, 3)", "(2, 4)"]),
        (call(2, 3, valid=torch.ones(2, 3)), TypeError, ["valid", "bool", "float32"]),
        (lambda: OutputCompression(2)(torch.ones(2, 3, 4).long(), torch.ones(2, 3).bool()), TypeError, ["x", "int64"]),
        (
            lambda: compress_output(outputs(1, 2), torch.tensor([0, -1]), torch.ones(1, 2).bool()),
            ValueError,
            ["columns", "at least 0", "-1"],
        ),
        (
            lambda: compress_output(outputs(1, 2), torch.tensor([0.0]), torch.ones(1, 2).bool()),
            TypeError,
            ["columns", "int64"],
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
