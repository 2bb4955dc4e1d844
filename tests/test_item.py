import hypothesis
import hypothesis.strategies as st
import oracles
import pytest
import torch

from recblocks.features.item import ItemEncoder

finite = st.floats(-50, 50, width=32)


@hypothesis.given(rows=st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=3))
def test_an_item_is_the_mlp_of_its_content_on_the_unit_sphere(rows):
    module = ItemEncoder(3, 2, hidden_dim=4, dtype=torch.float64)
    weights = [p.tolist() for p in (module.hidden.weight, module.hidden.bias, module.out.weight, module.out.bias)]
    got = module(torch.tensor(rows, dtype=torch.float64))
    want = torch.tensor([oracles.item_vector(row, *weights) for row in rows], dtype=torch.float64)
    # Sums of 4 products of numbers up to 50, in float64; dividing by a length that may be a hundredth of them.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_leading_shapes_pass_through():
    module = ItemEncoder(3, 2, hidden_dim=4)
    x = torch.randn(5, 4, 3)
    out = module(x)
    assert out.shape == (5, 4, 2)
    # A float32 square root and division: 2**-23 a piece.
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(5, 4), rtol=0, atol=4e-7)
    torch.testing.assert_close(module(x[2, 1]), out[2, 1], rtol=0, atol=1e-6)
    assert module(x[:0]).shape == (0, 4, 2)


def test_any_float_input_and_the_dtype_of_the_parameters():
    module = ItemEncoder(3, 2, hidden_dim=4)
    x = torch.randn(5, 3)
    assert module(x.double()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.float32
    # The norm is taken in float32 although the layers ran in bfloat16.
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(5), rtol=0, atol=4e-7)
    assert module.bfloat16()(x).dtype == torch.bfloat16


def test_gradients():
    module = ItemEncoder(3, 2, hidden_dim=4, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ItemEncoder(0, 2, hidden_dim=4), ValueError, ["in_dim", "at least 1"]),
        (lambda: ItemEncoder(3, 2, hidden_dim=0), ValueError, ["hidden_dim", "at least 1"]),
        (lambda: ItemEncoder(3, 2.0, hidden_dim=4), TypeError, ["out_dim", "int"]),
        (lambda: ItemEncoder(3, 2, hidden_dim=4)(torch.ones(5, 4)), ValueError, ["x", "(..., 3)", "(5, 4)"]),
        (lambda: ItemEncoder(3, 2, hidden_dim=4)(torch.tensor(1.0)), ValueError, ["x", "(..., 3)", "()"]),
        (lambda: ItemEncoder(3, 2, hidden_dim=4)(torch.ones(3).long()), TypeError, ["x", "int64"]),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
