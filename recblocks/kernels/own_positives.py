"""Which pool columns are positives of which rows' users, from four id vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recblocks import _checks

# A list of entries costs about 32 bytes each and a bool tile 3 bytes: beyond this share of owned entries the tile wins.
_SPARSE_SHARE = 1 / 16


def own_positive_mask(
    row_users: Tensor, column_items: Tensor, positive_users: Tensor, positive_items: Tensor
) -> Tensor:
    """Mark the pool columns whose item is any positive of the row's user.

    ``mask[r, c] = any(positive_users[k] == row_users[r] and positive_items[k] == column_items[c] for k)``

    Args:
        row_users: (R,) int64 user of each row; any value.
        column_items: (N,) int64 item of each pool column; any value, duplicates allowed.
        positive_users: (P,) int64 user of each known positive pair of the whole batch.
        positive_items: (P,) int64 item of each known positive pair.

    Returns:
        (R, N) bool, True = the column is excluded for the row.

    Raises:
        TypeError: an argument is not an int64 tensor.
        ValueError: an argument is not one-dimensional, or the two positive vectors differ in length.

    Example:
        >>> import torch
        >>> users, items = torch.tensor([1, 1, 2]), torch.tensor([10, 20, 30])
        >>> own_positive_mask(users, items, users, items).int().tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]

    Source: PinnerFormer, section 3.3.1, A.3 and Figure 5.
    """
    check_own((row_users, column_items, positive_users, positive_items), num_rows=None, num_columns=None)
    if not _checks.readable(row_users):
        return _mask(row_users, column_items, positive_users, positive_items)
    mask = torch.zeros(row_users.shape[0], column_items.shape[0], dtype=torch.bool)
    OwnPositives(row_users, column_items, positive_users, positive_items).fill_(mask, 0, True)
    return mask


def check_own(own: tuple[Tensor, Tensor, Tensor, Tensor], *, num_rows: int | None, num_columns: int | None) -> None:
    """Require four int64 vectors of fitting lengths; None is any length."""
    row_users, column_items, positive_users, positive_items = own
    _checks.integers("row_users", row_users, num_rows)
    _checks.integers("column_items", column_items, num_columns)
    _checks.integers("positive_users", positive_users, None)
    _checks.integers("positive_items", positive_items, positive_users.shape[0])


class Owned(NamedTuple):
    """What each row owns, as ranges of ranges; all int64.

    Row r has the pairs ``pair_first[r]`` and the ``pair_count[r] - 1`` after it, and pair k the columns
    ``columns[column_first[k]]`` and the ``column_count[k] - 1`` after it in ``columns``.
    """

    pair_first: Tensor
    pair_count: Tensor
    column_first: Tensor
    column_count: Tensor
    columns: Tensor  # (N,) by item
    total: Tensor  # (R,) columns that each row owns


class OwnPositives:
    """The same mask for a few rows at a time, so that rows x columns never exist at once.

    On a CPU the owned entries are listed: users' positives and the columns are sorted once, and a tile of rows touches
    its own entries only. Elsewhere, where a list's length would have to travel to the host, a tile forms a bool mask.

    Attributes:
        owned: the list; None where there is none.
    """

    def __init__(self, row_users: Tensor, column_items: Tensor, positive_users: Tensor, positive_items: Tensor) -> None:
        self._ids = (row_users, column_items, positive_users, positive_items)
        self.owned = _list(*self._ids) if row_users.device.type == "cpu" else None

    def fill_(self, tile: Tensor, start: int, value: float) -> None:
        """Write ``value`` wherever row ``start + i`` of the contiguous ``tile`` (rows, N) owns the column."""
        rows = slice(start, start + tile.shape[0])
        if self.owned is not None and int(self.owned.total[rows].sum()) <= _SPARSE_SHARE * tile.numel():
            row, pair = _expand(self.owned.pair_first[rows], self.owned.pair_count[rows])
            of, position = _expand(self.owned.column_first[pair], self.owned.column_count[pair])
            tile.view(-1).index_fill_(0, row[of] * tile.shape[1] + self.owned.columns[position], value)
        else:
            tile.masked_fill_(_mask(self._ids[0][rows], *self._ids[1:]), value)


def _list(row_users: Tensor, column_items: Tensor, positive_users: Tensor, positive_items: Tensor) -> Owned:
    users, items = _distinct(positive_users, positive_items)
    sorted_columns, columns = column_items.sort()
    first = torch.searchsorted(sorted_columns, items)
    count = torch.searchsorted(sorted_columns, items, right=True) - first
    in_pool = count > 0
    users, first, count = users[in_pool], first[in_pool], count[in_pool]
    begin, end = torch.searchsorted(users, row_users), torch.searchsorted(users, row_users, right=True)
    before = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    return Owned(begin, end - begin, first, count, columns, before[end] - before[begin])


class Ranges(NamedTuple):
    """Of each line of one side the ranges of lines of the other side, sorted by id, that it owns; all int32.

    Line k has the ranges ``begin[k]`` to ``end[k] - 1``, and range j holds the lines ``first[j]`` to ``last[j] - 1``.
    The ranges of a line are in order. What no line has stands behind them all.
    """

    begin: Tensor
    end: Tensor
    first: Tensor
    last: Tensor


class OwnedRanges(NamedTuple):
    """The same mask as ranges, which need no more memory than the ids and whose number no host has to know."""

    row_order: Tensor  # (R,) int64, rows by user
    column_order: Tensor  # (N,) int64, columns by item
    of_rows: Ranges  # of each row as it was given, ranges of columns by item
    of_columns: Ranges  # of each column as it was given, ranges of rows by user


def owned_ranges(
    row_users: Tensor, column_items: Tensor, positive_users: Tensor, positive_items: Tensor
) -> OwnedRanges:
    """List who owns what, as `own_positive_mask` marks it; each side has fewer than 2**31 lines."""
    users, row_order = row_users.sort()
    items, column_order = column_items.sort()
    rows = torch.searchsorted(users, positive_users), torch.searchsorted(users, positive_users, right=True)
    columns = torch.searchsorted(items, positive_items), torch.searchsorted(items, positive_items, right=True)
    absent = (rows[0] == rows[1]) | (columns[0] == columns[1])
    of_rows = _ranges(torch.searchsorted(users, row_users), rows[0], columns, absent, column_items.shape[0])
    of_columns = _ranges(torch.searchsorted(items, column_items), columns[0], rows, absent, row_users.shape[0])
    return OwnedRanges(row_order, column_order, of_rows, of_columns)


def _ranges(lines: Tensor, owners: Tensor, owned: tuple[Tensor, Tensor], absent: Tensor, num_others: int) -> Ranges:
    """Sort pairs by owner and then by what is owned; ``lines`` and ``owners`` number the same distinct ids."""
    size = max(1, num_others)
    key, order = (owners * size + owned[0]).masked_fill(absent, 2**63 - 1).sort()
    begin, end = torch.searchsorted(key, lines * size), torch.searchsorted(key, (lines + 1) * size)
    first, last = (one[order] for one in owned)
    return Ranges(*(one.int() for one in (begin, end, first, last)))


def owned_by_every_row(
    row_users: Tensor,
    column_items: Tensor,
    positive_users: Tensor,
    positive_items: Tensor,
    present: Tensor | None = None,
) -> Tensor:
    """Mark the columns that every present row's user owns, (N,) bool, without forming the mask.

    Args:
        row_users: (R,) int64, as in :func:`own_positive_mask`, and so the next three.
        column_items: (N,) int64.
        positive_users: (P,) int64.
        positive_items: (P,) int64.
        present: (R,) bool, the rows that count; None is all of them.

    Returns:
        (N,) bool; all True where no row is present.
    """
    if column_items.shape[0] == 0:
        return torch.zeros_like(column_items, dtype=torch.bool)
    if present is None:
        present = torch.ones_like(row_users, dtype=torch.bool)
    users, items, first = _runs(positive_users, positive_items)
    sorted_rows, order = row_users.sort()
    before = torch.nn.functional.pad(present[order].long().cumsum(0), (1, 0))
    rows = before[torch.searchsorted(sorted_rows, users, right=True)] - before[torch.searchsorted(sorted_rows, users)]
    columns = column_items.sort().values
    code, known = _code(columns, items)
    owners = torch.zeros_like(columns).scatter_add_(0, code, torch.where(first & known, rows, 0))
    return owners[torch.searchsorted(columns, column_items)] == present.sum()


def _mask(row_users: Tensor, column_items: Tensor, positive_users: Tensor, positive_items: Tensor) -> Tensor:
    """The mask by a table of distinct users x distinct items; every shape is known without looking at the ids."""
    if row_users.shape[0] == 0 or column_items.shape[0] == 0:
        return torch.zeros(row_users.shape[0], column_items.shape[0], dtype=torch.bool, device=row_users.device)
    users, items = row_users.sort().values, column_items.sort().values
    user, user_known = _code(users, positive_users)
    item, item_known = _code(items, positive_items)
    unused = users.shape[0]
    user = torch.where(user_known & item_known, user, unused)
    table = torch.zeros(users.shape[0] + 1, items.shape[0], dtype=torch.bool, device=row_users.device)
    table[user, item] = True
    return table[torch.searchsorted(users, row_users)].index_select(1, torch.searchsorted(items, column_items))


def _code(sorted_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each id's first place in ``sorted_ids`` (some valid place where it is absent), and whether it is there."""
    code = torch.searchsorted(sorted_ids, ids).clamp(max=sorted_ids.shape[0] - 1)
    return code, sorted_ids[code] == ids


def _runs(users: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs sorted by user then item, and which of them are the first of their kind."""
    order = items.argsort(stable=True)
    order = order[users[order].argsort(stable=True)]
    users, items = users[order], items[order]
    first = torch.ones_like(users, dtype=torch.bool)
    first[1:] = (users[1:] != users[:-1]) | (items[1:] != items[:-1])
    return users, items, first


def _distinct(users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    users, items, first = _runs(users, items)
    return users[first], items[first]


def _expand(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """List the ranges ``first[k], ..., first[k] + count[k] - 1`` one after the other, and each entry's k."""
    of = torch.repeat_interleave(count)
    offset = first - (count.cumsum(0) - count)
    return of, torch.arange(of.shape[0]) + offset[of]
