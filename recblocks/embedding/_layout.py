"""Which features look into which tables, where their rows lie, and how a batch of them is laid side by side."""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.embedding._id_table_state import MOST_ROWS
from recblocks.kernels.dispatch import watched
from recblocks.kernels.fused_lookup import cpp

Ids: TypeAlias = Tensor | tuple[Tensor, Tensor]
_Kind: TypeAlias = Literal["one", "each", "sum", "mean"]
_POOLINGS = ("sum", "mean", None)
_DTYPE, _DEVICE, _SHAPE, _NDIM = map(operator.attrgetter, ("dtype", "device", "shape", "ndim"))


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


class Group(NamedTuple):
    """Features of one width that are pooled alike, their ids side by side."""

    kind: _Kind
    """One id in each bag; ids without bags; bags that are pooled."""
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the ids of each feature, where they are without bags."""
    ids: Tensor
    """(F, B) one in each bag, else (N,), those of a feature behind those of the one before."""
    feature: Tensor
    """(F, 1) the number of each feature; (N,) of each id's, where they are without bags."""
    offsets: Tensor | None
    """(F B + 1,) where the bags begin and the last one ends."""
    sizes: Tensor | None
    """(F,) how many ids are in the bags of each feature."""

    def numbers(self) -> Tensor:
        """The number of each id's feature, which broadcasts against the ids."""
        if self.sizes is None:
            return self.feature
        return torch.repeat_interleave(self.feature.flatten(), self.sizes, output_size=self.ids.shape[0])

    def unpooled(self, vectors: Tensor) -> dict[str, Tensor]:
        """(..., dim) of each feature, of the (N, dim) of all ids without bags."""
        flat = torch.split(vectors, [math.prod(shape) for shape in self.shapes])
        each = zip(self.names, flat, self.shapes, strict=True)
        return {name: one.view(*shape, vectors.shape[1]) for name, one, shape in each}


class PackedIds(NamedTuple):
    """The ids of a batch, side by side: what `FusedEmbeddingLookup.pack` makes of the features one by one."""

    groups: tuple[Group, ...]
    made_for: str
    """What a lookup must be for that takes them."""


class Range(NamedTuple):
    """Rows of the weight of one width: of a table, or of a feature for unseen ids."""

    dim: int
    begin: int
    end: int
    table: str
    feature: str | None


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
        self._place = {name: number for number, name in enumerate(self.features)}
        self._plain_kinds = [self._kinds(dict.fromkeys(features, single)) for single in (False, True)]
        self.pooled = [name for name, one in self.features.items() if one.pooling is not None]
        self.unpooled = [name for name, one in self.features.items() if one.pooling is None]
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
            self._refuse("state_dict", bytes(described.tolist()).decode())

    def refuse_places(self, places: Tensor, capacities: Sequence[int], prefix: str) -> None:
        """Refuse a checkpoint whose features have their rows elsewhere."""
        if places.tolist() != self.places(capacities):
            raise ValueError(f"state_dict['{prefix}places'] must be those of its tables and features, got others")

    def groups(
        self, features: Mapping[str, Ids] | PackedIds, device: torch.device, backend: str | None
    ) -> Sequence[Group]:
        """Those of a batch, packed or not; ``backend`` is like `pack`'s."""
        if not isinstance(features, PackedIds):
            return self.pack(features, device, backend).groups
        if features.made_for != self.made_for:
            self._refuse("features", features.made_for)
        names = [name for group in features.groups for name in group.names]
        if len(names) != len(self.features) or set(names) != self.features.keys():
            raise ValueError(f"features must be packed of {list(self.features)}, each once, got {names}")
        every = ((group.ids, group.feature, group.offsets, group.sizes) for group in features.groups)
        for one in (tensor for tensors in every for tensor in tensors if tensor is not None):
            _checks.integers("features", one)
            if one.device != device:
                raise ValueError(f"features must be packed on {device} like the lookup, got {one.device}")
        return features.groups

    def _refuse(self, argument: str, made_for: str) -> None:
        theirs, ours = json.loads(made_for), json.loads(self.made_for)
        for name, own in ours.items():
            if theirs.get(name) != own:
                raise ValueError(f"{argument} must be of a lookup with {name} {own}, got {theirs.get(name)}")

    def pack(self, features: Mapping[str, Ids], device: torch.device, backend: str | None) -> PackedIds:
        """Lay a batch side by side; ``backend`` is what `dispatch.resolve` says."""
        groups = self._plain_groups(features, device, backend)
        if groups is None:
            self._check(features, device)
            kinds = self._kinds({name: isinstance(ids, Tensor) and ids.ndim == 1 for name, ids in features.items()})
            groups = tuple(self._group(kind, names, features) for kind, names in kinds)
        return PackedIds(groups, self.made_for)

    def _kinds(self, single: Mapping[str, bool]) -> list[tuple[_Kind, list[str]]]:
        """The features of each group, where these have one id in each bag."""
        kinds: dict[tuple[int, _Kind], list[str]] = {}
        for name, one in self.features.items():
            kind: _Kind = "each" if one.pooling is None else "one" if single[name] else one.pooling
            kinds.setdefault((self.dim_of[name], kind), []).append(name)
        return [(kind, names) for (_, kind), names in kinds.items()]

    def vectors(self, groups: Sequence[Group], found: Sequence[Tensor]) -> Vectors:
        """Give each feature its own, of the vectors of each group.

        These are (B, F, dim) of one id each, (F B, dim) of bags, and (N, dim) of each id.
        """
        unpooled: dict[str, Tensor] = {}
        pooled: dict[str, Tensor] = {}
        whole: Tensor | None = None
        for group, their in zip(groups, found, strict=True):
            if group.kind == "each":
                unpooled |= group.unpooled(their)
                continue
            if their.ndim == 2:
                their = their.view(len(group.names), -1, their.shape[1]).transpose(0, 1)
            if list(group.names) == self.pooled:
                whole = their.flatten(1)
            else:
                pooled.update(zip(group.names, their.unbind(1), strict=True))
        if whole is None:
            pieces = [pooled[name] for name in self.pooled]
            whole = torch.cat(pieces, 1) if pieces else found[0].new_empty(0, 0)
        return Vectors(whole, self.in_order(unpooled))

    def in_order(self, unpooled: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The vectors of the features that do not pool, in the order of the features."""
        return {name: unpooled[name] for name in self.unpooled}

    def _group(self, kind: _Kind, names: list[str], features: Mapping[str, Ids]) -> Group:
        given = [_parts(features[name]) for name in names]
        ids = [one if one.ndim == 1 else one.flatten() for one, _ in given]
        if kind == "each":
            shapes = tuple(tuple(one.shape) for one, _ in given)
            numbers = self._numbers(names, ids[0].device)
            of = [number.expand(math.prod(shape)) for number, shape in zip(numbers, shapes, strict=True)]
            return Group(kind, tuple(names), shapes, torch.cat(ids), torch.cat(of), None, None)
        return self._bags(kind, names, *_lay(ids, None if kind == "one" else [_offsets(*one) for one in given]))

    def _bags(self, kind: _Kind, names: list[str], ids: Tensor, offsets: Tensor | None, sizes: Tensor | None) -> Group:
        """Features that pool, laid side by side; without offsets each has one id in each bag."""
        numbers = self._numbers(names, ids.device)
        if offsets is None:
            return Group(kind, tuple(names), (), ids.view(len(names), -1), numbers, None, None)
        return Group(kind, tuple(names), (), ids, numbers, offsets, sizes)

    def _numbers(self, names: list[str], device: torch.device) -> Tensor:
        """(F, 1) the numbers of these features."""
        every = len(names) == len(self.features)
        if device.type == "cpu" and not every:
            return torch.tensor([[self._place[name]] for name in names], device=device)
        numbers = torch.arange(len(self.features), device=device)[:, None]
        return numbers if every else torch.cat([numbers[self._place[name]] for name in names])[:, None]

    def _plain_groups(
        self, features: Mapping[str, Ids], device: torch.device, backend: str | None
    ) -> tuple[Group, ...] | None:
        """Of hundreds of features, all ids or bags, that are seen to be right at once; None: each must be looked at."""
        if torch.compiler.is_compiling() or not isinstance(features, Mapping):
            return None
        if features.keys() != self.features.keys():
            return None
        given: dict[str, Any] = {name: features[name] for name in self.features}
        pairs = {name: one for name, one in given.items() if type(one) is tuple}
        if not pairs.keys().isdisjoint(self.unpooled) or any(len(pair) != 2 for pair in pairs.values()):
            return None
        offsets = {name: pair[1] for name, pair in pairs.items()}
        ids = given | {name: pair[0] for name, pair in pairs.items()}
        flat = [*(ids[name] for name in self.pooled), *offsets.values()]
        every = (*ids.values(), *offsets.values())
        if set(map(type, every)) != {Tensor} or set(map(_DTYPE, every)) != {torch.int64}:
            return None
        if set(map(_DEVICE, every)) != {device} or set(map(_NDIM, flat)) != {1}:
            return None
        num_rows = {shape[0] for shape in {ids[name].shape for name in self.pooled if name not in pairs}}
        num_rows |= {shape[0] - 1 for shape in set(map(_SHAPE, offsets.values()))}
        if len(num_rows) > 1 or min(num_rows) < 0:
            return None
        in_cpp = backend == "cpp" and device.type == "cpu" and not watched() and all(map(Tensor.is_contiguous, flat))
        alike = len(pairs) in (0, len(self.pooled))
        kinds = self._plain_kinds[not pairs] if alike else self._kinds({name: name not in pairs for name in given})
        groups = []
        for kind, names in kinds:
            if kind == "each":
                groups.append(self._group(kind, names, features))
                continue
            own, begins = [ids[name] for name in names], [offsets[name] for name in names] if kind != "one" else None
            laid = cpp.lay(own, begins) if in_cpp else _lay(own, begins) if _run(own, begins) else None
            if laid is None:
                return None
            groups.append(self._bags(kind, names, *laid))
        return tuple(groups)

    def _check(self, features: Mapping[str, Ids], device: torch.device) -> None:
        if not isinstance(features, Mapping):
            raise TypeError(f"features must be a mapping of names, or packed, got {_checks.describe(features)}")
        if features.keys() != self.features.keys():
            missing = [name for name in self.features if name not in features]
            unknown = [name for name in features if name not in self.features]
            raise ValueError(f"features must be those of the lookup, got none of {missing} and unknown {unknown}")
        sizes = {}
        for name, given in features.items():
            ids, offsets = _parts(given)
            pools = self.features[name].pooling is not None
            _checks.integers(f"features[{name!r}]", ids, *(("N",) if pools and isinstance(given, tuple) else ()))
            if isinstance(given, tuple):
                _checks.integers(f"features[{name!r}][1]", offsets, "B + 1")
            for one in (ids, offsets):
                if one is not None and one.device != device:
                    raise ValueError(f"features[{name!r}] must be on {device} like the lookup, got {one.device}")
            if offsets is not None:
                if not pools:
                    raise ValueError(f"features[{name!r}] must be ids alone where they are not pooled, got offsets too")
                _checks.offsets(f"features[{name!r}][1]", offsets, ids.shape[0])
                sizes[name] = offsets.shape[0] - 1
            elif pools:
                if ids.ndim not in (1, 2):
                    raise ValueError(f"features[{name!r}] must have shape (B) or (B, L), got {_checks.describe(ids)}")
                sizes[name] = ids.shape[0]
        wrong = [name for name in sizes if sizes[name] != sizes[self.pooled[0]]]
        if wrong:
            first, other = self.pooled[0], wrong[0]
            rows = f"{sizes[other]} for {other!r} and {sizes[first]} for {first!r}"
            raise ValueError(f"features that pool must have the same number of rows, got {rows}")


def holds_all(state_dict: Mapping[str, object], wanted: Sequence[str]) -> bool:
    """Whether a checkpoint holds all of a lookup, which it must where it holds any."""
    absent = [name for name in wanted if name not in state_dict]
    if absent and len(absent) < len(wanted):
        raise ValueError(f"state_dict must hold all of a lookup, got none of {', '.join(absent)}")
    return not absent


def _lay(ids: list[Tensor], offsets: list[Tensor] | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `cpp.lay` gives, of offsets that run as they must."""
    every = torch.cat(ids)
    if offsets is None:
        return every, None, None
    begins = torch.stack(offsets)
    sizes = begins[:, -1]
    moved = (sizes.cumsum(0) - sizes)[:, None] + begins[:, :-1]
    return every, torch.cat([moved.flatten(), every.new_full((1,), every.shape[0])]), sizes


def _run(ids: list[Tensor], offsets: list[Tensor] | None) -> bool:
    """Whether offsets run from 0 to as many ids as there are, and never back, where that can be read."""
    if offsets is None or not _checks.readable(offsets[0]):
        return True
    begins = torch.stack(offsets)
    ends = torch.tensor([one.numel() for one in ids], device=begins.device)
    runs = (begins[:, 0] == 0) & (begins[:, -1] == ends)
    return bool(runs.all() & (begins[:, 1:] >= begins[:, :-1]).all())


def _parts(given: Ids) -> tuple[Tensor, Tensor | None]:
    """The ids, and the offsets of their bags if they have any."""
    return given if isinstance(given, tuple) and len(given) == 2 else (given, None)


def _offsets(ids: Tensor, offsets: Tensor | None) -> Tensor:
    """(B + 1,) where the bags of a feature begin."""
    if offsets is not None:
        return offsets
    return ids.shape[1] * torch.arange(ids.shape[0] + 1, device=ids.device)


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
