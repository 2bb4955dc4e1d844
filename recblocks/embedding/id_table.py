"""Raw 64-bit ids to rows: a hash table in buckets of eight, in vectors, on CPU and GPU."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import pathlib
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from recblocks import _checks
from recblocks._hashing import GOLDEN, LOW_32, mix, signed, splitmix
from recblocks.sketch import CountMinSketch, refuse_others

BUCKET = 8  # keys side by side: one cache line of 64 bytes
_FULLEST = 0.85  # of the slots, when every row is taken; two buckets of eight can be filled to .98
_MOST_ROWS = (1 << 31) - 1
_SAVED = ("keys", "rows", "uses", "hashed", "numbers")
_STATE = (*_SAVED, "_freed", "capacity", "_end", "_hand", "_num_writes")
_LAYOUT = 1  # of what a checkpoint holds
_TURNS = 100  # ids are moved so often before all are hashed anew
_ATTEMPTS = 20
_CHUNK = 1 << 15  # ids at a time, so that they stay in cache and little is held beside the tables
_BEGIN = threading.Lock()
_T = TypeVar("_T")


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
        >>> table = IdTable(100)
        >>> _ = table.insert(torch.tensor([-5, 2**62]))
        >>> find_rows(torch.tensor([2**62, 0]), table.keys, table.rows, table.hashed)
        tensor([ 1, -1])
    """
    found = [_where_equal(ids, keys, rows, bucket) for bucket in bucket_pair(ids, keys.shape[0], hashed)]
    return torch.maximum(*found).long()


def bucket_pair(ids: Tensor, num_buckets: int, hashed: Tensor) -> tuple[Tensor, Tensor]:
    """The two buckets, (...) each, in one of which an id stands if it is in a table."""
    mixed = mix(ids, hashed[0]) * hashed[1]
    return ((mixed >> 32) & LOW_32) * num_buckets >> 32, (mixed & LOW_32) * num_buckets >> 32


def salt_ids(ids: Tensor, feature: int) -> Tensor:
    """Set the ids of one feature apart from those of others, so that one table can serve many features.

    ``id + feature · ⌊2⁶⁴ / φ⌋`` modulo 2⁶⁴. Of F features, no two ids from 0 to 2⁶² / F come out the same. Of n ids
    that are spread over all 64 bits, some two of different features do with a probability of about n² / 2⁶⁵, which is
    6·10⁻⁶ for 15 million: where this is too much, give each feature a table.

    Args:
        ids: (...) int64.
        feature: its number, from 0 to F - 1, where F is at most 2³¹.

    Returns:
        (...) int64; one to one within a feature, and feature 0's are the ids themselves.

    Raises:
        TypeError, ValueError: for another dtype or number.

    Example:
        >>> ids = torch.tensor([7, 8])
        >>> torch.isin(salt_ids(ids, 1), salt_ids(ids, 2)).any()
        tensor(False)

    Source:
        TransAct 3.4.2, where one table holds the rows of all features; Fibonacci hashing (Knuth, 6.4).
    """
    _checks.integers("ids", ids)
    feature = _checks.integer("feature", feature, at_least=0, at_most=_MOST_ROWS)
    return ids + signed(feature * GOLDEN % (1 << 64))


def _where_equal(ids: Tensor, keys: Tensor, rows: Tensor, bucket: Tensor) -> Tensor:
    return torch.where(keys[bucket] == ids[..., None], rows[bucket], -1).amax(-1)


class Inserted(NamedTuple):
    """What `IdTable.insert` did."""

    rows: Tensor
    """(...) int64, the row of each id; -1 where it was not seen often enough yet."""
    begun: Tensor
    """(K,) int64 rows that were given in this call, ascending: what an embedding has in them is to be reset."""


class IdTable(nn.Module):
    """Gives raw ids rows 0, 1, 2, … of an embedding table, and finds them again.

    Any int64 is an id. A new id gets the lowest row that is free, those of one `insert` in the order of their first
    places; so what a table holds follows from the calls alone, not from its device, its seed or its past sizes. Ids
    stand in buckets of eight, apart from their rows, at most 85 % of the slots filled: 14.1 bytes a row, 22.1 where
    uses are counted, and 8 for each row that is free again. Of a table that was just filled 86 % of the ids stand in
    the first of their two buckets, of a half full one nearly all; 65 % when every id was evicted for another since.

    Finds may run beside each other, in threads too. `insert`, `erase`, `evict`, `grow` and loading write: they are for
    one thread, between steps. Who writes, finds, saves, copies or asks for `num_ids` or `entries` meanwhile gets an
    error. A compiled or captured find, or one on another CUDA stream, cannot check that. `grow`, loading, and an insert
    that hashes anew because ids collide put keys and rows into new memory: graphs that were captured before must be
    captured again. A compiled find is compiled anew for each size of the table, of which torch takes eight.

    Args:
        capacity: how many rows, every one of which can be used; below 2**31.
        admit_after: an id is given a row when it has been seen so often, this time included, as far as the sketch
            knows, which may count too much.
        sketch: counts the sightings where ``admit_after`` is above 1. The table updates it, which does nothing in
            ``eval()``.
        evict: where all rows are taken, "least_used" gives a new id the row of that which was inserted least often
            since it has it; of several that of the next row after the one evicted last. None: that is an error.
        seed: chooses the first hash function, from 0 to 2**63 - 1.
        device: where the table lives.

    Raises:
        TypeError, ValueError: for arguments out of their range.

    Example:
        >>> table = IdTable(3)
        >>> table.insert(torch.tensor([[70, -2], [70, 0]])).rows
        tensor([[0, 1],
                [0, 2]])
        >>> table.find(torch.tensor([0, 5]))
        tensor([ 2, -1])

    Note:
        Writers copy what they must know to the host; `find` does not.

    Source:
        Bucketed cuckoo hashing (Dietzfelbinger and Weidling 2007), for TransAct 3.4.2's one lookup of all features.
    """

    keys: Tensor
    rows: Tensor
    uses: Tensor
    hashed: Tensor
    numbers: Tensor
    _freed: Tensor

    def __init__(
        self,
        capacity: int,
        *,
        admit_after: int = 1,
        sketch: CountMinSketch | None = None,
        evict: Literal["least_used"] | None = None,
        seed: int = 0,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        capacity = _checks.integer("capacity", capacity, at_least=1, at_most=_MOST_ROWS)
        admit_after = _checks.integer("admit_after", admit_after, at_least=1)
        _checks.choice("evict", evict, (None, "least_used"))
        seed = _checks.integer("seed", seed, at_least=0)
        if not isinstance(sketch, CountMinSketch | None):
            raise TypeError(f"sketch must be a CountMinSketch, got {_checks.describe(sketch)}")
        if (sketch is None) is (admit_after > 1):
            raise ValueError(f"sketch must be given where admit_after is above 1, and only there, got {sketch!r}")
        self.capacity, self.admit_after, self.sketch, self.evicts, self.seed = (
            capacity,
            admit_after,
            sketch,
            evict,
            seed,
        )
        self._version = 0
        with torch.inference_mode(False):
            for name, tensor in self._begin(device).items():
                self.register_buffer(name, tensor)
            self._remember()

    @property
    def num_ids(self) -> int:
        """How many ids have a row."""
        with self._reads("num_ids"):
            self._refresh()
            return self._num_ids()

    def reset_parameters(self) -> None:
        """Forget every id, and every sighting."""
        self._write(self._reset)
        if self.sketch is not None:
            self.sketch.reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        """Find like `find`."""
        return self.find(ids)

    def find(self, ids: Tensor) -> Tensor:
        """Find the row of each id, -1 where it has none.

        Args:
            ids: (...) int64.

        Returns:
            (...) int64 in [-1, capacity).

        Raises:
            TypeError, ValueError: ids of another dtype or on another device.
            RuntimeError: the table is written meanwhile.
        """
        self._check_ids(ids)
        if torch.compiler.is_compiling():
            return find_rows(ids, self.keys, self.rows, self.hashed)
        with self._reads("find"):
            if not _checks.readable(ids):
                return find_rows(ids, self.keys, self.rows, self.hashed)
            parts = [self._find_most_in_first(some) for some in torch.split(ids.flatten(), _CHUNK)]
            return torch.cat(parts).view(ids.shape)

    def insert(self, ids: Tensor) -> Inserted:
        """Find the row of each id, and give those that have none a row; a failed call changes nothing.

        Where ids are evicted, the whole table is read: 30 ms a million rows, so `evict` many at a time, ahead.

        Args:
            ids: (...) int64, an id may repeat.

        Returns:
            rows (...), and which rows were given.

        Raises:
            TypeError, ValueError: ids of another dtype or on another device; or more than there are rows for.
            RuntimeError: the table is written meanwhile; or ids that no hash function can place.

        Example:
            >>> table = IdTable(2, evict="least_used")
            >>> rows, begun = table.insert(torch.tensor([7, 7, 8]))
            >>> table.insert(torch.tensor([9]))
            Inserted(rows=tensor([1]), begun=tensor([1]))
            >>> table.find(torch.tensor([7, 8, 9]))
            tensor([ 0, -1,  1])
        """
        self._check_ids(ids)
        return self._write(self._insert, ids)

    def erase(self, ids: Tensor) -> Tensor:
        """Take the rows of some ids away; those that have none are passed over.

        Args:
            ids: (...) int64, an id may repeat.

        Returns:
            (...) the rows that they had, -1 where none.

        Raises:
            TypeError, ValueError: ids of another dtype or on another device.
            RuntimeError: the table is written meanwhile.
        """
        self._check_ids(ids)
        return self._write(self._erase, ids)

    def evict(self, num: int) -> tuple[Tensor, Tensor]:
        """Take the rows of the least used ids away, for which the table must be made with ``evict="least_used"``.

        Args:
            num: how many, at most `num_ids`.

        Returns:
            (num,) the ids and (num,) the rows that they had, ascending by row.

        Raises:
            TypeError, ValueError: another number, or a table that does not count uses.
            RuntimeError: the table is written meanwhile.
        """
        if not self.evicts:
            raise ValueError('evict must be "least_used" when the table is made, got None')
        return self._write(self._evict, num)

    def grow(self, capacity: int) -> None:
        """Make room for more rows; every id keeps its row. Beside the old and the new table little is held meanwhile.

        Args:
            capacity: at least as many as now, below 2**31.

        Raises:
            TypeError, ValueError: another capacity.
            RuntimeError: the table is written meanwhile.
        """
        capacity = _checks.integer("capacity", capacity, at_least=self.capacity, at_most=_MOST_ROWS)
        self._write(self._grow, capacity)

    def entries(self) -> tuple[Tensor, Tensor]:
        """All ids and their rows, (num_ids,) each, ascending by row."""
        with self._reads("entries"):
            stands = self.rows >= 0
            rows, order = self.rows[stands].long().sort()
            return self.keys[stands][order], rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a file, all of it or nothing: a file that was there stays until the new one is whole."""
        path = pathlib.Path(path)
        options = {name: getattr(self, name) for name in ("capacity", "admit_after", "seed")} | {"evict": self.evicts}
        sketch = None
        if self.sketch is not None:
            sketch = {name: getattr(self.sketch, name) for name in ("width", "depth", "seed")}
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        with partial.open("xb") as file:
            try:
                with self._reads("save"):
                    torch.save({"options": options, "sketch": sketch, "state": self.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | int | None = None) -> IdTable:
        """Read a table that `save` wrote, on any device.

        Raises:
            ValueError: for a file of something else, unless torch.load refuses it first.
        """
        saved = torch.load(path, map_location=torch.device("cpu" if device is None else device), weights_only=True)
        if not isinstance(saved, dict) or saved.keys() != {"options", "sketch", "state"}:
            raise ValueError(f"path must name a file that IdTable.save wrote, got {os.fspath(path)!r}")
        sketch = None if saved["sketch"] is None else CountMinSketch(**saved["sketch"], device=device)
        table = cls(**{**saved["options"], "capacity": 1}, sketch=sketch, device=device)
        table.load_state_dict(saved["state"], assign=True)
        return table

    def extra_repr(self) -> str:
        """Name the capacity and the rules."""
        return f"capacity={self.capacity}, admit_after={self.admit_after}, evict={self.evicts!r}"

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled while it is written."""
        with self._reads("a copy"):
            return self.__dict__.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> IdTable:
        """Refuse to be copied while it is written."""
        with self._reads("a copy"):
            memo[id(self)] = other = self.__class__.__new__(self.__class__)
            other.__dict__ = copy.deepcopy(self.__dict__, memo)
            return other

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self._reads("state_dict"):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take over another table, of any size, all of it or nothing."""
        absent = [prefix + name for name in _SAVED if prefix + name not in state_dict]
        if absent:
            if len(absent) < len(_SAVED):
                raise ValueError(f"state_dict must hold all of a table, got none of {', '.join(absent)}")
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        self._write(self._load, state_dict, prefix, *args)

    def _load(self, _: _Changes, state_dict: Any, prefix: str, *args: Any) -> None:
        given = {name: state_dict[prefix + name] for name in _SAVED}
        _check_state(given, prefix, counts_uses=self.evicts is not None)
        _check_sketch(self.sketch, state_dict, f"{prefix}sketch.")
        for name, tensor in given.items():
            setattr(self, name, torch.empty_like(tensor, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in given:  # with assign=True they are the giver's
            setattr(self, name, getattr(self, name).clone(memory_format=torch.contiguous_format))
        self._count_rows()
        self._num_writes -= 1  # what was loaded stays as it was saved

    def _begin(self, device: torch.device | str | int | None) -> dict[str, Tensor]:
        """The buffers of an empty table."""
        self._hand = self._num_writes = self._end = 0
        self._freed = torch.empty(0, dtype=torch.int64, device=device)
        keys, rows = _empty(_num_buckets(self.capacity), device)
        return {
            "keys": keys,
            "rows": rows,
            "uses": torch.zeros(self.capacity if self.evicts else 0, dtype=torch.int64, device=device),
            "hashed": torch.tensor(_hash(self.seed), device=device),
            "numbers": torch.tensor(self._numbers(), device=device),
        }

    def _reset(self, _: _Changes) -> None:
        for name, tensor in self._begin(self.rows.device).items():
            setattr(self, name, tensor)
        self._num_writes -= 1

    def _insert(self, changes: _Changes, ids: Tensor) -> Inserted:
        self._refresh()
        unique, place, seen = torch.unique(ids.flatten(), return_inverse=True, return_counts=True)
        rows = find_rows(unique, self.keys, self.rows, self.hashed)
        new = self._to_begin(unique, rows, place, seen)
        missing = len(new) - (self.capacity - self._num_ids())
        if missing > 0:
            self._remove(self._least_used(missing, rows[rows >= 0], len(new)), changes)
        begun = self._take(len(new))
        self._place(unique[new], begun, changes)
        rows[new] = begun
        if self.evicts:
            has_row = rows >= 0
            uses = self.uses[rows[has_row]] * torch.isin(rows[has_row], begun, invert=True) + seen[has_row]
            changes.set(self.uses, rows[has_row], uses)
        inserted = Inserted(rows[place].view(ids.shape), begun)
        if self.sketch is not None:
            self.sketch.update(unique, seen)
        return inserted

    def _erase(self, changes: _Changes, ids: Tensor) -> Tensor:
        self._refresh()
        rows = find_rows(ids, self.keys, self.rows, self.hashed)
        unique = torch.unique(ids[rows >= 0])
        pair = torch.stack(bucket_pair(unique, self.keys.shape[0], self.hashed), 1)
        stands = (self.keys[pair] == unique[:, None, None]) & (self.rows[pair] >= 0)
        stands[:, 1] &= (pair[:, 0] != pair[:, 1])[:, None]
        slot = (pair[..., None] * BUCKET + torch.arange(BUCKET, device=ids.device))[stands]
        self._empty_slots(slot, changes)
        return rows

    def _evict(self, changes: _Changes, num: int) -> tuple[Tensor, Tensor]:
        self._refresh()
        num = _checks.integer("num", num, at_least=0, at_most=self._num_ids())
        return self._remove(self._least_used(num, self._freed[:0], num), changes)

    def _grow(self, _: _Changes, capacity: int) -> None:
        self._refresh()
        if self.evicts:
            self.uses = torch.cat([self.uses, self.uses.new_zeros(capacity - self.capacity)])
        if _num_buckets(capacity) > self.keys.shape[0]:
            self._rehash(_num_buckets(capacity), self.hashed)
        self.capacity = capacity

    def _find_most_in_first(self, ids: Tensor) -> Tensor:
        """`find_rows`, which looks into the second bucket only for what is not in the first."""
        first, second = bucket_pair(ids, self.keys.shape[0], self.hashed)
        found = _where_equal(ids, self.keys, self.rows, first)
        left = torch.nonzero(found < 0).squeeze(1)
        if len(left):
            found[left] = _where_equal(ids[left], self.keys, self.rows, second[left])
        return found.long()

    def _to_begin(self, unique: Tensor, rows: Tensor, place: Tensor, seen: Tensor) -> Tensor:
        """Places of the ids that get a row now, ascending by where they stand first."""
        new = torch.nonzero(rows < 0).squeeze(1)
        if self.sketch is not None:
            new = new[self.sketch.query(unique[new]) + seen[new] >= self.admit_after]
        first = torch.full_like(unique, len(place))
        first.scatter_reduce_(0, place, torch.arange(len(place), device=place.device), "amin")
        return new[first[new].argsort()]

    def _least_used(self, num: int, kept: Tensor, wanted: int) -> Tensor:
        """Rows of the least used ids, (num,), none of those that are kept."""
        others = self._num_ids() - len(kept) if self.evicts else 0
        if num > others:
            most = self.capacity - self._num_ids() + others
            raise ValueError(f"ids must be at most {most} new ones, which are the rows that can be given, got {wanted}")
        candidate = torch.ones(self.capacity, dtype=torch.bool, device=kept.device)
        candidate[self._end :] = False
        candidate[self._freed] = False
        candidate[kept] = False
        rows = torch.nonzero(candidate).squeeze(1)
        if num == 0:
            return rows[:0]
        rows = rows.roll(-int(torch.searchsorted(rows, self._hand)))
        uses = self.uses[rows]
        at_most = uses.kthvalue(num).values
        fewer = uses < at_most
        tied = torch.nonzero(uses == at_most).squeeze(1)[: num - int(fewer.sum())]
        fewer[tied] = True
        self._hand = int(rows[tied[-1]]) + 1
        return rows[fewer]

    def _remove(self, rows: Tensor, changes: _Changes) -> tuple[Tensor, Tensor]:
        """Take (K,) rows away from their ids; the ids and the rows, ascending by row."""
        gone = torch.zeros(self.capacity + 1, dtype=torch.bool, device=rows.device)  # the last is of empty slots, -1
        gone[rows] = True
        slot = torch.nonzero(gone[self.rows.view(-1)]).squeeze(1)
        freed, order = self.rows.view(-1)[slot].long().sort()
        ids = self.keys.view(-1)[slot[order]]
        self._empty_slots(slot, changes)
        return ids, freed

    def _empty_slots(self, slot: Tensor, changes: _Changes) -> None:
        freed = self.rows.view(-1)[slot].long()
        changes.set(self.rows.view(-1), slot, torch.full_like(slot, -1))
        self._freed = torch.cat([self._freed, freed]).sort().values

    def _take(self, num: int) -> Tensor:
        """The lowest rows that are free, (num,)."""
        old, self._freed = self._freed[:num], self._freed[num:]
        begin, self._end = self._end, self._end + num - len(old)
        return torch.cat([old, torch.arange(begin, self._end, device=old.device)])

    def _place(self, ids: Tensor, rows: Tensor, changes: _Changes) -> None:
        """Put distinct ids that are not there into the table."""
        left = _place(self.keys, self.rows, self.hashed, ids, rows, changes)
        if len(left[0]):
            self._rehash(self.keys.shape[0], _next(self.hashed), left)

    def _rehash(self, num_buckets: int, hashed: Tensor, *more: tuple[Tensor, Tensor]) -> None:
        """Build the table anew with so many buckets, by another hash where this one does not do."""
        keys, rows = _empty(num_buckets, self.keys.device)
        for _ in range(_ATTEMPTS):
            if all(not len(_place(keys, rows, hashed, *part)[0]) for part in itertools.chain(self._chunks(), more)):
                self.keys, self.rows, self.hashed = keys, rows, hashed
                return
            rows.fill_(-1)
            hashed = _next(hashed)
        raise RuntimeError(f"{_ATTEMPTS} hash functions could not place {self._num_ids()} ids in {num_buckets} buckets")

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for keys, rows in zip(*(torch.split(one.view(-1), _CHUNK) for one in (self.keys, self.rows)), strict=True):
            yield keys[rows >= 0], rows[rows >= 0].long()

    def _num_ids(self) -> int:
        return self._end - self._freed.shape[0]

    def _numbers(self) -> list[int]:
        """What is saved beside the slots, and changes whenever they do."""
        return [_LAYOUT, self.capacity, self._num_ids(), self._hand, self._num_writes]

    def _remember(self) -> None:
        """Know the buffers again: any write into a tensor counts its version up, and other tensors have others."""
        self._known = None if self.rows.is_inference() else (id(self.rows), self.rows._version)

    def _refresh(self) -> None:
        """Find out which rows are free, where somebody else wrote into the buffers or moved them."""
        if self.rows.is_meta:
            return
        known = None if self.rows.is_inference() else (id(self.rows), self.rows._version)
        if known is None or known != self._known or self.numbers.tolist() != self._numbers():
            self._count_rows()
            self._remember()

    def _count_rows(self) -> None:
        """Say which rows are free: those from ``_end`` on, and ``_freed``, ascending."""
        if self.rows.is_meta:
            return
        _, capacity, _, hand, num_writes = self.numbers.tolist()
        if _num_buckets(capacity) != self.rows.shape[0] or self.uses.shape[0] != (capacity if self.evicts else 0):
            shapes = f"{self.rows.shape[0]} buckets and {self.uses.shape[0]} uses"
            raise ValueError(f"numbers must be those of the table's other buffers, got {capacity} rows for {shapes}")
        taken = torch.zeros(capacity + 1, dtype=torch.bool, device=self.rows.device)
        taken[self.rows.view(-1)] = True  # -1 is the last one
        rows = torch.nonzero(taken[:-1]).squeeze(1)
        end = int(rows[-1]) + 1 if len(rows) else 0
        freed = torch.nonzero(~taken[:end]).squeeze(1)
        self._end, self._freed, self.capacity, self._hand, self._num_writes = end, freed, capacity, hand, num_writes

    def _write(self, work: Callable[..., _T], *args: Any) -> _T:
        """One writer at a time, at work while the version is odd; if it fails, everything is as it was."""
        before, changes, writes = {}, _Changes(), False
        try:
            with _BEGIN:
                if self._version % 2:
                    raise RuntimeError("a table must be written by one thread at a time")
                writes, self._version = True, self._version + 1
            with torch.inference_mode(False):
                before = {name: getattr(self, name) for name in _STATE}
                done = work(changes, *args)
                self._num_writes += 1
                self.numbers = torch.tensor(self._numbers(), device=self.rows.device)
                self._remember()
                return done
        except BaseException:
            try:
                changes.undo()
            finally:
                for name, value in before.items():
                    setattr(self, name, value)
            raise
        finally:
            self._version += writes

    @contextlib.contextmanager
    def _reads(self, what: str) -> Iterator[None]:
        version = self._version
        if version % 2 == 0:
            yield
        if version % 2 or version != self._version:
            raise RuntimeError(f"{what} must not run while the table is written")

    def _check_ids(self, ids: Tensor) -> None:
        _checks.integers("ids", ids)
        if ids.device != self.keys.device:
            raise ValueError(f"ids must be on {self.keys.device} like the table, got {ids.device}")


class _Changes:
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


def _place(
    keys: Tensor, rows: Tensor, hashed: Tensor, ids: Tensor, given: Tensor, changes: _Changes | None = None
) -> tuple[Tensor, Tensor]:
    """Put (N,) distinct ids and their rows into slots; those that have found none after many turns, and their rows.

    Each turn sorts what is left by bucket and fills the empty slots. Who finds none goes to the other bucket; there the
    first one of those takes the slot of another id, which goes on to its own other bucket.
    """
    changes = _Changes() if changes is None else changes
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


def _check_sketch(sketch: CountMinSketch | None, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Refuse sightings of another sketch, half of one, or any where none are counted."""
    wanted = {} if sketch is None else {prefix + name: tensor.shape for name, tensor in sketch.named_buffers()}
    given = {name: state_dict[name].shape for name in state_dict if name.startswith(prefix) and "_extra" not in name}
    if sketch is not None:
        refuse_others(sketch, state_dict, prefix)
    if given != wanted:
        raise ValueError(f"state_dict must hold of a sketch {list(wanted)}, got {list(given)}, or of other shapes")


def _check_state(given: dict[str, Tensor], prefix: str, *, counts_uses: bool) -> None:
    """Refuse what is no table, or one whose ids do not stand where they are looked for."""
    name = {each: f"state_dict[{prefix + each!r}]" for each in given}
    _checks.integers(name["numbers"], given["numbers"], 5)
    _checks.integers(name["hashed"], given["hashed"], 2)
    layout, num_ids = int(given["numbers"][0]), int(given["numbers"][2])
    capacity = int(given["numbers"][1])
    if layout != _LAYOUT or not 1 <= capacity <= _MOST_ROWS:
        raise ValueError(f"{name['numbers']} must be of layout {_LAYOUT} and a capacity, got {layout} and {capacity}")
    keys, rows, shape = given["keys"], given["rows"], (_num_buckets(capacity), BUCKET)
    _checks.integers(name["keys"], keys, *shape)
    _checks.tensor(name["rows"], rows, *shape, dtype=torch.int32)
    _checks.integers(name["uses"], given["uses"], capacity if counts_uses else 0)
    seen = torch.zeros(capacity + 1, dtype=torch.bool, device=rows.device)
    if bool(((rows < -1) | (rows >= capacity)).any()):
        raise ValueError(f"{name['rows']} must be from -1 to {capacity - 1}, got {rows.min()} to {rows.max()}")
    seen[rows.flatten()] = True
    found = int((rows >= 0).sum())
    if not found == int(seen[:-1].sum()) == num_ids:
        raise ValueError(f"{name['rows']} must hold {num_ids} different rows, got {int(seen[:-1].sum())} in {found}")
    for some, their in zip(*(torch.split(one.flatten(), _CHUNK) for one in (keys, rows)), strict=True):
        stands = their >= 0
        if not torch.equal(find_rows(some[stands], keys, rows, given["hashed"]), their[stands].long()):
            raise ValueError(f"{name['keys']} must hold each id once, in one of its two buckets, got others")


def _empty(num_buckets: int, device: torch.device | str | int | None) -> tuple[Tensor, Tensor]:
    keys = torch.zeros(num_buckets, BUCKET, dtype=torch.int64, device=device)
    return keys, torch.full((num_buckets, BUCKET), -1, dtype=torch.int32, device=device)


def _num_buckets(capacity: int) -> int:
    return math.ceil(capacity / (BUCKET * _FULLEST))


def _hash(seed: int) -> list[int]:
    """What a hash function adds and multiplies with."""
    return [signed(splitmix(seed, 0)), signed(splitmix(seed, 1) | 1)]


def _next(hashed: Tensor) -> Tensor:
    return torch.tensor(_hash(int(hashed[0]) % (1 << 63)), device=hashed.device)
