"""A fused lookup whose tables torchrec shards over ranks while they are trained."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recblocks import _checks
from recblocks._distributed import all_gather_ragged, group_size
from recblocks.embedding import _collections
from recblocks.embedding._buckets import Changes
from recblocks.embedding._first_weights import draw_rows, draw_unseen
from recblocks.embedding._gather import give_rows, rows_of, without_row
from recblocks.embedding._id_table_state import SAVED, capacities_of
from recblocks.embedding._layout import (
    EmbeddingTable,
    IdFeature,
    Layout,
    Range,
    Vectors,
    holds_all,
)
from recblocks.embedding._packing import Group, Ids, PackedIds, groups_of, pack
from recblocks.embedding.fused_lookup import FusedEmbeddingLookup
from recblocks.embedding.id_table import IdTable
from recblocks.kernels.fused_lookup import dispatch


class ShardableLookup(nn.Module):
    """What a `FusedEmbeddingLookup` gives, from tables that torchrec's DistributedModelParallel shards over ranks.

    Raw ids become rows in an `IdTable` that every rank has whole; rows become vectors in an EmbeddingBagCollection for
    the features that pool and an EmbeddingCollection of each width for those that do not. These hold what is large, and
    are what DistributedModelParallel finds and shards, with whatever plan and optimizer it is given.

    Made with ``device="meta"``, it is trained in this order: torchrec's ``apply_optimizer_in_backward`` gives
    `table_weights` their optimizer, say RowWiseAdagrad with an eps of 1e-8; DistributedModelParallel wraps the model;
    `reset_parameters` draws the weights; then, on every rank and for each of its batches, `insert`, the loss and its
    backward. ``examples/transact/sharded.py`` does so.

    Trained so, with generators of one seed on every rank and a loss whose mean over ranks is the whole batch's, the
    vectors of every id are those of one process with ``FusedEmbeddingLookup(..., gradient="rowwise_adagrad")`` on the
    batches of all ranks, but for rounding: `insert` gives rows and draws vectors in the same order. Tables may go whole
    to one rank, or be cut by rows, bags then with batches of one size on all ranks; cut by columns, each piece of a row
    has an Adagrad of its own.

    Args:
        tables: like `FusedEmbeddingLookup`'s; the capacity is fixed, as a plan is made for it.
        features: like `FusedEmbeddingLookup`'s; those of one table must pool alike, as torchrec pools by table.
        seed: of the id table.
        device: where the tables live; "meta": where torchrec puts them. The id table is then on the CPU until the model
            is moved.

    Raises:
        ImportError: torchrec is not installed.
        TypeError, ValueError: for arguments out of their range, and features of one table that pool differently.

    Example:
        >>> tables = {"item": EmbeddingTable(1000, dim=8), "user": EmbeddingTable(500, dim=4)}
        >>> lookup = ShardableLookup(tables, {"user": IdFeature("user"), "liked": IdFeature("item", pooling="mean")})
        >>> liked = torch.tensor([900, 7, 8]), torch.tensor([0, 2, 3])
        >>> batch = {"user": torch.tensor([-5, 2**62]), "liked": liked}
        >>> lookup.insert(batch)
        {'item': 3, 'user': 2}
        >>> served = lookup.to_fused()
        >>> torch.equal(served(batch).pooled, lookup(batch).pooled)
        True

    Note:
        The id table costs each rank 14.1 bytes a row, and what is new to a rank is sent to all: of a batch whose ids
        are known nothing but a count. Ids are never taken away again: there is no admission and no eviction here.
        Where torchrec caches rows of a table on a GPU, new rows are written behind the cache, which has not seen them.

    Source:
        TransAct, section 3.4.2, for raw ids; torchrec (Ivchenko et al., RecSys 2022) for sharding.
    """

    places: Tensor

    def __init__(
        self,
        tables: Mapping[str, EmbeddingTable],
        features: Mapping[str, IdFeature],
        *,
        seed: int = 0,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        torchrec = _collections.need_torchrec()
        self.layout = Layout(tables, features)
        poolings = _poolings(self.layout)
        capacities = [self.layout.tables[name].capacity for name in self.layout.order]
        is_meta = device is not None and torch.device(device).type == "meta"
        self.table = IdTable(capacities, seed=seed, device=None if is_meta else device)
        own = self._own_begins()
        configs: dict[int | None, list[Any]] = {}
        kinds = {"sum": torchrec.PoolingType.SUM, "mean": torchrec.PoolingType.MEAN}
        for name, one in self.layout.tables.items():
            if name not in poolings:
                raise ValueError(f"tables must be those that features look into, got {name!r} without any")
            if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"tables must have names that torchrec can take in a ModuleDict, got {name!r}")
            sizes = {"num_embeddings": own[name] + one.capacity, "embedding_dim": one.dim}
            named = {"name": name, "feature_names": self.layout.features_of(name), **sizes}
            pooling = poolings[name]
            if pooling is None:
                config = torchrec.EmbeddingConfig(**named)
            else:
                config = torchrec.EmbeddingBagConfig(**named, pooling=kinds[pooling])
            setattr(config, _collections.OF_LOOKUP, True)
            configs.setdefault(one.dim if pooling is None else None, []).append(config)
        device = None if device is None else torch.device(device)
        pooled = configs.pop(None, None)
        self.bags = None if pooled is None else torchrec.EmbeddingBagCollection(tables=pooled, device=device)
        self.each = nn.ModuleDict()
        for dim, unpooled in configs.items():
            self.each[str(dim)] = torchrec.EmbeddingCollection(tables=unpooled, device=device)
        self.register_buffer("places", self._places(), persistent=False)
        if not is_meta:
            self.reset_parameters()

    @property
    def collections(self) -> list[nn.Module]:
        """The collections, sharded or not."""
        return [*([] if self.bags is None else [self.bags]), *self.each.values()]

    @property
    def num_ids(self) -> dict[str, int]:
        """How many ids of each table have a row."""
        return self.layout.by_table(self.table.num_ids_by_part)

    @property
    def columns(self) -> dict[str, slice]:
        """Where each feature that pools stands in the columns of the pooled vectors."""
        return self.layout.columns

    def table_weights(self) -> list[nn.Parameter]:
        """What an optimizer of the tables is for, ahead of sharding."""
        return [weight for collection in self.collections for weight in collection.parameters()]

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Forget every id, and draw the weights for unseen ones, on every rank from a generator of one seed.

        To be called once more when the model is sharded: what was drawn before was not kept. Weights of an id are drawn
        when it gets its row. What an optimizer keeps of the rows stays.
        """
        self.table.reset_parameters()
        weights = _collections.weights_of(self.collections)
        for weight in weights.values():
            for piece in _collections.pieces_of(weight):
                piece.tensor.zero_()
        for one, begin in self._ranges():
            if one.feature is not None:
                drawn = torch.empty(one.end - one.begin, one.dim, device=self.places.device, dtype=torch.float32)
                draw_unseen(drawn, self.layout.tables[one.table].capacity, generator)
                _collections.write_rows(weights[one.table], _rows(begin, drawn), drawn)

    def forward(self, features: Mapping[str, Ids] | PackedIds) -> Vectors:
        """Look all features up, like `FusedEmbeddingLookup.forward`, with the collections' gradients."""
        compiling = torch.compiler.is_compiling()
        with contextlib.nullcontext() if compiling else self.table.reading("a lookup"):
            groups = self._groups(features)
            rows = rows_of(groups, self.table.slots, self.places, self._backend)
        pooled = [(group, their) for group, their in zip(groups, rows, strict=True) if group.kind != "each"]
        each = [(group, their) for group, their in zip(groups, rows, strict=True) if group.kind == "each"]
        unpooled = {name: vectors for group, their in each for name, vectors in self._each(group, their).items()}
        in_order = {name: unpooled[name] for name in self.layout.features if name in unpooled}
        return Vectors(self._bags(pooled), in_order)

    def pack(self, features: Mapping[str, Ids]) -> PackedIds:
        """Lay the ids of all features side by side, like `FusedEmbeddingLookup.pack`."""
        return pack(self.layout, features, self.places.device, self._backend)

    def insert(
        self,
        features: Mapping[str, Ids] | PackedIds,
        *,
        generator: torch.Generator | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> dict[str, int]:
        """Give the ids of all ranks that have no row one, and draw its weights; every rank must call it.

        Args:
            features: of this rank, as `forward` takes them.
            generator: draws the weights, in one state on every rank, or None on every rank.
            group: the ranks that the tables are sharded over; None is the default group.

        Returns:
            how many new ids of each table.

        Raises:
            TypeError, ValueError: like `forward`'s, and on every rank where one has bad features; `TableFull`, on every
                rank, for more new ids than a table has rows for. A failed call changes nothing.
            RuntimeError: the table is read or written meanwhile, or ranks hold other numbers of ids.
        """
        try:
            new, problem = without_row(self._groups(features), self.table, self.places), None
        except (TypeError, ValueError) as error:
            new, problem = (self.places[0, :0], self.places[0, :0]), error
        every, generator = self._agree(torch.stack(new, 1), problem, generator, group)
        if not len(every):
            return dict.fromkeys(self.layout.tables, 0)
        ids, order = every[:, 0].sort()
        draw = functools.partial(self._draw, _collections.weights_of(self.collections), generator)
        return give_rows(self.table, self.layout, ids, self.places[0, every[order, 1]], draw)

    @property
    def _backend(self) -> str | None:
        return dispatch.resolve("auto", self.places.device)

    def _groups(self, features: Mapping[str, Ids] | PackedIds) -> Sequence[Group]:
        return groups_of(self.layout, features, self.places.device, self._backend)

    def _agree(
        self,
        own: Tensor,
        problem: Exception | None,
        generator: torch.Generator | None,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, torch.Generator | None]:
        """What is new to any rank, (K, 2) ids and features, and what to draw from; an error on all if one has one."""
        if group_size(group) == 1:
            if problem is not None:
                raise problem
            return own, generator
        seed = torch.randint(1 << 62, ()) if generator is None else torch.tensor(-1)
        says = [[int(problem is None), self.table.num_ids], [int(seed), len(own)]]
        every, sizes = all_gather_ragged(torch.cat([torch.tensor(says, device=own.device), own]), group)
        by_rank = torch.split(every, sizes)
        if problem is not None:
            raise problem
        good, num_ids = torch.stack([one[0] for one in by_rank]).t().tolist()
        if not all(good):
            raise ValueError(f"features must be good on every rank, got an error on rank {good.index(0)}")
        if len(set(num_ids)) > 1:
            raise RuntimeError(f"every rank must hold the same ids, got so many of them on the ranks: {num_ids}")
        seeds = [int(one[1, 0]) for one in by_rank]
        if generator is None and seeds[0] >= 0:
            generator = torch.Generator(own.device).manual_seed(seeds[0])
        return torch.cat([one[2:] for one in by_rank]), generator

    def get_extra_state(self) -> Tensor:
        """What the lookup was made for."""
        return self.layout.described()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: what differs was refused before anything was loaded."""

    def load_fused(self, lookup: FusedEmbeddingLookup) -> None:
        """Take over the ids and vectors of a lookup for the same tables and features; each rank writes what it has.

        Raises:
            TypeError, ValueError: for a lookup of other tables, features or capacities.
        """
        if not isinstance(lookup, FusedEmbeddingLookup):
            raise TypeError(f"lookup must be a FusedEmbeddingLookup, got {_checks.describe(lookup)}")
        self.layout.refuse_others(lookup.get_extra_state())
        if lookup.table.capacities != self.table.capacities:
            raise ValueError(f"lookup must have capacities {self.table.capacities}, got {lookup.table.capacities}")
        _take_ids(self.table, lookup.table)
        weights = _collections.weights_of(self.collections)
        for one, begin in self._ranges():
            source = lookup.weights[str(one.dim)].detach()[one.begin : one.end]
            _collections.write_rows(weights[one.table], _rows(begin, source), source)

    def to_fused(
        self, *, gradient: Literal["dense", "sparse", "sgd", "rowwise_adagrad"] = "dense", learning_rate: float = 0.01
    ) -> FusedEmbeddingLookup | None:
        """Gather everything into a lookup on rank 0, to serve it or to train on in one process.

        What an optimizer knows of the rows does not come with them.

        Args:
            gradient: like `FusedEmbeddingLookup`'s.
            learning_rate: like `FusedEmbeddingLookup`'s.

        Returns:
            on rank 0 a lookup whose vectors are the same, on the CPU; None on the others, which must call this as well.
        """
        fused = None
        if not dist.is_initialized() or dist.get_rank() == 0:
            options: dict[str, Any] = {"gradient": gradient, "learning_rate": learning_rate}
            fused = FusedEmbeddingLookup(self.layout.tables, self.layout.features, **options)
            _take_ids(fused.table, self.table)
        weights = _collections.weights_of(self.collections)
        ranges = self._ranges()
        for name, weight in weights.items():
            rows = _collections.whole(weight)
            if fused is not None and rows is not None:
                for one, begin in ranges:
                    if one.table == name:
                        given = fused.weights[str(one.dim)].detach()[one.begin : one.end]
                        given.copy_(rows[begin : begin + len(given)])
        return fused

    def extra_repr(self) -> str:
        """Say how many features there are."""
        return f"num_features={len(self.layout.features)}"

    def _draw(
        self, weights: Mapping[str, Any], generator: torch.Generator | None, changes: Changes, begun: Tensor
    ) -> None:
        """Draw the weights of rows of the id table that are given anew, ascending."""
        own = self._own_begins()
        for one in draw_rows(begun, self.table.begins, self.layout, generator, torch.float32):
            nums = torch.searchsorted(one.begun, self.table.begins).diff()[one.parts.start : one.parts.stop].tolist()
            pieces = zip(one.parts, torch.split(one.begun, nums), torch.split(one.vectors, nums), strict=True)
            for part, rows, vectors in pieces:
                name = self.layout.order[part]
                at = rows - self.table.begins[part] + own[name]
                _collections.write_rows(weights[name], at, vectors, changes)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Refuse another lookup's, before anything of it is loaded."""
        self.layout.refuse_others(state_dict.get(f"{prefix}_extra_state"))
        wanted = [f"{prefix}table.{name}" for name in SAVED]
        if holds_all(state_dict, [f"{prefix}_extra_state", *wanted]):  # the id table, loaded first, checks its own
            _checks.integers(f"state_dict['{prefix}table.begins']", state_dict[f"{prefix}table.begins"], None)
            capacities = capacities_of(state_dict[f"{prefix}table.begins"])
            if capacities != self.table.capacities:
                raise ValueError(f"state_dict must be of capacities {self.table.capacities}, got {capacities}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _ranges(self) -> list[tuple[Range, int]]:
        """The rows of a fused lookup's weights, and where each range begins in its table, by the same order."""
        found, begins = [], dict.fromkeys(self.layout.tables, 0)
        for one in self.layout.ranges(self.table.capacities):
            found.append((one, begins[one.table]))
            begins[one.table] += one.end - one.begin
        return found

    def _own_begins(self) -> dict[str, int]:
        """Where the rows of each table's ids begin, behind those for unseen ones."""
        return {one.table: begin for one, begin in self._ranges() if one.feature is None}

    def _places(self) -> Tensor:
        """Like `Layout.places`, for rows of the tables."""
        firsts = dict(zip(self.layout.order, self.table.begins.tolist(), strict=False))
        own = self._own_begins()
        found = [
            (self.layout.order.index(one.table), own[one.table] - firsts[one.table], begin, one.end - one.begin)
            for one, begin in self._ranges()
            if one.feature is not None
        ]
        return torch.tensor(found, device=self.table.begins.device).t().contiguous()

    def _bags(self, groups: Sequence[tuple[Group, Tensor]]) -> Tensor:
        """(B, sum of widths) of the features that pool."""
        if self.bags is None:
            return torch.empty(0, 0, device=self.places.device, dtype=torch.float32)
        values, lengths = [], []
        for group, rows in groups:
            values.append(rows.t().flatten() if group.kind == "one" else rows)
            lengths.append(torch.ones_like(rows.flatten()) if group.offsets is None else group.offsets.diff())
        names = [name for group, _ in groups for name in group.names]
        found = self.bags(_jagged(names, torch.cat(values), torch.cat(lengths))).to_dict()
        return torch.cat([found[name] for name in self.layout.pooled], 1)

    def _each(self, group: Group, rows: Tensor) -> dict[str, Tensor]:
        """(..., dim) of each feature of a width that does not pool, all whose ids are one bag for torchrec."""
        sizes = [math.prod(shape) for shape in group.shapes]
        dim = self.layout.dim_of[group.names[0]]
        found = self.each[str(dim)](_jagged(list(group.names), rows, torch.tensor(sizes, device=rows.device)))
        named = zip(group.names, group.shapes, strict=True)
        return {name: found[name].values().view(*shape, dim) for name, shape in named}


def _jagged(names: list[str], values: Tensor, lengths: Tensor) -> Any:
    from torchrec import KeyedJaggedTensor

    return KeyedJaggedTensor(keys=names, values=values, lengths=lengths)


def _poolings(layout: Layout) -> dict[str, str | None]:
    """What becomes of the bags of each table that a feature looks into."""
    found: dict[str, str | None] = {}
    for name, one in layout.features.items():
        if found.setdefault(one.table, one.pooling) != one.pooling:
            kinds = f"{found[one.table]!r} and, for {name!r}, {one.pooling!r}"
            raise ValueError(f"features of table {one.table!r} must pool alike, got {kinds}")
    return found


def _rows(begin: int, like: Tensor) -> Tensor:
    return torch.arange(begin, begin + len(like), device=like.device)


def _take_ids(table: IdTable, other: IdTable) -> None:
    table.load_state_dict({name: tensor.to(table.rows.device) for name, tensor in other.state_dict().items()})
