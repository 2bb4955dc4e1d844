"""From which moment's embedding each positive is predicted: once, daily with a day's delay, or in real time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.evaluation._pairs import Pairs, check_rows
from recblocks.evaluation.retrieval import METRICS, blocked_ranks, compute_dtype, corpus_scorer, item_mask

PROTOCOLS = ("once", "daily", "realtime")
_PER_SECOND = {"s": 1, "ms": 1000}


class EmbeddingPoints(NamedTuple):
    """The different (user, cut) at which an embedding is needed, and which of them each positive is predicted from."""

    user: Tensor
    cut: Tensor
    query: Tensor


class JudgedPositives(NamedTuple):
    """Ranks (P',) of the positives inside the window, their users (P',), and their places in the input (P',)."""

    ranks: Tensor
    pair_user: Tensor
    pair: Tensor


def in_window(time: Tensor, *, start: int, num_days: int = 14, day: int = 86_400, unit: str = "s") -> Tensor:
    """Whether ``start < time <= start + num_days * day``, the evaluation window.

    Args:
        time: (P,) int64 in ``unit``.
        start: end of the training data t, in ``unit``.
        num_days: days in the window.
        day: length of a day, in seconds.
        unit: "s" or "ms".

    Returns:
        (P,) bool.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or unit, or a length below 1.

    Example:
        >>> in_window(torch.tensor([100, 101, 120, 121]), start=100, num_days=2, day=10)
        tensor([False,  True,  True, False])

    Source: PinnerFormer, section 4.2.2.
    """
    start, length = _window(time, start, num_days, day, unit)
    return (time > start) & (time <= start + num_days * length)


def reference_times(
    positive_time: Tensor, *, start: int, protocol: str, num_days: int = 14, day: int = 86_400, unit: str = "s"
) -> Tensor:
    """The cut of the embedding that predicts each positive: it may read every action up to the cut, that one included.

    once: ``start``. daily: ``x - day`` for a positive in ``(x, x + day]``, with x = start, start + day, ...; the day
    between is the time until a log reaches the feature store. realtime: the last instant before the positive, so
    actions at the positive's own time are not read.

    Args:
        positive_time: (P,) int64 in ``unit``, each inside the window.
        start: end of the training data t, in ``unit``.
        protocol: "once", "daily" or "realtime".
        num_days: days in the window.
        day: length of a day, in seconds.
        unit: "s" or "ms".

    Returns:
        (P,) int64, always below ``positive_time``.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, unit or protocol, or a positive outside the window.

    Note:
        As printed, the first day's daily embedding is a day older than the one of "once".

    Example:
        >>> time = torch.tensor([101, 110, 111, 120])
        >>> reference_times(time, start=100, protocol="daily", num_days=2, day=10)
        tensor([ 90,  90, 100, 100])
        >>> reference_times(time, start=100, protocol="realtime", num_days=2, day=10)
        tensor([100, 109, 110, 119])

    Source: PinnerFormer, section 4.2.2.
    """
    _checks.choice("protocol", protocol, PROTOCOLS)
    inside = in_window(positive_time, start=start, num_days=num_days, day=day, unit=unit)
    if _checks.readable(inside) and not bool(inside.all()):
        raise ValueError(
            f"positive_time must lie in the window of {num_days} days after start = {start}, "
            f"got {int((~inside).sum())} of {len(inside)} outside; in_window() says which"
        )
    start, length = _window(positive_time, start, num_days, day, unit)
    if protocol == "once":
        return torch.full_like(positive_time, start)
    if protocol == "realtime":
        return positive_time - 1
    return positive_time - 1 - (positive_time - 1 - start) % length - length


def embedding_points(users: Tensor, cuts: Tensor) -> EmbeddingPoints:
    """Each different (user, cut) once, so that it is embedded once, sorted by user, then cut.

    Args:
        users: (P,) int64, any value.
        cuts: (P,) int64, as `reference_times` gives.

    Returns:
        EmbeddingPoints(user (n,), cut (n,), query (P,)), where positive i is predicted from point ``query[i]``.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    Example:
        >>> embedding_points(torch.tensor([7, 5, 7]), torch.tensor([90, 90, 90]))
        EmbeddingPoints(user=tensor([5, 7]), cut=tensor([90, 90]), query=tensor([1, 0, 1]))
    """
    _checks.integers("users", users, "P")
    _checks.integers("cuts", cuts, users.shape[0])
    user, user_row = torch.unique(users, return_inverse=True)
    cut, cut_row = torch.unique(cuts, return_inverse=True)
    cell, query = torch.unique(user_row * len(cut) + cut_row, return_inverse=True)
    width = max(1, len(cut))
    return EmbeddingPoints(user[cell // width], cut[cell % width], query)


@torch.no_grad()
def protocol_ranks(
    embed: Callable[[Tensor, Tensor], Tensor],
    corpus: Tensor,
    positives: tuple[Tensor, Tensor, Tensor],
    *,
    start: int,
    protocol: str,
    num_days: int = 14,
    day: int = 86_400,
    unit: str = "s",
    metric: str = "euclidean",
    in_corpus: Tensor | None = None,
    batch_size: int = 4096,
    max_elements: int = 2**24,
) -> JudgedPositives:
    """The rank of each positive in the window, retrieved by its user's embedding at the protocol's cut.

    ``recall_per_user(judged.ranks, judged.pair_user, k=10).value.mean()`` is Recall@10 under the protocol.

    Args:
        embed: called with users (n,) and cuts (n,), n <= batch_size and every (user, cut) once; returns (n, D)
            floating. It may read a user's actions up to the cut, that one included, and none after.
        corpus: (N, D) floating.
        positives: (user (P,), item (P,), time (P,)) int64: any user value, a corpus row, a time in ``unit``. Positives
            outside the window are left out.
        start: end of the training data t, in ``unit``.
        protocol: "once", "daily" or "realtime".
        num_days: days in the window.
        day: length of a day, in seconds.
        unit: "s" or "ms".
        metric: "euclidean" or "inner_product".
        in_corpus: (N,) bool; see `recall_at_k`.
        batch_size: users and cuts embedded at a time.
        max_elements: scores in memory at a time.

    Returns:
        JudgedPositives(ranks (P',), pair_user (P',), pair (P',)), in the order of the input.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, rows outside their range, or an unknown unit or protocol.

    Note:
        These protocols predict the specific action, so an item engaged with twice is two positives, under "once" too:
        the three stay comparable. `recall_at_k`, the primary evaluation, counts it once.

    Example:
        >>> items = torch.eye(3)
        >>> positives = (torch.tensor([8, 8]), torch.tensor([0, 2]), torch.tensor([101, 200]))
        >>> judged = protocol_ranks(lambda user, cut: items[cut % 3], items, positives, start=100, protocol="realtime")
        >>> judged.ranks
        tensor([2, 2])

    Source: PinnerFormer, section 4.2.2.
    """
    users, items, times = _triple(positives)
    _checks.floating("corpus", corpus, "N", "D")
    _checks.positive_int("batch_size", batch_size)
    _checks.choice("metric", metric, METRICS)
    num_items = corpus.shape[0]
    mask = item_mask(in_corpus, None, 0, num_items)
    scorer = functools.cache(functools.partial(corpus_scorer, corpus, metric))
    check_rows("positives[1] (item)", items, num_items)
    inside = in_window(times, start=start, num_days=num_days, day=day, unit=unit)
    kept = torch.nonzero(inside).squeeze(1)
    cuts = reference_times(times[kept], start=start, protocol=protocol, num_days=num_days, day=day, unit=unit)
    points = embedding_points(users[kept], cuts)
    num_points = len(points.user)
    order = torch.argsort(points.query)
    firsts = torch.arange(0, num_points + batch_size, batch_size, device=order.device)
    bounds = torch.searchsorted(points.query[order], firsts).tolist()
    ranks = torch.empty_like(kept)
    for batch, (low, high) in enumerate(itertools.pairwise(bounds)):
        first = batch * batch_size
        rows = slice(first, first + batch_size)
        block = order[low:high]
        pairs: Pairs = (points.query[block] - first, items[kept][block])
        queries = embed(points.user[rows], points.cut[rows])
        _checks.floating("what embed returns", queries, len(points.user[rows]), corpus.shape[1])
        scores_of = scorer(compute_dtype(queries, corpus))(queries)
        ranks[block] = blocked_ranks(scores_of, pairs, num_items, mask, max_elements)
    return JudgedPositives(ranks, users[kept], kept)


def _window(time: Tensor, start: int, num_days: int, day: int, unit: str) -> tuple[int, int]:
    """Check the window; then its start, and a day in ``unit``."""
    _checks.integers("time", time, "P")
    start = _checks.integer("start", start)
    _checks.positive_int("num_days", num_days)
    _checks.positive_int("day", day)
    _checks.choice("unit", unit, tuple(_PER_SECOND))
    return start, day * _PER_SECOND[unit]


def _triple(positives: object) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(positives, tuple) or len(positives) != 3:
        raise TypeError(f"positives must be a tuple (user, item, time), got {_checks.describe(positives)}")
    users, items, times = positives
    _checks.integers("positives[0] (user)", users, "P")
    _checks.integers("positives[1] (item)", items, users.shape[0])
    _checks.integers("positives[2] (time)", times, users.shape[0])
    return users, items, times
