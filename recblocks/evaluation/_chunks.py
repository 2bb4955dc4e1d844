"""Rows of a ranking model grouped by (user, chunk) and ordered by score: checks, order, ties, sums of runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recblocks import _checks

_INTEGERS = (torch.bool, torch.uint8, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UserMeans(NamedTuple):
    """The mean of each user's chunks and how many there were; users without one are left out.

    ``bootstrap_mean(value, weights=num_chunks)`` is the mean over chunks, with users drawn again.
    """

    user: Tensor
    value: Tensor
    num_chunks: Tensor


class RankedChunks(NamedTuple):
    """Rows by user, then chunk, then score, the best first; rows of a chunk with one score are a tie.

    Attributes:
        order: (N,) the rows in that order.
        user: (U,) the users, ascending.
        chunk_user: (C,) which of them each chunk belongs to.
        chunk_start: (C+1,) each chunk's first place in ``order``, and N.
        tie_chunk: (T,) the chunk of each tie.
        tie_start: (T+1,) each tie's first place in ``order``, and N.
    """

    order: Tensor
    user: Tensor
    chunk_user: Tensor
    chunk_start: Tensor
    tie_chunk: Tensor
    tie_start: Tensor


def check_scores(name: str, scores: Tensor, *shape: int | str) -> None:
    """Require floating scores without NaN, which has no place in an order."""
    _checks.floating(name, scores, *shape)
    if _checks.readable(scores) and bool(scores.isnan().any()):
        raise ValueError(f"{name} must be numbers, got NaN")


def check_binary(name: str, labels: Tensor, *shape: int | str) -> None:
    """Require labels that are 0 or 1, of whatever dtype."""
    _checks.tensor(name, labels, *shape, dtype=_INTEGERS + _FLOATS)
    if labels.dtype != torch.bool and _checks.readable(labels):
        bad = (labels != 0) & (labels != 1)
        if bool(bad.any()):
            raise ValueError(f"{name} must be 0 or 1, got {labels[bad][0].item()!r}")


def rank_chunks(scores: Tensor, user: Tensor, chunk: Tensor) -> RankedChunks:
    """Check the three vectors and put their rows in order; a chunk is a different pair (user, chunk)."""
    check_scores("scores", scores, "N")
    _checks.integers("user", user, scores.shape[0])
    _checks.integers("chunk", chunk, scores.shape[0])
    order = scores.argsort(descending=True, stable=True)
    for ids in (chunk, user):
        order = order[ids[order].argsort(stable=True)]
    new_user = run_starts(user[order])
    new_chunk = new_user | run_starts(chunk[order])
    new_tie = new_chunk | run_starts(scores[order])
    return RankedChunks(
        order,
        user[order][new_user],
        (new_user.cumsum(0) - 1)[new_chunk],
        run_places(new_chunk),
        (new_chunk.cumsum(0) - 1)[new_tie],
        run_places(new_tie),
    )


def run_starts(values: Tensor) -> Tensor:
    """True where a value differs from the one before it, and at the first."""
    new = torch.ones_like(values, dtype=torch.bool)
    new[1:] = values[1:] != values[:-1]
    return new


def run_places(new: Tensor) -> Tensor:
    """(R+1,) each run's first place, by `run_starts`, and behind them how many values there are."""
    return torch.cat([new.nonzero().flatten(), torch.tensor([len(new)], device=new.device)])


def run_sums(values: Tensor, starts: Tensor) -> Tensor:
    """(R, ...) int64 sums of the runs of ``values`` (N, ...) between consecutive ``starts`` (R+1,)."""
    total = torch.cat([values.new_zeros(1, *values.shape[1:], dtype=torch.int64), values.long().cumsum(0)])
    return total[starts].diff(dim=0)


def user_means(ranked: RankedChunks, value: Tensor, judged: Tensor) -> UserMeans:
    """Mean of ``value`` (C,) over each user's chunks that are ``judged`` (C,)."""
    value, owner = value[judged], ranked.chunk_user[judged]
    count = torch.bincount(owner, minlength=len(ranked.user))
    total = torch.zeros(len(ranked.user), dtype=torch.float64, device=value.device).index_add_(0, owner, value)
    some = count > 0
    return UserMeans(ranked.user[some], total[some] / count[some], count[some])


def mean_over_chunks(means: UserMeans) -> Tensor:
    """Every chunk weighs the same, whoever it belongs to."""
    return (means.value * means.num_chunks).sum() / means.num_chunks.sum()
