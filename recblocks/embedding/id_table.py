"""Raw 64-bit ids to rows: a hash table in buckets of eight, in vectors, on CPU and GPU."""

from __future__ import annotations

import copy
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from recblocks import _checks
from recblocks._files import replacing
from recblocks._hashing import GOLDEN, signed
from recblocks._memory import copied
from recblocks.embedding import _buckets, _free_rows
from recblocks.embedding._id_table_state import LAYOUT, MOST_ROWS, SAVED, capacities_of, check_sketch, check_state
from recblocks.sketch import CountMinSketch

_STATE = (*SAVED, "capacities", "_free", "_hands", "_num_writes")
_ATTEMPTS = 20
_BEGIN = threading.Lock()
_T = TypeVar("_T")


class TableFull(ValueError):
    """More new ids than there are rows for: ``wanted`` where ``room`` would do, in ``part`` of a table.

    ``table`` is the name of the part, where it has one, as in a `FusedEmbeddingLookup`.
    """

    def __init__(self, wanted: int, room: int, part: int, num_parts: int = 1, table: str | None = None) -> None:
        of = f" of {table!r}" if table is not None else f" of part {part}" if num_parts > 1 else ""
        can = "which are the rows that can be given"
        super().__init__(f"ids{of} must be at most {room} new ones, {can}, got {wanted}")
        self.wanted, self.room, self.part, self.num_parts, self.table = wanted, room, part, num_parts, table

    def named(self, names: Sequence[str]) -> TableFull:
        """The same of parts that have names."""
        return TableFull(self.wanted, self.room, self.part, self.num_parts, names[self.part])

    def __reduce__(self) -> tuple[Any, ...]:
        """Be made again from what it was made from, in another process too."""
        return type(self), (self.wanted, self.room, self.part, self.num_parts, self.table)


class _Reading:
    """While something is read of a table, which must not change."""

    __slots__ = ("table", "version", "what")

    def __init__(self, table: IdTable, what: str) -> None:
        self.table, self.what, self.version = table, what, table._version

    def __enter__(self) -> None:
        if self.version % 2:
            self._refuse()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.version != self.table._version:
            self._refuse()

    def _refuse(self) -> None:
        raise RuntimeError(f"{self.what} must not run while the table is written")


class Inserted(NamedTuple):
    """What `IdTable.insert` did."""

    rows: Tensor
    """(...) int64, the row of each id; -1 where it was not seen often enough yet."""
    begun: Tensor
    """(K,) int64 rows that were given in this call, ascending: what an embedding has in them is to be reset."""


class IdTable(nn.Module):
    """Gives raw ids rows 0, 1, 2, … of an embedding table, and finds them again.

    Any int64 is an id. A new id gets the lowest row that is free, those of one `insert` in the order of their first
    places; so what a table holds follows from the calls alone, not from its device, its seed or its past sizes.

    A table may have several parts, each with ids and rows of its own, one part's rows behind the other's: so one table,
    and one call, serves many features. The same id of two parts is two ids: it is looked for in other buckets, and in
    the same ones told apart by the part that its row is of.

    What stands in a slot is a hash of 64 bits of the id and its part, one to one, and no two ids of a table have the
    same: so one slot is all there is to look at, and the ids are read off the hashes where they are asked for.

    Ids stand in buckets of eight, apart from their rows, at most 85 % of the slots filled: 14.1 bytes a row, 22.1 where
    uses are counted, and 8 for each row that is free again. Of a table that was just filled 86 % of the ids stand in
    the first of their two buckets, of a half full one nearly all; 65 % when every id was evicted for another since.

    Finds may run beside each other, in threads too. `insert`, `erase`, `evict`, `grow` and loading write: they are for
    one thread, between steps. Who writes, finds, saves, copies or asks for `num_ids` or `entries` meanwhile gets an
    error. A compiled or captured find, or one on another CUDA stream, cannot check that. `grow`, loading, and an insert
    that hashes anew because ids collide put keys and rows into new memory: graphs that were captured before must be
    captured again. A compiled find is compiled anew for each size of the table, of which torch takes eight.

    Args:
        capacity: how many rows, every one of which can be used, or how many of each part; below 2**31 in all.
        admit_after: an id is given a row when it has been seen so often, this time included, as far as the sketch
            knows, which may count too much.
        sketch: counts the sightings where ``admit_after`` is above 1. The table updates it, which does nothing in
            ``eval()``.
        evict: where all rows are taken, "least_used" gives a new id the row of that which was inserted least often
            since it has it, of its own part; of several that of the next row after the one evicted last. None: that
            is an error.
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
        >>> features = IdTable([2, 3])
        >>> features.insert(torch.tensor([[7, 8], [7, 7]]), part=torch.tensor([[0], [1]])).rows
        tensor([[0, 1],
                [2, 2]])

    Note:
        Writers copy what they must know to the host; `find` does not.

    Source:
        Bucketed cuckoo hashing (Dietzfelbinger and Weidling 2007), for TransAct 3.4.2's one lookup of all features.
    """

    keys: Tensor
    rows: Tensor
    uses: Tensor
    hashed: Tensor
    begins: Tensor
    numbers: Tensor
    _free: _free_rows.FreeRows

    def __init__(
        self,
        capacity: int | Sequence[int],
        *,
        admit_after: int = 1,
        sketch: CountMinSketch | None = None,
        evict: Literal["least_used"] | None = None,
        seed: int = 0,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        self.capacities = _capacities(capacity)
        admit_after = _checks.integer("admit_after", admit_after, at_least=1)
        _checks.choice("evict", evict, (None, "least_used"))
        seed = _checks.integer("seed", seed, at_least=0)
        if not isinstance(sketch, CountMinSketch | None):
            raise TypeError(f"sketch must be a CountMinSketch, got {_checks.describe(sketch)}")
        if (sketch is None) is (admit_after > 1):
            raise ValueError(f"sketch must be given where admit_after is above 1, and only there, got {sketch!r}")
        self.admit_after, self.sketch, self.evicts, self.seed = admit_after, sketch, evict, seed
        self._version = 0
        with torch.inference_mode(False):
            for name, tensor in self._begin(device).items():
                self.register_buffer(name, tensor)
            self._remember()

    @property
    def capacity(self) -> int:
        """How many rows there are, of all parts."""
        return sum(self.capacities)

    @property
    def num_ids(self) -> int:
        """How many ids have a row, of all parts."""
        return sum(self.num_ids_by_part)

    @property
    def num_ids_by_part(self) -> list[int]:
        """How many ids of each part have a row."""
        with self.reading("num_ids"):
            self._refresh()
            return self._num_ids()

    @property
    def slots(self) -> _buckets.Slots:
        """What a find reads."""
        return _buckets.Slots(self.keys, self.rows, self.hashed, self.begins)

    def reset_parameters(self) -> None:
        """Forget every id, and every sighting."""
        self._write(self._reset)
        if self.sketch is not None:
            self.sketch.reset_parameters()

    def forward(self, ids: Tensor, part: Tensor | None = None) -> Tensor:
        """Find like `find`."""
        return self.find(ids, part)

    def find(self, ids: Tensor, part: Tensor | None = None) -> Tensor:
        """Find the row of each id, -1 where it has none.

        Args:
            ids: (...) int64.
            part: int64, the part that each id is of, from 0 on; broadcasts against ids. None where there is one part.

        Returns:
            (...) int64 in [-1, capacity).

        Raises:
            TypeError, ValueError: ids or part of another dtype or on another device; part of a shape that does not
                broadcast, none where there are several, or, on a CPU, a number of no part.
            RuntimeError: the table is written meanwhile.
        """
        part = self._check_ids(ids, part)
        if torch.compiler.is_compiling():
            return _buckets.find(ids, self.slots, part)
        with self.reading("find"):
            return _buckets.find(ids, self.slots, part)

    def insert(self, ids: Tensor, part: Tensor | None = None) -> Inserted:
        """Find the row of each id, and give those that have none a row; a failed call changes nothing.

        Where ids are evicted, all of their part is read: 30 ms a million rows, so `evict` many at a time, ahead.

        Args:
            ids: (...) int64, an id may repeat.
            part: like `find`'s.

        Returns:
            rows (...), and which rows were given.

        Raises:
            TypeError, ValueError: like `find`'s; `TableFull` for more new ids than there are rows for.
            RuntimeError: the table is written meanwhile; or ids that no hash function can place.

        Example:
            >>> table = IdTable(2, evict="least_used")
            >>> rows, begun = table.insert(torch.tensor([7, 7, 8]))
            >>> table.insert(torch.tensor([9]))
            Inserted(rows=tensor([1]), begun=tensor([1]))
            >>> table.find(torch.tensor([7, 8, 9]))
            tensor([ 0, -1,  1])
        """
        part = self._check_ids(ids, part)
        return self._write(self._insert, ids, part)

    def erase(self, ids: Tensor, part: Tensor | None = None) -> Tensor:
        """Take the rows of some ids away; those that have none are passed over.

        Args:
            ids: (...) int64, an id may repeat.
            part: like `find`'s.

        Returns:
            (...) the rows that they had, -1 where none.

        Raises:
            TypeError, ValueError: like `find`'s.
            RuntimeError: the table is written meanwhile.
        """
        part = self._check_ids(ids, part)
        return self._write(self._erase, ids, part)

    def evict(self, num: int, part: int | None = None) -> tuple[Tensor, Tensor]:
        """Take the rows of the least used ids away, for which the table must be made with ``evict="least_used"``.

        Args:
            num: how many, at most as many as there are.
            part: of which part, None where there is one.

        Returns:
            (num,) the ids and (num,) the rows that they had, ascending by row.

        Raises:
            TypeError, ValueError: another number or part, or a table that does not count uses.
            RuntimeError: the table is written meanwhile.
        """
        if not self.evicts:
            raise ValueError('evict must be "least_used" when the table is made, got None')
        return self._write(self._evict, num, self._number_of(part))

    def grow(self, capacity: int, part: int | None = None) -> None:
        """Make room for more rows. Beside the old and the new table little is held meanwhile.

        Every id keeps its row in its part: those of later parts lie so many rows further back.

        Args:
            capacity: of the part, at least as many as now; all parts' below 2**31.
            part: which one, None where there is one.

        Raises:
            TypeError, ValueError: another capacity or part.
            RuntimeError: the table is written meanwhile.
        """
        number = self._number_of(part)
        had = self.capacities[number]
        capacity = _checks.integer("capacity", capacity, at_least=had, at_most=MOST_ROWS - self.capacity + had)
        self._write(self._grow, capacity, number)

    def entries(self) -> tuple[Tensor, Tensor]:
        """All ids and their rows, (num_ids,) each, ascending by row; `begins` says which part a row is of."""
        with self.reading("entries"):
            stands = self.rows >= 0
            rows, order = self.rows[stands].long().sort()
            return _buckets.ids_in(self.keys[stands][order], rows, self.slots), rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a file, all of it or nothing: a file that was there stays until the new one is whole."""
        options = {"admit_after": self.admit_after, "seed": self.seed, "evict": self.evicts}
        sketch = None
        if self.sketch is not None:
            sketch = {name: getattr(self.sketch, name) for name in ("width", "depth", "seed")}
        with replacing(path) as scratch, self.reading("save"), scratch.open("wb") as file:
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
        table = cls(1, **saved["options"], sketch=sketch, device=device)
        table.load_state_dict(saved["state"], assign=True)
        return table

    def reading(self, what: str) -> _Reading:
        """Raise a RuntimeError that names who reads, where the table is written meanwhile."""
        return _Reading(self, what)

    def extra_repr(self) -> str:
        """Name the capacity and the rules."""
        capacity = self.capacities if len(self.capacities) > 1 else self.capacity
        return f"capacity={capacity}, admit_after={self.admit_after}, evict={self.evicts!r}"

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled while it is written."""
        with self.reading("a copy"):
            return self.__dict__.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> IdTable:
        """Refuse to be copied while it is written."""
        with self.reading("a copy"):
            memo[id(self)] = other = self.__class__.__new__(self.__class__)
            other.__dict__ = copy.deepcopy(self.__dict__, memo)
            return other

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self.reading("state_dict"):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take over another table, of any size and number of parts, all of it or nothing."""
        absent = [prefix + name for name in SAVED if prefix + name not in state_dict]
        if absent:
            if len(absent) < len(SAVED):
                raise ValueError(f"state_dict must hold all of a table, got none of {', '.join(absent)}")
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        self._write(self._load, state_dict, prefix, *args)

    def _load(self, _: _buckets.Changes, state_dict: Any, prefix: str, *args: Any) -> None:
        given = {name: state_dict[prefix + name] for name in SAVED}
        check_state(given, prefix, counts_uses=self.evicts is not None)
        check_sketch(self.sketch, state_dict, f"{prefix}sketch.")
        for name, tensor in given.items():
            setattr(self, name, torch.empty_like(tensor, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in given:  # with assign=True they are the giver's
            setattr(self, name, copied(getattr(self, name)))
        self._count_rows()
        self._num_writes -= 1  # what was loaded stays as it was saved

    def _begin(self, device: torch.device | str | int | None) -> dict[str, Tensor]:
        """The buffers of an empty table."""
        self._hands, self._num_writes = [0] * len(self.capacities), 0
        begins = torch.tensor([0, *itertools.accumulate(self.capacities)], device=device)
        self._free = _free_rows.none_given(begins)
        keys, rows = _buckets.empty(_buckets.num_buckets_of(self.capacity), device)
        return {
            "keys": keys,
            "rows": rows,
            "uses": torch.zeros(self.capacity if self.evicts else 0, dtype=torch.int64, device=device),
            "hashed": torch.tensor(_buckets.hash_of(self.seed), device=device),
            "begins": begins,
            "numbers": torch.tensor([LAYOUT, 0, 0, *self._hands], device=device),
        }

    def _reset(self, _: _buckets.Changes) -> None:
        for name, tensor in self._begin(self.rows.device).items():
            setattr(self, name, tensor)
        self._num_writes -= 1

    def _insert(
        self,
        changes: _buckets.Changes,
        ids: Tensor,
        part: Tensor | None,
        begin: Callable[[_buckets.Changes, Tensor], None] | None = None,
    ) -> Inserted:
        """Insert; ``begin`` is told the rows that are given, before the sightings are counted, which stay counted."""
        self._refresh()
        unique, part, place, seen = _unique(ids.flatten(), None if part is None else part.expand(ids.shape).flatten())
        rows = _buckets.find(unique, self.slots, part)
        salted = unique if part is None else unique + part * signed(GOLDEN)
        new = self._to_begin(salted, part, rows, place, seen)
        wanted = _count(part, new, len(self.capacities))
        missing = wanted - _free_rows.count(self._free, self.begins)
        if bool((missing > 0).any()):
            self._remove(self._least_used(missing, rows[rows >= 0], wanted), changes)
        begun, self._free = _free_rows.take(self._free, self.begins, wanted)
        self._place(unique[new], begun, changes)
        rows[new] = begun
        if self.evicts:
            has_row = rows >= 0
            uses = self.uses[rows[has_row]] * torch.isin(rows[has_row], begun, invert=True) + seen[has_row]
            changes.set(self.uses, rows[has_row], uses)
        inserted = Inserted(rows[place].view(ids.shape), begun)
        if begin is not None:
            begin(changes, begun)
        if self.sketch is not None:
            self.sketch.update(salted, seen)
        return inserted

    def _erase(self, changes: _buckets.Changes, ids: Tensor, part: Tensor | None) -> Tensor:
        self._refresh()
        rows = _buckets.find(ids, self.slots, part)
        stand = rows >= 0
        part = None if part is None else part.expand(ids.shape)[stand]
        hashes = _buckets.hash_ids(ids[stand], self.hashed, part)
        self._empty_slots(_buckets.find_slots(torch.unique(hashes), self.slots), changes)
        return rows

    def _evict(self, changes: _buckets.Changes, num: int, part: int) -> tuple[Tensor, Tensor]:
        self._refresh()
        num = _checks.integer("num", num, at_least=0, at_most=self._num_ids()[part])
        wanted = torch.zeros_like(self._free.ends)
        wanted[part] = num
        return self._remove(self._least_used(wanted, self.begins[:0], wanted), changes)

    def _grow(self, _: _buckets.Changes, capacity: int, part: int) -> None:
        self._refresh()
        more, end = capacity - self.capacities[part], sum(self.capacities[: part + 1])
        if self.evicts:
            self.uses = torch.cat([self.uses[:end], self.uses.new_zeros(more), self.uses[end:]])
        self._free = _free_rows.widen(self._free, part, self.begins, more)
        rows = self.rows if end == self.capacity else torch.where(self.rows >= end, self.rows + more, self.rows)
        self.capacities = [*self.capacities[:part], capacity, *self.capacities[part + 1 :]]
        self.begins = torch.cat([self.begins[: part + 1], self.begins[part + 1 :] + more])
        self.rows = rows
        if _buckets.num_buckets_of(self.capacity) > self.keys.shape[0]:
            self._rehash(_buckets.num_buckets_of(self.capacity), self.hashed)

    def _to_begin(self, salted: Tensor, part: Tensor | None, rows: Tensor, place: Tensor, seen: Tensor) -> Tensor:
        """Places of the ids that get a row now, by part, and ascending by where they stand first."""
        new = torch.nonzero(rows < 0).squeeze(1)
        if self.sketch is not None:
            new = new[self.sketch.query(salted[new]) + seen[new] >= self.admit_after]
        first = torch.full_like(salted, len(place))
        first.scatter_reduce_(0, place, torch.arange(len(place), device=place.device), "amin")
        new = new[first[new].argsort()]
        return new if part is None else new[part[new].argsort(stable=True)]

    def _least_used(self, missing: Tensor, kept: Tensor, wanted: Tensor) -> Tensor:
        """Rows of the least used ids, so many of each part as are missing there, none of those that are kept."""
        begins, ends, evicted = self.begins.tolist(), self._free.ends.tolist(), [self.begins[:0]]
        for part in torch.nonzero(missing > 0).flatten().tolist():
            begin, num = begins[part], int(missing[part])
            candidate = torch.ones(ends[part] - begin, dtype=torch.bool, device=kept.device)
            for others in (self._free.again, kept):
                candidate[others[(others >= begin) & (others < begins[part + 1])] - begin] = False
            rows = torch.nonzero(candidate).squeeze(1)
            num_others = len(rows) if self.evicts else 0
            if num > num_others:
                asked = int(wanted[part])
                raise TableFull(asked, asked - num + num_others, part, len(self.capacities))
            rows = rows.roll(-int(torch.searchsorted(rows, self._hands[part])))
            uses = self.uses[begin + rows]
            at_most = uses.kthvalue(num).values
            fewer = uses < at_most
            tied = torch.nonzero(uses == at_most).squeeze(1)[: num - int(fewer.sum())]
            fewer[tied] = True
            self._hands = [*self._hands[:part], int(rows[tied[-1]]) + 1, *self._hands[part + 1 :]]
            evicted.append(begin + rows[fewer])
        return torch.cat(evicted)

    def _remove(self, rows: Tensor, changes: _buckets.Changes) -> tuple[Tensor, Tensor]:
        """Take (K,) rows away from their ids; the ids and the rows, ascending by row."""
        gone = torch.zeros(self.capacity + 1, dtype=torch.bool, device=rows.device)  # the last is of empty slots, -1
        gone[rows] = True
        slot = torch.nonzero(gone[self.rows.view(-1)]).squeeze(1)
        freed, order = self.rows.view(-1)[slot].long().sort()
        ids = _buckets.ids_in(self.keys.view(-1)[slot[order]], freed, self.slots)
        self._empty_slots(slot, changes)
        return ids, freed

    def _empty_slots(self, slot: Tensor, changes: _buckets.Changes) -> None:
        freed = self.rows.view(-1)[slot].long()
        changes.set(self.rows.view(-1), slot, torch.full_like(slot, -1))
        changes.set(self.keys.view(-1), slot, _buckets.key_of_nothing(slot // _buckets.BUCKET, self.keys.shape[0]))
        self._free = _free_rows.give_back(self._free, freed)

    def _place(self, ids: Tensor, rows: Tensor, changes: _buckets.Changes) -> None:
        """Put distinct ids that are not there into the table."""
        hashes = self._hashes(ids, rows, self.hashed)
        left, their = _buckets.place(self.slots, hashes, rows, changes)
        if len(left):
            ids = _buckets.ids_in(left, their, self.slots)
            self._rehash(self.keys.shape[0], _buckets.next_hash(self.hashed), (ids, their))

    def _rehash(self, num_buckets: int, hashed: Tensor, *more: tuple[Tensor, Tensor]) -> None:
        """Build the table anew with so many buckets, by another hash where this one does not do."""
        for _ in range(_ATTEMPTS):
            slots = _buckets.Slots(*_buckets.empty(num_buckets, self.keys.device), hashed, self.begins)
            if all(
                not len(_buckets.place(slots, self._hashes(ids, rows, hashed), rows)[0])
                for ids, rows in itertools.chain(_buckets.entries(self.slots), more)
            ):
                self.keys, self.rows, self.hashed = slots[:3]
                return
            hashed = _buckets.next_hash(hashed)
        num_ids = sum(self._num_ids())
        raise RuntimeError(f"{_ATTEMPTS} hash functions could not place {num_ids} ids in {num_buckets} buckets")

    def _hashes(self, ids: Tensor, rows: Tensor, hashed: Tensor) -> Tensor:
        return _buckets.hash_ids(ids, hashed, _buckets.part_of(rows, self.begins))

    def _num_ids(self) -> list[int]:
        if self.rows.is_meta:
            return [0] * len(self.capacities)
        free = _free_rows.count(self._free, self.begins).tolist()
        return [capacity - left for capacity, left in zip(self.capacities, free, strict=True)]

    def _numbers(self) -> list[int]:
        """What is saved beside the slots, and changes whenever they do."""
        return [LAYOUT, sum(self._num_ids()), self._num_writes, *self._hands]

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
        """Say which rows are free, and how many there are of each part."""
        if self.rows.is_meta:
            return
        begins, (_, _, num_writes, *hands) = self.begins.tolist(), self.numbers.tolist()
        if _buckets.num_buckets_of(begins[-1]) != self.rows.shape[0] or self.uses.shape[0] != (
            begins[-1] if self.evicts else 0
        ):
            shapes = f"{self.rows.shape[0]} buckets and {self.uses.shape[0]} uses"
            raise ValueError(f"begins must be those of the table's other buffers, got {begins[-1]} rows for {shapes}")
        self._free = _free_rows.not_in(self.rows, self.begins)
        self.capacities = capacities_of(self.begins)
        self._hands, self._num_writes = hands, num_writes

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

    def _check_ids(self, ids: Tensor, part: Tensor | None) -> Tensor | None:
        """The parts, None where there is one."""
        _checks.integers("ids", ids)
        if ids.device != self.keys.device:
            raise ValueError(f"ids must be on {self.keys.device} like the table, got {ids.device}")
        num_parts = len(self.capacities)
        if part is None:
            if num_parts > 1:
                raise ValueError(f"part must be given for a table of {num_parts} parts, got None")
            return None
        _checks.integers("part", part)
        sizes = zip(reversed(part.shape), reversed(ids.shape), strict=False)
        if part.device != ids.device or part.ndim > ids.ndim or any(one not in (1, size) for one, size in sizes):
            wanted = f"broadcast against ids, {tuple(ids.shape)} on {ids.device}"
            raise ValueError(f"part must {wanted}, got {_checks.describe(part)} on {part.device}")
        if _checks.readable(part) and bool(((part < 0) | (part >= num_parts)).any()):
            raise ValueError(f"part must be from 0 to {num_parts - 1}, got {part.min()} to {part.max()}")
        return part if num_parts > 1 else None

    def _number_of(self, part: int | None) -> int:
        most = len(self.capacities) - 1
        return 0 if part is None and most == 0 else _checks.integer("part", part, at_least=0, at_most=most)


def _capacities(capacity: int | Sequence[int]) -> list[int]:
    """How many rows each part has."""
    if not isinstance(capacity, Sequence):
        return [_checks.integer("capacity", capacity, at_least=1, at_most=MOST_ROWS)]
    found = [_checks.integer(f"capacity[{at}]", one, at_least=1, at_most=MOST_ROWS) for at, one in enumerate(capacity)]
    if not 1 <= sum(found) <= MOST_ROWS:
        raise ValueError(f"capacity must be from 1 to {MOST_ROWS} in all, got {sum(found)} in {len(found)} parts")
    return found


def _unique(ids: Tensor, part: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Different ids and their parts, which of them each given one is, and how often each was given."""
    if part is None:
        unique, place, seen = torch.unique(ids, return_inverse=True, return_counts=True)
        return unique, None, place, seen
    order = ids.argsort()
    order = order[part[order].argsort(stable=True)]
    ids, part = ids[order], part[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = (ids[1:] != ids[:-1]) | (part[1:] != part[:-1])
    group = first.cumsum(0) - 1
    return ids[first], part[first], torch.empty_like(order).scatter_(0, order, group), group.bincount()


def _count(part: Tensor | None, chosen: Tensor, num_parts: int) -> Tensor:
    """How many of those chosen are of each part, (P,)."""
    return torch.bincount(torch.zeros_like(chosen) if part is None else part[chosen], minlength=num_parts)
