import warnings

import hypothesis
import hypothesis.strategies as st
import oracles
import pytest
import torch

from recblocks.sequence.causal_encoder import CausalSequenceEncoder

IN, OUT, SLOTS = 3, 5, 6
# Float64 and a few hundred operations on numbers near 1, but for one division by a length that may be a tenth of them:
# under 1e-13 is typical; the mistakes that these tests look for move an output by more than 1e-3.
EXACT = {"rtol": 0, "atol": 1e-11}


def encoder(num_layers=2, num_heads=2, max_len=SLOTS, **options):
    module = CausalSequenceEncoder(
        IN,
        OUT,
        hidden_dim=4,
        num_layers=num_layers,
        num_heads=num_heads,
        max_len=max_len,
        dtype=torch.float64,
        **options,
    )
    # Biases and norms that are 0 or 1 would hide a missing one.
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def actions(*shape):
    return torch.randn(*shape, IN, dtype=torch.float64)


def pack(x, valid):
    return x[valid], torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0))


masks = (
    st.integers(1, SLOTS)
    .flatmap(lambda slots: st.lists(st.lists(st.booleans(), min_size=slots, max_size=slots), min_size=1, max_size=4))
    .map(torch.tensor)
)
row_lengths = st.lists(st.integers(0, SLOTS), min_size=1, max_size=4).map(torch.tensor)


@hypothesis.given(valid=masks, num_layers=st.integers(1, 3), num_heads=st.sampled_from([1, 2, 4]))
def test_the_equations_of_the_paper_with_holes_anywhere(valid, num_layers, num_heads):
    module = encoder(num_layers, num_heads)
    weights = {name: value.tolist() for name, value in module.state_dict().items()}
    x = actions(*valid.shape)
    got = module(x, valid)
    for row in range(len(valid)):
        want = oracles.causal_encoder_row(x[row].tolist(), valid[row].tolist(), weights, num_layers, num_heads)
        want = [vector or [0.0] * OUT for vector in want]
        torch.testing.assert_close(got[row], torch.tensor(want, dtype=torch.float64), **EXACT)


@hypothesis.given(valid=masks)
def test_unit_norm_where_valid_and_zeros_elsewhere(valid):
    norms = encoder()(actions(*valid.shape), valid).norm(dim=-1)
    # In units of 2**-53: either norm of 5 numbers is off by (1 + 4) / 2 + 1, and the division by 1; together 8.
    torch.testing.assert_close(norms[valid], torch.ones_like(norms[valid]), rtol=0, atol=9 * 2**-53)
    assert (norms[~valid] == 0).all()


@pytest.mark.parametrize("is_packed", [False, True])
@hypothesis.given(slot=st.integers(0, SLOTS - 1), lengths=row_lengths)
def test_no_slot_sees_a_newer_one(is_packed, slot, lengths):
    module = encoder()
    valid = torch.arange(SLOTS) < lengths[:, None]
    x = actions(len(lengths), SLOTS)

    def run(x):
        if not is_packed:
            return module(x, lengths=lengths)
        flat, offsets = pack(x, valid)
        out = x.new_zeros(*x.shape[:2], OUT)
        return out.masked_scatter(valid[..., None], module(flat, offsets=offsets))

    x.requires_grad_()
    out = run(x)
    (grad,) = torch.autograd.grad(out[:, slot].sum(), x)
    assert (grad[:, :slot] == 0).all()
    # A unit vector's sum has a gradient, and attention passes it on to every older action of the row.
    reached = valid & valid[:, slot, None] & (torch.arange(SLOTS) >= slot)
    assert ((grad != 0).any(-1) == reached).all()

    newer = x.detach().clone()
    newer[:, :slot] = actions(len(lengths), slot)
    torch.testing.assert_close(run(newer)[:, slot:], out[:, slot:], rtol=0, atol=0)


@hypothesis.given(valid=masks, poison=st.sampled_from([float("nan"), float("inf"), 1e300]))
def test_what_stands_at_an_invalid_slot_changes_no_output_and_no_gradient(valid, poison):
    module = encoder()
    x = actions(*valid.shape)

    def run(x):
        x = x.clone().requires_grad_()
        out = module(x, valid)
        return out, torch.autograd.grad((out * torch.arange(1.0, OUT + 1)).sum(), [x, *module.parameters()])

    out, grads = run(x)
    got, got_grads = run(x.masked_fill(~valid[..., None], poison))
    assert torch.equal(got, out)
    for ours, theirs in zip(got_grads, grads, strict=True):
        assert torch.equal(ours, theirs)
    assert (grads[0][~valid] == 0).all()


@hypothesis.given(valid=masks)
def test_a_row_does_not_depend_on_its_batch_or_on_more_padding(valid):
    module = encoder()
    x = actions(*valid.shape)
    out = module(x, valid)
    for row in range(len(valid)):
        torch.testing.assert_close(module(x[row : row + 1], valid[row : row + 1])[0], out[row], **EXACT)
    more = SLOTS - valid.shape[1]
    padded = torch.cat([x, actions(len(x), more)], dim=1)
    wider = module(padded, torch.nn.functional.pad(valid, (0, more)))
    torch.testing.assert_close(wider[:, : valid.shape[1]], out, **EXACT)
    assert (wider[:, valid.shape[1] :] == 0).all()


@hypothesis.given(lengths=row_lengths, spare=st.integers(0, 3))
def test_packed_and_padded_give_the_same_numbers_and_gradients(lengths, spare):
    module = encoder(max_len=SLOTS + 3)
    valid = torch.arange(SLOTS) < lengths[:, None]
    x = actions(len(lengths), SLOTS).requires_grad_()
    padded = module(x, lengths=lengths)
    flat, offsets = pack(x, valid)
    packed = module(flat, offsets=offsets, max_length=SLOTS + spare)
    assert packed.shape == (int(lengths.sum()), OUT)
    torch.testing.assert_close(packed, padded[valid], **EXACT)
    torch.testing.assert_close(module(flat, offsets=offsets), packed, **EXACT)

    direction = torch.randn(OUT, dtype=torch.float64)
    inputs = [x, *module.parameters()]
    ours = torch.autograd.grad((packed * direction).sum(), inputs)
    theirs = torch.autograd.grad((padded * direction).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        # Sums over up to 24 slots, of numbers up to 100.
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)


@hypothesis.given(valid=masks, num_layers=st.integers(1, 3), num_heads=st.sampled_from([1, 2, 4]))
def test_newest_only_is_the_embedding_at_the_newest_valid_action(valid, num_layers, num_heads):
    module = encoder(num_layers, num_heads)
    x = actions(*valid.shape).requires_grad_()
    every, got = module(x, valid), module(x, valid, newest_only=True)
    some, first = valid.any(1), valid.int().argmax(1)
    want = every[torch.arange(len(valid)), first].where(some[:, None], 0)
    torch.testing.assert_close(got, want, **EXACT)
    direction = torch.randn(OUT, dtype=torch.float64)
    inputs = [x, *module.parameters()]
    ours = torch.autograd.grad((got * direction).sum(), inputs)
    theirs = torch.autograd.grad((want * direction).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)


@hypothesis.given(lengths=st.lists(st.integers(0, 100), min_size=1, max_size=12).map(torch.tensor))
def test_newest_only_of_packed_sequences_of_many_lengths(lengths):
    module = encoder(num_layers=2, max_len=120)
    x = actions(int(lengths.sum()))
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    every, got = module(x, offsets=offsets), module(x, offsets=offsets, newest_only=True)
    want = torch.zeros(len(lengths), OUT, dtype=torch.float64)
    want[lengths > 0] = every[offsets[:-1][lengths > 0]]
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_newest_only_of_a_row_does_not_see_its_padding_or_its_batch(poison):
    module = encoder()
    x = actions(3, SLOTS)
    lengths = torch.tensor([2, 0, SLOTS])
    want = module(x, lengths=lengths, newest_only=True)
    x[0, 2:], x[1] = poison, poison
    torch.testing.assert_close(module(x, lengths=lengths, newest_only=True), want, rtol=0, atol=0)
    alone = module(x[:1], lengths=lengths[:1], newest_only=True)
    torch.testing.assert_close(alone[0], want[0], **EXACT)
    assert not want[1].any()


def test_newest_only_compiles_and_exports_to_one_graph():
    module = encoder().eval()

    class Newest(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = module

        def forward(self, x, valid):
            return self.encoder(x, valid, newest_only=True)

    x, valid = actions(4, SLOTS), torch.arange(SLOTS) < torch.tensor([[2], [0], [SLOTS], [0]])
    want = Newest()(x, valid)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(Newest(), fullgraph=True, backend="aot_eager")(x, valid), want, **EXACT)
    torch.testing.assert_close(torch.export.export(Newest(), (x, valid)).module()(x, valid), want, **EXACT)
    flat, offsets = pack(x, valid)
    packed = torch.compile(
        lambda flat, offsets: module(flat, offsets=offsets, max_length=SLOTS, newest_only=True),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(packed(flat, offsets), want, **EXACT)


@hypothesis.given(lengths=st.lists(st.integers(0, 100), min_size=1, max_size=12).map(torch.tensor))
@hypothesis.example(lengths=torch.tensor([1] * 10 + [17, 100]))
def test_attention_pads_a_packed_sequence_by_an_eighth_of_the_longest_at_most(lengths):
    module = encoder(num_layers=1, max_len=120)
    valid = torch.arange(100) < lengths[:, None]
    x = actions(len(lengths), 100)
    want = module(x, valid)[valid]
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda q, *args, **more: seen.append(q.shape[0] * q.shape[2]) or attention(q, *args, **more),
        )
        flat, offsets = pack(x, valid)
        got = module(flat, offsets=offsets)
    torch.testing.assert_close(got, want, **EXACT)
    if len(flat):
        assert sum(seen) <= len(flat) + (lengths > 0).sum() * (-(-lengths.max() // 8) - 1)


def test_what_is_traced_takes_packed_sequences_of_other_lengths_too():
    module, x = encoder().requires_grad_(False), actions(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have its old tracer be used no more
        traced = torch.jit.trace(
            lambda x, offsets: module(x, offsets=offsets), (x, torch.tensor([0, 6, 7])), check_trace=False
        )
        for offsets in ([0, 2, 7], [0, 4, 7], [0, 1, 7]):
            got = traced(x, torch.tensor(offsets))
            torch.testing.assert_close(got, module(x, offsets=torch.tensor(offsets)), **EXACT)


@pytest.mark.parametrize("max_length", [1, 2, 3])
def test_a_packed_sequence_over_an_unchecked_max_length_meets_no_other_row(max_length):
    module = encoder()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x, offsets = actions(7), torch.tensor([0, 1, 5, 6, 7])
    out = compiled(x, offsets=offsets, max_length=max_length)
    others = torch.tensor([0, 5, 6])
    torch.testing.assert_close(out[others], module(x[others], offsets=torch.arange(4)), **EXACT)
    x[others] = actions(3)
    torch.testing.assert_close(compiled(x, offsets=offsets, max_length=max_length)[1:5], out[1:5], **EXACT)


@pytest.mark.parametrize("is_packed", [False, True])
def test_nan_at_a_valid_slot_stays_in_its_row(is_packed):
    module = encoder()
    x = actions(3, SLOTS)
    out = module(x)
    x[1, 2] = float("nan")
    offsets = SLOTS * torch.arange(4)
    got = module(x.flatten(0, 1), offsets=offsets).view_as(out) if is_packed else module(x)
    assert got[1].isnan().any()
    torch.testing.assert_close(got[[0, 2]], out[[0, 2]], **EXACT)


@hypothesis.given(lengths=row_lengths)
def test_lengths_are_a_mask_of_the_first_slots_and_no_mask_means_all(lengths):
    module = encoder()
    x = actions(len(lengths), SLOTS)
    assert torch.equal(module(x, lengths=lengths), module(x, torch.arange(SLOTS) < lengths[:, None]))
    assert torch.equal(module(x), module(x, lengths=torch.full_like(lengths, SLOTS)))


def test_a_row_with_nothing_valid_is_zeros_with_zero_gradient():
    module = encoder()
    x = actions(2, SLOTS).requires_grad_()
    out = module(x, lengths=torch.tensor([0, 0]))
    assert (out == 0).all()
    out.sum().backward()
    for tensor in (x, *module.parameters()):
        assert (tensor.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, SLOTS), (2, 0), (0, 0)])
def test_nothing_gives_nothing(shape):
    newest = encoder()(actions(*shape), newest_only=True)
    assert newest.shape == (shape[0], OUT)
    assert newest.requires_grad
    assert not newest.any()
    assert encoder()(actions(*shape)).shape == (*shape, OUT)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_packed_action_gives_none(offsets):
    assert encoder()(actions(0), offsets=torch.tensor(offsets)).shape == (0, OUT)
    newest = encoder()(actions(0), offsets=torch.tensor(offsets), newest_only=True)
    assert newest.shape == (len(offsets) - 1, OUT)
    assert newest.requires_grad


def test_gradients():
    module = encoder(num_layers=1)
    x = actions(2, 4).requires_grad_()
    valid = torch.tensor([[True, False, True, True], [True, True, False, False]])
    assert torch.autograd.gradcheck(lambda x, _: module(x, valid), (x, module.position))


def test_dropout_acts_in_training_only():
    module = encoder(dropout=0.5)
    x = actions(2, SLOTS)
    assert not torch.equal(module(x), module(x))
    module.eval()
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)
    plain = encoder()
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("kept", ["attention weights", "attention output", "feed-forward output"])
def test_dropout_reaches(kept, monkeypatch):
    module = encoder(num_layers=1, dropout=0.5)
    block = module.blocks[0]
    if kept == "attention weights":
        monkeypatch.setattr(block, "_drop", lambda x: x)
    else:
        # Each branch ends in its bias alone, and the other one in nothing; attention's own dropout then has no effect.
        silent, heard = "ffn_out", "attention_out"
        if kept == "feed-forward output":
            silent, heard = heard, silent
        torch.nn.init.zeros_(getattr(block, heard).weight)
        for parameter in getattr(block, silent).parameters():
            torch.nn.init.zeros_(parameter)
    x = actions(1, SLOTS)
    assert not torch.equal(module(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_float_input_gives_the_dtype_of_the_parameters(dtype):
    module = encoder().to(dtype)
    out = module(actions(2, SLOTS))
    assert out.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(actions(2, SLOTS).float()).dtype == dtype
        flat, offsets = pack(actions(2, SLOTS), torch.ones(2, SLOTS, dtype=torch.bool))
        assert module(flat, offsets=offsets).dtype == dtype


def test_autocast_takes_the_norm_in_float32():
    module = encoder().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = module(actions(2, SLOTS)).norm(dim=-1)
    # A float32 square root and division: 2**-23 a piece.
    torch.testing.assert_close(norms, torch.ones(2, SLOTS), rtol=0, atol=4e-7)


def call(*shape, module=None, **arguments):
    return lambda: (module or encoder())(actions(*shape), **arguments)


def build(**changes):
    sizes = {"in_dim": 3, "out_dim": 5, "hidden_dim": 4, "num_layers": 1, "num_heads": 2, "max_len": 6}
    return lambda: CausalSequenceEncoder(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (build(in_dim=0), ValueError, ["in_dim", "at least 1"]),
        (build(num_layers=1.5), TypeError, ["num_layers", "int"]),
        (build(num_heads=3), ValueError, ["num_heads", "hidden_dim = 4", "3"]),
        (build(dropout=1.0), ValueError, ["dropout", "below 1"]),
        (build(dropout=-0.1), ValueError, ["dropout", "at least 0"]),
        (lambda: encoder()(torch.ones(2, 3, 4)), ValueError, ["x", "(B, M, 3)", "(2, 3, 4)"]),
        (lambda: encoder()(torch.ones(2, 3, 3).long()), TypeError, ["x", "int64"]),
        (call(2, 7), ValueError, ["x", "max_len = 6", "(2, 7, 3)"]),
        (call(6), ValueError, ["x", "(B, M, 3)", "(6, 3)"]),
        (call(2, 3, valid=torch.ones(2, 3)), TypeError, ["valid", "bool"]),
        (call(2, 3, valid=torch.ones(2, 4).bool()), ValueError, ["valid", "(2, 3)", "(2, 4)"]),
        (call(2, 3, lengths=torch.tensor([1, 4])), ValueError, ["lengths", "[0, 3]"]),
        (call(2, 3, lengths=torch.tensor([1, -1])), ValueError, ["lengths", "[0, 3]"]),
        (call(2, 3, lengths=torch.tensor([1])), ValueError, ["lengths", "(2)", "(1,)"]),
        (call(2, 3, lengths=torch.tensor([1.0, 2.0])), TypeError, ["lengths", "int64"]),
        (call(1, 1, lengths=torch.tensor([1]), valid=torch.ones(1, 1).bool()), ValueError, ["lengths", "valid"]),
        (call(2, 3, max_length=3), ValueError, ["max_length", "offsets"]),
        (call(4, offsets=torch.tensor([0, 4]), lengths=torch.tensor([4])), ValueError, ["offsets", "alone"]),
        (call(4, offsets=torch.tensor([0, 4]), valid=torch.ones(1, 4).bool()), ValueError, ["offsets", "alone"]),
        (call(1, 4, offsets=torch.tensor([0, 4])), ValueError, ["x", "(T, 3)", "(1, 4, 3)"]),
        (call(4, offsets=torch.tensor([0, 3])), ValueError, ["offsets", "from 0 to 4", "to 3"]),
        (call(4, offsets=torch.tensor([1, 4])), ValueError, ["offsets", "from 0 to 4", "from 1"]),
        (call(4, offsets=torch.tensor([0, 3, 1, 4])), ValueError, ["offsets", "never descend"]),
        (call(4, offsets=torch.tensor([0.0, 4.0])), TypeError, ["offsets", "int64"]),
        (call(4, offsets=torch.empty(0).long()), ValueError, ["offsets", "(B+1,)"]),
        (call(4, offsets=torch.tensor([0, 4]), max_length=3), ValueError, ["offsets", "over 3", "4"]),
        (call(4, offsets=torch.tensor([0, 4]), max_length=7), ValueError, ["max_length", "max_len = 6", "7"]),
        (call(4, offsets=torch.tensor([0, 4]), max_length=4.0), TypeError, ["max_length", "int"]),
        (call(7, offsets=torch.tensor([0, 7])), ValueError, ["offsets", "over 6", "7"]),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
