"""Which later actions of the same user lie within a window of time: ranges of lines sorted by user and time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LATEST, _EARLIEST = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min


class Windows(NamedTuple):
    """Rows and columns by user and then time; who meets whom is a range for each, in sorted places on both sides.

    Row k meets the columns ``first_column[k]`` to ``last_column[k] - 1``, and column j the rows ``first_row[j]`` to
    ``last_row[j] - 1``. All four ascend.
    """

    row_order: Tensor  # (U,) int64
    column_order: Tensor  # (P,) int64
    first_column: Tensor  # (U,) int64
    last_column: Tensor
    first_row: Tensor  # (P,) int64
    last_row: Tensor


def windows(row_users: Tensor, row_times: Tensor, column_users: Tensor, column_times: Tensor, window: int) -> Windows:
    """Row i meets column c iff they are the same user's and ``0 < column_times[c] - row_times[i] <= window``."""
    row_order, column_order = _by_user_and_time(row_users, row_times), _by_user_and_time(column_users, column_times)
    rows = row_users[row_order], row_times[row_order]
    columns = column_users[column_order], column_times[column_order]
    opening = columns[1].clamp(min=_EARLIEST + window) - window
    return Windows(
        row_order,
        column_order,
        *_places(columns, rows[0], (rows[1], horizon(rows[1], window)), behind_equals=True),
        *_places(rows, columns[0], (opening, columns[1]), behind_equals=False),
    )


def horizon(times: Tensor, window: int) -> Tensor:
    """The last moment of the window after each time, or int64's last."""
    return times.clamp(max=_LATEST - window) + window


def _places(
    lines: tuple[Tensor, Tensor], users: Tensor, times: tuple[Tensor, Tensor], behind_equals: bool
) -> list[Tensor]:
    """How many of the lines come before each user at each of the times."""
    asked = torch.cat([users, users]), torch.cat(times)
    first, second = (lines, asked) if behind_equals else (asked, lines)  # the order of equals is kept
    order = _by_user_and_time(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    is_line = (order < first[0].shape[0]) == behind_equals
    before = torch.empty_like(order).scatter_(0, order, is_line.long().cumsum(0))
    num_lines = lines[0].shape[0]
    return list((before[num_lines:] if behind_equals else before[: asked[0].shape[0]]).chunk(2))


def _by_user_and_time(users: Tensor, times: Tensor) -> Tensor:
    order = times.argsort(stable=True)
    return order[users[order].argsort(stable=True)]
