import hypothesis
import hypothesis.strategies as st
import oracles
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.nn.utils import prune

from recblocks.sequence._post_norm_layer import PostNormLayer
from recblocks.sequence.action_transformer import _LEAST_TOKENS, ActionTransformer

ITEM, TYPE, TYPES, USER, SLOTS, NOW = 4, 2, 3, 3, 5, 1_700_000_000_123
# Float64 and a thousand operations on numbers near 1: under 1e-13 is typical; the mistakes that these tests look for
# (a lost mask, scale, bias or position) move an output by more than 1e-3.
EXACT = {"rtol": 0, "atol": 1e-11}

masks = (
    st.integers(1, SLOTS)
    .flatmap(lambda slots: st.lists(st.lists(st.booleans(), min_size=slots, max_size=slots), min_size=1, max_size=3))
    .map(torch.tensor)
)
fusions = st.sampled_from(["concat", "append", None])
all_positions = st.sampled_from([None, "learned", "sinusoidal", "linear"])


def transformer(**options):
    options = {"item_dim": ITEM, "num_action_types": TYPES, "type_dim": TYPE, "dropout": 0.0, "unit": "ms"} | options
    if options.get("positions") == "learned":
        options["max_len"] = SLOTS
    module = ActionTransformer(**{"hidden_dim": 3, "dtype": torch.float64} | options)
    # Biases and norms that are 0 or 1 would hide a missing one.
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def arguments(module, valid):
    """Random inputs of the kinds that a module takes."""
    rows, slots = valid.shape
    given = {
        "item": torch.randn(rows, slots, ITEM, dtype=torch.float64),
        "action_type": torch.randint(TYPES, (rows, slots)) if module.num_action_types else None,
        "candidate": torch.randn(rows, ITEM, dtype=torch.float64) if module.fusion else None,
        "valid": valid,
    }
    if module.user_dim:
        given["user"] = torch.randn(rows, USER, dtype=torch.float64)
    if module.positions == "linear":
        given["request_time"] = NOW + torch.randint(10**6, (rows,))
        given["action_time"] = NOW - torch.randint(10**9, (rows, slots))
    return given


def differentiable(given):
    """The same inputs, and those of them that have a gradient."""
    given = {name: value.clone() if value is not None else None for name, value in given.items()}
    leaves = [value.requires_grad_() for value in given.values() if value is not None and value.is_floating_point()]
    return given, leaves


def gradients(module, given):
    given, leaves = differentiable(given)
    out, _ = module(**given)
    weights = torch.arange(1.0, module.out_dim + 1, dtype=out.dtype)
    return out, torch.autograd.grad((out * weights).sum(), [*leaves, *module.parameters()], allow_unused=True)


def expected_row(module, given, row):
    action = {name: value[row].tolist() for name, value in given.items() if value is not None}
    weights = {name: value.tolist() for name, value in module.state_dict().items()}
    actions = action["item"]
    if "action_type" in action:
        actions = [
            weights["type_table.weight"][kind] + x for kind, x in zip(action["action_type"], actions, strict=True)
        ]
    user = None
    if "user" in action:
        user = oracles.affine(weights["user_token.weight"], weights["user_token.bias"], action["user"])
    position = {
        None: None,
        "learned": lambda slot: weights["position"][slot],
        "sinusoidal": lambda slot: oracles.sinusoid(slot, module.out_dim),
        "linear": lambda slot: linear_position(weights["age.weight"], action, slot),
    }[module.positions]
    layers = [
        {name.removeprefix(f"layers.{layer}."): value for name, value in weights.items() if f"layers.{layer}." in name}
        for layer in range(len(module.layers))
    ]
    out = oracles.action_transformer_row(
        actions, action["valid"], action.get("candidate"), module.fusion, user, position, layers,
        module.layers[0].num_heads,
    )  # fmt: skip
    return torch.tensor([vector or [0.0] * module.out_dim for vector in out], dtype=torch.float64)


def linear_position(weight, action, slot):
    seconds = 0 if slot == -1 else (action["request_time"] - action["action_time"][slot]) / 1000
    return [w * oracles.math.log(1 + seconds) for (w,) in weight]


@hypothesis.given(
    valid=masks,
    fusion=fusions,
    positions=all_positions,
    types=st.sampled_from([None, TYPES]),
    user_dim=st.sampled_from([None, USER]),
    num_layers=st.integers(1, 2),
    num_heads=st.sampled_from([1, 2]),
)
def test_the_equations_of_the_paper_with_holes_anywhere(
    valid, fusion, positions, types, user_dim, num_layers, num_heads
):
    module = transformer(
        fusion=fusion,
        positions=positions,
        num_action_types=types,
        user_dim=user_dim,
        num_layers=num_layers,
        num_heads=num_heads,
    )
    given = arguments(module, valid)
    out, out_valid = module(**given)
    assert torch.equal(out_valid, functional.pad(valid, (0, fusion == "append"), value=True))
    assert out.shape == (*out_valid.shape, module.out_dim)
    for row in range(len(valid)):
        torch.testing.assert_close(out[row], expected_row(module, given, row), **EXACT)
    assert (out[~out_valid] == 0).all()


@pytest.mark.parametrize("num_heads", [1, 2])
def test_equals_the_layers_of_torch_where_nothing_is_masked(num_heads):
    module = transformer(num_heads=num_heads)
    peers = []
    for layer in module.layers:
        peer = torch.nn.TransformerEncoderLayer(
            module.out_dim, num_heads, dim_feedforward=3, dropout=0.0, batch_first=True, dtype=torch.float64
        )
        names = {
            "self_attn.in_proj_": "qkv.",
            "self_attn.out_proj.": "attention_out.",
            "linear1.": "ffn_hidden.",
            "linear2.": "ffn_out.",
            "norm1.": "attention_norm.",
            "norm2.": "ffn_norm.",
        }
        ours = layer.state_dict()
        peer.load_state_dict({their + of: ours[our + of] for their, our in names.items() for of in ("weight", "bias")})
        peers.append(peer)
    given = arguments(module, torch.ones(3, SLOTS, dtype=torch.bool))
    x = torch.cat([module.type_table(given["action_type"]), given["item"]], dim=2)
    x = torch.cat([x, given["candidate"][:, None].expand(-1, SLOTS, -1)], dim=2)
    for peer in peers:
        x = peer(x)
    torch.testing.assert_close(module(**given)[0], x, **EXACT)


def test_weights_start_as_in_torch():
    torch.manual_seed(1)
    ours = ActionTransformer(item_dim=20, num_layers=1, hidden_dim=64).layers[0]
    peer = torch.nn.TransformerEncoderLayer(40, 1, dim_feedforward=64)
    pairs = {
        "qkv": peer.self_attn.in_proj_weight,
        "attention_out": peer.self_attn.out_proj.weight,
        "ffn_hidden": peer.linear1.weight,
        "ffn_out": peer.linear2.weight,
    }
    for name, theirs in pairs.items():
        # The largest of 1600 or more uniform draws misses the bound by over 1 % with a chance of 1.1e-7.
        torch.testing.assert_close(getattr(ours, name).weight.abs().max(), theirs.abs().max(), rtol=0.02, atol=0)
    assert (ours.qkv.bias == 0).all()
    assert (ours.attention_out.bias == 0).all()


@hypothesis.given(
    valid=masks,
    fusion=fusions,
    positions=all_positions,
    user_dim=st.sampled_from([None, USER]),
    poison=st.sampled_from([float("nan"), float("inf"), 1e300]),
)
def test_what_stands_at_an_invalid_slot_changes_no_output_and_no_gradient(valid, fusion, positions, user_dim, poison):
    module = transformer(fusion=fusion, positions=positions, user_dim=user_dim)
    given = arguments(module, valid)
    out, grads = gradients(module, given)
    assert (grads[0][~valid] == 0).all()
    poisoned = given | {
        "item": given["item"].masked_fill(~valid[..., None], poison),
        "action_type": given["action_type"].masked_fill(~valid, 2**62),
    }
    if positions == "linear":
        poisoned["action_time"] = given["action_time"].masked_fill(~valid, -(2**63))
    got, got_grads = gradients(module, poisoned)
    assert torch.equal(got, out)
    for ours, theirs in zip(got_grads, grads, strict=True):
        assert torch.equal(ours, theirs)


@hypothesis.given(valid=masks, fusion=fusions, positions=all_positions, user_dim=st.sampled_from([None, USER]))
def test_a_row_does_not_depend_on_its_batch_or_on_more_padding(valid, fusion, positions, user_dim):
    module = transformer(fusion=fusion, positions=positions, user_dim=user_dim)
    given = arguments(module, valid)
    out, _ = module(**given)
    for row in range(len(valid)):
        alone = {name: None if value is None else value[row : row + 1] for name, value in given.items()}
        torch.testing.assert_close(module(**alone)[0][0], out[row], **EXACT)

    slots, more = valid.shape[1], SLOTS - valid.shape[1]
    padded = given | {
        "item": functional.pad(given["item"], (0, 0, 0, more), value=7.0),
        "action_type": functional.pad(given["action_type"], (0, more)),
        "valid": functional.pad(valid, (0, more)),
    }
    if positions == "linear":
        padded["action_time"] = functional.pad(given["action_time"], (0, more))
    wider, _ = module(**padded)
    torch.testing.assert_close(wider[:, :slots], out[:, :slots], **EXACT)
    assert (wider[:, slots:SLOTS] == 0).all()
    torch.testing.assert_close(wider[:, SLOTS:], out[:, slots:], **EXACT)


@pytest.mark.parametrize("fusion", ["concat", None])
def test_a_row_with_nothing_valid_is_zeros_with_zero_gradient(fusion):
    module = transformer(fusion=fusion, positions="learned", user_dim=USER)
    out, grads = gradients(module, arguments(module, torch.zeros(2, SLOTS, dtype=torch.bool)))
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("others", [0, 1])
def test_candidates_of_a_user_without_actions_are_zeros_with_zero_gradient(others):
    module = transformer()
    valid = torch.zeros(1 + others, SLOTS, dtype=torch.bool)
    valid[1:] = True
    given, leaves = differentiable(arguments(module, valid))
    candidates = given.pop("candidate")[:, None]
    out = module.encode_candidates(module.encode_user(**given), candidates)[0]
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), [*leaves, *module.parameters()]))


def test_only_an_appended_candidate_has_a_learned_position_beyond_the_actions():
    sizes = {fusion: len(transformer(fusion=fusion, positions="learned").position) for fusion in ("append", "concat")}
    assert sizes == {"append": SLOTS + 1, "concat": SLOTS}


def test_an_appended_candidate_without_actions_is_still_real():
    module = transformer(fusion="append")
    out, valid = module(**arguments(module, torch.zeros(2, SLOTS, dtype=torch.bool)))
    assert valid.tolist() == 2 * [[False] * SLOTS + [True]]
    assert (out[:, :-1] == 0).all()
    assert out[:, -1].isfinite().all()
    assert (out[:, -1] != 0).all()


@pytest.mark.parametrize("shape", [(0, SLOTS), (2, 0), (0, 0)])
@pytest.mark.parametrize("fusion", ["concat", "append", None])
def test_nothing_gives_nothing(shape, fusion):
    for options in ({}, {"user_dim": USER, "positions": "linear"}):
        module = transformer(fusion=fusion, **options)
        out, valid = module(**arguments(module, torch.ones(shape, dtype=torch.bool)))
        slots = shape[1] + (fusion == "append")
        assert out.shape == (shape[0], slots, module.out_dim)
        assert valid.shape == (shape[0], slots)


def test_nan_at_a_valid_slot_stays_in_its_row():
    module = transformer()
    given = arguments(module, torch.ones(3, SLOTS, dtype=torch.bool))
    out, _ = module(**given)
    given["item"][1, 2] = float("nan")
    got, _ = module(**given)
    assert got[1].isnan().any()
    torch.testing.assert_close(got[[0, 2]], out[[0, 2]], **EXACT)


@pytest.mark.parametrize("fusion", ["concat", "append"])
def test_gradients(fusion):
    module = transformer(num_layers=1, fusion=fusion, user_dim=USER, hidden_dim=8)
    valid = torch.tensor([[True, False, True], [False, False, False]])
    given, leaves = differentiable(arguments(module, valid))
    assert torch.autograd.gradcheck(lambda *_: module(**given)[0], leaves)


def one_by_one(module, given, candidates):
    """Every user's row once a candidate: (B, N, S, out_dim)."""
    rows, num, _ = candidates.shape
    repeated = {n: None if x is None else x.repeat_interleave(num, 0) for n, x in given.items() if n != "candidate"}
    out, _ = module(**repeated, candidate=candidates.flatten(0, 1))
    return out.unflatten(0, (rows, num))


@pytest.mark.parametrize(("chunk", "least"), [(1, 0), (2**18, 0), (2**18, 2)])
@hypothesis.given(
    valid=masks,
    positions=all_positions,
    types=st.sampled_from([None, TYPES]),
    user_dim=st.sampled_from([None, USER]),
    num_layers=st.integers(1, 2),
    num_heads=st.sampled_from([1, 2]),
    num=st.integers(1, 3),
)
def test_many_candidates_of_a_user_equal_a_row_each(
    chunk, least, valid, positions, types, user_dim, num_layers, num_heads, num
):
    module = transformer(
        positions=positions, num_action_types=types, user_dim=user_dim, num_layers=num_layers, num_heads=num_heads
    )
    given = arguments(module, valid)
    candidates = torch.randn(len(valid), num, ITEM, dtype=torch.float64)
    want = one_by_one(module, given, candidates)
    del given["candidate"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recblocks.sequence.action_transformer._CACHED_SCORES", chunk)
        patch.setattr("recblocks.sequence.action_transformer._LEAST_TOKENS", least)
        got = module.encode_candidates(module.encode_user(**given), candidates)
    torch.testing.assert_close(got, want, **EXACT)
    assert (got[~valid[:, None].expand(-1, num, -1)] == 0).all()

    one = {name: None if value is None else value[:1] for name, value in given.items()}
    got = module.encode_candidates(module.encode_user(**one), candidates[0])
    torch.testing.assert_close(got, want[0], **EXACT)


class Adapted(torch.nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Doubled(PostNormLayer):
    def forward(self, x, keys):
        return 2 * super().forward(x, keys)


class Wrapped(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, *args):
        return 2 * self.inner(*args)


def without_bias(layer, part):
    old = getattr(layer, part)
    setattr(layer, part, torch.nn.Linear(old.in_features, old.out_features, bias=False, dtype=torch.float64))


def pruned(layer):
    prune.l1_unstructured(layer.qkv, "weight", 0.5)
    with torch.no_grad():
        layer.qkv.weight_orig.mul_(1.5)  # the weight itself is made anew when the part is called


CHANGES = {
    "a part of another class": lambda layers: setattr(layers[1].qkv, "__class__", Adapted),
    "another part of another class": lambda layers: setattr(layers[1].attention_out, "__class__", Adapted),
    "a part without bias": lambda layers: without_bias(layers[1], "qkv"),
    "another part without bias": lambda layers: without_bias(layers[1], "attention_out"),
    "a pruned part": lambda layers: pruned(layers[1]),
    "a hook of a part": lambda layers: layers[1].qkv.register_forward_hook(lambda *given: 2 * given[-1]),
    "a hook of a layer": lambda layers: layers[1].register_forward_hook(lambda *given: 2 * given[-1]),
    "a hook before a layer": lambda layers: layers[1].register_forward_pre_hook(
        lambda _, given: (2 * given[0], *given[1:])
    ),
    "a layer of another class": lambda layers: setattr(layers[1], "__class__", Doubled),
    "a layer in another module": lambda layers: layers.__setitem__(1, Wrapped(layers[1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_many_candidates_go_through_what_was_put_into_a_layer(change, monkeypatch):
    monkeypatch.setattr("recblocks.sequence.action_transformer._LEAST_TOKENS", 0)
    module = transformer()
    given = arguments(module, torch.tensor([[True, True, False, True, False]]))
    candidates = torch.randn(1, 4, ITEM, dtype=torch.float64)
    plain = one_by_one(module, given, candidates)
    CHANGES[change](module.layers)
    want_given = dict(given)
    del given["candidate"]
    got = module.encode_candidates(module.encode_user(**given), candidates)
    want = one_by_one(module, want_given, candidates)
    assert not torch.allclose(want, plain)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_one_plain_head_takes_half_of_the_products(num_heads, monkeypatch):
    """And only where they are many enough, and nothing is dropped."""
    module = transformer(num_heads=num_heads, dropout=0.5).eval()
    calls = []
    monkeypatch.setattr(PostNormLayer, "one_head", lambda self, x, keys: calls.append(x.shape) or self(x, keys))
    given = arguments(module, torch.ones(1, 5, dtype=torch.bool))
    del given["candidate"]
    encoded = module.encode_user(**given)
    enough = _LEAST_TOKENS * module.out_dim // 5 + 1  # candidates, of five tokens each
    module.encode_candidates(encoded, torch.randn(enough - 1, ITEM))
    assert not calls
    module.encode_candidates(encoded, torch.randn(enough, ITEM))
    assert len(calls) == (1 if num_heads == 1 else 0)
    module.train()
    module.encode_candidates(encoded, torch.randn(enough, ITEM))
    assert len(calls) == (1 if num_heads == 1 else 0)


@pytest.mark.parametrize("user_dim", [None, USER])
def test_slots_that_no_user_has_cost_nothing(user_dim):
    module = transformer(user_dim=user_dim)
    valid = torch.tensor([[True, False, False, True, False], [False, False, False, True, False]])
    own = 0 if user_dim is None else 1
    for rows, wanted, has_holes in (
        (valid, [0, 3], True),
        (valid[:1], [0, 3], False),
        (~valid[:1] & valid[1:], [], False),
    ):
        given = arguments(module, rows)
        del given["candidate"]
        encoded = module.encode_user(**given)
        assert encoded.slots.tolist() == wanted
        assert encoded.residual.shape[1] == encoded.values.shape[1] == len(wanted) + own
        assert (encoded.keys is not None) == has_holes


def test_what_is_traced_for_one_user_holds_for_another():
    module = transformer(num_action_types=None)
    candidates = torch.randn(1, 3, ITEM, dtype=torch.float64)

    def encode(item, valid):
        return module.encode_candidates(module.encode_user(item, valid=valid), candidates)

    item = torch.randn(1, 3, ITEM, dtype=torch.float64)
    one, other = torch.tensor([[True, False, True]]), torch.tensor([[False, True, False]])
    traced = make_fx(encode)(item, one)
    torch.testing.assert_close(traced(item, other), encode(item, other), **EXACT)


def test_many_candidates_of_a_user_in_float32_have_the_same_gradients():
    module = transformer(user_dim=USER).float()
    valid = torch.tensor([[True, True, False, True, False]])
    given, leaves = differentiable({n: x.float() if x.is_floating_point() else x for n, x in arguments(module, valid).items()})  # fmt: skip # noqa: E501
    candidates = torch.randn(1, 4, ITEM, requires_grad=True)
    wanted = [leaf for leaf in leaves if leaf is not given["candidate"]] + [candidates, *module.parameters()]
    want = one_by_one(module, given, candidates)
    del given["candidate"]
    got = module.encode_candidates(module.encode_user(**given), candidates)
    # The bar of the block; some hundred float32 roundings of 6e-8 each, by up to ten.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    direction = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad((out * direction).sum(), wanted) for out in (got, want))
    for our, their in zip(ours, theirs, strict=True):
        # Sums of some hundred products, of numbers up to 100.
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("users", "num"), [(1, 0), (0, 3), (2, 0)])
def test_no_candidate_gives_none(users, num):
    module = transformer(user_dim=USER)
    given = arguments(module, torch.ones(users, SLOTS, dtype=torch.bool))
    del given["candidate"]
    out = module.encode_candidates(module.encode_user(**given), torch.randn(users, num, ITEM))
    assert out.shape == (users, num, SLOTS, module.out_dim)


def test_no_action_gives_no_slot_to_candidates():
    for user_dim in (None, USER):
        module = transformer(user_dim=user_dim)
        given = arguments(module, torch.ones(1, 0, dtype=torch.bool))
        del given["candidate"]
        out = module.encode_candidates(module.encode_user(**given), torch.randn(3, ITEM))
        assert out.shape == (3, 0, module.out_dim)


def test_dropout_acts_in_training_only():
    module = transformer(dropout=0.5, hidden_dim=8)
    given = arguments(module, torch.ones(2, SLOTS, dtype=torch.bool))
    assert not torch.equal(module(**given)[0], module(**given)[0])
    module.eval()
    plain = transformer(hidden_dim=8)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(**given)[0], plain(**given)[0], rtol=0, atol=0)


def test_dropout_is_that_of_torch(monkeypatch):
    """The same share at the same four places: where dropout is a scaling by its p, ours equals torch's own layer."""
    monkeypatch.setattr(functional, "dropout", lambda x, p, *_: x * (1 + p))
    seen = []
    attention = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda *args, dropout_p, **more: seen.append(dropout_p) or attention(*args, **more),
    )
    module = transformer(dropout=0.25, num_layers=1)
    layer = module.layers[0]
    x = torch.randn(2, SLOTS, module.out_dim, dtype=torch.float64)
    q, k, v = layer.heads(x)
    attended = layer.attention_out(attention(q, k, v)[:, 0]) * 1.25
    u = layer.attention_norm(x + attended)
    want = layer.ffn_norm(u + 1.25 * layer.ffn_out(1.25 * layer.ffn_hidden(u).relu()))
    torch.testing.assert_close(layer(x, torch.ones(2, SLOTS, dtype=torch.bool)), want, **EXACT)
    assert seen == [0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_float_input_gives_the_dtype_of_the_parameters(dtype):
    module = transformer(user_dim=USER, positions="linear").to(dtype)
    given = arguments(module, torch.ones(2, SLOTS, dtype=torch.bool))
    assert module(**given)[0].dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(**given)[0].dtype == dtype
        candidates = given.pop("candidate")[:, None]
        out = module.encode_candidates(module.encode_user(**given), candidates)
    assert out.dtype == dtype


def test_ages_keep_their_seconds_in_float32():
    """Milliseconds of today in float32 are two minutes apart."""
    module = transformer(positions="linear").float()
    age = torch.tensor([[0, 1, 999, 1000, 60_000, 61_000]])
    got = module._log_age(torch.ones(1, 6, dtype=torch.bool), NOW - age, torch.tensor([NOW]))
    # A division and a log1p in float32.
    torch.testing.assert_close(got, (age.double() / 1000).log1p().float(), rtol=3e-7, atol=0)


def call(options=None, **changes):
    def run():
        module = transformer(**options or {})
        given = arguments(module, torch.tensor([[True, True, False], [True, False, False]])) | changes
        return module(**given)

    return run


def encode(options=None, *, candidates=(3, ITEM), users=1, is_training=True, **changes):
    def run():
        module = transformer(**options or {}).train(is_training)
        given = arguments(module, torch.ones(users, SLOTS, dtype=torch.bool)) | changes
        del given["candidate"]
        return module.encode_candidates(module.encode_user(**given), torch.randn(*candidates))

    return run


LINEAR = {"positions": "linear"}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (call({"item_dim": 0}), ValueError, ["item_dim", "at least 1"]),
        (call({"num_layers": 1.5}), TypeError, ["num_layers", "int"]),
        (call({"user_dim": 0}), ValueError, ["user_dim", "at least 1"]),
        (call({"num_heads": 3}), ValueError, ["num_heads", "out_dim = 10", "3"]),
        (call({"dropout": 1.0}), ValueError, ["dropout", "below 1"]),
        (call({"fusion": "add"}), ValueError, ["fusion", "'concat'", "'add'"]),
        (call({"positions": "rotary"}), ValueError, ["positions", "'learned'", "'rotary'"]),
        (call({"unit": "h"}), ValueError, ["unit", "'ms'", "'h'"]),
        (call({"max_len": 5}), ValueError, ["max_len", "None", "learned"]),
        (lambda: ActionTransformer(item_dim=4, positions="learned"), ValueError, ["max_len", "given", "learned"]),
        (call(item=torch.ones(2, 3, 5)), ValueError, ["item", "(B, S, 4)", "(2, 3, 5)"]),
        (call(item=torch.ones(2, 3, 4).long()), TypeError, ["item", "int64"]),
        (call(valid=torch.ones(2, 3)), TypeError, ["valid", "bool"]),
        (call(valid=torch.ones(2, 4).bool()), ValueError, ["valid", "(2, 3)", "(2, 4)"]),
        (call(action_type=None), ValueError, ["action_type", "given"]),
        (call({"num_action_types": None}, action_type=torch.ones(2, 3).long()), ValueError, ["action_type", "None"]),
        (call(action_type=torch.ones(2, 3)), TypeError, ["action_type", "int64"]),
        (call(action_type=torch.tensor([[0, 3, 9], [0, 0, 0]])), ValueError, ["action_type", "[0, 3)", "got 3"]),
        (call(action_type=torch.tensor([[0, -1, 9], [0, 0, 0]])), ValueError, ["action_type", "[0, 3)", "got -1"]),
        (call(candidate=None), ValueError, ["candidate", "given"]),
        (call({"fusion": None}, candidate=torch.ones(2, 4)), ValueError, ["candidate", "None"]),
        (call(candidate=torch.ones(3, 4)), ValueError, ["candidate", "(2, 4)", "(3, 4)"]),
        (call({"fusion": "append"}, candidate=torch.ones(2, 3)), ValueError, ["candidate", "(2, 4)", "(2, 3)"]),
        (call(user=torch.ones(2, 3)), ValueError, ["user", "None", "user_dim"]),
        (call({"user_dim": 3}, user=None), ValueError, ["user", "given", "user_dim"]),
        (call({"user_dim": 3}, user=torch.ones(2, 4)), ValueError, ["user", "(2, 3)", "(2, 4)"]),
        (call(action_time=torch.ones(2, 3).long()), ValueError, ["action_time", "None", "linear"]),
        (call(LINEAR, request_time=None), ValueError, ["request_time", "given", "linear"]),
        (call(LINEAR, action_time=torch.ones(2, 3)), TypeError, ["action_time", "int64"]),
        (call(LINEAR, request_time=torch.ones(2, 1).long()), ValueError, ["request_time", "(2)", "(2, 1)"]),
        (call(LINEAR, action_time=torch.full((2, 3), NOW + 10**7)), ValueError, ["action_time", "after", "got 3"]),
        (
            call({"positions": "learned"}, item=torch.ones(2, 6, 4), valid=torch.ones(2, 6).bool(),
                 action_type=torch.zeros(2, 6).long()),
            ValueError, ["item", "max_len = 5", "6"],
        ),
        (encode({"fusion": "append"}), ValueError, ["encode_user", "concat", "append"]),
        (encode({"dropout": 0.1}), ValueError, ["encode_user", "eval()", "0.1"]),
        (encode(action_type=torch.full((1, SLOTS), 3)), ValueError, ["action_type", "[0, 3)", "got 3"]),
        (encode(LINEAR, action_time=torch.full((1, SLOTS), NOW + 10**7)), ValueError, ["action_time", "after"]),
        (encode(users=2), ValueError, ["candidates", "(2, N, 4)", "(3, 4)"]),
        (encode(candidates=(3, 5)), ValueError, ["candidates", "(N, 4)", "(3, 5)"]),
        (encode(candidates=(2, 3, 4)), ValueError, ["candidates", "(1, N, 4)", "(2, 3, 4)"]),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_dropout_of_evaluation_does_not_hinder_candidates():
    assert encode({"dropout": 0.1}, is_training=False)().shape == (3, SLOTS, TYPE + 2 * ITEM)
