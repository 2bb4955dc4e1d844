"""Columnar timelines: one user's actions lie together, newest first, and may stay on disk."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recblocks import _checks
from recblocks.timelines import _arrays, storage


def expand_ranges(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """List the integers of many ranges, one range after the other.

    Args:
        starts: (R,) int64 first integer of each range.
        ends: (R,) int64 one past the last; where it is not above the start the range is empty.

    Returns:
        (T,) which range each integer belongs to, and (T,) the integers.

    Example:
        >>> expand_ranges(torch.tensor([5, 0, 2]), torch.tensor([7, 0, 3]))
        (tensor([0, 0, 2]), tensor([5, 6, 2]))
    """
    lengths = (ends - starts).clamp(min=0)
    row = torch.repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    return row, torch.arange(row.shape[0]) + (starts - before)[row]


def first_at_or_before(time: Tensor, low: Tensor, high: Tensor, limit: Tensor) -> Tensor:
    """Find the first i in [low, high) with time[i] <= limit, or high; a binary search in every range at once.

    Args:
        time: (N,) int64, falling or level inside each range.
        low: (Q,) int64 first index of each range.
        high: (Q,) int64 one past the last index of each range, not below ``low``.
        limit: (Q,) int64, in the unit of ``time``.

    Returns:
        (Q,) int64.

    Example:
        >>> time = torch.tensor([9, 7, 7, 4])
        >>> first_at_or_before(time, torch.tensor([0, 0]), torch.tensor([4, 4]), torch.tensor([8, 3]))
        tensor([1, 4])
    """
    longest = int((high - low).amax()) if low.numel() else 0
    last = max(time.shape[0] - 1, 0)
    for _ in range(longest.bit_length()):
        middle = (low + high) >> 1
        later = time[middle.clamp(max=last)] > limit
        low = torch.where(later, middle + 1, low).minimum(high)
        high = torch.where(later, high, middle)
    return low


class Timelines:
    r"""Every user's actions as columns, each user's slice newest first (slot 0 = the most recent action).

    Row r's actions are ``columns[name][starts[r]:ends[r]]``, so the slice [i, i+M) inside it is the input sequence
    whose newest action is i. Rows with equal time stand in the order in which they came. Opened from disk the columns
    are memory-mapped: they cost no memory of the process until they are read, and then only pages that the system may
    drop.
    A subset (``select``, ``split_by_time``, ``split_by_user``) shares the columns.

    Attributes:
        unit: "s" or "ms", the unit of ``columns["time"]``.
        users: (U,) int64 raw user ids, ascending.
        starts: (U,) int64 first action of each user.
        ends: (U,) int64 one past the last action of each user.
        columns: (N,) tensors by name; ``time`` and ``item`` are int64 and always there.

    Example:
        >>> timelines = Timelines.from_arrays(
        ...     user=torch.tensor([7, 3, 7]), time=torch.tensor([10, 20, 30]), item=torch.tensor([1, 2, 3]), unit="s"
        ... )
        >>> timelines.users, timelines.offsets, timelines.columns["item"]
        (tensor([3, 7]), tensor([0, 1, 3]), tensor([2, 3, 1]))

    Source: PinnerFormer, section 3.5 (one row a user, examples sampled on the fly).
    """

    def __init__(
        self,
        users: Tensor,
        starts: Tensor,
        ends: Tensor,
        columns: dict[str, Tensor],
        *,
        unit: str,
        path: pathlib.Path | None = None,
    ) -> None:
        _checks.choice("unit", unit, _arrays.UNITS)
        _checks.integers("users", users, None)
        _checks.integers("starts", starts, users.shape[0])
        _checks.integers("ends", ends, users.shape[0])
        for name in ("time", "item"):
            if name not in columns:
                raise ValueError(f"columns must hold {name!r}, got {sorted(columns)}")
            _checks.integers(f"columns[{name!r}]", columns[name], None)
        self.unit = unit
        self.users = users
        self.starts = starts
        self.ends = ends
        self.columns = columns
        self._path = path  # where the columns lie, so that another process opens them instead of receiving a copy
        self._whole = False

    @classmethod
    def from_arrays(cls, *, user: object, time: object, item: object, unit: str, **columns: object) -> Timelines:
        """Build timelines in memory from one row an action, in any order.

        Args:
            user: (N,) int64 raw ids.
            time: (N,) int64 in ``unit``, or datetime64, which is rounded down to the unit.
            item: (N,) int64 raw ids.
            unit: "s" or "ms".
            columns: further (N,) columns, kept in their dtype; usually ``action_type``, ``surface``, and
                ``duration`` in seconds.

        Returns:
            The timelines; rows that come in the right order already are not copied.
        """
        users, times, arrays = _arrays.check_actions(user, time, item, unit, columns)
        ids, offsets, ordered = _arrays.group_actions(users, times, arrays)
        bounds = torch.from_numpy(offsets)
        tensors = {
            name: torch.from_numpy(np.require(column, requirements=("C", "W"))) for name, column in ordered.items()
        }
        return cls(torch.from_numpy(ids), bounds[:-1], bounds[1:], tensors, unit=unit)

    @classmethod
    def from_arrow(cls, table: Any, *, unit: str) -> Timelines:
        """Build timelines in memory from a pyarrow Table with columns ``user``, ``time``, ``item`` and any others."""
        from recblocks.timelines import tables

        return cls.from_arrays(unit=unit, **tables.columns_from_arrow(table, unit=unit))

    @classmethod
    def from_pandas(cls, frame: Any, *, unit: str) -> Timelines:
        """Build timelines in memory from a pandas DataFrame with columns ``user``, ``time``, ``item`` and others."""
        from recblocks.timelines import tables

        return cls.from_arrow(tables.arrow_from_pandas(frame), unit=unit)

    @classmethod
    def from_parquet(cls, path: str | os.PathLike[str], *, unit: str) -> Timelines:
        """Build timelines in memory from a Parquet file or folder."""
        from recblocks.timelines import tables

        return cls.from_arrow(tables.read_parquet(path), unit=unit)

    def to_arrow(self) -> Any:
        """Return a pyarrow Table, one row an action, in the order of the timelines; ``from_arrow`` undoes it."""
        from recblocks.timelines import tables

        row, index = expand_ranges(self.starts, self.ends)
        return tables.arrow_from_columns({"user": self.users[row], **self.gather(index)}, unit=self.unit)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write one Parquet file; ``from_parquet`` undoes it."""
        from recblocks.timelines import tables

        tables.write_parquet(self.to_arrow(), path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Timelines:
        """Open what ``write_timelines`` or ``TimelinesWriter`` wrote, memory-mapped.

        Args:
            path: the folder.
            verify: also read every file and compare its checksum and its order; sizes are always compared.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the writing was cut off, a file is shorter or longer than the header says, or the format has
                another version; the message names the file.
        """
        folder = pathlib.Path(path)
        unit, users, offsets, columns = storage.read(folder, verify=verify)
        timelines = cls(users, offsets[:-1], offsets[1:], columns, unit=unit, path=folder.resolve())
        timelines._whole = True
        if verify:
            timelines._verify_order()
        return timelines

    def _verify_order(self) -> None:
        time, users = self.columns["time"], self.users
        later = torch.nonzero(time[1:] > time[:-1]).squeeze(1) + 1
        newest = torch.isin(later, self.starts)
        if not (bool(newest.all()) and bool((self.ends > self.starts).all()) and bool((users[1:] > users[:-1]).all())):
            raise ValueError(f"{self._path}: users must ascend, each one's actions run from the newest to the oldest")

    @property
    def offsets(self) -> Tensor:
        """(U+1,) int64: row r's actions are [offsets[r], offsets[r+1]); only whole timelines have it."""
        if not torch.equal(self.starts[1:], self.ends[:-1]):
            raise ValueError("these timelines are a subset, whose users do not follow each other: use starts and ends")
        return torch.cat([self.starts[:1], self.ends]) if len(self) else torch.zeros(1, dtype=torch.int64)

    @property
    def num_actions(self) -> int:
        """Actions of the users at hand."""
        return int((self.ends - self.starts).sum())

    def __len__(self) -> int:
        """Users."""
        return self.users.shape[0]

    def __repr__(self) -> str:
        return (
            f"Timelines({len(self)} users, {self.num_actions} actions, unit={self.unit!r}, {', '.join(self.columns)})"
        )

    def select(self, rows: Tensor) -> Timelines:
        """Return a subset of the users; the columns are shared.

        Args:
            rows: (R,) int64 rows to keep, strictly ascending, or (U,) bool.
        """
        if isinstance(rows, Tensor) and rows.dtype == torch.bool:
            _checks.mask("rows", rows, len(self))
            rows = torch.nonzero(rows).squeeze(1)
        _checks.integers("rows", rows, None)
        if not bool((rows[1:] > rows[:-1]).all()):
            raise ValueError("rows must be strictly ascending")
        if rows.numel() and not 0 <= int(rows[0]) <= int(rows[-1]) < len(self):
            raise ValueError(f"rows must be in [0, {len(self)}), got {int(rows[0])} to {int(rows[-1])}")
        return self.view(self.users[rows], self.starts[rows], self.ends[rows])

    def view(self, users: Tensor, starts: Tensor, ends: Tensor) -> Timelines:
        """Return timelines over the same columns with other users or bounds."""
        return Timelines(users, starts, ends, self.columns, unit=self.unit, path=self._path)

    def rows_of(self, user_ids: Tensor) -> Tensor:
        """Return the row of each raw user id, -1 where the user is not here; any shape."""
        _checks.integers("user_ids", user_ids)
        if len(self) == 0:
            return torch.full_like(user_ids, -1)
        row = torch.searchsorted(self.users, user_ids).clamp(max=len(self) - 1)
        return torch.where(self.users[row] == user_ids, row, -1)

    def gather(self, index: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return columns (all, or the named ones) at action indices of any shape."""
        return {name: self.columns[name][index] for name in (self.columns if names is None else names)}

    def save(self, path: str | os.PathLike[str]) -> Timelines:
        """Write the users at hand to a folder and open it."""
        row, index = expand_ranges(self.starts, self.ends)
        columns: dict[str, object] = dict(self.gather(index))
        return write_timelines(path, user=self.users[row], unit=self.unit, **columns)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is None:
            return _restore, (self.users, self.starts, self.ends, self.columns, self.unit)
        if self._whole:
            return Timelines.open, (self._path,)
        return _reopen, (self._path, self.users, self.starts, self.ends)


def _restore(users: Tensor, starts: Tensor, ends: Tensor, columns: dict[str, Tensor], unit: str) -> Timelines:
    return Timelines(users, starts, ends, columns, unit=unit)


def _reopen(path: pathlib.Path, users: Tensor, starts: Tensor, ends: Tensor) -> Timelines:
    return Timelines.open(path).view(users, starts, ends)


def write_timelines(
    path: str | os.PathLike[str], *, user: object, time: object, item: object, unit: str, **columns: object
) -> Timelines:
    """Sort actions into timelines, write them to a folder and open it.

    Args:
        path: a folder, created if need be; one that already holds timelines is refused.
        user: (N,) int64 raw ids, numpy or torch; rows in any order.
        time: (N,) int64 in ``unit``, or numpy datetime64, which is rounded down to the unit.
        item: (N,) int64 raw ids.
        unit: "s" or "ms".
        columns: further (N,) columns, kept in their dtype; usually ``action_type``, ``surface``, and
            ``duration`` in seconds.

    Returns:
        The opened, memory-mapped timelines. For more actions than fit into memory see ``TimelinesWriter``.

    Raises:
        FileExistsError: the folder already holds timelines.
        ValueError: a column has nulls or another length.
        TypeError: a column is not of a supported dtype.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> write_timelines(
        ...     folder, user=torch.tensor([7, 3]), time=torch.tensor([10, 20]), item=torch.tensor([1, 2]), unit="s"
        ... )
        Timelines(2 users, 2 actions, unit='s', time, item)

    Source: PinnerFormer, section 3.5.
    """
    with storage.TimelinesWriter(path, unit=unit) as writer:
        writer.append(user=user, time=time, item=item, **columns)
    return Timelines.open(path)
