"""Buckets of eight slots, in one of two of which an id stands: where to look, and how to put ids in, in vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recblocks import _checks
from recblocks._hashing import LOW_32, mix, signed, splitmix, unmix
from recblocks._memory import in_huge_pages

BUCKET = 8  # keys side by side: one cache line of 64 bytes
CHUNK = 1 << 15  # ids at a time, so that they stay in cache and little is held beside the tables
_FULLEST = 0.85  # of the slots, when every row is taken; two buckets of eight can be filled to .98
_TURNS = 100  # ids are moved so often before all are hashed anew


class Slots(NamedTuple):
    """Where ids stand, and what it takes to look there."""

    keys: Tensor
    """(B, 8) int64, the hash of what stands there."""
    rows: Tensor
    """(B, 8) int32, -1 where nothing stands."""
    hashed: Tensor
    """(3,) int64, what the hash adds to an id, multiplies with, and adds for a part; the last two are odd."""
    begins: Tensor
    """(P + 1,) int64, the first row of each part, ascending, and the number of rows."""


def find_rows(ids: Tensor, slots: Slots, part: Tensor | None = None) -> Tensor:
    """Find the row of each id, or -1: the definition of what a table answers, and of where an id may stand.

    What stands in a slot is not the id but a hash of 64 bits of it and its part, ``h₁ h₂``, one to one within a part.
    It stands in one of two buckets that it names itself, ``⌊h₁ B / 2³²⌋`` and ``⌊h₂ B / 2³²⌋``, and in one slot only:
    no two ids of a table have the same hash. The part of a slot is that which its row is of: an id of another part
    that has the same hash is not there. An empty slot holds a hash that names other buckets, so no id is special.

    Args:
        ids: (...) int64.
        slots: of B buckets and P parts.
        part: broadcasts against ids, int64 from 0 to P - 1; None where P is 1.

    Returns:
        (...) int64.

    Example:
        >>> keys, rows = empty(2, "cpu")
        >>> slots = Slots(keys, rows, torch.tensor(hash_of(0)), begins=torch.tensor([0, 1, 2]))
        >>> hashes = hash_ids(torch.tensor([-5, 2**62]), slots.hashed, torch.tensor([0, 1]))
        >>> _ = place(slots, hashes, torch.tensor([0, 1]))
        >>> find_rows(torch.tensor([2**62, 2**62, 0]), slots, part=torch.tensor([0, 1, 1]))
        tensor([-1,  1, -1])
    """
    hashes = hash_ids(ids, slots.hashed, part)
    first, second = bucket_pair(hashes, slots.keys.shape[0])
    at = torch.maximum(_slot_in(hashes, slots, first), _slot_in(hashes, slots, second))
    return _rows_at(at, slots, part)


def find(ids: Tensor, slots: Slots, part: Tensor | None = None) -> Tensor:
    """What `find_rows` says, in the form that is fastest where it runs."""
    if torch.compiler.is_compiling():
        return _find_slot_by_slot(ids, slots, part)
    if not _checks.readable(ids):
        return find_rows(ids, slots, part)
    hashes = hash_ids(ids, slots.hashed, part)
    at = [find_slots(some, slots) for some in torch.split(hashes.flatten(), CHUNK)]
    return _rows_at(torch.cat(at).view(ids.shape), slots, part)


def find_slots(hashes: Tensor, slots: Slots) -> Tensor:
    """The slot of each of (N,) hashes, or -1; looks into the second bucket only for what is not in the first."""
    first, second = bucket_pair(hashes, slots.keys.shape[0])
    at = _slot_in(hashes, slots, first)
    left = torch.nonzero(at < 0).squeeze(1)
    if len(left):
        at[left] = _slot_in(hashes[left], slots, second[left])
    return at


def _find_slot_by_slot(ids: Tensor, slots: Slots, part: Tensor | None) -> Tensor:
    """For compilers: no slot is a dimension, so that one loop over the ids does it all, and keeps nothing."""
    hashes, at = hash_ids(ids, slots.hashed, part), torch.full_like(ids, -1)
    for bucket in bucket_pair(hashes, slots.keys.shape[0]):
        for slot, keys in enumerate(slots.keys.unbind(1)):
            at = torch.where(keys[bucket] == hashes, bucket * BUCKET + slot, at)
    return _rows_at(at, slots, part)


def hash_ids(ids: Tensor, hashed: Tensor, part: Tensor | None) -> Tensor:
    """64 bits, one to one within a part: ``(mix(id + a) + part · c) b`` for the three numbers a, b, c."""
    mixed = mix(ids, hashed[0])
    return (mixed if part is None else mixed + part * hashed[2]) * hashed[1]


def ids_of(hashes: Tensor, hashed: Tensor, part: Tensor | None) -> Tensor:
    """The ids that have these hashes: `hash_ids` undone."""
    mixed = hashes * signed(pow(int(hashed[1]), -1, 1 << 64))
    return unmix(mixed if part is None else mixed - part * hashed[2], hashed[0])


def ids_in(hashes: Tensor, rows: Tensor, slots: Slots) -> Tensor:
    """The ids of what stands in slots, by the parts that their rows are of."""
    return ids_of(hashes, slots.hashed, part_of(rows, slots.begins))


def bucket_pair(hashes: Tensor, num_buckets: int) -> tuple[Tensor, Tensor]:
    """The two buckets that hashes name, (...) each."""
    return ((hashes >> 32) & LOW_32) * num_buckets >> 32, (hashes & LOW_32) * num_buckets >> 32


def _slot_in(hashes: Tensor, slots: Slots, bucket: Tensor) -> Tensor:
    """(...) int64 the slot of each hash in the bucket named, -1 where it does not stand there."""
    # index_select takes a third of the time of keys[bucket] on a CPU.
    keys = slots.keys.index_select(0, bucket.flatten()).view(*bucket.shape, BUCKET)
    slot = torch.arange(BUCKET, dtype=torch.int8, device=keys.device)
    found = torch.where(keys == hashes[..., None], slot, -1).amax(-1)
    return torch.where(found < 0, -1, bucket * BUCKET + found)


def _rows_at(at: Tensor, slots: Slots, part: Tensor | None) -> Tensor:
    """(...) int64 the rows in slots, -1 where there is no slot, or one of another part."""
    rows = slots.rows.view(-1).index_select(0, at.clamp(min=0).flatten()).view(at.shape).long()
    found = at >= 0
    if part is not None:
        found = found & (rows >= slots.begins[part]) & (rows < slots.begins[part + 1])
    return torch.where(found, rows, -1)


def part_of(rows: Tensor, begins: Tensor) -> Tensor | None:
    """The part that each row is of, None where there is one."""
    return None if begins.shape[0] == 2 else torch.bucketize(rows, begins[1:-1], right=True)


def entries(slots: Slots) -> Iterator[tuple[Tensor, Tensor]]:
    """The ids that have a row and their rows, some slots at a time."""
    for some, their in zip(*(torch.split(one.flatten(), CHUNK) for one in slots[:2]), strict=True):
        rows = their[their >= 0].long()
        yield ids_in(some[their >= 0], rows, slots), rows


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


def place(slots: Slots, hashes: Tensor, given: Tensor, changes: Changes | None = None) -> tuple[Tensor, Tensor]:
    """Put (N,) hashes and their rows into slots; those that have found none, and their rows.

    They have not where there are two alike, of different parts, in the table or here. Else each turn sorts what is left
    by bucket and fills the empty slots. Who finds none goes to the other bucket; there the first one of those takes the
    slot of another hash, which goes on to its own other bucket; and so on for many turns.
    """
    changes = Changes() if changes is None else changes
    if slots.begins.shape[0] > 2 and (
        len(torch.unique(hashes)) < len(hashes) or bool((find_slots(hashes, slots) >= 0).any())
    ):
        return hashes, given
    flat_keys, flat_rows, num_buckets = slots.keys.view(-1), slots.rows.view(-1), slots.keys.shape[0]
    wants_second, tried = torch.zeros_like(hashes, dtype=torch.bool), torch.zeros_like(hashes, dtype=torch.bool)
    for turn in range(_TURNS):
        if not len(hashes):
            break
        pair = bucket_pair(hashes, num_buckets)
        bucket, order = torch.where(wants_second, pair[1], pair[0]).sort(stable=True)
        hashes, given, wants_second, tried = hashes[order], given[order], wants_second[order], tried[order]
        rank = torch.arange(len(hashes), device=hashes.device) - torch.searchsorted(bucket, bucket)
        is_empty = slots.rows[bucket] < 0
        nth = is_empty.cumsum(1, dtype=torch.int8)
        chosen = is_empty & (nth == rank[:, None] + 1)
        fits = chosen.any(1)
        slot = bucket * BUCKET + chosen.byte().argmax(1)
        changes.set(flat_keys, slot[fits], hashes[fits])
        changes.set(flat_rows, slot[fits], given[fits])
        left = ~fits
        kicks = left & tried & (rank == nth[:, -1])
        taken = bucket[kicks] * BUCKET + (bucket[kicks] + turn) % BUCKET
        moved, moved_rows = flat_keys[taken], flat_rows[taken].long()
        changes.set(flat_keys, taken, hashes[kicks])
        changes.set(flat_rows, taken, given[kicks])
        hashes[kicks], given[kicks] = moved, moved_rows
        wants_second[kicks] = bucket_pair(moved, num_buckets)[0] != bucket[kicks]
        hashes, given, wants_second = hashes[left], given[left], ~wants_second[left]
        tried = torch.ones_like(hashes, dtype=torch.bool)
    return hashes, given


def empty(num_buckets: int, device: torch.device | str | int | None) -> tuple[Tensor, Tensor]:
    """Keys and rows of buckets in which nothing stands."""
    keys = in_huge_pages(torch.empty(num_buckets, BUCKET, dtype=torch.int64, device=device))
    rows = in_huge_pages(torch.empty(num_buckets, BUCKET, dtype=torch.int32, device=device))
    for begin in range(0, num_buckets, CHUNK):
        bucket = torch.arange(begin, min(begin + CHUNK, num_buckets), device=device)
        keys[begin : begin + CHUNK] = key_of_nothing(bucket, num_buckets)[:, None]
    return keys, rows.fill_(-1)


def key_of_nothing(bucket: Tensor, num_buckets: int) -> Tensor:
    """What stands in the slots of buckets where nothing does: a hash that names the next bucket, and it alone."""
    other = (bucket + 1) % num_buckets
    half = ((other << 32) + num_buckets - 1) // num_buckets
    return (half << 32) | half


def num_buckets_of(capacity: int) -> int:
    """Buckets for so many rows; two at least, for an empty slot names another one."""
    return max(2, math.ceil(capacity / (BUCKET * _FULLEST)))


def hash_of(seed: int) -> list[int]:
    """What a hash function adds to an id, multiplies with, and adds for a part."""
    return [signed(splitmix(seed, 0)), signed(splitmix(seed, 1) | 1), signed(splitmix(seed, 2) | 1)]


def next_hash(hashed: Tensor) -> Tensor:
    """Another one, (3,), which follows from this one."""
    return torch.tensor(hash_of(int(hashed[0]) % (1 << 63)), device=hashed.device)
