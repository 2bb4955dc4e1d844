"""Which features look into which tables, and where their rows lie."""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.embedding._id_table_state import MOST_ROWS

Kind: TypeAlias = Literal["one", "each", "sum", "mean"]
_POOLINGS = ("sum", "mean", None)


class EmbeddingTable(NamedTuple):
    """A table of vectors, one feature's own or shared by several."""

    capacity: int
    """How many ids have a row of their own."""
    dim: int
    """How wide the rows are."""


class IdFeature(NamedTuple):
    """A feature whose values are raw ids."""

    table: str
    """Where its ids have their rows."""
    pooling: Literal["sum", "mean"] | None = "sum"
    """What becomes of a bag of ids; None: each id keeps its vector."""
    num_unseen: int = 1
    """How many rows it has for ids that the table does not hold; a hash chooses one."""


class Vectors(NamedTuple):
    """What a lookup gives."""

    pooled: Tensor
    """(B, sum of the widths of the features that pool), in the order of the features; (0, 0) if none does."""
    unpooled: dict[str, Tensor]
    """(..., dim) of each feature that does not pool."""


class Range(NamedTuple):
    """Rows of the weight of one width: of a table, or of a feature for unseen ids."""

    dim: int
    begin: int
    end: int
    table: str
    feature: str | None


class Alike(NamedTuple):
    """Features of one width that are pooled alike."""

    kind: Kind
    """One id in each bag; ids without bags; bags that are pooled."""
    numbers: tuple[int, ...]
    names: tuple[str, ...]


class Layout:
    """What follows from the tables and features alone."""

    def __init__(self, tables: Mapping[str, EmbeddingTable], features: Mapping[str, IdFeature]) -> None:
        for name, given, kind in (("tables", tables, EmbeddingTable), ("features", features, IdFeature)):
            if not isinstance(given, Mapping) or not given:
                raise ValueError(f"{name} must be a mapping that names at least one, got {_checks.describe(given)}")
            for key, one in given.items():
                if not isinstance(one, kind):
                    raise TypeError(f"{name}[{key!r}] must be an {kind.__name__}, got {_checks.describe(one)}")
        self.tables = {name: _checked_table(name, *one) for name, one in tables.items()}
        self.features = {name: _checked_feature(name, self.tables, *one) for name, one in features.items()}
        self.order = sorted(self.tables, key=lambda name: self.tables[name].dim)
        self.dims = sorted({one.dim for one in self.tables.values()})
        self.dim_of = {name: self.tables[one.table].dim for name, one in self.features.items()}
        self.all_alike = [self.alike([single] * len(features)) for single in (False, True)]
        self.pooled = [name for name, one in self.features.items() if one.pooling is not None]
        self.unpooled = [name for name, one in self.features.items() if one.pooling is None]
        pools = [one.pooling is not None for one in self.features.values()]
        self.pooled_at = [at for at, one in enumerate(pools) if one]
        self.unpooled_at = [at for at, one in enumerate(pools) if not one]
        self.num_columns = sum(self.dim_of[name] for name in self.pooled)
        dims = [[name, one.dim] for name, one in self.tables.items()]
        self.made_for = json.dumps({"dims": dims, "features": [[name, *one] for name, one in self.features.items()]})

    @property
    def columns(self) -> dict[str, slice]:
        """Where each feature that pools stands in the columns of the pooled vectors."""
        ends = list(itertools.accumulate((self.dim_of[name] for name in self.pooled), initial=0))
        return {name: slice(*pair) for name, pair in zip(self.pooled, itertools.pairwise(ends), strict=True)}

    def by_table(self, numbers: Sequence[int]) -> dict[str, int]:
        """Of each table, in the order they were given in, what is given by `order`."""
        found = dict(zip(self.order, numbers, strict=True))
        return {name: found[name] for name in self.tables}

    def features_of(self, table: str) -> list[str]:
        """The features that look into a table."""
        return [name for name, one in self.features.items() if one.table == table]

    def ranges(self, capacities: Sequence[int]) -> list[Range]:
        """What each row of the weights is for; the capacities are by `order`. First come the rows for unseen ids."""
        ends, found = dict.fromkeys(self.dims, 0), []
        unseen = ((name, one.table, one.num_unseen) for name, one in self.features.items())
        own = ((None, table, capacity) for table, capacity in zip(self.order, capacities, strict=True))
        for feature, table, num_rows in itertools.chain(unseen, own):
            dim = self.tables[table].dim
            found.append(Range(dim, ends[dim], ends[dim] + num_rows, table, feature))
            ends[dim] += num_rows
        return found

    def num_rows(self, capacities: Sequence[int]) -> dict[int, int]:
        """How many rows the weights of each width have."""
        return {one.dim: one.end for one in self.ranges(capacities)}

    def places(self, capacities: Sequence[int]) -> list[list[int]]:
        """What is needed of each feature, (7, F), a row each.

        The part of the id table, the shift of a row, the first row for unseen ids, their number; which weight, by
        width; the column of the output that it begins in; and whether its bags are means.
        """
        ranges = self.ranges(capacities)
        first = dict(zip(self.order, itertools.accumulate(capacities, initial=0), strict=False))
        shift = {one.table: one.begin - first[one.table] for one in ranges if one.feature is None}
        unseen = (one for one in ranges if one.feature is not None)  # in the order of the features
        found = [(self.order.index(one.table), shift[one.table], one.begin, one.end - one.begin) for one in unseen]
        begins = {name: columns.start for name, columns in self.columns.items()}
        out = [
            (self.dims.index(self.dim_of[name]), begins.get(name, 0), int(one.pooling == "mean"))
            for name, one in self.features.items()
        ]
        return [list(column) for column in zip(*map(operator.add, found, out), strict=True)]

    def described(self) -> Tensor:
        """What a checkpoint must agree with, as bytes."""
        return torch.frombuffer(bytearray(self.made_for.encode()), dtype=torch.uint8)

    def refuse_others(self, described: Tensor | None) -> None:
        """Refuse a checkpoint of other tables or features, or of the same in another order."""
        if described is not None:
            self.refuse("state_dict", bytes(described.tolist()).decode())

    def refuse_places(self, places: Tensor, capacities: Sequence[int], prefix: str) -> None:
        """Refuse a checkpoint whose features have their rows elsewhere."""
        if places.tolist() != self.places(capacities):
            raise ValueError(f"state_dict['{prefix}places'] must be those of its tables and features, got others")

    def refuse(self, argument: str, made_for: str) -> None:
        theirs, ours = json.loads(made_for), json.loads(self.made_for)
        for name, own in ours.items():
            if theirs.get(name) != own:
                raise ValueError(f"{argument} must be of a lookup with {name} {own}, got {theirs.get(name)}")

    def alike(self, single: Sequence[bool]) -> list[Alike]:
        """The features of one width that are pooled alike, where these have one id in each bag."""
        found: dict[tuple[int, Kind], list[tuple[int, str]]] = {}
        for at, (name, one) in enumerate(self.features.items()):
            kind: Kind = "each" if one.pooling is None else "one" if single[at] else one.pooling
            found.setdefault((self.dim_of[name], kind), []).append((at, name))
        return [Alike(kind, *map(tuple, zip(*those, strict=True))) for (_, kind), those in found.items()]

    def in_order(self, unpooled: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The vectors of the features that do not pool, in the order of the features."""
        return {name: unpooled[name] for name in self.unpooled}


def holds_all(state_dict: Mapping[str, object], wanted: Sequence[str]) -> bool:
    """Whether a checkpoint holds all of a lookup, which it must where it holds any."""
    absent = [name for name in wanted if name not in state_dict]
    if absent and len(absent) < len(wanted):
        raise ValueError(f"state_dict must hold all of a lookup, got none of {', '.join(absent)}")
    return not absent


def _checked_table(name: str, capacity: int, dim: int) -> EmbeddingTable:
    capacity = _checks.integer(f"tables[{name!r}].capacity", capacity, at_least=1, at_most=MOST_ROWS)
    return EmbeddingTable(capacity, _checks.integer(f"tables[{name!r}].dim", dim, at_least=1))


def _checked_feature(
    name: str,
    tables: Mapping[str, EmbeddingTable],
    table: str,
    pooling: Literal["sum", "mean"] | None,
    num_unseen: int,
) -> IdFeature:
    _checks.choice(f"features[{name!r}].table", table, tables.keys())
    _checks.choice(f"features[{name!r}].pooling", pooling, _POOLINGS)
    return IdFeature(
        table, pooling, _checks.integer(f"features[{name!r}].num_unseen", num_unseen, at_least=1, at_most=MOST_ROWS)
    )
