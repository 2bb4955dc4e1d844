"""How good a ranking model's order is: hits of each head among the first k of a chunk, blended scores, diversity."""

from __future__ import annotations

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.evaluation._chunks import (
    RankedChunks,
    UserMeans,
    check_binary,
    check_scores,
    mean_over_chunks,
    rank_chunks,
    run_places,
    run_starts,
    run_sums,
    user_means,
)
from recblocks.evaluation.per_user import PerUser


def blend_scores(probabilities: Tensor, utilities: Tensor) -> Tensor:
    """The score that a chunk is sorted by: ``S = sum_h u_h f(x)_h``.

    Args:
        probabilities: (N, H) floating, each head's probability for each candidate.
        utilities: (H,) floating, what an action is worth; below 0 for an unwanted one.

    Returns:
        (N,) float64; equal rows get equal scores.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, or a probability or a utility that is not finite.

    Example:
        >>> blend_scores(torch.tensor([[0.5, 0.0], [0.5, 0.25]]), torch.tensor([1.0, -2.0]))
        tensor([0.5000, 0.0000], dtype=torch.float64)

    Source: TransAct, eq. 3.
    """
    check_scores("probabilities", probabilities, "N", "H")
    if _checks.readable(probabilities) and not bool(probabilities.isfinite().all()):
        raise ValueError(f"probabilities must be finite, got {probabilities[~probabilities.isfinite()][0].item()}")
    _checks.floating("utilities", utilities, probabilities.shape[1])
    if _checks.readable(utilities) and not bool(utilities.isfinite().all()):
        raise ValueError(f"utilities must be finite, got {utilities.tolist()}")
    return (probabilities.double() * utilities.double()).sum(1)


def hit_at_k(scores: Tensor, labels: Tensor, user: Tensor, chunk: Tensor, *, k: int = 3) -> Tensor:
    """HIT@k of each head: ``sum_u sum_{c of u} beta_{c,h} / |U|``, beta the labels among the chunk's first k.

    Constant scores give the HIT@k of a random order, exactly; a head's own labels as scores give the largest.

    Args:
        scores: (N,) floating, the score of each candidate, as `blend_scores` gives.
        labels: (N, H) bool or 0 and 1, what the user did with it.
        user: (N,) int64, any value.
        chunk: (N,) int64, the request that showed it; a chunk is a pair (user, chunk). Rows come in any order.
        k: length of the list; of a shorter chunk everything counts.

    Returns:
        (H,) float64. Higher is better for a wanted action, lower for an unwanted one.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a label other than 0 and 1, a NaN score, k below 1, or no row.

    Note:
        The paper does not say what equal scores do. Here the expected hits of a random order count: of g equal
        candidates of which r still fit into the list, each counts r/g. So the order of the rows cannot matter.

    Example:
        >>> scores, labels = torch.tensor([0.9, 0.2, 0.5, 0.5]), torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]])
        >>> hit_at_k(scores, labels, torch.tensor([7, 7, 7, 7]), torch.tensor([0, 0, 0, 0]), k=2)
        tensor([1.0000, 0.5000], dtype=torch.float64)

    Source: TransAct, section 4.2.1, eq. 4.
    """
    hits = hit_per_user(scores, labels, user, chunk, k=k).value
    if not len(hits):
        raise ValueError("scores must hold at least one row, got none")
    return hits.mean(0)


def hit_per_user(scores: Tensor, labels: Tensor, user: Tensor, chunk: Tensor, *, k: int = 3) -> PerUser:
    """Each user's hits, summed over their chunks; the mean over users is `hit_at_k`.

    Two models judged on the same rows give the same users: ``paired_bootstrap(a.value[:, h], b.value[:, h])``.

    Args:
        scores: (N,) floating, the score of each candidate.
        labels: (N, H) bool or 0 and 1.
        user: (N,) int64, any value.
        chunk: (N,) int64, the request that showed it.
        k: length of the list.

    Returns:
        PerUser(user (U,), value (U, H) float64), of every user of the rows, ascending, those without a hit too.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a label other than 0 and 1, a NaN score, or k below 1.

    Example:
        >>> scores, labels = torch.tensor([0.9, 0.2, 0.5]), torch.tensor([[True], [True], [False]])
        >>> hit_per_user(scores, labels, torch.tensor([7, 7, 8]), torch.tensor([0, 0, 0]), k=1).value.tolist()
        [[1.0], [0.0]]

    Source: TransAct, section 4.2.1.
    """
    _checks.positive_int("k", k)
    ranked = rank_chunks(scores, user, chunk)
    check_binary("labels", labels, scores.shape[0], "H")
    before, size = _ties(ranked)
    share = ((k - before) / size.double()).clamp(0, 1)
    hits = share[:, None] * run_sums(labels[ranked.order], ranked.tie_start)
    value = torch.zeros(len(ranked.user), labels.shape[1], dtype=torch.float64, device=scores.device)
    return PerUser(ranked.user, value.index_add_(0, ranked.chunk_user[ranked.tie_chunk], hits))


def distinct_in_top_k(scores: Tensor, topics: Tensor, user: Tensor, chunk: Tensor, *, k: int = 3) -> Tensor:
    """Diversity: how many different topics stand among a chunk's first k, mean over chunks.

    Args:
        scores: (N,) floating, the score of each candidate.
        topics: (N,) int64, the candidate's topic, such as its top-level category; any value.
        user: (N,) int64, any value.
        chunk: (N,) int64, the request that showed it.
        k: length of the list.

    Returns:
        A float64 scalar, from 1 to k.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a NaN score, k below 1, or no row.

    Note:
        The paper counts the topics that a user saw online; offline the first k of a chunk stand for what is seen.
        Equal scores count as in `hit_at_k`: the expected number over the orders of a tie.

    Example:
        >>> scores, topics = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([4, 4, 6])
        >>> distinct_in_top_k(scores, topics, torch.tensor([7, 7, 7]), torch.tensor([0, 0, 0]), k=2)
        tensor(1., dtype=torch.float64)

    Source: TransAct, section 4.4.4.
    """
    means = distinct_per_user(scores, topics, user, chunk, k=k)
    if not len(means.user):
        raise ValueError("scores must hold at least one row, got none")
    return mean_over_chunks(means)


def distinct_per_user(scores: Tensor, topics: Tensor, user: Tensor, chunk: Tensor, *, k: int = 3) -> UserMeans:
    """Each user's mean of `distinct_in_top_k` over their chunks, and how many chunks.

    Args:
        scores: (N,) floating, the score of each candidate.
        topics: (N,) int64, the candidate's topic, any value.
        user: (N,) int64, any value.
        chunk: (N,) int64, the request that showed it.
        k: length of the list.

    Returns:
        UserMeans(user (U,), value (U,) float64, num_chunks (U,) int64).

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a NaN score, or k below 1.

    Example:
        >>> scores, topics = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([4, 6, 6])
        >>> distinct_per_user(scores, topics, torch.tensor([7, 7, 8]), torch.tensor([0, 0, 0])).value.tolist()
        [2.0, 1.0]

    Source: TransAct, section 4.4.4.
    """
    _checks.positive_int("k", k)
    ranked = rank_chunks(scores, user, chunk)
    _checks.integers("topics", topics, scores.shape[0])
    before, size = _ties(ranked)
    seen = _expected_topics(ranked, topics, before, size, k)
    return user_means(ranked, seen, torch.ones_like(seen, dtype=torch.bool))


def _ties(ranked: RankedChunks) -> tuple[Tensor, Tensor]:
    """(T,) how many rows of the chunk stand before each tie, and how many are in it."""
    return ranked.tie_start[:-1] - ranked.chunk_start[ranked.tie_chunk], ranked.tie_start.diff()


def _expected_topics(ranked: RankedChunks, topics: Tensor, before: Tensor, size: Tensor, k: int) -> Tensor:
    """(C,) the expected number of different topics among the first k of each chunk."""
    num_chunks = len(ranked.chunk_user)
    whole, cut = before + size <= k, (before < k) & (before + size > k)
    cut_size, cut_room = size.new_ones(num_chunks), size.new_zeros(num_chunks)
    cut_size[ranked.tie_chunk[cut]] = size[cut]
    cut_room[ranked.tie_chunk[cut]] = k - before[cut]

    tie = torch.repeat_interleave(size)
    within = (whole | cut)[tie]
    tie, topic = tie[within], topics[ranked.order][within]
    order = topic.argsort(stable=True)  # chunks stay ascending within a topic
    tie, topic = tie[order], topic[order]
    new = run_starts(ranked.tie_chunk[tie]) | run_starts(topic)
    start = run_places(new)
    chunk = ranked.tie_chunk[tie][new]

    missed = _chance_of_none(run_sums(cut[tie], start), cut_size[chunk], cut_room[chunk], k)
    seen = torch.where(run_sums(whole[tie], start) > 0, 1.0, 1 - missed)
    return torch.zeros(num_chunks, dtype=torch.float64, device=tie.device).index_add_(0, chunk, seen)


def _chance_of_none(marked: Tensor, size: Tensor, room: Tensor, k: int) -> Tensor:
    """The chance that ``room`` <= k draws without replacement from ``size`` hold none of the ``marked``."""
    none = torch.ones_like(marked, dtype=torch.float64)  # exactly 0 before a factor could be below it
    for drawn in range(k):
        left = (size - drawn).clamp(min=1).double()
        none *= torch.where(drawn < room, (size - marked - drawn) / left, 1.0)
    return none
