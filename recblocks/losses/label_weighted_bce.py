"""Binary cross entropy of several heads, each weighted by what the user did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from recblocks import _checks
from recblocks.kernels import dispatch

_LABELS = (torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def label_weighted_bce_with_logits(
    logits: Tensor,
    labels: Tensor,
    label_weights: Tensor,
    *,
    sample_weights: Tensor | None = None,
    base_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross entropy from logits, weighted by a matrix of heads and actions.

    ``l_bh = -u_b w_bh (y_bh log f_bh + (1 - y_bh) log(1 - f_bh))`` with ``f = sigmoid(logits)`` and
    ``w_bh = base_h + Σ_a M[h, a] y_ba``.

    A row of sample weight 0 is absent: it may hold NaN and changes neither loss nor gradient. The loss is float32
    (float64 where an argument is), under autocast too.

    Args:
        logits: (B, H) floating point, one column a head.
        labels: (B, H) what the user did, bool, int64 or floating point from 0 to 1, in the order of the heads: column h
            is both head h's truth y_h and action h.
        label_weights: (H, H) M[head, action], at least 0; `label_weight_matrix` builds it from names.
        sample_weights: (B,) u, at least 0, such as what `attribute_weights` returns; None is 1 each.
        base_weights: (H,) at least 0; None is 0 each, as in the paper. Without them a row without any action weighs 0.
        reduction: "none" gives (B, H) l_bh; "sum" their sum; "mean" that sum over B. B counts every row, and the
            weights do not divide it, as in the paper.

    Returns:
        (B, H), or a scalar; the mean of no rows is 0.

    Raises:
        TypeError, ValueError: a wrong shape or dtype, an unknown reduction; and on a CPU a label outside 0..1, or a
            weight that is negative or not finite.

    Example:
        >>> matrix = torch.tensor([[100.0, 0, 100], [0, 100, 100], [1, 5, 10]])  # click, repin, hide
        >>> hidden_pin = torch.tensor([[0, 0, 1]])
        >>> loss = label_weighted_bce_with_logits(torch.zeros(1, 3), hidden_pin, matrix, reduction="none")
        >>> loss / torch.tensor(2.0).log()  # the weights: clicks and repins must not be predicted here
        tensor([[100., 100.,  10.]])

    Source: TransAct, section 3.1, equations 1 and 2, and appendix A.

    Note:
        Equation 1 prints ``(1 - log f)`` where ``log(1 - f)`` is meant. By equation 2 a diagonal M leaves a head
        without its own action at weight 0, so it is not plain cross entropy as the paper says: M = 0 and base 1 is.
    """
    _checks.choice("reduction", reduction, ("none", "sum", "mean"))
    _check_shapes(logits, labels, label_weights, sample_weights, base_weights)
    dtype = torch.float32
    for given in (logits, labels, label_weights, sample_weights, base_weights):
        dtype = dtype if given is None else torch.promote_types(dtype, given.dtype)
    logits, labels = logits.to(dtype), labels.to(dtype)
    if sample_weights is not None:
        absent = (sample_weights == 0)[:, None]
        logits, labels = logits.masked_fill(absent, 0), labels.masked_fill(absent, 0)
    _check_labels(labels)
    with dispatch.without_autocast(logits.device):
        weights = F.linear(labels, label_weights.to(dtype))
        if base_weights is not None:
            weights = weights + base_weights.to(dtype)
        if sample_weights is not None:
            weights = weights * sample_weights.to(dtype)[:, None]
        losses = weights * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / max(logits.shape[0], 1)


def label_weight_matrix(
    weights: Mapping[str, Mapping[str, float]], heads: Sequence[str], *, label_names: Sequence[str] | None = None
) -> Tensor:
    """Build M of :func:`label_weighted_bce_with_logits` from names, so that the order of the heads is settled once.

    ``M[i, j] = weights[heads[i]][heads[j]]``

    Args:
        weights: for every head the weight that each action puts on its cross entropy, at least 0; in any order.
        heads: names of the H heads, in the order of the columns of the logits.
        label_names: names of the columns of the labels, which must be the heads in the same order; None does not check.

    Returns:
        (H, H) float32 [head, action].

    Raises:
        TypeError: a name that is no str, or a weight that is no number.
        ValueError: no heads, a name that stands twice, is unknown or missing, ``label_names`` in another order, or a
            weight that is negative or not finite.

    Example:
        >>> weights = {"hide": {"hide": 10, "save": 5}, "save": {"save": 100, "hide": 100}}
        >>> label_weight_matrix(weights, ["save", "hide"])
        tensor([[100., 100.],
                [  5.,  10.]])

    Source: TransAct, appendix A, Table 7.
    """
    _check_heads(heads, label_names)
    _check_names("weights", weights, heads)
    for head in heads:
        _check_names(f"weights[{head!r}]", weights[head], heads)
        for action in heads:
            _checks.number(f"weights[{head!r}][{action!r}]", weights[head][action], at_least=0)
    return torch.tensor([[float(weights[head][action]) for action in heads] for head in heads], dtype=torch.float32)


def attribute_weights(attributes: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> Tensor:
    """Weigh each row by the product of its user's attributes' weights.

    ``u_b = Π_a tables[a][attributes[a][b]]``

    Args:
        attributes: by name, such as state, location and gender, (B,) int64 values, each below the size of its table.
        tables: by the same names, (V,) floating point, the weight of each value, at least 0. Sizes may differ.

    Returns:
        (B,) in the widest dtype of the tables.

    Raises:
        TypeError, ValueError: no attribute, names that are not the same, a wrong shape or dtype; and on a CPU a value
            that has no place in its table or a weight that is negative or not finite.

    Example:
        >>> state, gender = torch.tensor([0, 1]), torch.tensor([1, 1])
        >>> tables = {"state": torch.tensor([1.0, 3.0]), "gender": torch.tensor([1.0, 0.5])}
        >>> attribute_weights({"state": state, "gender": gender}, tables)
        tensor([0.5000, 1.5000])

    Source: TransAct, section 3.1: ``w_u = w_state × w_location × w_gender``.
    """
    _check_mapping("attributes", attributes)
    _check_names("tables", tables, list(attributes))
    if not attributes:
        raise ValueError("attributes must hold at least one, got none")
    product: Tensor | None = None
    for name in attributes:
        table = tables[name]
        _checks.floating(f"tables[{name!r}]", table, None)
        _checks.not_negative(f"tables[{name!r}]", table)
        values = attributes[name]
        _checks.integers(f"attributes[{name!r}]", values, None if product is None else product.shape[0])
        _check_values(f"attributes[{name!r}]", values, table.shape[0])
        factor = table.index_select(0, values)
        product = factor if product is None else product * factor
    assert product is not None
    return product


def _check_shapes(
    logits: Tensor, labels: Tensor, label_weights: Tensor, sample_weights: Tensor | None, base_weights: Tensor | None
) -> None:
    _checks.floating("logits", logits, None, None)
    num_rows, num_heads = logits.shape
    _checks.tensor("labels", labels, num_rows, num_heads, dtype=_LABELS)
    _checks.floating("label_weights", label_weights, num_heads, num_heads)
    _checks.not_negative("label_weights", label_weights)
    if sample_weights is not None:
        _checks.floating("sample_weights", sample_weights, num_rows)
        _checks.not_negative("sample_weights", sample_weights)
    if base_weights is not None:
        _checks.floating("base_weights", base_weights, num_heads)
        _checks.not_negative("base_weights", base_weights)


def _check_labels(labels: Tensor) -> None:
    if _checks.readable(labels) and labels.numel():
        least, most = labels.aminmax()  # one pass; both are NaN where a label is
        if not (least >= 0 and most <= 1):
            bad = ~((labels >= 0) & (labels <= 1))
            raise ValueError(f"labels must be from 0 to 1, got {labels[bad][0].item()!r}")


def _check_heads(heads: Sequence[str], label_names: Sequence[str] | None) -> None:
    if isinstance(heads, str) or not all(isinstance(head, str) for head in heads):
        raise TypeError(f"heads must be names, got {_checks.describe(heads)}")
    if not heads:
        raise ValueError("heads must hold at least one name, got none")
    if len(set(heads)) < len(heads):
        raise ValueError(f"heads must all differ, got {list(heads)}")
    if label_names is not None and list(label_names) != list(heads):
        raise ValueError(f"label_names must be the heads in their order, {list(heads)}, got {list(label_names)}")


def _check_mapping(what: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping by name, got {_checks.describe(given)}")


def _check_names(what: str, given: Mapping[str, object], wanted: Sequence[str]) -> None:
    _check_mapping(what, given)
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    if missing or unknown:
        raise ValueError(f"{what} must hold exactly {list(wanted)}, got it without {missing} and with {unknown}")


def _check_values(name: str, values: Tensor, size: int) -> None:
    if _checks.readable(values):
        bad = (values < 0) | (values >= size)
        if bad.any():
            raise ValueError(f"{name} must be at least 0 and below {size}, got {values[bad][0].item()}")
