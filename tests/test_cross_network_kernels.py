"""Triton's kernel of a cross network's layer against plain torch; on a GPU, or else in its interpreter."""

import hopper
import pytest
import torch
from poison import inside_nan

from recblocks import CrossNetwork
from recblocks.interaction import cross_network
from recblocks.kernels.cross import dispatch

kernels = pytest.importorskip("recblocks.kernels.cross.triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def drawn(generator, dtype, *shape):
    return inside_nan(torch.randn(shape, generator=generator).to(DEVICE, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "dim", "num_hidden"), [(1, 1, 1), (5, 3, 7), (64, 64, 64), (65, 127, 31), (67, 129, 131)]
)
def test_a_layer_is_that_of_float64(rows, dim, num_hidden, dtype):
    generator = torch.Generator().manual_seed(rows)
    first, crossed = (drawn(generator, dtype, rows, dim) for _ in range(2))
    hidden, weight = drawn(generator, dtype, rows, num_hidden), drawn(generator, dtype, dim, num_hidden)
    bias = drawn(generator, dtype, dim)
    got = dispatch.cross_layer(first, crossed, hidden, weight, bias)
    assert got.dtype == dtype
    by, add, left, right, more = (one.double() for one in (first, crossed, hidden, weight, bias))
    transformed = left @ right.t() + more
    # A product of float32 rounds each of its terms and sums; it and the layer are then rounded to the dtype.
    terms = (left.abs() @ right.abs().t() + more.abs()) * num_hidden.bit_length() * 2**-23
    rounding = torch.finfo(dtype).eps / 2
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        rounding *= 2  # the interpreter cuts off
    allowed = by.abs() * (terms + 2 * rounding * transformed.abs()) + 2 * rounding * add.abs() + 1e-7
    assert ((got.double() - (by * transformed + add)).abs() <= allowed).all()


def test_a_product_is_rounded_as_it_is_by_itself():
    """256 + 1 is no bfloat16: training, which makes the product alone, sees 256, and so does what serves."""
    hidden, weight = torch.tensor([[256.0, 1.0]]), torch.ones(1, 2)
    given = [torch.ones(1, 1), torch.full((1, 1), -256.0), hidden, weight, torch.zeros(1)]
    first, crossed, hidden, weight, bias = (one.to(DEVICE, torch.bfloat16) for one in given)
    assert dispatch.cross_layer(first, crossed, hidden, weight, bias) == 0
    assert torch.addcmul(crossed, first, torch.nn.functional.linear(hidden, weight, bias)) == 0


@pytest.mark.parametrize("kind", [{}, {"rank": 3}, {"rank": 3, "num_experts": 2}])
@pytest.mark.parametrize("shape", [(7,), (2, 5, 7), (0, 7), (66, 7)])
def test_a_network_that_takes_it_gives_what_it_gave(kind, shape, monkeypatch):
    network = CrossNetwork(7, num_layers=3, device=DEVICE, **kind)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    want = network(x)
    monkeypatch.setattr(cross_network, "runs_on", lambda first, *_: first.ndim > 1)
    with torch.no_grad():
        torch.testing.assert_close(network(x), want)


def test_what_takes_the_kernel(monkeypatch):
    network = CrossNetwork(4, num_layers=1)
    last, x = network.layers[0], torch.ones(2, 4)

    def taken(x=x, last=last):
        return dispatch.runs_on(x, x, x, last)

    assert not taken()
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert not taken()
    with torch.no_grad():
        assert taken()
        assert not taken(x[0])
        assert not taken(x.bfloat16())
        assert not taken(x.double(), torch.nn.Linear(4, 4).double())
        assert not taken(last=torch.nn.Identity())
        with monkeypatch.context() as autocast:
            autocast.setattr(torch, "is_autocast_enabled", lambda _: True)
            assert not taken()
        handle = last.register_forward_hook(lambda *_: None)
        assert not taken()
        handle.remove()
        assert taken()
        monkeypatch.setattr(dispatch, "transformed", lambda: True)
        assert not taken()


def test_the_operator_is_one_of_torch_and_has_no_gradient():
    given = [torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)]
    given = [one.to(DEVICE) for one in given]
    torch.library.opcheck(dispatch.cross_layer, tuple(given))
    given[0].requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dispatch.cross_layer(*given).sum().backward()


BUILDING = """
import hopper, torch
from recblocks.kernels.cross import triton as kernel

NUMBERS = dict.fromkeys(("num_rows", "num_columns", "num_hidden"), "i32")
for name, dtype in (("*fp32", torch.float32), ("*bf16", torch.bfloat16), ("*fp16", torch.float16)):
    for aligned in ((), kernel.cross.arg_names[:9]):
        types = dict.fromkeys(kernel.cross.arg_names, name) | NUMBERS
        sizes, options = kernel.sizes_of(dtype)
        hopper.build(kernel.cross, types, sizes, aligned, **options)
"""


def test_the_kernel_builds_for_a_hopper_gpu_spills_nothing_and_uses_its_matrix_unit(tmp_path):
    built = hopper.run(BUILDING, tmp_path)
    assert len(built) == 6
    for one in built:
        assert one.spilled == 0
        assert one.shared <= 232_448
        assert one.products > 0
