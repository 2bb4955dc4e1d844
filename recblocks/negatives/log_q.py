"""The distribution a negative was drawn from, for the loss to correct."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recblocks import _checks


def mixed_log_q(
    counts: Tensor,
    total: Tensor | float,
    *,
    num_in_batch: int,
    num_random: int,
    num_candidates: int,
    correct_positive: bool = True,
) -> Tensor:
    """Log of the probability that a column of the mixed pool holds an item, whichever source the column came from.

    q(v) = (n_b f_v + n_r / num_candidates) / (n_b + n_r), f_v = max(counts_v, 1) / total: n_b of the columns are the
    batch's positives, where v stands as often as it is seen, and n_r are uniform draws. With n_r = 0 this is the
    in-batch q, with n_b = 0 a constant that changes no loss. Computed in float64; never above 0, without a clamp, since
    no count exceeds the total.

    Args:
        counts: (...) how often each item was seen as a positive, in sightings: ``sketch.query(ids)``.
        total: all sightings, at least 1: ``sketch.total``, read after the sketch has counted this batch.
        num_in_batch: n_b, in-batch columns of the global pool, after the cap: ``pool.num_in_batch``.
        num_random: n_r, random columns of the global pool: ``pool.num_random``.
        num_candidates: items that random columns are drawn from, every one alike.
        correct_positive: False where the loss does not correct the positive. The pool's size then does not cancel, and
            log(n_b + n_r) is added: the log of how many columns hold the item on average, which may exceed 0.

    Returns:
        (...) float32.

    Raises:
        TypeError: for another dtype.
        ValueError: for an empty pool, and, where they can be read, for a total below 1 or a count that is not finite or
            outside [0, total].

    Example:
        >>> counts = torch.tensor([6.0, 2.0, 0.0])
        >>> mixed_log_q(counts, 8.0, num_in_batch=4, num_random=4, num_candidates=16).exp()
        tensor([0.4062, 0.1562, 0.0938])

    Source:
        PinnerFormer 3.3.1, 3.3.2 (Q of equation 2); the mixture is that of Yang et al. 2020, which it cites.

    Note:
        The paper does not print how it mixes the two sources; an item's q here is that of a column drawn at random from
        the pool, so the paper's Q, the chance to be in the batch at all, is n_b + n_r times it where that is small.
    """
    _checks.floating("counts", counts)
    _checks.count("num_in_batch", num_in_batch)
    _checks.count("num_random", num_random)
    _checks.positive_int("num_candidates", num_candidates)
    size = num_in_batch + num_random
    if size == 0:
        raise ValueError("num_in_batch + num_random must be at least 1, got 0")
    if num_in_batch == 0:
        q = torch.full(counts.shape, 1 / num_candidates, dtype=torch.float64, device=counts.device)
    else:
        _check_counts(counts, total)
        frequency = counts.double().clamp(min=1) / total
        q = (num_in_batch * frequency + num_random / num_candidates) / size
    log_q = q.log()
    if not correct_positive:
        log_q = log_q + math.log(size)
    return log_q.float()


def _check_counts(counts: Tensor, total: Tensor | float) -> None:
    if isinstance(total, Tensor):
        _checks.floating("total", total)
        if total.ndim:
            raise ValueError(f"total must be a number or a 0-dim tensor, got {_checks.describe(total)}")
        if not _checks.readable(total):
            return
    elif total != math.inf:
        _checks.number("total", total)
    if not 1 <= float(total) < math.inf:
        raise ValueError(f"total must be at least 1 sighting (count the batch before it is read), got {float(total):g}")
    if _checks.readable(counts) and counts.numel():
        lowest, highest = counts.min().item(), counts.max().item()
        if not (lowest >= 0 and highest <= float(total)):
            raise ValueError(f"counts must be from 0 to the total {float(total):g}, got {lowest:g} to {highest:g}")
