"""Triton's kernel of TransAct's encoder against plain torch; on a GPU, or else in its interpreter."""

import copy

import hopper
import pytest
import torch

from recblocks import ActionTransformer, OutputCompression
from recblocks.kernels.action_transformer import dispatch
from recblocks.sequence import action_transformer

kernels = pytest.importorskip("recblocks.kernels.action_transformer.triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Which slots are filled is not looked at."""
    every = lambda valid: (torch.arange(valid.shape[1], device=valid.device), False)  # noqa: E731
    monkeypatch.setattr(action_transformer, "_slots_of_any", every)


def drawn(dtype=torch.float32, **options):
    """A model whose biases and norms are not at their start."""
    generator = torch.Generator().manual_seed(0)
    model = ActionTransformer(num_action_types=3, **options).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.2 * torch.randn(one.shape, generator=generator))
    return model.to(DEVICE, dtype)


def users(model, rows, slots, num, share):
    """Some users, of whom the first acted in no slot, and candidates of each."""
    generator = torch.Generator().manual_seed(1)
    valid = torch.rand(rows, slots, generator=generator) < share
    valid[0] = False
    given = {
        "item": torch.randn(rows, slots, model.item_dim, generator=generator),
        "action_type": torch.randint(3, (rows, slots), generator=generator),
        "valid": valid,
    }
    if model.user_dim is not None:
        given["user"] = torch.randn(rows, model.user_dim, generator=generator)
    candidates = torch.randn(rows, num, model.item_dim, generator=generator)
    return {name: one.to(DEVICE) for name, one in given.items()}, candidates.to(DEVICE)


def both(model, given, candidates, monkeypatch, **options):
    """What the kernel gives, and what plain torch does."""
    found = []
    with torch.no_grad():
        for taken in (True, False):
            monkeypatch.setattr(action_transformer, "runs_on", lambda *_, taken=taken: taken)
            found.append(model.encode_candidates(model.encode_user(**given), candidates, **options))
    return found


@pytest.mark.parametrize(
    ("slots", "sizes"),
    [
        (1, {"item_dim": 1, "type_dim": 1, "num_layers": 1, "hidden_dim": 1}),
        (17, {"item_dim": 5, "type_dim": 3, "num_layers": 3, "hidden_dim": 33}),
        (33, {"item_dim": 16, "type_dim": 8, "num_heads": 2}),
        (40, {"item_dim": 32, "type_dim": 40, "num_heads": 1, "user_dim": 7}),
    ],
)
@pytest.mark.parametrize("share", [0.6, 1.1])
def test_it_gives_what_plain_torch_gives(slots, sizes, share, monkeypatch):
    model = drawn(**sizes)
    given, candidates = users(model, 2, slots, 3, share)
    got, want = both(model, given, candidates, monkeypatch)
    # Some hundred operations on numbers that norms hold near 1, each rounded to float32.
    torch.testing.assert_close(got, want, rtol=0, atol=100 * torch.finfo(torch.float32).eps * want.abs().max().item())
    assert not got[~given["valid"][:, None].expand(got.shape[:3])].any()


@pytest.mark.parametrize(("num_slots", "max_pool"), [(0, True), (3, True), (3, False), (9, True), (12, True)])
def test_it_compresses_what_it_gives(num_slots, max_pool, monkeypatch):
    model = drawn(item_dim=4, type_dim=2)
    given, candidates = users(model, 3, 9, 2, 0.5)
    compression = OutputCompression(num_slots, max_pool=max_pool)
    got, want = both(model, given, candidates, monkeypatch, compression=compression)
    assert got.shape == (3, 2, (num_slots + max_pool) * model.out_dim)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    one, whole = both(
        model, {name: x[1:2] for name, x in given.items()}, candidates[1], monkeypatch, compression=compression
    )
    torch.testing.assert_close(one, got[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(whole, got[1], rtol=0, atol=1e-5)


def test_columns_that_are_not_the_first_are_compressed_as_ever(monkeypatch):
    model = drawn(item_dim=4, type_dim=2)
    given, candidates = users(model, 2, 9, 2, 0.5)
    compression = OutputCompression(4, columns="random", max_len=9, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(model, "_in_one_kernel", None)
    got, want = both(model, given, candidates, monkeypatch, compression=compression.to(DEVICE))
    assert torch.equal(got, want)
    whole = model.encode_candidates(model.encode_user(**given), candidates)
    picked = whole[:, :, compression.slots].flatten(2)
    torch.testing.assert_close(got[:, :, : picked.shape[2]], picked)


def test_a_layer_that_was_swapped_is_called(monkeypatch):
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    model = drawn(item_dim=4, type_dim=2)
    given, candidates = users(model, 2, 5, 2, 0.5)
    plain = both(model, given, candidates, monkeypatch)[1]
    adapted = Adapted(32, model.out_dim)
    adapted.load_state_dict(model.layers[1].ffn_out.state_dict())
    model.layers[1].ffn_out = adapted
    got, want = both(model, given, candidates, monkeypatch)
    assert torch.equal(got, want)
    assert not torch.allclose(got, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_float64_than_plain_torch(dtype, monkeypatch):
    model = drawn(dtype, item_dim=16, type_dim=8)
    given, candidates = users(model, 2, 20, 3, 0.7)
    given["item"], candidates = given["item"].to(dtype), candidates.to(dtype)
    got, plain = both(model, given, candidates, monkeypatch)
    exact = copy.deepcopy(model).double()
    _, want = both(exact, given | {"item": given["item"].double()}, candidates.double(), monkeypatch)
    # The interpreter cuts off where a GPU rounds to bfloat16, which is twice as far.
    more = 2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1
    assert (got.double() - want).norm() <= more * (plain.double() - want).norm()


def test_what_takes_the_kernel(monkeypatch):
    model = drawn(torch.bfloat16, item_dim=4, type_dim=2)
    given, candidates = users(model, 1, 5, 2, 0.5)
    with torch.no_grad():
        encoded = model.encode_user(**given)
    layers = [one for layer in model.layers for one in layer.parameters()]
    user, candidates = list(encoded[:4]), candidates.bfloat16()

    def taken(user=user, valid=encoded.valid, candidates=candidates, layers=layers):
        return dispatch.runs_on(user, valid, candidates, layers)

    with torch.no_grad():
        assert taken() == (DEVICE == "cuda")
        monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
        assert taken()
        assert not taken(candidates=candidates.float())
        assert not taken(layers=[*layers[1:], layers[0].half()])
        assert not taken(layers=[*layers, *layers[:12]])
        assert not taken(user=[torch.ones(1, 129, 10).bfloat16(), *user[1:]])
        assert not taken(valid=encoded.valid[:, :0])
        with monkeypatch.context() as autocast:
            autocast.setattr(torch, "is_autocast_enabled", lambda _: True)
            assert not taken()
    assert not taken()


def test_the_operator_is_one_of_torch():
    model = drawn(item_dim=4, type_dim=2)
    given, candidates = users(model, 2, 5, 3, 0.5)
    with torch.no_grad():
        encoded = model.encode_user(**given)
        layers = [one.detach() for layer in model.layers for one in layer.parameters()]
        own = model._own(candidates)
    for keys, num_slots, max_pool in ((encoded.keys, 5, False), (None, 2, True)):
        how = list(encoded[:4]), keys, encoded.valid, layers, 1, num_slots, max_pool, 1e-5
        torch.library.opcheck(dispatch.encode_candidates, (candidates, own, *how))


BUILDING = """
import hopper
from recblocks.kernels.action_transformer import triton as kernel

for name, tokens, item, dim, hidden, heads, layers, masked, pooled in (
    ("*bf16", 100, 32, 96, 32, 1, 2, True, 1),
    ("*fp16", 100, 32, 96, 32, 1, 2, True, 1),
    ("*bf16", 101, 32, 128, 128, 1, 2, True, 1),
    ("*bf16", 128, 64, 128, 64, 4, 2, True, 1),
    ("*bf16", 50, 32, 96, 32, 2, 2, False, 1),
    ("*bf16", 17, 5, 13, 33, 1, 1, True, 0),
):
    types = dict.fromkeys(("out", "candidates", "own"), name) | dict.fromkeys(("keys", "valid"), "*u8")
    types |= {"user": (name,) * 4, "halves": ((name,) * 8,) * layers, "attentions": ((name,) * 4,) * (layers - 1)}
    types |= {"num_candidates": "i32", "scale": "fp32", "epsilon": "fp32"}
    sizes, options = kernel.sizes_of(tokens, 0, item, dim, hidden)
    fixed = sizes | {"HEADS": heads, "HEAD": dim // heads, "SLOTS": 10, "POOLED": pooled, "HOW": "tf32x3"}
    fixed |= {} if masked else {"keys": None}
    hopper.build(kernel.encode, types, fixed, ["out", "candidates", "own"], **options)
"""


def test_the_kernel_builds_for_a_hopper_gpu_spills_nothing_and_uses_its_matrix_unit(tmp_path):
    built = hopper.run(BUILDING, tmp_path)
    assert len(built) == 6
    for one in built:
        assert one.spilled == 0
        assert one.shared <= 232_448
        assert one.products > 0
