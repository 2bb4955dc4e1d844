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
    num_rows, num_columns = row_users.shape[0], column_users.shape[0]
    opening = column_times.clamp(min=_EARLIEST + window) - window
    # Among equals columns and openings stand before rows and horizons: a row meets no column of its own time, but those
    # of its horizon, and a column the rows of its opening.
    users = torch.cat([column_users, column_users, row_users, row_users])
    times = torch.cat([column_times, opening, row_times, horizon(row_times, window)])
    order = times.argsort(stable=True)
    order = order[users[order].argsort(stable=True)]
    sizes = [num_columns, num_columns, num_rows, num_rows]
    is_column = order < num_columns
    is_row = (order >= 2 * num_columns) & (order < 2 * num_columns + num_rows)
    column_place, _, first_column, last_column = torch.split(_counted(is_column, order), sizes)
    last_row, first_row, row_place, _ = torch.split(_counted(is_row, order), sizes)
    row_order, column_order = _inverse(row_place - 1), _inverse(column_place - 1)
    return Windows(
        row_order,
        column_order,
        first_column[row_order],
        last_column[row_order],
        first_row[column_order],
        last_row[column_order],
    )


def horizon(times: Tensor, window: int) -> Tensor:
    """The last moment of the window after each time, or int64's last."""
    return times.clamp(max=_LATEST - window) + window


def _counted(marked: Tensor, order: Tensor) -> Tensor:
    """How many of the marked stand up to each, both by their place in the order."""
    return torch.empty_like(order).scatter_(0, order, marked.cumsum(0))


def _inverse(places: Tensor) -> Tensor:
    """What stands in each place."""
    return torch.empty_like(places).scatter_(0, places, torch.arange(places.shape[0], device=places.device))
