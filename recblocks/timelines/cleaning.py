"""Raw action records become clean ones: validated, duplicates merged, clock differences settled, all of it counted."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from recblocks import _checks
from recblocks.timelines import _arrays
from recblocks.timelines._arrays import Array


class CleaningReport(NamedTuple):
    """What became of every record: read = kept + merged + dropped."""

    read: int
    kept: int
    merged: dict[str, int]
    """Records that repeat a kept one, by reason: ``same_time``, ``clock_difference``."""
    dropped: dict[str, int]
    """Records that were refused, each by the first reason that applies in the order of ``clean_actions``."""


class CleanedActions(NamedTuple):
    """Columns for ``write_timelines`` and an account of what is missing from them."""

    columns: dict[str, Array]
    report: CleaningReport


def clean_actions(
    *,
    user: object,
    time: object,
    item: object,
    unit: str,
    action_type: object | None = None,
    surface: object | None = None,
    duration: object | None = None,
    source: object | None = None,
    time_range: tuple[int, int] | None = None,
    items: object | None = None,
    action_types: Collection[int] | None = None,
    surfaces: Collection[int] | None = None,
    clock_bound: int | None = None,
    **columns: object,
) -> CleanedActions:
    """Validate action records, merge those that are the same action, and count what became of each.

    1. A record is dropped, for the first reason that applies: ``null_<column>`` in any column, ``time_out_of_range``,
       ``unknown_item``, ``unknown_action_type``, ``unknown_surface``, ``duration_not_finite``, ``negative_duration``.
    2. Records that agree in user, item, type, surface and time are one action (``same_time``).
    3. With ``clock_bound``, records of different sources that agree in user, item, type and surface, and whose times
       differ by at most the bound, are one action seen by clocks that differ (``clock_difference``). The earliest
       record opens the action; in the order of time every record within the bound of it joins, unless its source is in
       the action already: a clock does not differ from itself. The order in which records came changes nothing.

    A merged action keeps its earliest time and its longest duration; other columns are those of its earliest record, of
    equal times the one that came first.

    Args:
        user: (N,) int64 raw ids; numpy, torch, or a numpy masked array, whose masked entries are null.
        time: (N,) int64 in ``unit``, or datetime64, which is rounded down to the unit.
        item: (N,) int64 raw ids.
        unit: "s" or "ms".
        action_type: (N,) integers.
        surface: (N,) integers.
        duration: (N,) floats, seconds.
        source: (N,) integers, which system recorded the action; needed by ``clock_bound``.
        time_range: the earliest and the latest time that is credible, both included, in ``unit``.
        items: (I,) int64, every known item.
        action_types: every known action type.
        surfaces: every known surface.
        clock_bound: how far the clocks of two sources may differ, in ``unit``.
        columns: further (N,) columns to carry along.

    Returns:
        The kept records, in the order in which they came, and the report.

    Example:
        >>> import numpy as np
        >>> cleaned = clean_actions(
        ...     user=np.array([1, 1, 1]), time=np.array([10, 10, 11]), item=np.array([5, 5, 5]), unit="s",
        ...     duration=np.array([3.0, 4.0, -1.0]),
        ... )
        >>> cleaned.columns["duration"], cleaned.report.merged, cleaned.report.dropped
        (array([4.]), {'same_time': 1}, {'negative_duration': 1})
    """
    if clock_bound is not None:
        check_source(source)
        clock_bound = _checks.integer("clock_bound", clock_bound, at_least=0)
    optional = {"action_type": action_type, "surface": surface, "duration": duration, "source": source, **columns}
    given = {"user": user, "time": time, "item": item, **{k: v for k, v in optional.items() if v is not None}}
    table, rows, dropped = valid_records(given, unit, time_range, items, action_types, surfaces)
    rows, repeats = _merge(table, rows, clock_bound)
    kept = {name: column[rows] for name, column in table.items()}
    return CleanedActions(kept, CleaningReport(table["user"].size, rows.size, repeats, dropped))


def check_source(source: object | None) -> None:
    """Require the column without which clocks cannot be told apart."""
    if source is None:
        raise ValueError("clock_bound needs source, which says whose clock recorded each action, got None")


def valid_records(
    given: dict[str, object],
    unit: str,
    time_range: tuple[int, int] | None,
    items: object | None,
    action_types: Collection[int] | None,
    surfaces: Collection[int] | None,
) -> tuple[dict[str, Array], Array, dict[str, int]]:
    """Every column as a plain vector, the rows that no check refuses, and how many each check refuses first."""
    table, nulls = _read(given, unit)
    reasons = {f"null_{name}": null for name, null in nulls.items()}
    reasons |= _refusals(table, time_range, items, action_types, surfaces)
    rows, dropped = _drop(table["user"].size, reasons)
    return table, rows, dropped


def _read(given: dict[str, object], unit: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """Every column as a plain vector of one length, and which of its entries are null."""
    table, nulls = {}, {}
    for name, value in given.items():
        if name != "user":
            _arrays.check_name(name)
        data, nulls[name] = _arrays.split_nulls(name, value)
        if name == "time":
            table[name] = _arrays.as_time(name, data, unit)
        elif name in ("user", "item", "action_type", "surface", "source"):
            table[name] = _arrays.as_int64(name, data)
        else:
            table[name] = _arrays.as_column(name, data).copy()
        if table[name].shape != table["user"].shape:
            size = table["user"].size
            raise ValueError(f"{name} must have one entry for each of the {size} users given, got {data.size}")
    if "duration" in table and table["duration"].dtype.kind != "f":
        raise TypeError(f"duration must be floats in seconds, got {table['duration'].dtype}")
    return table, nulls


def _refusals(
    table: dict[str, Array],
    time_range: tuple[int, int] | None,
    items: object | None,
    action_types: Collection[int] | None,
    surfaces: Collection[int] | None,
) -> dict[str, Array]:
    """Which records each check refuses."""
    found: dict[str, Array] = {}
    if time_range is not None:
        if not isinstance(time_range, tuple | list) or len(time_range) != 2:
            raise ValueError(f"time_range must be the earliest and the latest time, got {time_range!r}")
        earliest, latest = (_checks.integer("time_range", end) for end in time_range)
        if earliest > latest:
            raise ValueError(f"time_range must be the earliest and the latest time, got {time_range}")
        found["time_out_of_range"] = (table["time"] < earliest) | (table["time"] > latest)
    if items is not None:
        found["unknown_item"] = ~np.isin(table["item"], known_items(items))
    for name, plural, allowed in (("action_type", "action_types", action_types), ("surface", "surfaces", surfaces)):
        if allowed is not None:
            if name not in table:
                raise ValueError(f"{plural} needs {name}, got None")
            found[f"unknown_{name}"] = ~np.isin(table[name], known_values(plural, allowed))
    if "duration" in table:
        found["duration_not_finite"] = ~np.isfinite(table["duration"])
        found["negative_duration"] = table["duration"] < 0
    return found


def known_items(items: object) -> Array:
    """Every known item as int64."""
    return _arrays.as_int64("items", _arrays.without_nulls("items", items))


def known_values(name: str, allowed: Collection[int]) -> Array:
    """Every known action type or surface as int64."""
    return np.array([_checks.integer(name, one) for one in allowed], dtype=np.int64)


def _drop(read: int, reasons: dict[str, Array]) -> tuple[Array, dict[str, int]]:
    """The rows that no reason refuses, and how many each reason refuses first."""
    left = np.ones(read, dtype=bool)
    dropped = {}
    for reason, refused in reasons.items():
        if count := int((left & refused).sum()):
            dropped[reason] = count
        left &= ~refused
    return np.flatnonzero(left), dropped


def _merge(table: dict[str, Array], rows: Array, clock_bound: int | None) -> tuple[Array, dict[str, int]]:
    """The rows that stand for one action each, ascending, with their longest duration written in; and the repeats."""
    rows, new_key, new_time = order_by_key(table, rows)
    head = _spread(rows, new_time)
    _longest_duration(table, rows, head)
    merged = {"same_time": rows.size - int(new_time.sum())}
    heads = rows[new_time]
    if clock_bound is not None and heads.size:
        bits = source_bits(table["source"][rows], np.unique(table["source"][rows]))
        clocks = np.bitwise_or.reduceat(bits, np.flatnonzero(new_time))
        opens = same_action(table["time"][heads], new_key[new_time], clocks, clock_bound)
        _longest_duration(table, heads, heads[opens])
        heads = heads[opens == np.arange(heads.size)]
        merged["clock_difference"] = opens.size - heads.size
    return np.sort(heads), {reason: count for reason, count in merged.items() if count}


def order_by_key(table: dict[str, Array], rows: Array) -> tuple[Array, Array, Array]:
    """The rows by user, item, type, surface and time; where another key begins; where another time of a key begins."""
    keys = [table[name] for name in ("user", "item", "action_type", "surface") if name in table]
    time = table["time"]
    rows = rows[np.lexsort([column[rows] for column in (time, *reversed(keys))])]
    new_key = changes(*(column[rows] for column in keys))
    return rows, new_key, new_key | changes(time[rows])


def changes(*columns: Array) -> Array:
    """Where a row differs from the one before it; the first row does."""
    changed = np.ones(columns[0].size, dtype=bool)
    changed[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return changed


def _spread(values: Array, begins: Array) -> Array:
    """For each place the value at the latest place that begins."""
    spread: Array = values[begins][np.cumsum(begins) - 1]
    return spread


def _longest_duration(table: dict[str, Array], rows: Array, heads: Array) -> None:
    if "duration" in table:
        np.maximum.at(table["duration"], heads, table["duration"][rows])


def source_bits(source: Array, sources: Array) -> Array:
    """Each source as a bit of its own, by its place among all the sources."""
    if sources.size > 64:
        raise ValueError(f"source must name at most 64 sources where clock_bound is given, got {sources.size}")
    order = np.argsort(sources)
    code = order[np.searchsorted(sources, source, sorter=order)]
    bits: Array = np.uint64(1) << code.astype(np.uint64)
    return bits


def same_action(time: Array, new_key: Array, clocks: Array, bound: int) -> Array:
    """For each place the place of the record that opened its action.

    ``time`` rises within a key. The earliest record that has no action yet opens one; in the order of time each record
    within the bound joins it, if none of its clocks is in the action already. All stretches of records that are
    near enough to meet (no gap above the bound) take such a turn at once.
    """
    near = np.diff(time, prepend=time[:1]).view(np.uint64) <= np.uint64(bound)  # unsigned: a gap may exceed int64
    stretch = np.cumsum(new_key | ~near)
    opens = np.arange(time.size)
    waiting = np.flatnonzero((np.bincount(stretch) > 1)[stretch])
    while waiting.size:
        first = changes(stretch[waiting])
        opener, clock = waiting[first], clocks[waiting[first]]
        turn = np.cumsum(first) - 1
        gap = (time[waiting] - time[opener[turn]]).view(np.uint64)
        candidate = np.flatnonzero(~first & (gap <= np.uint64(bound)))
        joined = first.copy()
        while candidate.size:
            candidate = candidate[(clocks[waiting[candidate]] & clock[turn[candidate]]) == 0]
            if not candidate.size:
                break
            next_one = changes(turn[candidate])
            joining = candidate[next_one]
            joined[joining] = True
            opens[waiting[joining]] = opener[turn[joining]]
            clock[turn[joining]] |= clocks[waiting[joining]]
            candidate = candidate[~next_one]
        waiting = waiting[~joined]
    return opens
