"""Rows of columns by user, in memory, where a user's rows are replaced as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from recblocks.timelines._arrays import Array


class UserRows:
    """Rows by user, each user's together and newest first; a user's rows are written anew at the end.

    At the end of the arrays the live rows move to others twice as long, so few rows are moved for each one written.
    """

    def __init__(self, columns: dict[str, Array]) -> None:
        self.columns = columns
        self._declared = False
        self._used = 0
        self.users = np.empty(0, dtype=np.int64)  # ascending
        self.starts = np.empty(0, dtype=np.int64)
        self.sizes = np.empty(0, dtype=np.int64)
        self.open = np.empty(0, dtype=np.int64)  # so many of the newest rows are not final
        self.latest = np.empty(0, dtype=np.int64)
        self.forgot = np.empty(0, dtype=bool)  # whether there were older rows

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """Of the columns that came with the records."""
        return {name: column.dtype for name, column in self.columns.items() if name.isidentifier()}

    def declare(self, table: dict[str, Array]) -> None:
        """Fix the columns, or require those that are fixed."""
        columns = {name: column[:0].copy() for name, column in table.items() if name != "user"}
        if not self._declared:
            self.columns, self._declared = columns, True
        wanted, got = self.dtypes, {name: column.dtype for name, column in columns.items() if name.isidentifier()}
        if wanted.keys() != got.keys():
            raise ValueError(f"columns must be those of the first batch, {', '.join(wanted)}, got {', '.join(got)}")
        for name, dtype in wanted.items():
            if got[name] != dtype:
                raise TypeError(f"{name} must be {dtype} as in the first batch, got {got[name]}")

    def find(self, users: Array) -> tuple[Array, Array]:
        """Each user's place, and whether the user is there."""
        places = np.searchsorted(self.users, users)
        inside = np.flatnonzero(places < self.users.size)
        known = np.zeros(users.size, dtype=bool)
        known[inside] = self.users[places[inside]] == users[inside]
        return places, known

    def enter(self, users: Array) -> Array:
        """Ascending users' places, after making places for those who are new."""
        places, known = self.find(users)
        new = places[~known]
        self.users = np.insert(self.users, new, users[~known])
        self.latest = np.insert(self.latest, new, np.iinfo(np.int64).min)
        self.forgot = np.insert(self.forgot, new, False)
        self.starts, self.sizes, self.open = (np.insert(a, new, 0) for a in (self.starts, self.sizes, self.open))
        return np.searchsorted(self.users, users)

    def take(self, starts: Array, sizes: Array) -> dict[str, Array]:
        """The rows of many ranges; ``user`` says which range each one is from."""
        index, owner = spans(starts, sizes)
        return {"user": owner, **{name: column[index] for name, column in self.columns.items()}}

    def write(self, places: Array, rows: dict[str, Array], still_open: Array) -> None:
        """Put rows in the place of all that the users had; ``user`` counts through ``places``."""
        size = still_open.size
        self.sizes[places] = 0
        if self._used + size > self.columns["time"].size:
            self._make_room(size)
        for name, column in self.columns.items():
            column[self._used : self._used + size] = rows[name]
        sizes = np.bincount(rows["user"], minlength=places.size)
        self.sizes[places] = sizes
        self.starts[places] = self._used + np.cumsum(sizes) - sizes
        self.open[places] = np.bincount(rows["user"][still_open], minlength=places.size)
        self._used += size

    def _make_room(self, size: int) -> None:
        """Move the live rows to arrays of twice what is needed."""
        index, _ = spans(self.starts, self.sizes)
        for name, column in self.columns.items():
            self.columns[name] = np.zeros(2 * (index.size + size), dtype=column.dtype)
            self.columns[name][: index.size] = column[index]
        self.starts = np.cumsum(self.sizes) - self.sizes
        self._used = index.size


def spans(starts: Array, sizes: Array) -> tuple[Array, Array]:
    """The integers of many ranges, one range after the other, and which range each is from."""
    owner = np.repeat(np.arange(sizes.size), sizes)
    before = np.cumsum(sizes) - sizes
    return np.arange(owner.size) + (starts - before)[owner], owner
