"""Each user's newest actions, kept up to date by micro-batches of records that come late, twice or by two clocks."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recblocks import _checks
from recblocks.timelines import _arrays, cleaning
from recblocks.timelines._arrays import Array
from recblocks.timelines._user_rows import UserRows, spans
from recblocks.timelines.cleaning import CleaningReport

_CLOCKS, _LONGEST, _STANDS = "clock bits", "longest duration", "stands for an action"  # names that no column can have
_INT64 = np.iinfo(np.int64)


class NewestActions(NamedTuple):
    """The newest actions of some users, newest first, zeros where ``valid`` is False."""

    columns: dict[str, Tensor]
    """(U, S) each, in the dtype of the records."""
    valid: Tensor
    """(U, S) bool, True = a real action; padding is at the tail."""


class RealtimeActions:
    """Clean a stream of action records in micro-batches and answer each user's newest actions at any moment.

    What `clean_actions` does to all records at once, done as they come: after every `apply`, `newest` and `report` are
    those of `clean_actions` over all the records so far. So neither how the stream is cut into batches nor the order
    within the declared lateness changes an answer.

    A record may come after a newer one of the same user, if it is older by at most ``lateness``; one that is older
    still is dropped and counted (``late``). Records above that line may be joined yet by others: they are kept one by
    one. Below it merged actions are final, but for the records by another clock that may still join within
    ``clock_bound``. Memory: ``num_actions`` rows a user, and those that the lateness and the bound keep open.

    Args:
        num_actions: S, the length of a sequence.
        unit: "s" or "ms", of every time, of ``lateness`` and of ``clock_bound``.
        lateness: how much older than the user's newest record before it a record may be.
        clock_bound: how far the clocks of two sources may differ; records then need ``source``. See `clean_actions`.
        items: (I,) int64, every known item.
        action_types: every known action type.
        surfaces: every known surface.

    Note:
        `clean_actions` lets the earliest record of a merged action speak for it, of equal times the first to come. So
        another order may show in ``source`` and in further columns; never in time, item, type, surface and duration.

        Lateness is counted for each user apart: a user with one clock far ahead (see ``time_range`` of `apply`) costs
        no other user anything, and streams cut by user give the same answers.

        Pickle and deepcopy keep the whole state.

    Example:
        >>> import numpy as np
        >>> stream = RealtimeActions(num_actions=3, unit="s", lateness=5)
        >>> stream.apply(user=np.array([1, 1]), time=np.array([10, 12]), item=np.array([7, 8]))
        CleaningReport(read=2, kept=2, merged={}, dropped={})
        >>> stream.apply(user=np.array([1, 1, 1]), time=np.array([9, 12, 6]), item=np.array([9, 8, 7]))
        CleaningReport(read=5, kept=3, merged={'same_time': 1}, dropped={'late': 1})
        >>> newest = stream.newest(torch.tensor([1]), request_time=12)
        >>> newest.columns["item"], newest.valid
        (tensor([[7, 9, 0]]), tensor([[ True,  True, False]]))

    Source: TransAct, section 3.4.3 (realtime feature processing).
    """

    def __init__(
        self,
        *,
        num_actions: int,
        unit: str,
        lateness: int,
        clock_bound: int | None = None,
        items: object | None = None,
        action_types: Collection[int] | None = None,
        surfaces: Collection[int] | None = None,
    ) -> None:
        _checks.positive_int("num_actions", num_actions)
        _checks.choice("unit", unit, _arrays.UNITS)
        self._num_actions, self._unit = num_actions, unit
        self._lateness = _checks.integer("lateness", lateness, at_least=0)
        self._bound = None if clock_bound is None else _checks.integer("clock_bound", clock_bound, at_least=0)
        self._items = None if items is None else cleaning.known_items(items)
        self._types = None if action_types is None else cleaning.known_values("action_types", action_types)
        self._surfaces = None if surfaces is None else cleaning.known_values("surfaces", surfaces)
        self._sources = np.empty(0, dtype=np.int64)
        int64 = np.empty(0, dtype=np.int64)
        self._log = UserRows({"time": int64, "item": int64, _STANDS: np.empty(0, dtype=bool)})
        self._read = self._kept = self._same_time = 0
        self._dropped: dict[str, int] = {}

    @property
    def report(self) -> CleaningReport:
        """What became of every record so far, as `clean_actions` counts them; ``kept`` counts forgotten actions too."""
        others = self._read - self._kept - self._same_time - sum(self._dropped.values())
        merged = {"same_time": self._same_time, "clock_difference": others}
        return CleaningReport(
            self._read, self._kept, {reason: count for reason, count in merged.items() if count}, dict(self._dropped)
        )

    def apply(
        self,
        *,
        user: object,
        time: object,
        item: object,
        action_type: object | None = None,
        surface: object | None = None,
        duration: object | None = None,
        source: object | None = None,
        time_range: tuple[int, int] | None = None,
        **columns: object,
    ) -> CleaningReport:
        """Take the next records, in the order in which they came.

        Args:
            user: (N,) int64 raw ids; numpy, torch, or a numpy masked array, whose masked entries are null.
            time: (N,) int64 in ``unit``, or datetime64, which is rounded down to the unit.
            item: (N,) int64 raw ids.
            action_type: (N,) integers.
            surface: (N,) integers.
            duration: (N,) floats, seconds.
            source: (N,) integers, which system recorded the action; needed by ``clock_bound``.
            time_range: the earliest and the latest time that is credible by now, both included. One time far ahead
                makes all the user's records after it late, so state what the clocks can show.
            columns: further (N,) columns to carry along. Every batch has the columns and dtypes of the first.

        Returns:
            The report on the whole stream so far. A refused batch (an error) changes nothing.

        Raises:
            ValueError: for a missing, further or misshapen column, or more than 64 sources with ``clock_bound``.
            TypeError: for a column of a wrong dtype.
        """
        if self._bound is not None:
            cleaning.check_source(source)
        optional = {"action_type": action_type, "surface": surface, "duration": duration, "source": source, **columns}
        given = {"user": user, "time": time, "item": item, **{k: v for k, v in optional.items() if v is not None}}
        table, rows, dropped = cleaning.valid_records(
            given, self._unit, time_range, self._items, self._types, self._surfaces
        )
        read = table["user"].size
        table = {name: column[rows] for name, column in table.items()}
        sources = self._sources
        if self._bound is not None:
            sources = np.append(sources, np.setdiff1d(table["source"], sources))
            table[_CLOCKS] = cleaning.source_bits(table["source"], sources)
        if "duration" in table:
            table[_LONGEST] = table["duration"]
        table[_STANDS] = np.zeros(rows.size, dtype=bool)
        users, table["user"] = np.unique(table["user"], return_inverse=True)
        self._log.declare(table)
        self._sources = sources
        self._read += read
        late = self._merge(self._log.enter(users), table) if rows.size else 0
        for reason, count in {**dropped, "late": late}.items():
            if count:
                self._dropped[reason] = self._dropped.get(reason, 0) + count
        return self.report

    def _merge(self, places: Array, records: dict[str, Array]) -> int:
        """Bring valid records into the log; ``user`` counts through ``places``. Returns how many were late."""
        log = self._log
        known = log.latest[places]
        late = records["time"] < _less(_newest_so_far(records["user"], records["time"], known), self._lateness)
        records = {name: column[~late] for name, column in records.items()}
        latest = known.copy()
        np.maximum.at(latest, records["user"], records["time"])
        settled_before = _less(latest, self._lateness)
        closed_before = _less(settled_before, self._bound or 0)

        waiting = log.take(log.starts[places], log.open[places])
        final = log.take(log.starts[places] + log.open[places], log.sizes[places] - log.open[places])
        stood = int(waiting[_STANDS].sum())
        rows = {name: np.concatenate([waiting[name], column]) for name, column in records.items()}
        read = rows["time"].size
        rows, new_key = _one_row_a_time(rows)
        self._same_time += read - rows["time"].size
        rows = _one_row_an_action(rows, new_key, settled_before, self._bound)
        self._kept += int(rows[_STANDS].sum()) - stood

        rows = {name: np.concatenate([column, final[name]]) for name, column in rows.items()}  # final ones are older
        order = np.argsort(rows["user"], kind="stable")
        user, time = rows["user"][order], rows["time"][order]
        still_open = time >= closed_before[user]
        stay = still_open | (_rank(user, time < settled_before[user]) < self._num_actions)
        log.forgot[places] |= np.bincount(user[~stay], minlength=places.size) > 0
        log.latest[places] = latest
        log.write(places, {name: column[order[stay]] for name, column in rows.items()}, still_open[stay])
        return int(late.sum())

    def newest(self, users: object, *, request_time: object) -> NewestActions:
        """Answer each user's S newest actions strictly earlier than the request, from the records applied so far.

        Args:
            users: (U,) int64 raw ids, in any order; a user may repeat, one without actions has nothing valid.
            request_time: in ``unit``, or (U,), one for each user.

        Returns:
            (U, S) columns, torch tensors on the CPU, newest first, and ``valid``. Actions of equal time stand in the
            order of item, type and surface. Columns are those of the first batch, an empty one included; before it
            there are ``time`` and ``item`` alone.

        Raises:
            ValueError: if a request lies so far in the past that actions of its sequence are forgotten. Up to
                ``lateness`` before the user's newest action none are.
        """
        log = self._log
        ids = _arrays.as_int64("users", _arrays.without_nulls("users", users))
        asked = self._request_times(request_time, ids.size)
        places, known = log.find(ids)
        row, places = np.flatnonzero(known), places[known]
        index, owner = spans(log.starts[places], log.sizes[places])
        seen = log.columns[_STANDS][index] & (log.columns["time"][index] < asked[row][owner])
        index, owner = index[seen], owner[seen]
        short = log.forgot[places] & (np.bincount(owner, minlength=row.size) < self._num_actions)
        if short.any():
            first = row[short][0]
            raise ValueError(
                f"request_time must be at most lateness ({self._lateness}) before the user's newest action, at "
                f"{log.latest[places[short][0]]}, got {asked[first]} for user {ids[first]}: older ones are forgotten"
            )
        slot = _rank(owner, np.ones(owner.size, dtype=bool))
        inside = slot < self._num_actions
        index, at = index[inside], (row[owner[inside]], slot[inside])
        shape = (ids.size, self._num_actions)
        found = {}
        for name, dtype in log.dtypes.items():
            values = np.zeros(shape, dtype=dtype)
            values[at] = log.columns[_LONGEST if name == "duration" else name][index]
            found[name] = torch.from_numpy(values)
        valid = np.zeros(shape, dtype=bool)
        valid[at] = True
        return NewestActions(found, torch.from_numpy(valid))

    def _request_times(self, request_time: object, size: int) -> Array:
        if not isinstance(request_time, np.ndarray | Tensor):
            return np.full(size, _checks.integer("request_time", request_time))
        times = _arrays.as_time("request_time", _arrays.without_nulls("request_time", request_time), self._unit)
        if times.size != size:
            raise ValueError(f"request_time must have one entry for each of the {size} users given, got {times.size}")
        return times


def _one_row_a_time(rows: dict[str, Array]) -> tuple[dict[str, Array], Array]:
    """Merge the rows that agree in key and time into the first, ordered by key and time; and where keys begin."""
    order, new_key, new_time = cleaning.order_by_key(rows, np.arange(rows["time"].size))
    begins = np.flatnonzero(new_time)
    merged = {name: column[order[begins]] for name, column in rows.items()}
    for name, union in ((_CLOCKS, np.bitwise_or), ("duration", np.maximum)):
        if name in rows:
            merged[name] = union.reduceat(rows[name][order], begins)
    return merged, new_key[begins]


def _one_row_an_action(
    rows: dict[str, Array], new_key: Array, settled_before: Array, bound: int | None
) -> dict[str, Array]:
    """Find which rows stand for an action, and merge settled rows into theirs; by user, newest first.

    No record can come any more below ``settled_before`` (P,). Which rows below it are one action follows from them
    alone, since a row joins an action by what is earlier. So they become one row that has all their clocks: it lets the
    same later rows join, and never joins another such row, for what kept the first of its rows apart still does.
    """
    time, user, place = rows["time"], rows["user"], np.arange(new_key.size)
    opens = place if bound is None else cleaning.same_action(time, new_key, rows[_CLOCKS], bound)
    settled = time < settled_before[user]
    if "duration" in rows:
        rows[_LONGEST] = _union(np.maximum, rows["duration"], opens, place)
        rows["duration"] = _union(np.maximum, rows["duration"], opens, settled)
    if bound is not None:
        rows[_CLOCKS] = _union(np.bitwise_or, rows[_CLOCKS], opens, settled)
    rows[_STANDS] = opens == place
    stay = np.flatnonzero(rows[_STANDS] | ~settled)
    order = stay[np.lexsort((~time[stay], user[stay]))]  # ~t = -1 - t: the newest first, and it cannot overflow
    return {name: column[order] for name, column in rows.items()}


def _union(union: np.ufunc, values: Array, opens: Array, rows: Array) -> Array:
    """Each action's value over the given rows, at the row that opens it."""
    merged = values.copy()
    union.at(merged, opens[rows], values[rows])
    return merged


def _newest_so_far(user: Array, time: Array, known: Array) -> Array:
    """For each record, in the order in which they came, the newest time of its user up to it; ``known`` (P,) before."""
    order = np.argsort(user, kind="stable")
    times, code = np.unique(time[order], return_inverse=True)
    newest = np.empty_like(time)
    newest[order] = times[np.maximum.accumulate(code + user[order] * times.size) % times.size]
    return np.maximum(newest, known[user])


def _less(time: Array, span: int) -> Array:
    """Time - span, or int64's lowest value."""
    less: Array = np.maximum(time, int(_INT64.min) + span) - span
    return less


def _rank(user: Array, counted: Array) -> Array:
    """How many counted rows of the same user stand before each row; users are ascending."""
    before = np.cumsum(counted) - counted
    rank: Array = before - before[np.searchsorted(user, user)]
    return rank
