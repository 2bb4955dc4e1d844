"""The rows of a table that no id has, part by part; the lowest are given first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recblocks.embedding._buckets import part_of


class FreeRows(NamedTuple):
    """Which rows are free; never written, only replaced."""

    again: Tensor
    """(K,) int64 rows that an id had before, ascending."""
    ends: Tensor
    """(P,) int64, the row of each part from which on none was given."""


def none_given(begins: Tensor) -> FreeRows:
    """All rows, for (P + 1,) first rows of the parts and the number of rows."""
    return FreeRows(begins[:0], begins[:-1])


def not_in(rows: Tensor, begins: Tensor) -> FreeRows:
    """All but those in the slots of a table, int32, -1 where nothing stands."""
    taken = torch.zeros(int(begins[-1]) + 1, dtype=torch.bool, device=rows.device)
    taken[rows.view(-1)] = True  # -1 is the last one
    given = torch.nonzero(taken[:-1]).squeeze(1)
    ends = begins[:-1].clone()
    ends.scatter_reduce_(0, _parts(given, begins), given + 1, "amax")
    taken |= ~_below(ends, begins)
    return FreeRows(torch.nonzero(~taken[:-1]).squeeze(1), ends)


def count(free: FreeRows, begins: Tensor) -> Tensor:
    """How many there are of each part, (P,)."""
    again = torch.bincount(_parts(free.again, begins), minlength=len(free.ends))
    return begins[1:] - free.ends + again


def take(free: FreeRows, begins: Tensor, wanted: Tensor) -> tuple[Tensor, FreeRows]:
    """The lowest rows, so many of each part, ascending; and what is left."""
    part = _parts(free.again, begins)
    rank = torch.arange(len(part), device=part.device) - torch.searchsorted(part, part)
    old = rank < wanted[part]
    more = wanted - torch.bincount(part[old], minlength=len(wanted))
    new = torch.repeat_interleave(free.ends - more.cumsum(0) + more, more)
    rows = torch.cat([free.again[old], new + torch.arange(len(new), device=part.device)])
    return rows.sort().values, FreeRows(free.again[~old], free.ends + more)


def give_back(free: FreeRows, rows: Tensor) -> FreeRows:
    """These too."""
    return free._replace(again=torch.cat([free.again, rows]).sort().values)


def widen(free: FreeRows, part: int, begins: Tensor, more: int) -> FreeRows:
    """The same rows after so many were added behind those of a part, which had begun at ``begins``."""
    behind = torch.arange(len(free.ends), device=begins.device) > part
    return FreeRows(free.again + more * (free.again >= begins[part + 1]), free.ends + more * behind)


def _parts(rows: Tensor, begins: Tensor) -> Tensor:
    part = part_of(rows, begins)
    return torch.zeros_like(rows) if part is None else part


def _below(ends: Tensor, begins: Tensor) -> Tensor:
    """(rows + 1,) whether a row is below its part's end; the last, which is none, is not."""
    pieces = torch.stack([ends - begins[:-1], begins[1:] - ends], 1).flatten()
    below = torch.arange(len(pieces), device=ends.device) % 2 == 0
    return torch.cat([torch.repeat_interleave(below, pieces), below.new_zeros(1)])
