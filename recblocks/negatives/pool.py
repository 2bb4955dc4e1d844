"""Mixed negatives: which positives of the batch and which items of the corpus make up the pool."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from recblocks import _checks
from recblocks._distributed import group_size
from recblocks.kernels.own_positives import own_positive_mask

__all__ = ["NegativePool", "mixed_negative_pool", "own_positive_mask"]


class NegativePool(NamedTuple):
    """The columns of a pool: first the in-batch ones, then the random ones. An item may stand in several columns."""

    in_batch: Tensor  # (n_b,) int64: rows of the global batch's positives, ascending, no row twice
    random: Tensor  # (n_r,) int64: candidates, 0 to num_candidates - 1, drawn with replacement

    @property
    def num_in_batch(self) -> int:
        """n_b of log q."""
        return self.in_batch.shape[0]

    @property
    def num_random(self) -> int:
        """n_r of log q."""
        return self.random.shape[0]


def mixed_negative_pool(
    num_positives: int,
    num_candidates: int,
    *,
    max_in_batch: int = 5000,
    num_random: int = 8192,
    generator: torch.Generator | None = None,
    device: torch.device | str | int | None = None,
    group: dist.ProcessGroup | None = None,
) -> NegativePool:
    """Choose the columns: all positives of the global batch, or a random subset of them, and uniform random candidates.

    With several ranks all get the choice of the group's first rank, whatever their generators hold; every rank calls
    this with the same arguments. The draw costs one broadcast of at most ``max_in_batch + num_random`` numbers.

    Args:
        num_positives: positives of the whole batch, over all ranks (rows of `gather_rows` of the positives).
        num_candidates: items of the corpus that random negatives come from.
        max_in_batch: cap on in-batch columns; a batch with more positives gives a uniform random subset.
        num_random: random columns; 0 for in-batch negatives alone, as ``max_in_batch=0`` for random ones alone.
        generator: draws the numbers, on ``device``.
        device: where the answer lives.
        group: the ranks that share the pool; None is the default group. Without a process group the rank is alone.

    Returns:
        The rows and candidates chosen. Duplicates stay: log q says how often an item is to be expected.

    Raises:
        TypeError: for a number that is no int.
        ValueError: for a negative number, or no candidates to draw from.

    Example:
        >>> pool = mixed_negative_pool(3, 1000, num_random=5, generator=torch.Generator().manual_seed(0))
        >>> pool.in_batch
        tensor([0, 1, 2])
        >>> positive_items, corpus = torch.tensor([70, 80, 70]), torch.arange(1000) * 10
        >>> torch.cat([positive_items[pool.in_batch], corpus[pool.random]]).shape  # the items of the columns
        torch.Size([8])

    Source:
        PinnerFormer 3.3.1 and A.3 (Figure 5; caps of 5000 and 8192).
    """
    counts = {"num_positives": num_positives, "max_in_batch": max_in_batch, "num_random": num_random}
    for name, value in counts.items():
        _checks.count(name, value)
    _checks.positive_int("num_candidates", num_candidates)
    if num_positives <= max_in_batch:
        in_batch = torch.arange(num_positives, device=device)
    else:
        shuffled = torch.randperm(num_positives, generator=generator, device=device)
        in_batch = shuffled[:max_in_batch].sort().values
    random = torch.randint(num_candidates, (num_random,), generator=generator, device=device)
    if group_size(group) > 1:
        chosen = torch.cat([in_batch, random])
        dist.broadcast(chosen, group=group, group_src=0)
        in_batch, random = chosen[: len(in_batch)], chosen[len(in_batch) :]
    return NegativePool(in_batch, random)
