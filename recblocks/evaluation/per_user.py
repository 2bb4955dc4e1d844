"""What each user's ranks are worth: recall, hit rate, reciprocal rank and NDCG, one number a user."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recblocks import _checks


class PerUser(NamedTuple):
    """One number, or one a head, for each user judged, users ascending; the others are left out, so nothing is NaN."""

    user: Tensor
    value: Tensor


def recall_per_user(ranks: Tensor, pair_user: Tensor, *, k: int = 10) -> PerUser:
    """Share of each user's positives that are among the k nearest: ``1/|P_U| sum_P 1{rank(P) < k}``.

    Args:
        ranks: (P,) int64, how many items stand before each positive, as `positive_ranks` and `retrieval_ranks` give.
        pair_user: (P,) int64, the user of each positive: a row or an id, any value.
        k: length of the list.

    Returns:
        PerUser(user (U',), value (U',) float64), of the users that have positives; ``value.mean()`` is Recall@k.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a negative rank, or k below 1.

    Example:
        >>> recall_per_user(torch.tensor([0, 12, 9]), torch.tensor([5, 5, 8]), k=10)
        PerUser(user=tensor([5, 8]), value=tensor([0.5000, 1.0000], dtype=torch.float64))

    Source: PinnerFormer, section 4.1.
    """
    user, row, count = _users(ranks, pair_user, k)
    return PerUser(user, _sums(ranks < k, row, len(user)) / count)


def hit_rate_per_user(ranks: Tensor, pair_user: Tensor, *, k: int = 10) -> PerUser:
    """HR@k: 1 where at least one of the user's positives is among the k nearest, else 0.

    Args:
        ranks: (P,) int64, how many items stand before each positive.
        pair_user: (P,) int64, the user of each positive.
        k: length of the list.

    Returns:
        PerUser(user (U',), value (U',) float64).

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a negative rank, or k below 1.

    Example:
        >>> hit_rate_per_user(torch.tensor([0, 12, 19]), torch.tensor([5, 5, 8]), k=10).value.tolist()
        [1.0, 0.0]

    Source: SASRec (Kang and McAuley 2018), section IV.C.
    """
    user, row, _ = _users(ranks, pair_user, k)
    return PerUser(user, (_first(ranks, row, len(user)) < k).double())


def reciprocal_rank_per_user(ranks: Tensor, pair_user: Tensor, *, k: int | None = None) -> PerUser:
    """``1 / (1 + rank)`` of the user's first positive; its mean over users is MRR, MRR@k with ``k``.

    Args:
        ranks: (P,) int64, how many items stand before each positive.
        pair_user: (P,) int64, the user of each positive.
        k: a first positive behind the k nearest gives 0; None: no limit.

    Returns:
        PerUser(user (U',), value (U',) float64).

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a negative rank, or k below 1.

    Example:
        >>> reciprocal_rank_per_user(torch.tensor([1, 12, 3]), torch.tensor([5, 5, 8])).value.tolist()
        [0.5, 0.25]

    Source: Voorhees 1999, the TREC-8 question answering track.
    """
    user, row, _ = _users(ranks, pair_user, 1 if k is None else k)
    first = _first(ranks, row, len(user))
    value = 1 / (1 + first.double())
    return PerUser(user, value if k is None else torch.where(first < k, value, 0.0))


def ndcg_per_user(ranks: Tensor, pair_user: Tensor, *, k: int = 10) -> PerUser:
    """NDCG@k with gains 0 and 1: ``sum_{rank < k} 1/log2(rank + 2)`` over the same sum for ranks 0, 1, 2, ...

    Args:
        ranks: (P,) int64, how many items stand before each positive, the user's other positives among them.
        pair_user: (P,) int64, the user of each positive; each positive of a user once.
        k: length of the list.

    Returns:
        PerUser(user (U',), value (U',) float64).

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a negative rank, or k below 1.

    Note:
        Ties are at the positive's cost, as in the ranks: tied items all stand before it. scikit-learn gives tied items
        the mean of their discounts, torchmetrics whatever order its sort leaves. Without ties all three agree.

    Example:
        >>> ndcg_per_user(torch.tensor([0, 1, 2]), torch.tensor([5, 5, 8])).value.tolist()
        [1.0, 0.5]

    Source: Järvelin and Kekäläinen 2002.
    """
    user, row, count = _users(ranks, pair_user, k)
    gain = torch.where(ranks < k, 1 / torch.log2(ranks.double() + 2), 0.0)
    ideal = (1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64, device=ranks.device))).cumsum(0)
    return PerUser(user, _sums(gain, row, len(user)) / ideal[count.clamp(max=k) - 1])


def _users(ranks: Tensor, pair_user: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Check; then the users ascending, each positive's place among them, and each user's number of positives."""
    _checks.positive_int("k", k)
    _checks.integers("ranks", ranks, "P")
    _checks.integers("pair_user", pair_user, ranks.shape[0])
    if ranks.numel() and _checks.readable(ranks) and int(ranks.min()) < 0:
        raise ValueError(f"ranks must be at least 0, got {int(ranks.min())}")
    user, row, count = torch.unique(pair_user, return_inverse=True, return_counts=True)
    return user, row, count


def _sums(values: Tensor, row: Tensor, num_users: int) -> Tensor:
    return torch.zeros(num_users, dtype=torch.float64, device=row.device).index_add_(0, row, values.double())


def _first(ranks: Tensor, row: Tensor, num_users: int) -> Tensor:
    return ranks.new_zeros(num_users).scatter_reduce_(0, row, ranks, "amin", include_self=False)
