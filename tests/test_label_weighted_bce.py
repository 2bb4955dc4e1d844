import hypothesis
import hypothesis.strategies as st
import oracles
import pytest
import torch
from torch.nn import functional as F

from recblocks import attribute_weights, label_weight_matrix, label_weighted_bce_with_logits

# TransAct, Table 7.
TABLE_7 = {
    "click": {"click": 100, "repin": 0, "hide": 100},
    "repin": {"click": 0, "repin": 100, "hide": 100},
    "hide": {"click": 1, "repin": 5, "hide": 10},
}
HEADS = ["click", "repin", "hide"]
BINARY = st.integers(0, 1)
weight = st.one_of(st.just(0.0), st.floats(1e-3, 100))


@st.composite
def batches(draw, label=BINARY):
    rows, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def table(element, *shape):
        if not shape:
            return draw(element)
        return [table(element, *shape[1:]) for _ in range(shape[0])]

    return {
        "logits": table(st.floats(-50, 50), rows, heads),
        "labels": table(label, rows, heads),
        "label_weights": table(weight, heads, heads),
        "sample_weights": table(weight, rows),
        "base_weights": table(weight, heads),
    }


def tensors(batch):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in batch.items()}


@hypothesis.given(batch=st.one_of(batches(), batches(label=st.floats(0, 1))))
def test_equals_the_equations_as_scalar_loops(batch):
    want = [
        [u * loss for loss in oracles.label_weighted_bce(z, y, batch["label_weights"], batch["base_weights"])]
        for z, y, u in zip(batch["logits"], batch["labels"], batch["sample_weights"], strict=True)
    ]
    want = torch.tensor(want, dtype=torch.float64)
    arguments = tensors(batch)
    # A dozen float64 roundings of terms of one sign; the 50 - 50 y of ours may leave 1e-14, times weights of up to 5e4.
    tolerance = {"rtol": 1e-13, "atol": 1e-9}
    for reduction, reduced in (("none", want), ("sum", want.sum()), ("mean", want.sum() / len(want))):
        torch.testing.assert_close(
            label_weighted_bce_with_logits(**arguments, reduction=reduction), reduced, **tolerance
        )
    torch.testing.assert_close(label_weighted_bce_with_logits(**arguments), want.sum(1).mean(), **tolerance)


def test_the_papers_example_of_a_user_who_only_hides():
    matrix = label_weight_matrix(TABLE_7, HEADS)
    loss = label_weighted_bce_with_logits(torch.zeros(1, 3), torch.tensor([[0, 0, 1]]), matrix, reduction="none")
    weights = loss / F.softplus(torch.zeros(()))
    torch.testing.assert_close(weights, torch.tensor([[100.0, 100.0, 10.0]]), rtol=1e-6, atol=0)


def test_the_papers_example_of_a_user_who_only_repins():
    matrix = label_weight_matrix(TABLE_7, HEADS)
    logits = torch.tensor([[9.0, -1.0, 2.0]])
    loss = label_weighted_bce_with_logits(logits, torch.tensor([[0, 1, 0]]), matrix, reduction="none")
    # Predicted clicks cost nothing, the missed repin 100 times log(1 + e), the predicted hide 5 times log(1 + e^2).
    torch.testing.assert_close(loss, torch.tensor([[0.0, 131.32617, 10.63464]]), rtol=1e-6, atol=0)


@hypothesis.given(batch=batches(), ones=st.booleans())
def test_a_matrix_of_zeros_with_base_weights_of_1_is_plain_cross_entropy(batch, ones):
    arguments = tensors(batch)
    logits, labels, matrix = (arguments[name] for name in ("logits", "labels", "label_weights"))
    base = torch.ones(len(matrix))
    sample_weights = torch.ones(len(logits)) if ones else None
    got = label_weighted_bce_with_logits(
        logits, labels, torch.zeros_like(matrix), base_weights=base, sample_weights=sample_weights
    )
    want = F.binary_cross_entropy_with_logits(logits, labels) * len(matrix)  # theirs is also a mean over the heads
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


def test_as_in_the_paper_a_row_without_any_action_weighs_nothing():
    arguments = (torch.randn(4, 3), torch.zeros(4, 3), label_weight_matrix(TABLE_7, HEADS))
    assert label_weighted_bce_with_logits(*arguments) == 0
    assert label_weighted_bce_with_logits(*arguments, base_weights=torch.tensor([0.0, 0.5, 0.0])) > 0


@hypothesis.given(batch=batches(), order=st.randoms(use_true_random=False))
def test_the_order_of_heads_and_rows_does_not_matter(batch, order):
    arguments = tensors(batch)
    rows, heads = (order.sample(range(size), size) for size in arguments["logits"].shape)
    moved = {
        "logits": arguments["logits"][rows][:, heads],
        "labels": arguments["labels"][rows][:, heads],
        "label_weights": arguments["label_weights"][heads][:, heads],
        "sample_weights": arguments["sample_weights"][rows],
        "base_weights": arguments["base_weights"][heads],
    }
    got = label_weighted_bce_with_logits(**moved, reduction="none")
    want = label_weighted_bce_with_logits(**arguments, reduction="none")[rows][:, heads]
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)  # up to 4 non-negative terms in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_stable_far_out(dtype):
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1, 0, 0, 1]])
    matrix = torch.full((4, 4), 3.0)
    loss = label_weighted_bce_with_logits(logits, labels, matrix, reduction="none")
    assert loss.tolist() == [[0.0, 0.0, 6e4, 6e4]]
    loss.sum().backward()
    assert logits.grad.tolist() == [[0.0, 0.0, 6.0, -6.0]]


@hypothesis.given(batch=batches(), poison=st.sampled_from([float("nan"), float("inf")]))
def test_a_row_of_weight_0_is_absent(batch, poison):
    arguments = tensors(batch)
    arguments["sample_weights"][0] = 0
    arguments["logits"][0] = poison
    arguments["labels"][0] = poison
    logits = arguments["logits"].requires_grad_()
    total = label_weighted_bce_with_logits(**arguments, reduction="sum")
    (gradient,) = torch.autograd.grad(total, logits)
    assert gradient[0].tolist() == [0.0] * gradient.shape[1]
    without = {
        name: value if name in ("label_weights", "base_weights") else value[1:] for name, value in arguments.items()
    }
    torch.testing.assert_close(total, label_weighted_bce_with_logits(**without, reduction="sum"), rtol=1e-13, atol=0)
    mean = label_weighted_bce_with_logits(**arguments)
    torch.testing.assert_close(mean, total / len(gradient))  # the mean counts it


def test_no_rows():
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = label_weighted_bce_with_logits(empty, empty.detach(), torch.ones(3, 3), sample_weights=torch.zeros(0))
    assert loss == 0
    loss.backward()
    assert empty.grad.shape == (0, 3)


def test_gradients():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(2, (3, 4))
    matrix, base = torch.rand(4, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    sample_weights = torch.tensor([0.0, 1.0, 2.5])
    for reduction in ("none", "sum", "mean"):
        assert torch.autograd.gradcheck(
            lambda logits, reduction=reduction: label_weighted_bce_with_logits(
                logits,
                labels,
                matrix,
                sample_weights=sample_weights,
                base_weights=base,
                reduction=reduction,
            ),
            logits,
        )


def test_short_floats_and_autocast_compute_in_float32():
    logits, labels = torch.randn(64, 3), torch.randint(2, (64, 3))
    matrix = torch.tensor([[100.25, 3.0, 1.0], [0.3, 7.7, 2.2], [1.1, 0.0, 55.5]])
    want = label_weighted_bce_with_logits(logits, labels, matrix)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(label_weighted_bce_with_logits(logits, labels, matrix), want)
    assert torch.equal(label_weighted_bce_with_logits(logits, labels.bool(), matrix), want)
    short = label_weighted_bce_with_logits(logits.bfloat16(), labels, matrix)
    assert short.dtype == torch.float32
    assert torch.equal(short, label_weighted_bce_with_logits(logits.bfloat16().float(), labels, matrix))


def test_compiles_to_one_graph():
    arguments = {
        "logits": torch.randn(5, 3),
        "labels": torch.randint(2, (5, 3)),
        "label_weights": torch.rand(3, 3),
        "sample_weights": torch.tensor([0.0, 1, 2, 3, 4]),
        "base_weights": torch.rand(3),
    }
    compiled = torch.compile(label_weighted_bce_with_logits, fullgraph=True, backend="aot_eager")
    # The same operators; only their order of summation is the compiler's.
    torch.testing.assert_close(compiled(**arguments), label_weighted_bce_with_logits(**arguments), rtol=1e-6, atol=0)


@hypothesis.given(order=st.permutations(HEADS), inner=st.permutations(HEADS), outer=st.permutations(HEADS))
def test_the_matrix_follows_the_heads_however_the_names_come(order, inner, outer):
    weights = {head: {action: TABLE_7[head][action] for action in inner} for head in outer}
    matrix = label_weight_matrix(weights, order, label_names=tuple(order))
    for i, head in enumerate(order):
        for j, action in enumerate(order):
            assert matrix[i, j].item() == TABLE_7[head][action]


def test_sample_weights_are_products_over_attributes():
    state, location, gender = (torch.tensor(values) for values in ([0, 1, 2, 1], [0, 0, 1, 1], [1, 0, 1, 0]))
    tables = {
        "gender": torch.tensor([0.25, 3.0]),
        "state": torch.tensor([1.0, 2.0, 4.0]),
        "location": torch.tensor([0.5, 1.0]),
    }
    got = attribute_weights({"state": state, "location": location, "gender": gender}, tables)
    assert got.tolist() == [1 * 0.5 * 3, 2 * 0.5 * 0.25, 4 * 1 * 3, 2 * 1 * 0.25]
    assert attribute_weights({"state": state}, {"state": tables["state"]}).tolist() == [1, 2, 4, 2]


ONE = torch.ones(2, 3)
MATRIX = torch.ones(3, 3)
LOSS = label_weighted_bce_with_logits
NEGATIVE = torch.tensor([[1.0, 1, 1], [1, 1, -2], [1, 1, 1]])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: LOSS(ONE.long(), ONE, MATRIX), TypeError, ["logits", "int64"]),
        (lambda: LOSS(ONE[0], ONE, MATRIX), ValueError, ["logits", "(3,)"]),
        (lambda: LOSS(ONE, ONE[:, :2], MATRIX), ValueError, ["labels", "(2, 3)", "(2, 2)"]),
        (lambda: LOSS(ONE, ONE.to(torch.complex64), MATRIX), TypeError, ["labels", "complex64"]),
        (lambda: LOSS(ONE, 2 * ONE, MATRIX), ValueError, ["labels", "0 to 1", "2.0"]),
        (lambda: LOSS(ONE, -ONE.long(), MATRIX), ValueError, ["labels", "0 to 1", "-1.0"]),
        (lambda: LOSS(ONE, torch.nan * ONE, MATRIX), ValueError, ["labels", "nan"]),
        (lambda: LOSS(ONE, ONE, MATRIX[:2]), ValueError, ["label_weights", "(3, 3)", "(2, 3)"]),
        (lambda: LOSS(ONE, ONE, MATRIX.long()), TypeError, ["label_weights", "int64"]),
        (lambda: LOSS(ONE, ONE, NEGATIVE), ValueError, ["label_weights", "at least 0", "-2.0"]),
        (lambda: LOSS(ONE, ONE, torch.inf * MATRIX), ValueError, ["label_weights", "finite", "inf"]),
        (lambda: LOSS(ONE, ONE, MATRIX, sample_weights=torch.ones(3)), ValueError, ["sample_weights", "(2)", "(3,)"]),
        (lambda: LOSS(ONE, ONE, MATRIX, sample_weights=-torch.ones(2)), ValueError, ["sample_weights", "at least 0"]),
        (lambda: LOSS(ONE, ONE, MATRIX, base_weights=torch.ones(2)), ValueError, ["base_weights", "(3)", "(2,)"]),
        (lambda: LOSS(ONE, ONE, MATRIX, base_weights=-torch.ones(3)), ValueError, ["base_weights", "at least 0"]),
        (lambda: LOSS(ONE, ONE, MATRIX, reduction="batch"), ValueError, ["reduction", "'mean'", "'batch'"]),
    ],
)
def test_bad_input_to_the_loss_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: label_weight_matrix(TABLE_7, HEADS, label_names=["repin", "click", "hide"]),
            ValueError,
            ["label_names", "['click', 'repin', 'hide']", "['repin', 'click', 'hide']"],
        ),
        (lambda: label_weight_matrix(TABLE_7, HEADS[:2]), ValueError, ["weights", "with ['hide']"]),
        (lambda: label_weight_matrix(TABLE_7, [*HEADS, "share"]), ValueError, ["weights", "without ['share']"]),
        (
            lambda: label_weight_matrix(TABLE_7 | {"hide": {"click": 1, "hide": 10}}, HEADS),
            ValueError,
            ["weights['hide']", "without ['repin']"],
        ),
        (
            lambda: label_weight_matrix({"a": {"a": 1, "b": 2}}, ["a"]),
            ValueError,
            ["weights['a']", "with ['b']"],
        ),
        (lambda: label_weight_matrix({"a": {"a": -1}}, ["a"]), ValueError, ["weights['a']['a']", "at least 0", "-1"]),
        (lambda: label_weight_matrix({"a": {"a": float("nan")}}, ["a"]), ValueError, ["weights['a']['a']", "nan"]),
        (lambda: label_weight_matrix({"a": {"a": "1"}}, ["a"]), TypeError, ["weights['a']['a']", "'1'"]),
        (lambda: label_weight_matrix({"a": [1]}, ["a"]), TypeError, ["weights['a']", "mapping"]),
        (lambda: label_weight_matrix([[1]], ["a"]), TypeError, ["weights", "mapping"]),
        (lambda: label_weight_matrix({}, []), ValueError, ["heads", "none"]),
        (lambda: label_weight_matrix({"a": {"a": 1}}, "a"), TypeError, ["heads", "'a'"]),
        (lambda: label_weight_matrix({0: {0: 1}}, [0]), TypeError, ["heads", "[0]"]),
        (lambda: label_weight_matrix({"a": {"a": 1}}, ["a", "a"]), ValueError, ["heads", "differ"]),
    ],
)
def test_bad_names_and_weights_of_the_matrix_are_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


STATE = torch.tensor([0, 1])
TABLE = torch.ones(2)


@pytest.mark.parametrize(
    ("attributes", "tables", "error", "words"),
    [
        ({}, {}, ValueError, ["attributes", "none"]),
        ([STATE], {"state": TABLE}, TypeError, ["attributes", "mapping"]),
        ({"state": STATE}, [TABLE], TypeError, ["tables", "mapping"]),
        ({"state": STATE}, {"gender": TABLE}, ValueError, ["tables", "without ['state']", "with ['gender']"]),
        ({"state": STATE + 1}, {"state": TABLE}, ValueError, ["attributes['state']", "below 2", "got 2"]),
        ({"state": STATE - 1}, {"state": TABLE}, ValueError, ["attributes['state']", "at least 0", "got -1"]),
        ({"state": STATE.int()}, {"state": TABLE}, TypeError, ["attributes['state']", "int32"]),
        ({"a": STATE, "b": STATE[:1]}, {"a": TABLE, "b": TABLE}, ValueError, ["attributes['b']", "(2)", "(1,)"]),
        ({"state": STATE}, {"state": -TABLE}, ValueError, ["tables['state']", "at least 0"]),
        ({"state": STATE}, {"state": TABLE[None]}, ValueError, ["tables['state']", "(1, 2)"]),
    ],
)
def test_bad_attributes_are_named(attributes, tables, error, words):
    with pytest.raises(error) as caught:
        attribute_weights(attributes, tables)
    for word in words:
        assert word in str(caught.value)
