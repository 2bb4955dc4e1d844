"""Columnar timelines: one user's actions lie together, newest first, and may stay on disk."""

from __future__ import annotations

import os
import pathlib
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recblocks import _checks
from recblocks.timelines import _arrays, storage
from recblocks.timelines.ranges import check_ascending, check_bounds, expand_ranges


class _Folder(NamedTuple):
    """Where opened timelines lie, and the tensors that another process gets by opening them too."""

    path: pathlib.Path
    bounds: tuple[Tensor, Tensor, Tensor]
    columns: Mapping[str, Tensor]


class Timelines:
    r"""Every user's actions as columns, each user's slice newest first (slot 0 = the most recent action).

    Row r's actions are ``columns[name][starts[r]:ends[r]]``, so the slice [i, i+M) inside it is the input sequence
    whose newest action is i. Rows with equal time stand in the order in which they came. Opened from disk the columns
    are memory-mapped: they cost no memory of the process until they are read, and then only pages that the system may
    drop.
    A subset (``select``, ``split_by_time``, ``split_by_user``) shares the columns. Another process, such as a
    DataLoader's worker, opens the same folder and receives only the tensors that are not the folder's; so what is
    written into an opened column stays in this process, while ``with_columns`` reaches the others.

    Attributes:
        unit: "s" or "ms", the unit of ``columns["time"]``.
        users: (U,) int64 raw user ids, ascending.
        starts: (U,) int64 first action of each user.
        ends: (U,) int64 one past the last action of each user.
        columns: (N,) tensors by name, read-only; ``time`` and ``item`` are int64 and always there. ``with_columns``
            adds some.

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
        columns: Mapping[str, Tensor],
        *,
        unit: str,
    ) -> None:
        _checks.choice("unit", unit, _arrays.UNITS)
        _checks.integers("users", users, None)
        _checks.integers("starts", starts, users.shape[0])
        _checks.integers("ends", ends, users.shape[0])
        for name in ("time", "item"):
            if name not in columns:
                raise ValueError(f"columns must hold {name!r}, got {sorted(columns)}")
            _checks.integers(f"columns[{name!r}]", columns[name], None)
        for name, column in columns.items():
            _arrays.check_name(name)
            _checks.tensor(f"columns[{name!r}]", column, columns["time"].shape[0])
        check_bounds(users, starts, ends, columns["time"].shape[0])
        self.unit = unit
        self.users = users
        self.starts = starts
        self.ends = ends
        self.columns: Mapping[str, Tensor] = types.MappingProxyType(dict(columns))
        self._folder: _Folder | None = None

    @classmethod
    def from_arrays(cls, /, *, user: object, time: object, item: object, unit: str, **columns: object) -> Timelines:
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

        columns = tables.columns_from_arrow(table, unit=unit)
        for name in columns.keys() - {"user"}:
            _arrays.check_name(name)
        return cls.from_arrays(unit=unit, **columns)

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
        """Return a pyarrow Table, one row an action, in the order of the timelines.

        ``from_arrow`` undoes it, except that users without actions are no rows of a table and so are lost; ``save``
        keeps them.
        """
        from recblocks.timelines import tables

        row, index = self.actions()
        return tables.arrow_from_columns({"user": self.users[row], **self.gather(index)}, unit=self.unit)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_arrow()`` to one Parquet file; ``from_parquet`` undoes it, but for users without actions."""
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
        try:
            timelines = cls(users, offsets[:-1], offsets[1:], columns, unit=unit)
            if verify:
                timelines._check_order()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder} is damaged: {error}") from error
        bounds = (timelines.users, timelines.starts, timelines.ends)
        timelines._folder = _Folder(folder.resolve(), bounds, timelines.columns)
        return timelines

    def _check_order(self) -> None:
        """Require that each user's times never rise."""
        time = self.columns["time"]
        rises = torch.nonzero(time[1:] > time[:-1]).squeeze(1) + 1
        row = torch.searchsorted(self.starts, rises, right=True) - 1
        inside = row >= 0
        row, rises = row[inside], rises[inside]
        inside = (self.starts[row] < rises) & (rises < self.ends[row])
        if bool(inside.any()):
            user, at = int(self.users[row[inside][0]]), int(rises[inside][0])
            raise ValueError(
                f"time must run from each user's newest action to the oldest, got user {user} with "
                f"{int(time[at - 1])} before {int(time[at])}, action {at}"
            )

    @property
    def offsets(self) -> Tensor:
        """(U+1,) int64: row r's actions are [offsets[r], offsets[r+1]); only whole timelines have it."""
        if not torch.equal(self.starts[1:], self.ends[:-1]):
            raise ValueError("these timelines are a subset, whose users do not follow each other: use starts and ends")
        return torch.cat([self.starts[:1], self.ends]) if len(self) else self.users.new_zeros(1)

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
        check_ascending("rows", rows)
        if rows.numel() and not 0 <= int(rows[0]) <= int(rows[-1]) < len(self):
            raise ValueError(f"rows must be in [0, {len(self)}), got {int(rows[0])} to {int(rows[-1])}")
        return self.view(self.users[rows], self.starts[rows], self.ends[rows])

    def view(self, users: Tensor, starts: Tensor, ends: Tensor) -> Timelines:
        """Return timelines over the same columns with other users or bounds."""
        return self._like(users, starts, ends, self.columns)

    def with_columns(self, /, **columns: Tensor) -> Timelines:
        """Return timelines of the same users with columns added or replaced; all others are shared.

        Args:
            columns: (N,) tensors by name, one entry for each action of ``columns["time"]``, other users' included.

        Returns:
            The timelines. Another process receives these columns and opens the rest.

        Raises:
            TypeError, ValueError: a column is no tensor or of another length, a name is no identifier, or ``time`` is
                not newest first.

        Example:
            >>> timelines = Timelines.from_arrays(
            ...     user=torch.tensor([7, 7]), time=torch.tensor([1, 2]), item=torch.tensor([50, 60]), unit="s"
            ... )
            >>> timelines.with_columns(row=timelines.columns["item"] // 10).columns["row"]
            tensor([6, 5])
        """
        timelines = self._like(self.users, self.starts, self.ends, {**self.columns, **columns})
        if "time" in columns:
            timelines._check_order()
        return timelines

    def _like(self, users: Tensor, starts: Tensor, ends: Tensor, columns: Mapping[str, Tensor]) -> Timelines:
        timelines = Timelines(users, starts, ends, columns, unit=self.unit)
        timelines._folder = self._folder
        return timelines

    def rows_of(self, user_ids: Tensor) -> Tensor:
        """Return the row of each raw user id, -1 where the user is not here; any shape."""
        _checks.integers("user_ids", user_ids)
        if len(self) == 0:
            return torch.full_like(user_ids, -1)
        row = torch.searchsorted(self.users, user_ids).clamp(max=len(self) - 1)
        return torch.where(self.users[row] == user_ids, row, -1)

    def actions(self) -> tuple[Tensor, Tensor]:
        """List every action of the users at hand: (A,) its user's row and (A,) its index into the columns.

        Example:
            >>> time = torch.tensor([10, 20, 30])
            >>> timelines = Timelines.from_arrays(user=torch.tensor([7, 3, 7]), time=time, item=time, unit="s")
            >>> timelines.select(torch.tensor([1])).actions()
            (tensor([0, 0]), tensor([1, 2]))
        """
        return expand_ranges(self.starts, self.ends)

    def gather(self, index: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return columns (all, or the named ones) at action indices of any shape."""
        return {name: self.columns[name][index] for name in (self.columns if names is None else names)}

    def save(self, path: str | os.PathLike[str]) -> Timelines:
        """Write the users at hand, those without actions too, to a folder that is not there yet or empty; open it."""
        _, index = self.actions()
        with storage.TimelinesWriter(path, unit=self.unit) as writer:
            writer.append_timelines(self.users, self.ends - self.starts, self.gather(index))
        return Timelines.open(path)

    def __reduce__(self) -> tuple[Any, ...]:
        bounds = (self.users, self.starts, self.ends)
        if self._folder is None:
            return _restore, (bounds, dict(self.columns), self.unit)
        opened = self._folder.columns
        columns = {name: None if column is opened.get(name) else column for name, column in self.columns.items()}
        same = all(one is other for one, other in zip(bounds, self._folder.bounds, strict=True))
        return _reopen, (self._folder.path, None if same else bounds, columns)


def _restore(bounds: tuple[Tensor, Tensor, Tensor], columns: dict[str, Tensor], unit: str) -> Timelines:
    return Timelines(*bounds, columns, unit=unit)


def _reopen(
    path: pathlib.Path, bounds: tuple[Tensor, Tensor, Tensor] | None, columns: dict[str, Tensor | None]
) -> Timelines:
    """Timelines of a folder, with other bounds or columns; a column that is None is the folder's."""
    opened = Timelines.open(path)
    own = {name: opened.columns[name] if column is None else column for name, column in columns.items()}
    return opened._like(*(bounds or (opened.users, opened.starts, opened.ends)), own)


def write_timelines(
    path: str | os.PathLike[str], /, *, user: object, time: object, item: object, unit: str, **columns: object
) -> Timelines:
    """Sort actions into timelines, write them to a folder and open it.

    Args:
        path: a folder that is not there yet, or empty.
        user: (N,) int64 raw ids, numpy or torch; rows in any order.
        time: (N,) int64 in ``unit``, or numpy datetime64, which is rounded down to the unit.
        item: (N,) int64 raw ids.
        unit: "s" or "ms".
        columns: further (N,) columns, kept in their dtype; usually ``action_type``, ``surface``, and
            ``duration`` in seconds.

    Returns:
        The opened, memory-mapped timelines. For more actions than fit into memory see ``TimelinesWriter``.

    Raises:
        FileExistsError: the folder already holds timelines or other files.
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
