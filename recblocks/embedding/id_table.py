"""Raw 64-bit ids to rows: a hash table in buckets of eight, in vectors, on CPU and GPU."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from recblocks import _checks
from recblocks._files import replacing
from recblocks._hashing import GOLDEN, signed
from recblocks.embedding import _buckets
from recblocks.sketch import CountMinSketch, refuse_others

_MOST_ROWS = (1 << 31) - 1
_SAVED = ("keys", "rows", "uses", "hashed", "numbers")
_STATE = (*_SAVED, "_freed", "capacity", "_end", "_hand", "_num_writes")
_LAYOUT = 1  # of what a checkpoint holds
_ATTEMPTS = 20
_BEGIN = threading.Lock()
_T = TypeVar("_T")


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
        self.capacity, self.admit_after, self.sketch = capacity, admit_after, sketch
        self.evicts, self.seed, self._version = evict, seed, 0
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
            return _buckets.find_rows(ids, self.keys, self.rows, self.hashed)
        with self._reads("find"):
            if not _checks.readable(ids):
                return _buckets.find_rows(ids, self.keys, self.rows, self.hashed)
            parts = [self._find_most_in_first(some) for some in torch.split(ids.flatten(), _buckets.CHUNK)]
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
        options = {name: getattr(self, name) for name in ("capacity", "admit_after", "seed")} | {"evict": self.evicts}
        sketch = None
        if self.sketch is not None:
            sketch = {name: getattr(self.sketch, name) for name in ("width", "depth", "seed")}
        with replacing(path) as scratch, self._reads("save"), scratch.open("wb") as file:
            torch.save({"options": options, "sketch": sketch, "state": self.state_dict()}, file)

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

    def _load(self, _: _buckets.Changes, state_dict: Any, prefix: str, *args: Any) -> None:
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
        keys, rows = _buckets.empty(_buckets.num_buckets_of(self.capacity), device)
        return {
            "keys": keys,
            "rows": rows,
            "uses": torch.zeros(self.capacity if self.evicts else 0, dtype=torch.int64, device=device),
            "hashed": torch.tensor(_buckets.hash_of(self.seed), device=device),
            "numbers": torch.tensor(self._numbers(), device=device),
        }

    def _reset(self, _: _buckets.Changes) -> None:
        for name, tensor in self._begin(self.rows.device).items():
            setattr(self, name, tensor)
        self._num_writes -= 1

    def _insert(self, changes: _buckets.Changes, ids: Tensor) -> Inserted:
        self._refresh()
        unique, place, seen = torch.unique(ids.flatten(), return_inverse=True, return_counts=True)
        rows = _buckets.find_rows(unique, self.keys, self.rows, self.hashed)
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

    def _erase(self, changes: _buckets.Changes, ids: Tensor) -> Tensor:
        self._refresh()
        rows = _buckets.find_rows(ids, self.keys, self.rows, self.hashed)
        unique = torch.unique(ids[rows >= 0])
        pair = torch.stack(_buckets.bucket_pair(unique, self.keys.shape[0], self.hashed), 1)
        stands = (self.keys[pair] == unique[:, None, None]) & (self.rows[pair] >= 0)
        stands[:, 1] &= (pair[:, 0] != pair[:, 1])[:, None]
        slot = (pair[..., None] * _buckets.BUCKET + torch.arange(_buckets.BUCKET, device=ids.device))[stands]
        self._empty_slots(slot, changes)
        return rows

    def _evict(self, changes: _buckets.Changes, num: int) -> tuple[Tensor, Tensor]:
        self._refresh()
        num = _checks.integer("num", num, at_least=0, at_most=self._num_ids())
        return self._remove(self._least_used(num, self._freed[:0], num), changes)

    def _grow(self, _: _buckets.Changes, capacity: int) -> None:
        self._refresh()
        if self.evicts:
            self.uses = torch.cat([self.uses, self.uses.new_zeros(capacity - self.capacity)])
        if _buckets.num_buckets_of(capacity) > self.keys.shape[0]:
            self._rehash(_buckets.num_buckets_of(capacity), self.hashed)
        self.capacity = capacity

    def _find_most_in_first(self, ids: Tensor) -> Tensor:
        """`find_rows`, which looks into the second bucket only for what is not in the first."""
        first, second = _buckets.bucket_pair(ids, self.keys.shape[0], self.hashed)
        found = _buckets.where_equal(ids, self.keys, self.rows, first)
        left = torch.nonzero(found < 0).squeeze(1)
        if len(left):
            found[left] = _buckets.where_equal(ids[left], self.keys, self.rows, second[left])
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

    def _remove(self, rows: Tensor, changes: _buckets.Changes) -> tuple[Tensor, Tensor]:
        """Take (K,) rows away from their ids; the ids and the rows, ascending by row."""
        gone = torch.zeros(self.capacity + 1, dtype=torch.bool, device=rows.device)  # the last is of empty slots, -1
        gone[rows] = True
        slot = torch.nonzero(gone[self.rows.view(-1)]).squeeze(1)
        freed, order = self.rows.view(-1)[slot].long().sort()
        ids = self.keys.view(-1)[slot[order]]
        self._empty_slots(slot, changes)
        return ids, freed

    def _empty_slots(self, slot: Tensor, changes: _buckets.Changes) -> None:
        freed = self.rows.view(-1)[slot].long()
        changes.set(self.rows.view(-1), slot, torch.full_like(slot, -1))
        self._freed = torch.cat([self._freed, freed]).sort().values

    def _take(self, num: int) -> Tensor:
        """The lowest rows that are free, (num,)."""
        old, self._freed = self._freed[:num], self._freed[num:]
        begin, self._end = self._end, self._end + num - len(old)
        return torch.cat([old, torch.arange(begin, self._end, device=old.device)])

    def _place(self, ids: Tensor, rows: Tensor, changes: _buckets.Changes) -> None:
        """Put distinct ids that are not there into the table."""
        left = _buckets.place(self.keys, self.rows, self.hashed, ids, rows, changes)
        if len(left[0]):
            self._rehash(self.keys.shape[0], _buckets.next_hash(self.hashed), left)

    def _rehash(self, num_buckets: int, hashed: Tensor, *more: tuple[Tensor, Tensor]) -> None:
        """Build the table anew with so many buckets, by another hash where this one does not do."""
        keys, rows = _buckets.empty(num_buckets, self.keys.device)
        for _ in range(_ATTEMPTS):
            if all(
                not len(_buckets.place(keys, rows, hashed, *part)[0])
                for part in itertools.chain(_buckets.entries(self.keys, self.rows), more)
            ):
                self.keys, self.rows, self.hashed = keys, rows, hashed
                return
            rows.fill_(-1)
            hashed = _buckets.next_hash(hashed)
        raise RuntimeError(f"{_ATTEMPTS} hash functions could not place {self._num_ids()} ids in {num_buckets} buckets")

    def _num_ids(self) -> int:
        return self._end - self._freed.shape[0]

    def _numbers(self) -> list[int]:
        """What is saved beside the slots, and changes whenever they do."""
        return [_LAYOUT, self.capacity, self._num_ids(), self._hand, self._num_writes]

    def _remember(self) -> None:
        """Know the buffers again."""
        self._known = self._mark()

    def _mark(self) -> tuple[int, int] | None:
        """What another tensor, or a write into this one, would change; None where torch does not count the writes."""
        return None if self.rows.is_inference() else (id(self.rows), self.rows._version)

    def _refresh(self) -> None:
        """Find out which rows are free, where somebody else wrote into the buffers or moved them."""
        if self.rows.is_meta:
            return
        mark = self._mark()
        if mark is None or mark != self._known or self.numbers.tolist() != self._numbers():
            self._count_rows()
            self._remember()

    def _count_rows(self) -> None:
        """Say which rows are free: those from ``_end`` on, and ``_freed``, ascending."""
        if self.rows.is_meta:
            return
        _, capacity, _, hand, num_writes = self.numbers.tolist()
        if _buckets.num_buckets_of(capacity) != self.rows.shape[0] or self.uses.shape[0] != (
            capacity if self.evicts else 0
        ):
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
        before, changes, writes = {}, _buckets.Changes(), False
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
    layout, capacity, num_ids = (int(number) for number in given["numbers"][:3])
    if layout != _LAYOUT or not 1 <= capacity <= _MOST_ROWS:
        raise ValueError(f"{name['numbers']} must be of layout {_LAYOUT} and a capacity, got {layout} and {capacity}")
    keys, rows, shape = given["keys"], given["rows"], (_buckets.num_buckets_of(capacity), _buckets.BUCKET)
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
    for ids, their in _buckets.entries(keys, rows):
        if not torch.equal(_buckets.find_rows(ids, keys, rows, given["hashed"]), their):
            raise ValueError(f"{name['keys']} must hold each id once, in one of its two buckets, got others")
