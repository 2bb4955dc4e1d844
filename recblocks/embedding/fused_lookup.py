"""Raw ids of all features to vectors in one lookup: an id table, and weights that it names the rows of."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from recblocks import _checks
from recblocks._memory import in_huge_pages
from recblocks.embedding._buckets import Changes
from recblocks.embedding._first_weights import draw_rows, draw_unseen
from recblocks.embedding._gather import (
    give_rows,
    kernel_vectors,
    pool,
    restore_dtypes,
    rows_of,
    vectors_in_order,
    without_row,
)
from recblocks.embedding._id_table_state import MOST_ROWS, SAVED, capacities_of, check_sketch, check_state
from recblocks.embedding._layout import (
    EmbeddingTable,
    IdFeature,
    Layout,
    Range,
    Vectors,
    holds_all,
)
from recblocks.embedding._packing import Group, Ids, PackedIds, groups_of, pack
from recblocks.embedding._row_updates import gather_and_train
from recblocks.embedding.id_table import IdTable
from recblocks.kernels.fused_lookup import dispatch
from recblocks.sketch import CountMinSketch

_OPTIMIZERS = ("sgd", "rowwise_adagrad")
_GRADIENTS = ("dense", "sparse", *_OPTIMIZERS)


class FusedEmbeddingLookup(nn.Module):
    """Turns the raw 64-bit ids of any number of features into vectors, without a vocabulary.

    An `IdTable`, of one part a table, gives each id a row; the rows of one width lie in one matrix, so that all
    features of that width, hundreds of them, are looked up in one go. An id without a row gets one of its feature's own
    rows for unseen ids. A lookup gives no rows: `insert` does, between steps, and so do `evict`, `erase` and `grow`.

    ``gradient`` says what becomes of a gradient. "dense" and "sparse": it is the ``grad`` of the weights, for an
    optimiser, as with `torch.nn.Embedding`. "sgd" and "rowwise_adagrad": backward applies it to the rows that were
    seen, touches no other, and keeps nothing; the weights then need no optimiser. With the sum ``g_r`` of the gradients
    of row r, "sgd" is ``w_r -= η g_r``, and "rowwise_adagrad" ``m_r += mean(g_r²)``, one number m a row, then ``w_r -=
    η g_r / (√m_r + 1e-8)``, computed in float32 and rounded to the weights' dtype. Two lookups before a backward are
    two updates (of a compiled one an error), and a loss that is scaled scales them.

    "Between steps" is after the optimiser's, before the next lookup: a backward after `insert` or `grow` would train
    rows that are no longer those that were looked up, and what an optimiser keeps of a row stays when the row is given
    to another id. Several processes: under DDP, with "dense", each must insert the ids of all, in one order, with a
    generator of one seed. The last two are for one process: under DDP every rank's weights would go their own way, and
    what FSDP gathers is not kept.

    On a CPU large tables are made in huge pages, where Linux grants those on request, as it says in
    ``/sys/kernel/mm/transparent_hugepage/enabled``: a lookup then spends less on finding out where its rows are.

    Args:
        tables: each one's capacity in ids, and the width of its rows.
        features: each one's table, pooling and number of rows for unseen ids, in the order of the output.
        gradient: "dense", "sparse", "sgd" or "rowwise_adagrad".
        learning_rate: η of the last two; a schedule writes into the buffer of this name.
        admit_after: like `IdTable`'s, and so are sketch, evict and seed.
        backend: "auto" takes Triton's kernels on CUDA, where Triton is installed, C++ on a CPU, where there is a
            compiler (it is built when it is first needed, in seconds, and kept in the user's cache folder), and plain
            torch elsewhere and for what is exported. "reference" is plain torch.
        generator: draws the first weights.
        device: where everything lives.
        dtype: the weights'.

    Raises:
        TypeError, ValueError: for arguments out of their range, and features of a table that there is not.

    Example:
        >>> lookup = FusedEmbeddingLookup(
        ...     {"item": EmbeddingTable(1000, dim=8), "user": EmbeddingTable(500, dim=4)},
        ...     {"user": IdFeature("user"), "item": IdFeature("item"), "liked": IdFeature("item", pooling="mean")},
        ... )
        >>> liked = torch.tensor([900, 7, 8]), torch.tensor([0, 2, 3])  # the ids, and where each row's begin
        >>> batch = {"user": torch.tensor([-5, 2**62]), "item": torch.tensor([7, 7]), "liked": liked}
        >>> lookup.insert(batch)
        {'item': 3, 'user': 2}
        >>> vectors = lookup(batch)
        >>> vectors.pooled.shape, vectors.pooled[:, lookup.columns["liked"]].shape
        (torch.Size([2, 20]), torch.Size([2, 8]))
        >>> vectors.pooled.sum().backward()
        >>> sorted(lookup.weights), lookup.weights["8"].grad.sum()
        (['4', '8'], tensor(32.))

    Note:
        Weights begin uniform within ±1/√capacity of their table, as in DLRM and torchrec, and so does the row of an id
        that is new.

    Source:
        TransAct, section 3.4.2.
    """

    places: Tensor
    learning_rate: Tensor
    anchor: Parameter | None

    def __init__(
        self,
        tables: Mapping[str, EmbeddingTable],
        features: Mapping[str, IdFeature],
        *,
        gradient: Literal["dense", "sparse", "sgd", "rowwise_adagrad"] = "dense",
        learning_rate: float = 0.01,
        admit_after: int = 1,
        sketch: CountMinSketch | None = None,
        evict: Literal["least_used"] | None = None,
        seed: int = 0,
        backend: Literal["auto", "reference", "cpp", "triton"] = "auto",
        generator: torch.Generator | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.choice("backend", backend, dispatch.BACKENDS)
        _checks.choice("gradient", gradient, _GRADIENTS)
        _checks.number("learning_rate", learning_rate, at_least=0)
        self.layout, self.gradient, self.backend = Layout(tables, features), gradient, backend
        self._first_learning_rate = learning_rate
        capacities = [self.layout.tables[name].capacity for name in self.layout.order]
        self.table = IdTable(capacities, admit_after=admit_after, sketch=sketch, evict=evict, seed=seed, device=device)
        self.weights = nn.ParameterDict()
        with torch.inference_mode(False):
            for dim, num_rows in self.layout.num_rows(capacities).items():
                weight = in_huge_pages(torch.empty(num_rows, dim, device=device, dtype=dtype))
                self.weights[str(dim)] = Parameter(weight, requires_grad=gradient not in _OPTIMIZERS)
                num_moments = num_rows if gradient == "rowwise_adagrad" else 0
                self.register_buffer(f"moment_{dim}", torch.empty(num_moments, dtype=torch.float32, device=device))
            anchor = Parameter(torch.empty(0, device=device, dtype=dtype)) if gradient in _OPTIMIZERS else None
            self.register_parameter("anchor", anchor)
            self.register_buffer("learning_rate", torch.empty((), dtype=torch.float32, device=device))
            self.register_buffer("places", torch.empty(7, len(features), dtype=torch.int64, device=device))
            self.reset_parameters(generator=generator)

    @property
    def num_ids(self) -> dict[str, int]:
        """How many ids of each table have a row."""
        return self.layout.by_table(self.table.num_ids_by_part)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(iter(self.weights.values())).dtype
        return dtype

    @property
    def _backend(self) -> str | None:
        return dispatch.resolve(self.backend, self.places.device)

    @property
    def columns(self) -> dict[str, slice]:
        """Where each feature that pools stands in the columns of the pooled vectors."""
        return self.layout.columns

    @property
    def capacities(self) -> dict[str, int]:
        """How many ids of each table can have a row."""
        return self.layout.by_table(self.table.capacities)

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Forget every id, and draw the weights for unseen ones; those of an id are drawn when it gets its row."""
        self.table.reset_parameters()
        with torch.no_grad():
            self.learning_rate.fill_(self._first_learning_rate)
            self.places = self._places()
            for tensor in (*self.weights.values(), *(self.get_buffer(f"moment_{dim}") for dim in self.layout.dims)):
                tensor.zero_()
            for one in self.layout.ranges(self.table.capacities):
                if one.feature is not None:
                    rows = self.weights[str(one.dim)][one.begin : one.end]
                    draw_unseen(rows, self.capacities[one.table], generator)

    def forward(self, features: Mapping[str, Ids] | PackedIds) -> Vectors:
        """Look all features up.

        Args:
            features: of each feature int64 ids, and of a bag where it begins. Of one that pools: (B,) one id in each
                bag; (B, L) bags of L; or a pair, the (N,) ids of all bags and the (B + 1,) offsets at which they begin
                and the last one ends. Of one that does not: (...). Or what `pack` made of them.

        Returns:
            the vectors, in the weights' dtype; zeros for an empty bag.

        Raises:
            TypeError, ValueError: a feature missing or unknown, another dtype or shape, rows that differ in number,
                and, on a CPU, offsets that do not run from 0 to N or descend.
            RuntimeError: the table is written meanwhile.
        """
        compiling = torch.compiler.is_compiling()
        with contextlib.nullcontext() if compiling else self.table.reading("a lookup"):
            places, slots = self.places, self.table.slots
            backend = dispatch.resolve(self.backend, places.device)
            # Of other dtypes torch rounds the sums of bags as it goes, and training must give what this gives.
            if backend is not None and not torch.is_grad_enabled():
                weights = [self.weights[str(dim)] for dim in self.layout.dims]
                if weights[0].dtype == torch.float32:
                    return kernel_vectors(backend, features, slots, places, weights, [], self.layout)
            groups = groups_of(self.layout, features, places.device, backend)
            rows = rows_of(groups, slots, places, backend)
            if self.gradient in _OPTIMIZERS:
                return vectors_in_order(self.layout, groups, self._trained_vectors(groups, rows))
            found = [self._vectors(group, their) for group, their in zip(groups, rows, strict=True)]
            return vectors_in_order(self.layout, groups, found)

    def pack(self, features: Mapping[str, Ids]) -> PackedIds:
        """Lay the ids of all features side by side, for what is compiled: a few tensors, and not some a feature.

        Args:
            features: as `forward` takes them.

        Returns:
            what `forward` and `insert` take as well, of this lookup or another one for the same features.

        Raises:
            TypeError, ValueError: like `forward`'s.
        """
        return pack(self.layout, features, self.places.device, self._backend)

    def insert(
        self, features: Mapping[str, Ids] | PackedIds, *, generator: torch.Generator | None = None
    ) -> dict[str, int]:
        """Give the ids that have no row one, in their feature's table, and draw its weights; a failed call gives none.

        The new ids of a table get rows in ascending order, so that these do not follow from how a batch is laid out.

        Args:
            features: as `forward` takes them.
            generator: draws the weights.

        Returns:
            how many new ids of each table.

        Raises:
            TypeError, ValueError: like `forward`'s; `TableFull` for more new ids than a table has rows for.
            RuntimeError: the table is read or written meanwhile; or ids that no hash function can place.
        """
        groups = groups_of(self.layout, features, self.places.device, self._backend)
        ids, feature = without_row(groups, self.table, self.places)
        ids, order = ids.sort()
        draw = functools.partial(self._draw, generator)
        return give_rows(self.table, self.layout, ids, self.places[0, feature[order]], draw)

    def erase(self, table: str, ids: Tensor) -> int:
        """Take the rows of some ids away, those without one are passed over; how many had one.

        Raises:
            TypeError, ValueError: another table, or ids that are not int64.
            RuntimeError: the table is read or written meanwhile.
        """
        _checks.integers("ids", ids)
        rows = self.table.erase(ids, torch.full_like(ids, self._part(table)))
        return len(torch.unique(rows[rows >= 0]))

    def evict(self, table: str, num: int) -> Tensor:
        """Take the rows of so many least used ids away, where the lookup is made with ``evict="least_used"``; the ids.

        Raises:
            TypeError, ValueError: another table or number, or a table that does not count uses.
            RuntimeError: the table is read or written meanwhile.
        """
        return self.table.evict(num, self._part(table))[0]

    def grow(self, table: str, capacity: int) -> None:
        """Make room for more ids; every id keeps its vector, and a failed call changes nothing.

        The weights of this width move into new memory, and lose their ``grad``: what an optimiser keeps of them,
        graphs that were captured, and a DDP around them must be made anew. Beside the old and the new weights and id
        table nothing of size is held.

        Args:
            table: which one.
            capacity: at least as many as now.

        Raises:
            TypeError, ValueError: another table or capacity.
            RuntimeError: the table is read or written meanwhile; or, with "dense" and "sparse", the graph of an earlier
                lookup is alive, whose backward would not fit: delete the last loss and vectors, or the DDP.
        """
        part = self._part(table)
        had, rows = self.table.capacities[part], self.table.capacity
        capacity = _checks.integer("capacity", capacity, at_least=had, at_most=MOST_ROWS - rows + had)
        dim = self.layout.tables[table].dim
        weight, name = self.weights[str(dim)], f"moment_{dim}"
        refuse_live_graph(weight, "grow")
        before = weight.data, weight.grad, self.get_buffer(name), self.places
        try:
            self.table._write(self._grow, part, capacity)
        except BaseException:
            weight.data = before[0]
            weight.grad = before[1]
            setattr(self, name, before[2])
            self.places = before[3]
            raise

    def get_extra_state(self) -> Tensor:
        """What the lookup was made for."""
        return self.layout.described()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: what differs was refused before anything was loaded."""

    def extra_repr(self) -> str:
        """Name the tables, how many features there are, and what becomes of the gradient."""
        tables = ", ".join(
            f"{name}: {capacity} x {self.layout.tables[name].dim}" for name, capacity in self.capacities.items()
        )
        return f"tables={{{tables}}}, num_features={len(self.layout.features)}, gradient={self.gradient!r}"

    def _draw(self, generator: torch.Generator | None, changes: Changes, begun: Tensor) -> None:
        """Draw the weights of rows of the id table that are given anew, ascending."""
        own = self._own_ranges()
        for one in draw_rows(begun, self.table.begins, self.layout, generator, self._dtype):
            at = one.begun - self.table.begins[one.parts.start] + own[one.parts.start].begin
            weight, moment = self.weights[str(one.dim)].detach(), self.get_buffer(f"moment_{one.dim}")
            changes.set(weight, at, one.vectors)
            if len(moment):
                changes.set(moment, at, torch.zeros_like(moment[at]))

    def _grow(self, changes: Changes, part: int, capacity: int) -> None:
        more, one = capacity - self.table.capacities[part], self._own_ranges()[part]
        weight, moment = self.weights[str(one.dim)], self.get_buffer(f"moment_{one.dim}")
        wide = _widened(weight.data, one.end, more)
        moment = _widened(moment, one.end, more) if len(moment) else moment
        self.table._grow(changes, capacity, part)
        weight.grad = None
        weight.data = wide
        setattr(self, f"moment_{one.dim}", moment)
        self.places = self._places()

    def _trained_vectors(self, groups: Sequence[Group], rows: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of all groups; those of one width are one update."""
        found: dict[int, Tensor] = {}
        for dim in self.layout.dims:
            of = [at for at, group in enumerate(groups) if self.layout.dim_of[group.names[0]] == dim]
            if of:
                weight, moment = self.weights[str(dim)], self.get_buffer(f"moment_{dim}")
                every = torch.cat([rows[at].flatten() for at in of])
                vectors = gather_and_train(weight, moment, self.learning_rate, self.anchor, every)
                pieces = torch.split(vectors, [rows[at].numel() for at in of])
                found.update(zip(of, pieces, strict=True))
        shaped = []
        for at, group in enumerate(groups):
            their, bags = found[at], group.offsets
            if bags is not None:
                shaped.append(pool(their, bags, group.kind))
            else:
                shaped.append(their.view(*rows[at].shape, their.shape[1]))
        return shaped

    def _vectors(self, group: Group, rows: Tensor) -> Tensor:
        dim = self.layout.dim_of[group.names[0]]
        weight = self.weights[str(dim)]
        if not torch.is_grad_enabled():
            weight = weight.detach()  # torch then leaves out what a backward would need
        sparse = self.gradient == "sparse"
        if group.offsets is not None:
            return pool(weight, group.offsets, group.kind, rows, sparse=sparse)
        # A bag for each id: torch reads ahead in bags, on a CPU, and takes half the time.
        every = torch.arange(rows.numel() + 1, device=rows.device)
        return pool(weight, every, "sum", rows.flatten(), sparse=sparse).view(*rows.shape, dim)

    def _part(self, table: str) -> int:
        _checks.choice("table", table, self.layout.tables.keys())
        return self.layout.order.index(table)

    def _own_ranges(self) -> list[Range]:
        """The rows of the weights that are each table's, by the parts of the id table."""
        return [one for one in self.layout.ranges(self.table.capacities) if one.feature is None]

    def _places(self) -> Tensor:
        device = self.get_buffer("places").device
        return torch.tensor(self.layout.places(self.table.capacities), device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedEmbeddingLookup:
        """Move, and cast the weights: sums of squares and the learning rate stay float32."""
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_dtypes(self, kept)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}anchor", None)  # no numbers, and not of every lookup

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take over another lookup for the same features, whatever its capacities, all of it or nothing."""
        self.layout.refuse_others(state_dict.get(f"{prefix}_extra_state"))
        wanted = [prefix + name for name in self.state_dict() if not name.startswith("table.sketch")]
        if holds_all(state_dict, wanted):
            capacities = self._check_state(state_dict, prefix)
            if self.anchor is not None:
                some = state_dict[f"{prefix}weights.{self.layout.dims[0]}"]
                state_dict[f"{prefix}anchor"] = torch.empty(0, dtype=some.dtype, device=some.device)
            if capacities != self.table.capacities:
                for weight in self.weights.values():
                    refuse_live_graph(weight, "load_state_dict")
            for name, weight in self.weights.items():
                given = state_dict[f"{prefix}weights.{name}"]
                if weight.shape != given.shape:
                    weight.grad = None
                    weight.data = in_huge_pages(torch.empty_like(given, device=weight.device, dtype=weight.dtype))
            for name, tensor in list(self.named_buffers(recurse=False)):
                given = state_dict[prefix + name]
                if tensor.shape != given.shape:
                    setattr(self, name, torch.empty_like(given, device=tensor.device, dtype=tensor.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_state(self, state_dict: Mapping[str, Any], prefix: str) -> list[int]:
        """Refuse what cannot be a lookup of these tables and features; their capacities."""
        table = {name: state_dict[f"{prefix}table.{name}"] for name in SAVED}
        check_state(table, f"{prefix}table.", counts_uses=self.table.evicts is not None)
        check_sketch(self.table.sketch, state_dict, f"{prefix}table.sketch.")
        rate = f"state_dict['{prefix}learning_rate']"
        _checks.tensor(rate, state_dict[f"{prefix}learning_rate"], dtype=torch.float32)
        if state_dict[f"{prefix}learning_rate"].ndim:
            raise ValueError(f"{rate} must be one number, got {_checks.describe(state_dict[f'{prefix}learning_rate'])}")
        capacities = capacities_of(table["begins"])
        if len(capacities) != len(self.layout.order):
            raise ValueError(f"state_dict must hold {len(self.layout.order)} tables, got {len(capacities)}")
        for dim, num_rows in self.layout.num_rows(capacities).items():
            _checks.floating(
                f"state_dict['{prefix}weights.{dim}']", state_dict[f"{prefix}weights.{dim}"], num_rows, dim
            )
            num_moments = num_rows if self.gradient == "rowwise_adagrad" else 0
            _checks.floating(f"state_dict['{prefix}moment_{dim}']", state_dict[f"{prefix}moment_{dim}"], num_moments)
        self.layout.refuse_places(state_dict[f"{prefix}places"], capacities, prefix)
        return capacities


def refuse_live_graph(weight: Tensor, what: str) -> None:
    """Refuse to give a weight another shape while a graph is alive whose backward would bring a gradient of this one.

    The node that takes a leaf's gradient is kept by graphs alone: what is written on it is there again where one is.
    """
    if weight.requires_grad and not weight.is_meta:
        edge: Any = torch.autograd.graph.get_gradient_edge
        with torch.inference_mode(False), torch.enable_grad():
            edge(weight).node.metadata["recblocks"] = True
            alive = edge(weight).node.metadata.pop("recblocks", False)
        if alive:
            held = "the graph of an earlier lookup, or a DDP, is alive: delete the last loss and vectors, or the DDP"
            raise RuntimeError(f"{what} must not run while {held}")


def _widened(rows: Tensor, end: int, more: int) -> Tensor:
    """The same rows with so many more, zeros, before the one at ``end``."""
    wide = in_huge_pages(rows.new_empty(rows.shape[0] + more, *rows.shape[1:]))
    wide[:end], wide[end : end + more], wide[end + more :] = rows[:end], 0, rows[end:]
    return wide
