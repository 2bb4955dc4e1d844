import hypothesis
import hypothesis.strategies as st
import oracles
import pytest
import torch

from recblocks.sequence.fusion import fuse_append, fuse_concat

sizes = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 3),
        "slots": st.integers(0, 4),
        "type_dim": st.integers(0, 3),
        "item_dim": st.integers(0, 3),
    }
)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def batch(rows, slots, type_dim, item_dim):
    actions, candidate = numbers(rows, slots, type_dim + item_dim), numbers(rows, item_dim)
    return actions, candidate, torch.rand(rows, slots) < 0.5


@hypothesis.given(size=sizes, candidate_dim=st.integers(0, 5))
def test_concat_puts_the_candidate_beside_every_action(size, candidate_dim):
    actions, _, _ = batch(**size)
    candidate = numbers(size["rows"], candidate_dim)
    got = fuse_concat(actions, candidate)
    assert got.shape == (*actions.shape[:2], actions.shape[2] + candidate_dim)
    want = [oracles.fuse_concat(row, own) for row, own in zip(actions.tolist(), candidate.tolist(), strict=True)]
    assert got.tolist() == want


@hypothesis.given(size=sizes)
def test_append_puts_the_candidate_behind_the_actions_with_a_type_of_zeros(size):
    actions, candidate, valid = batch(**size)
    got, got_valid = fuse_append(actions, candidate, valid=valid)
    assert got.shape == (actions.shape[0], actions.shape[1] + 1, actions.shape[2])
    assert got_valid.dtype == torch.bool
    for row in range(size["rows"]):
        one = actions[row].tolist(), candidate[row].tolist(), valid[row].tolist()
        want, want_valid = oracles.fuse_append(*one, actions.shape[2])
        assert got[row].tolist() == want
        assert got_valid[row].tolist() == want_valid


def test_a_hand_worked_append():
    actions = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    got, valid = fuse_append(actions, torch.tensor([[8.0, 9.0]]), valid=torch.tensor([[False, True]]))
    assert got.tolist() == [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0.0, 8.0, 9.0]]]
    assert valid.tolist() == [[False, True, True]]


def test_nan_at_an_invalid_slot_stays_there():
    actions, candidate, valid = batch(3, 4, 2, 3)
    poisoned = actions.masked_fill(~valid[..., None], float("nan"))
    both = fuse_concat(poisoned, candidate)
    assert torch.equal(both[valid], fuse_concat(actions, candidate)[valid])
    assert torch.equal(both[..., 5:], candidate[:, None].expand(-1, 4, -1))
    appended, appended_valid = fuse_append(poisoned, candidate, valid=valid)
    assert torch.equal(appended[appended_valid], fuse_append(actions, candidate, valid=valid)[0][appended_valid])


def test_gradients():
    actions, candidate, valid = batch(2, 3, 2, 2)
    inputs = (actions.requires_grad_(), candidate.requires_grad_())
    assert torch.autograd.gradcheck(fuse_concat, inputs)
    assert torch.autograd.gradcheck(lambda a, c: fuse_append(a, c, valid=valid)[0], inputs)


def test_the_inputs_are_left_as_they_were():
    given = batch(2, 3, 2, 2)
    before = [tensor.clone() for tensor in given]
    actions, candidate, valid = given
    fuse_concat(actions, candidate)
    fuse_append(actions, candidate, valid=valid)
    assert all(torch.equal(tensor, was) for tensor, was in zip(given, before, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_they_compile_into_one_graph():
    actions, candidate, valid = batch(2, 3, 2, 2)

    def both(actions, candidate, valid):
        return (fuse_concat(actions, candidate), *fuse_append(actions, candidate, valid=valid))

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(actions, candidate, valid), both(actions, candidate, valid), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fuse_concat(torch.ones(2, 3), torch.ones(2, 3)), ValueError, ["actions", "(B, S, A)", "(2, 3)"]),
        (lambda: fuse_concat(torch.ones(2, 3, 4), torch.ones(3, 4)), ValueError, ["candidate", "(2, C)", "(3, 4)"]),
        (lambda: fuse_concat(torch.ones(2, 3, 4), torch.ones(2, 1, 4)), ValueError, ["candidate", "(2, 1, 4)"]),
        (lambda: fuse_concat(torch.ones(2, 3, 4).long(), torch.ones(2, 4)), TypeError, ["actions", "int64"]),
        (lambda: fuse_concat([[[1.0]]], torch.ones(1, 1)), TypeError, ["actions", "torch.Tensor", "list"]),
        (lambda: append(candidate=torch.ones(2, 5)), ValueError, ["candidate", "at most 4", "(2, 5)"]),
        (lambda: append(candidate=torch.ones(2, 4).bool()), TypeError, ["candidate", "bool"]),
        (lambda: append(valid=torch.ones(2, 4).bool()), ValueError, ["valid", "(2, 3)", "(2, 4)"]),
        (lambda: append(valid=torch.ones(2, 3)), TypeError, ["valid", "bool", "float32"]),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def append(candidate=None, valid=None):
    candidate = torch.ones(2, 4) if candidate is None else candidate
    valid = torch.ones(2, 3, dtype=torch.bool) if valid is None else valid
    return fuse_append(torch.ones(2, 3, 4), candidate, valid=valid)
