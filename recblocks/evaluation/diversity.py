"""How different the retrieved items are: within one user's list, and over all users."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.evaluation._pairs import check_rows


def interest_entropy_at_k(items: Tensor, topics: Tensor, *, k: int = 50, valid: Tensor | None = None) -> Tensor:
    """Mean over users of the entropy of the topics of their first k retrieved items, in nats.

    ``-sum_t f_t ln f_t``, where f_t is the share of the user's first k items that have topic t.

    Args:
        items: (U, K) int64, K >= k corpus rows a user, best first, as `retrieve` and `round_robin` give.
        topics: (N,) int64, the topic of each corpus row, any value.
        k: length of the list.
        valid: (U, K) bool, True = an item; None: all. Users without any item are left out of the mean.

    Returns:
        A float64 scalar, from 0 (one topic) to ln k.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, fewer than k items a user, a row outside [0, N), or no item.

    Note:
        The paper names no base for the logarithm; its values (1.69 to 2.10 with about 350 topics) rule none out.

    Example:
        >>> interest_entropy_at_k(torch.tensor([[0, 1], [2, 3]]), torch.tensor([7, 7, 7, 8]), k=2)
        tensor(0.3466, dtype=torch.float64)

    Source: PinnerFormer, section 4.1.
    """
    items, valid = _first_k(items, valid, k)
    _checks.integers("topics", topics, "N")
    check_rows("items", items[valid], topics.shape[0])
    user = torch.arange(len(items), device=items.device)[:, None].expand_as(items)[valid]
    if not user.numel():
        raise ValueError("items must hold at least one valid item, got none")
    _, topic = torch.unique(topics[items[valid]], return_inverse=True)
    length = torch.bincount(user, minlength=len(items)).double()
    cell, count = torch.unique(user * len(topics) + topic, return_counts=True)
    user = cell // len(topics)
    share = count.double() / length[user]
    entropy = torch.zeros_like(length).index_add_(0, user, -share * share.log())
    return entropy[length > 0].mean()


def coverage_at_k(items: Tensor, *, num_items: int, k: int = 10, p: float = 0.9, valid: Tensor | None = None) -> Tensor:
    """The smallest share of the corpus that accounts for a share p of everybody's first k retrieved items.

    Args:
        items: (U, K) int64, K >= k rows or ids a user, best first.
        num_items: items in the corpus.
        k: length of the list.
        p: the share to account for, in (0, 1], as the decimal number it is written as.
        valid: (U, K) bool, True = an item; None: all.

    Returns:
        A float64 scalar in (0, 1].

    Raises:
        TypeError, ValueError: a wrong dtype or shape, fewer than k items a user, p outside (0, 1], more different items
            than ``num_items``, or no item at all.

    Example:
        >>> coverage_at_k(torch.tensor([[3, 1], [3, 2], [3, 1]]), num_items=10, k=2, p=0.8)
        tensor(0.2000, dtype=torch.float64)

    Source: PinnerFormer, section 4.1.
    """
    items, valid = _first_k(items, valid, k)
    _checks.positive_int("num_items", num_items)
    _checks.number("p", p, above=0, at_most=1)
    _, count = torch.unique(items[valid], return_counts=True)
    if not len(count):
        raise ValueError("items must hold at least one valid item, got none")
    if len(count) > num_items:
        raise ValueError(f"num_items must be at least the number of different items, {len(count)}, got {num_items}")
    covered = count.sort(descending=True).values.cumsum(0)
    # 0.07 * 100 is 7.000000000000001 in floating point, which would ask for one item too many
    needed = math.ceil(Fraction(str(p)) * int(covered[-1]))
    used: Tensor = (covered < needed).sum() + 1
    return used.double() / num_items


def _first_k(items: Tensor, valid: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    _checks.integers("items", items, "U", "K")
    _checks.positive_int("k", k)
    if items.shape[1] < k:
        raise ValueError(f"items must hold at least k = {k} items a user, got {_checks.describe(items)}")
    if valid is None:
        valid = torch.ones_like(items, dtype=torch.bool)
    _checks.mask("valid", valid, *items.shape)
    return items[:, :k], valid[:, :k]
