"""Buckets of eight slots, in one of two of which an id stands: where to look, and how to put ids in, in vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from recblocks._hashing import LOW_32, mix, signed, splitmix

BUCKET = 8  # keys side by side: one cache line of 64 bytes
CHUNK = 1 << 15  # ids at a time, so that they stay in cache and little is held beside the tables
_FULLEST = 0.85  # of the slots, when every row is taken; two buckets of eight can be filled to .98
_TURNS = 100  # ids are moved so often before all are hashed anew


def find_rows(ids: Tensor, keys: Tensor, rows: Tensor, hashed: Tensor) -> Tensor:
    """Find the row of each id, or -1: the definition of what a table answers, and of where an id may stand.

    An id stands in one of two buckets that a hash chooses, ``⌊h₁ B / 2³²⌋`` and ``⌊h₂ B / 2³²⌋``, where ``h₁ h₂`` are
    the 64 bits of a hash that is one to one. No value of an id is special: a slot is empty where its row is -1.

    Args:
        ids: (...) int64.
        keys: (B, 8) int64.
        rows: (B, 8) int32, -1 where nothing stands.
        hashed: (2,) int64, what the hash adds and multiplies with.

    Returns:
        (...) int64.

    Example:
        >>> (keys, rows), hashed = empty(2, "cpu"), torch.tensor(hash_of(0))
        >>> _ = place(keys, rows, hashed, torch.tensor([-5, 2**62]), torch.tensor([0, 1]))
        >>> find_rows(torch.tensor([2**62, 0]), keys, rows, hashed)
        tensor([ 1, -1])
    """
    found = [where_equal(ids, keys, rows, bucket) for bucket in bucket_pair(ids, keys.shape[0], hashed)]
    return torch.maximum(*found).long()


def bucket_pair(ids: Tensor, num_buckets: int, hashed: Tensor) -> tuple[Tensor, Tensor]:
    """The two buckets, (...) each, in one of which an id stands if it is in a table."""
    mixed = mix(ids, hashed[0]) * hashed[1]
    return ((mixed >> 32) & LOW_32) * num_buckets >> 32, (mixed & LOW_32) * num_buckets >> 32


def where_equal(ids: Tensor, keys: Tensor, rows: Tensor, bucket: Tensor) -> Tensor:
    """(...) int32 the row of each id in the bucket named, -1 where it does not stand there."""
    return torch.where(keys[bucket] == ids[..., None], rows[bucket], -1).amax(-1)


def entries(keys: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The ids that stand in slots and their rows, some slots at a time."""
    for some, their in zip(*(torch.split(one.flatten(), CHUNK) for one in (keys, rows)), strict=True):
        yield some[their >= 0], their[their >= 0].long()


class Changes:
    """What a writer put into tensors, and what stood there before."""

    def __init__(self) -> None:
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []

    def set(self, tensor: Tensor, index: Tensor, values: Tensor) -> None:
        """Write distinct places."""
        self._before.append((tensor, index, tensor[index]))
        tensor[index] = values.to(tensor.dtype)

    def undo(self) -> None:
        """Put everything back, the last first."""
        while self._before:
            tensor, index, values = self._before[-1]
            tensor[index] = values
            self._before.pop()


def place(
    keys: Tensor, rows: Tensor, hashed: Tensor, ids: Tensor, given: Tensor, changes: Changes | None = None
) -> tuple[Tensor, Tensor]:
    """Put (N,) distinct ids and their rows into slots; those that have found none after many turns, and their rows.

    Each turn sorts what is left by bucket and fills the empty slots. Who finds none goes to the other bucket; there the
    first one of those takes the slot of another id, which goes on to its own other bucket.
    """
    changes = Changes() if changes is None else changes
    flat_keys, flat_rows = keys.view(-1), rows.view(-1)
    wants_second, tried = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for turn in range(_TURNS):
        if not len(ids):
            break
        pair = bucket_pair(ids, keys.shape[0], hashed)
        bucket, order = torch.where(wants_second, pair[1], pair[0]).sort(stable=True)
        ids, given, wants_second, tried = ids[order], given[order], wants_second[order], tried[order]
        rank = torch.arange(len(ids), device=ids.device) - torch.searchsorted(bucket, bucket)
        empty = rows[bucket] < 0
        nth = empty.cumsum(1, dtype=torch.int8)
        chosen = empty & (nth == rank[:, None] + 1)
        fits = chosen.any(1)
        slot = bucket * BUCKET + chosen.byte().argmax(1)
        changes.set(flat_keys, slot[fits], ids[fits])
        changes.set(flat_rows, slot[fits], given[fits])
        left = ~fits
        kicks = left & tried & (rank == nth[:, -1])
        taken = bucket[kicks] * BUCKET + (bucket[kicks] + turn) % BUCKET
        moved, moved_rows = flat_keys[taken], flat_rows[taken].long()
        changes.set(flat_keys, taken, ids[kicks])
        changes.set(flat_rows, taken, given[kicks])
        ids[kicks], given[kicks] = moved, moved_rows
        wants_second[kicks] = bucket_pair(moved, keys.shape[0], hashed)[0] != bucket[kicks]
        ids, given, wants_second = ids[left], given[left], ~wants_second[left]
        tried = torch.ones_like(ids, dtype=torch.bool)
    return ids, given


def empty(num_buckets: int, device: torch.device | str | int | None) -> tuple[Tensor, Tensor]:
    """Keys and rows of buckets in which nothing stands."""
    keys = torch.zeros(num_buckets, BUCKET, dtype=torch.int64, device=device)
    return keys, torch.full((num_buckets, BUCKET), -1, dtype=torch.int32, device=device)


def num_buckets_of(capacity: int) -> int:
    """Buckets for so many rows."""
    return math.ceil(capacity / (BUCKET * _FULLEST))


def hash_of(seed: int) -> list[int]:
    """What a hash function adds and multiplies with."""
    return [signed(splitmix(seed, 0)), signed(splitmix(seed, 1) | 1)]


def next_hash(hashed: Tensor) -> Tensor:
    """Another one, (2,), which follows from this one."""
    return torch.tensor(hash_of(int(hashed[0]) % (1 << 63)), device=hashed.device)
