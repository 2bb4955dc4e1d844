"""Buckets of eight slots, in one of two of which an id stands: where to look, and how to put ids in, in vectors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recblocks import _checks
from recblocks._hashing import LOW_32, mix, signed, splitmix

BUCKET = 8  # keys side by side: one cache line of 64 bytes
CHUNK = 1 << 15  # ids at a time, so that they stay in cache and little is held beside the tables
_FULLEST = 0.85  # of the slots, when every row is taken; two buckets of eight can be filled to .98
_TURNS = 100  # ids are moved so often before all are hashed anew


class Slots(NamedTuple):
    """Where ids stand, and what it takes to look there."""

    keys: Tensor
    """(B, 8) int64."""
    rows: Tensor
    """(B, 8) int32, -1 where nothing stands."""
    hashed: Tensor
    """(3,) int64, what the hash adds to an id, multiplies with, and adds for a part."""
    begins: Tensor
    """(P + 1,) int64, the first row of each part, ascending, and the number of rows."""


def find_rows(ids: Tensor, slots: Slots, part: Tensor | None = None) -> Tensor:
    """Find the row of each id, or -1: the definition of what a table answers, and of where an id may stand.

    An id stands in one of two buckets that a hash chooses, ``⌊h₁ B / 2³²⌋`` and ``⌊h₂ B / 2³²⌋``, where ``h₁ h₂`` are
    the 64 bits of a hash of the id and its part, one to one within a part. No value of an id is special: a slot is
    empty where its row is -1, and it is of the part that its row is of.

    Args:
        ids: (...) int64.
        slots: of B buckets and P parts.
        part: broadcasts against ids, int64 from 0 to P - 1; None where P is 1.

    Returns:
        (...) int64.

    Example:
        >>> slots = Slots(*empty(2, "cpu"), torch.tensor(hash_of(0)), begins=torch.tensor([0, 1, 2]))
        >>> _ = place(slots, torch.tensor([-5, 2**62]), torch.tensor([0, 1]))
        >>> find_rows(torch.tensor([2**62, 2**62, 0]), slots, part=torch.tensor([0, 1, 1]))
        tensor([-1,  1, -1])
    """
    first, second = bucket_pair(ids, slots, part)
    return torch.maximum(where_equal(ids, slots, first, part), where_equal(ids, slots, second, part)).long()


def find(ids: Tensor, slots: Slots, part: Tensor | None = None) -> Tensor:
    """What `find_rows` says, in the form that is fastest where it runs."""
    if torch.compiler.is_compiling():
        return _find_slot_by_slot(ids, slots, part)
    if not _checks.readable(ids):
        return find_rows(ids, slots, part)
    chunks = zip(
        torch.split(ids.flatten(), CHUNK),
        itertools.repeat(None) if part is None else torch.split(part.expand(ids.shape).flatten(), CHUNK),
        strict=False,
    )
    return torch.cat([_find_most_in_first(some, slots, their) for some, their in chunks]).view(ids.shape)


def _find_slot_by_slot(ids: Tensor, slots: Slots, part: Tensor | None) -> Tensor:
    """For compilers: no slot is a dimension, so that one loop over the ids does it all, and keeps nothing."""
    keys, rows = slots.keys.view(-1), slots.rows.view(-1)
    begin, end = (0, 1 << 31) if part is None else (slots.begins[part], slots.begins[part + 1])
    found = torch.full_like(ids, -1)
    for bucket in bucket_pair(ids, slots, part):
        for slot in range(BUCKET):
            at = bucket * BUCKET + slot
            row = rows[at].long()
            found = torch.where((keys[at] == ids) & (row >= begin) & (row < end), row, found)
    return found


def _find_most_in_first(ids: Tensor, slots: Slots, part: Tensor | None) -> Tensor:
    """For (N,) ids on a CPU: looks into the second bucket only for what is not in the first."""
    first, second = bucket_pair(ids, slots, part)
    found = where_equal(ids, slots, first, part)
    left = torch.nonzero(found < 0).squeeze(1)
    if len(left):
        found[left] = where_equal(ids[left], slots, second[left], None if part is None else part[left])
    return found.long()


def bucket_pair(ids: Tensor, slots: Slots, part: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two buckets, (...) each, in one of which an id stands if it is in a table."""
    num_buckets, hashed = slots.keys.shape[0], slots.hashed
    mixed = mix(ids, hashed[0])
    mixed = (mixed if part is None else mixed + part * hashed[2]) * hashed[1]
    return ((mixed >> 32) & LOW_32) * num_buckets >> 32, (mixed & LOW_32) * num_buckets >> 32


def where_equal(ids: Tensor, slots: Slots, bucket: Tensor, part: Tensor | None) -> Tensor:
    """(...) int32 the row of each id in the bucket named, -1 where it does not stand there."""
    rows, equal = _take(slots.rows, bucket), _take(slots.keys, bucket) == ids[..., None]
    if part is not None:
        equal &= (rows >= slots.begins[part][..., None]) & (rows < slots.begins[part + 1][..., None])
    return torch.where(equal, rows, -1).amax(-1)


def _take(buckets: Tensor, which: Tensor) -> Tensor:
    """``buckets[which]``, three times faster on a CPU."""
    return buckets.index_select(0, which.flatten()).view(*which.shape, BUCKET)


def part_of(rows: Tensor, begins: Tensor) -> Tensor | None:
    """The part that each row is of, None where there is one."""
    return None if begins.shape[0] == 2 else torch.bucketize(rows, begins[1:-1], right=True)


def entries(slots: Slots) -> Iterator[tuple[Tensor, Tensor]]:
    """The ids that stand in slots and their rows, some slots at a time."""
    for some, their in zip(*(torch.split(one.flatten(), CHUNK) for one in slots[:2]), strict=True):
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


def place(slots: Slots, ids: Tensor, given: Tensor, changes: Changes | None = None) -> tuple[Tensor, Tensor]:
    """Put (N,) ids and their distinct rows into slots; those that have found none after many turns, and their rows.

    Each turn sorts what is left by bucket and fills the empty slots. Who finds none goes to the other bucket; there the
    first one of those takes the slot of another id, which goes on to its own other bucket.
    """
    changes = Changes() if changes is None else changes
    flat_keys, flat_rows = slots.keys.view(-1), slots.rows.view(-1)
    wants_second, tried = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for turn in range(_TURNS):
        if not len(ids):
            break
        pair = bucket_pair(ids, slots, part_of(given, slots.begins))
        bucket, order = torch.where(wants_second, pair[1], pair[0]).sort(stable=True)
        ids, given, wants_second, tried = ids[order], given[order], wants_second[order], tried[order]
        rank = torch.arange(len(ids), device=ids.device) - torch.searchsorted(bucket, bucket)
        empty = slots.rows[bucket] < 0
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
        wants_second[kicks] = bucket_pair(moved, slots, part_of(moved_rows, slots.begins))[0] != bucket[kicks]
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
    """What a hash function adds to an id, multiplies with, and adds for a part."""
    return [signed(splitmix(seed, 0)), signed(splitmix(seed, 1) | 1), signed(splitmix(seed, 2) | 1)]


def next_hash(hashed: Tensor) -> Tensor:
    """Another one, (3,), which follows from this one."""
    return torch.tensor(hash_of(int(hashed[0]) % (1 << 63)), device=hashed.device)
