"""AUC of one head: over all rows, within chunks, and its bootstrap intervals over users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recblocks import _checks
from recblocks.evaluation._chunks import (
    UserMeans,
    check_binary,
    check_scores,
    mean_over_chunks,
    rank_chunks,
    run_starts,
    run_sums,
    user_means,
)
from recblocks.evaluation.statistics import Interval, percentiles, times_drawn

_CELLS_AT_A_TIME = 2**22
_BLOCK = 32


def auc(scores: Tensor, labels: Tensor) -> Tensor:
    """The chance that a row with the action scores above a row without it, ties counting 1/2; by scikit-learn.

    Args:
        scores: (N,) floating, one head's score for each row.
        labels: (N,) bool or 0 and 1.

    Returns:
        A float64 scalar.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a label other than 0 and 1, a NaN score, or one label only.
        ImportError: scikit-learn is not installed.

    Example:
        >>> auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
        tensor(0.8750, dtype=torch.float64)

    Source: Hanley and McNeil 1982.
    """
    metrics = _checks.optional("sklearn.metrics", "pip install scikit-learn")
    _check_rows(scores, labels)
    if bool((labels == labels[:1]).all()):
        raise ValueError("labels must hold both 0 and 1, got one of them only")
    _, place = torch.unique(scores, return_inverse=True)  # scikit-learn takes no infinite scores
    found = metrics.roc_auc_score(labels.cpu().numpy() != 0, place.cpu().numpy())
    return torch.tensor(found, dtype=torch.float64, device=scores.device)


def chunk_auc(scores: Tensor, labels: Tensor, user: Tensor, chunk: Tensor) -> Tensor:
    """Mean over chunks of the AUC within the chunk; a chunk in which all labels are equal is left out.

    ``1/|C| sum_c 1/(P_c N_c) sum_{i, j of c, y_i = 1, y_j = 0} (1{s_i > s_j} + 1/2 1{s_i = s_j})``

    Args:
        scores: (N,) floating, one head's score for each candidate.
        labels: (N,) bool or 0 and 1.
        user: (N,) int64, any value.
        chunk: (N,) int64, the request that showed it; a chunk is a pair (user, chunk). Rows come in any order.

    Returns:
        A float64 scalar.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a label other than 0 and 1, a NaN score, or no chunk with both.

    Example:
        >>> scores, labels = torch.tensor([0.9, 0.2, 0.2, 0.7]), torch.tensor([0, 1, 0, 1])
        >>> chunk_auc(scores, labels, torch.tensor([7, 7, 8, 8]), torch.tensor([0, 0, 0, 0]))
        tensor(0.5000, dtype=torch.float64)

    Source: Zhu et al. 2017, Optimized Cost per Click in Taobao Display Advertising: GAUC, with chunks for users and
        every chunk weighing the same.
    """
    means = chunk_auc_per_user(scores, labels, user, chunk)
    if not len(means.user):
        raise ValueError("labels must hold both 0 and 1 in at least one chunk, got none")
    return mean_over_chunks(means)


def chunk_auc_per_user(scores: Tensor, labels: Tensor, user: Tensor, chunk: Tensor) -> UserMeans:
    """Each user's mean AUC within their chunks, and how many of these hold both labels.

    ``bootstrap_mean(value, weights=num_chunks)`` gives `chunk_auc` with its interval over users. Which users appear
    follows from the labels alone, so two models on the same rows are paired by ``paired_bootstrap(a.value, b.value,
    weights=a.num_chunks)``.

    Args:
        scores: (N,) floating, one head's score for each candidate.
        labels: (N,) bool or 0 and 1.
        user: (N,) int64, any value.
        chunk: (N,) int64, the request that showed it.

    Returns:
        UserMeans(user (U',), value (U',) float64, num_chunks (U',) int64), users ascending, those without such a chunk
        left out.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a label other than 0 and 1, or a NaN score.

    Example:
        >>> scores, labels = torch.tensor([0.9, 0.2, 0.2, 0.7]), torch.tensor([0, 1, 0, 1])
        >>> chunk_auc_per_user(scores, labels, torch.tensor([7, 7, 8, 8]), torch.tensor([0, 0, 0, 0])).value.tolist()
        [0.0, 1.0]

    Source: as `chunk_auc`.
    """
    ranked = rank_chunks(scores, user, chunk)
    check_binary("labels", labels, scores.shape[0])
    wanted = labels[ranked.order].long()
    positive = run_sums(wanted, ranked.tie_start)
    negative = ranked.tie_start.diff() - positive
    positives = run_sums(wanted, ranked.chunk_start)
    negatives = ranked.chunk_start.diff() - positives
    below = negatives.cumsum(0)[ranked.tie_chunk] - negative.cumsum(0)  # negatives of the chunk behind each tie
    twice = torch.zeros_like(positives).index_add_(0, ranked.tie_chunk, positive * (2 * below + negative))
    value = twice.double() / (2 * positives * negatives)
    return user_means(ranked, value, (positives > 0) & (negatives > 0))


def auc_bootstrap(
    scores: Tensor,
    labels: Tensor,
    user: Tensor,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> Interval:
    """AUC over all rows with its percentile bootstrap interval: users are drawn again with all their rows.

    Args:
        scores: (N,) floating, one head's score for each row.
        labels: (N,) bool or 0 and 1.
        user: (N,) int64, any value.
        level: coverage of the interval, in (0, 1).
        num_resamples: bootstrap samples; one without both labels is dropped.
        generator: source of randomness, on the device of ``scores``.

    Returns:
        Interval(mean, low, high), ``mean`` the AUC itself.

    Raises:
        TypeError, ValueError: as `auc`.

    Example:
        >>> auc_bootstrap(torch.tensor([0.1, 0.4, 0.1, 0.4]), torch.tensor([0, 1, 0, 1]), torch.tensor([7, 7, 8, 8]))
        Interval(mean=1.0, low=1.0, high=1.0)

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    (exact,), resampled = _bootstrap([scores], labels, user, level, num_resamples, generator)
    return Interval(exact, *percentiles(resampled[0], level))


def paired_auc_bootstrap(
    scores: Tensor,
    other: Tensor,
    labels: Tensor,
    user: Tensor,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> Interval:
    """AUC of ``scores`` less that of ``other`` on the same rows, with its interval: both see the same drawn users.

    Args:
        scores: (N,) floating, one model's scores.
        other: (N,) floating, the other model's scores of the same rows.
        labels: (N,) bool or 0 and 1.
        user: (N,) int64, any value.
        level: coverage of the interval, in (0, 1).
        num_resamples: bootstrap samples; one without both labels is dropped.
        generator: source of randomness, on the device of ``scores``.

    Returns:
        Interval(mean, low, high) of the difference.

    Raises:
        TypeError, ValueError: as `auc`.

    Example:
        >>> scores, labels = torch.tensor([0.1, 0.4, 0.1, 0.4]), torch.tensor([0, 1, 0, 1])
        >>> paired_auc_bootstrap(scores, torch.zeros(4), labels, torch.tensor([7, 7, 8, 8]))
        Interval(mean=0.5, low=0.5, high=0.5)

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    exact, resampled = _bootstrap([scores, other], labels, user, level, num_resamples, generator, ("scores", "other"))
    return Interval(exact[0] - exact[1], *percentiles(resampled[0] - resampled[1], level))


def _check_rows(scores: Tensor, labels: Tensor, name: str = "scores") -> None:
    check_scores(name, scores, "N")
    check_binary("labels", labels, scores.shape[0])


class _Order(NamedTuple):
    """One model's rows by ascending score, as bags of users whose weights are to be added.

    Step j leads from the tie of positives j-1 to tie j: half the negatives tied with each, all between them.
    """

    positive_user: Tensor
    positive_start: Tensor
    step_user: Tensor
    step_share: Tensor
    step_start: Tensor


def _ordered(scores: Tensor, positive: Tensor, user: Tensor) -> _Order:
    """``user`` (N,): the place of each row's user."""
    scores, order = scores.sort()
    positive, user = positive[order], user[order]
    tie_start = torch.cat([run_starts(scores).nonzero().flatten(), torch.tensor([len(scores)], device=scores.device)])
    has_positive = run_sums(positive, tie_start) > 0
    size = tie_start.diff()
    # the ties that hold positives, counted up to and including each row's own
    reached = torch.repeat_interleave(has_positive.cumsum(0), size)
    tied = torch.repeat_interleave(has_positive, size) & ~positive
    num_ties = int(has_positive.sum())

    between = ~positive & ~tied
    step = torch.cat([reached[between], reached[tied] - 1, reached[tied]])
    step_user = torch.cat([user[between], user[tied], user[tied]])
    share = torch.ones(len(step), device=scores.device)
    share[between.sum() :] = 0.5
    step, by_step = step.sort()
    steps = torch.arange(num_ties, device=scores.device)  # what follows the last tie beats nobody
    used = step < num_ties
    by_step = by_step[used]
    return _Order(
        user[positive],
        torch.searchsorted(reached[positive] - 1, steps),
        step_user[by_step],
        share[by_step],
        torch.searchsorted(step[used], steps),
    )


def _concordant(rows: _Order, times: Tensor) -> Tensor:
    """(B,) pairs in order, ties 1/2, where user u's rows count ``times[u, b]`` times."""
    positives = F.embedding_bag(rows.positive_user, times, rows.positive_start, mode="sum")
    shares = rows.step_share.to(times.dtype)
    steps = F.embedding_bag(rows.step_user, times, rows.step_start, mode="sum", per_sample_weights=shares)
    # running sums of the steps: within blocks by a triangular product, then what came before each block
    blocks = -(-len(steps) // _BLOCK)
    padding = (0, 0, 0, blocks * _BLOCK - len(steps))
    positives = F.pad(positives, padding).view(blocks, _BLOCK, -1)
    steps = F.pad(steps, padding).view(blocks, _BLOCK, -1)
    within = torch.ones(_BLOCK, _BLOCK, dtype=times.dtype, device=times.device).tril() @ steps
    total = within[:, -1].double()
    before = total.cumsum(0) - total
    inside = (positives * within).sum(1).double()
    return (inside + positives.sum(1).double() * before).sum(0)


def _bootstrap(
    models: Sequence[Tensor],
    labels: Tensor,
    user: Tensor,
    level: float,
    num_resamples: int,
    generator: torch.Generator | None,
    names: Sequence[str] = ("scores",),
) -> tuple[list[float], Tensor]:
    """Each model's AUC, and (models, num_resamples) AUCs of users drawn again, NaN where a label is missing."""
    for name, scores in zip(names, models, strict=True):
        _check_rows(scores, labels, name)
    _checks.integers("user", user, models[0].shape[0])
    _checks.number("level", level, above=0, below=1)
    _checks.positive_int("num_resamples", num_resamples)
    positive = labels != 0
    if not bool(positive.any()) or bool(positive.all()):
        raise ValueError("labels must hold both 0 and 1, got one of them only")
    _, place = torch.unique(user, return_inverse=True)
    num_users = int(place.max()) + 1
    counts = torch.stack([torch.bincount(place[one], minlength=num_users) for one in (positive, ~positive)]).double()
    orders = [_ordered(scores, positive, place) for scores in models]

    def aucs(times: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = (counts @ times).prod(0)
        table = times.to(dtype).contiguous()
        return torch.stack([_concordant(rows, table) / pairs for rows in orders])

    exact = aucs(torch.ones(num_users, 1, dtype=torch.float64, device=place.device), torch.float64)
    longest = max(len(rows.positive_start) for rows in orders)
    at_a_time = max(1, _CELLS_AT_A_TIME // max(longest, num_users))
    drawn = times_drawn(num_users, num_resamples, at_a_time, generator=generator, device=place.device)
    # float32 holds whole and half numbers to 2^23 exactly, and beyond errs by 6e-8 of an AUC
    resampled = [aucs(times.t(), torch.float32) for times in drawn]
    return exact.flatten().tolist(), torch.cat(resampled, dim=1)
