"""Training batches by number: which users and which pairs batch k holds follows from k and a seed alone."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recblocks import _checks
from recblocks.timelines._hashing import mix_integers, permute
from recblocks.timelines.examples import Anchors, Examples, drop_rows_without_pairs, sample_anchors
from recblocks.timelines.timeline import Timelines

_ORDER, _DRAWS = 0, 1


class Objective(Protocol):
    """``functools.partial(dense_all_action, max_len=256, positive=...)``, say."""

    def __call__(
        self, timelines: Timelines, anchors: Anchors, *, until: int | None, generator: torch.Generator
    ) -> Examples:
        """Draw the examples of a batch."""


class TrainingBatches(Dataset[Examples]):
    """A map-style dataset whose item k is the k-th training batch of this rank, over all epochs.

    Each epoch visits every user exactly once, in an order of its own that is computed, not stored. Step k takes the
    next ``users_per_batch`` * ``world_size`` users of that order and gives each rank its share; the last step of an
    epoch shares out what is left. So ranks and workers have disjoint users by construction, and resuming is starting at
    k:

    ``DataLoader(batches, batch_size=None, sampler=range(k, len(batches)), num_workers=2)``

    Workers prepare batches ahead (``prefetch_factor``), and with ``pin_memory=True`` in memory from which
    ``.to(device, non_blocking=True)`` copies to a GPU while that computes.
    ``collate_fn`` of the DataLoader, called with one ``Examples``, is the place to gather columns in the worker. Rows
    without a pair are left out, so the number of rows varies, and a batch may be empty.

    Args:
        timelines: whole timelines or a subset; opened from disk, another process maps the same files.
        objective: called with timelines, anchors, ``until`` and a generator.
        users_per_batch: users that each rank's batch is drawn from.
        fraction: of a user's possible sequences; see ``sample_anchors``.
        max_sequences: at most this many sequences of one user.
        until: in the timelines' unit; no label is later.
        epochs: how often every user is visited.
        seed: another seed is another order and other draws.
        rank: this process among ``world_size``.
        world_size: how many processes train together.

    Raises:
        IndexError: an item at or after ``len``.

    Example:
        >>> import functools
        >>> from recblocks import next_action
        >>> timelines = Timelines.from_arrays(
        ...     user=torch.arange(40) % 10, time=torch.arange(40), item=torch.arange(40), unit="s"
        ... )
        >>> objective = functools.partial(next_action, max_len=8, positive=lambda action: action["item"] >= 0)
        >>> batches = TrainingBatches(timelines, objective, users_per_batch=4, fraction=1.0, max_sequences=2)
        >>> len(batches), [len(batches[k].users) for k in range(3)]
        (3, [8, 8, 4])

    Source: PinnerFormer, section 3.5.
    """

    def __init__(
        self,
        timelines: Timelines,
        objective: Objective,
        *,
        users_per_batch: int,
        fraction: float,
        max_sequences: int,
        until: int | None = None,
        epochs: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not isinstance(timelines, Timelines):
            raise TypeError(f"timelines must be Timelines, got {_checks.describe(timelines)}")
        for name, value in (("users_per_batch", users_per_batch), ("epochs", epochs), ("world_size", world_size)):
            _checks.positive_int(name, value)
        seed = _checks.integer("seed", seed, at_most=2**64 - 1)
        rank = _checks.integer("rank", rank, at_least=0, at_most=world_size - 1)
        nobody = timelines.users.new_zeros(0)
        sample_anchors(timelines, nobody, fraction=fraction, max_sequences=max_sequences, until=until)  # checks both
        self.timelines = timelines
        self.objective = objective
        self.users_per_batch = users_per_batch
        self.fraction = fraction
        self.max_sequences = max_sequences
        self.until = until
        self.epochs = epochs
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank in one epoch; the same on every rank."""
        return -(-len(self.timelines) // (self.users_per_batch * self.world_size))

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def user_rows(self, step: int) -> Tensor:
        """Return the rows of the timelines that this rank's batch ``step`` is drawn from."""
        step = _checks.integer("step", step)
        if not 0 <= step < len(self):
            raise IndexError(f"step must be in [0, {len(self)}), got {step}")
        epoch, step = divmod(step, self.steps_per_epoch)
        users, of_all_ranks = len(self.timelines), self.users_per_batch * self.world_size
        first = step * of_all_ranks
        count = min(of_all_ranks, users - first)
        low, high = (first + count * rank // self.world_size for rank in (self.rank, self.rank + 1))
        places = np.arange(low, high, dtype=np.uint64)
        rows = permute(places, users, key=mix_integers(self.seed, _ORDER, epoch))
        return torch.from_numpy(rows.astype(np.int64))

    def __getitem__(self, step: int) -> Examples:
        step = _checks.integer("step", step)
        rows = self.user_rows(step)
        generator = torch.Generator("cpu").manual_seed(mix_integers(self.seed, _DRAWS, step, self.rank))
        anchors = sample_anchors(
            self.timelines,
            rows,
            fraction=self.fraction,
            max_sequences=self.max_sequences,
            until=self.until,
            generator=generator,
        )
        examples = self.objective(self.timelines, anchors, until=self.until, generator=generator)
        return drop_rows_without_pairs(examples)
