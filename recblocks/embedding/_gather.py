"""What every fused lookup does with the ids of a batch: rows and vectors, in plain torch or by a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from recblocks._hashing import FIRST, GOLDEN, LOW_32, mix, signed
from recblocks.embedding._buckets import Changes, Slots, find
from recblocks.embedding._layout import Layout, Vectors
from recblocks.embedding._packing import Group, Ids, PackedIds, groups_of
from recblocks.embedding.id_table import IdTable, TableFull
from recblocks.kernels.fused_lookup import dispatch
from recblocks.kernels.fused_lookup.asked import Asked


def lookup_rows(ids: Tensor, slots: Slots, places: Tensor) -> Tensor:
    """Rows of a weight for the ids of several features: a table's, or one of those for unseen ids.

    ``r + shift`` where the feature's part of the table says r; else ``first + ⌊h u / 2³²⌋``, where h is 32 bits of a
    hash of the id that stays the same whatever the table does, for u rows from ``first`` on.

    Args:
        ids: (...) int64.
        slots: of the id table.
        places: (4 or more, ...) int64, the part, shift, first unseen row and number of unseen rows u of each id's
            feature; broadcasts against ids.

    Returns:
        (...) int64.

    Example:
        >>> from recblocks import IdTable
        >>> table = IdTable(2)
        >>> _ = table.insert(torch.tensor([50, 60]))
        >>> slots = Slots(table.keys, table.rows, table.hashed, table.begins)
        >>> lookup_rows(torch.tensor([60, 70, 50]), slots, torch.tensor([[0], [1], [0], [1]]))
        tensor([2, 0, 1])
    """
    part, shift, first, num_unseen = places[:4].unbind()
    rows = find(ids, slots, None if slots.begins.shape[0] == 2 else part)
    unseen = ((mix(ids, signed(GOLDEN)) * signed(FIRST) >> 32) & LOW_32) * num_unseen >> 32
    return torch.where(rows < 0, first + unseen, rows + shift)


def pool(weight: Tensor, offsets: Tensor, mode: str, rows: Tensor | None = None, *, sparse: bool = False) -> Tensor:
    """Sum or mean of the rows (N,) of each bag, (B, D), zeros for an empty one; None: all rows in turn."""
    rows = torch.arange(weight.shape[0], device=weight.device) if rows is None else rows
    return functional.embedding_bag(rows, weight, offsets, mode=mode, sparse=sparse, include_last_offset=True)


def rows_of(groups: Sequence[Group], slots: Slots, places: Tensor, backend: str | None) -> Sequence[Tensor]:
    """The rows of all ids, (B, F) or (N,) of each group, looked for in one go.

    Args:
        groups: of a batch.
        slots: of the id table.
        places: (4 or more, F), what `lookup_rows` takes of each feature.
        backend: None is plain torch.
    """

    def look_up(ids: Tensor, feature: Tensor) -> Tensor:
        if backend is None:
            return lookup_rows(ids, slots, places[:, feature])
        found: Tensor = dispatch.lookup_rows(ids, feature, places, *slots, backend)
        return found

    if len(groups) == 1:
        pieces = [look_up(groups[0].ids, groups[0].numbers())]
    else:
        found = torch.split(look_up(*side_by_side(groups)), [group.ids.numel() for group in groups])
        pieces = [piece.view(group.ids.shape) for piece, group in zip(found, groups, strict=True)]
    return [piece.t() if group.kind == "one" else piece for piece, group in zip(pieces, groups, strict=True)]


def kernel_vectors(
    backend: str,
    features: Mapping[str, Ids] | PackedIds,
    slots: Slots,
    places: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    layout: Layout,
) -> Vectors:
    """All vectors by a kernel, without gradient: those of the features that pool at once, each in its columns.

    Weights, and scales if there are any, are by width.
    """
    if backend == "cpp" and not layout.unpooled:
        apart = _vectors_apart(features, (places, *slots), weights, scales, layout)
        if apart is not None:
            return Vectors(apart, {})
    groups = groups_of(layout, features, places.device, backend)
    groups = sorted(groups, key=lambda group: layout.dim_of[group.names[0]])

    def look_up(those: Sequence[Group], num_columns: int, pooled: bool) -> Tensor:
        ids, feature, offsets = _one_behind_the_other(those)
        each = [(layout.dim_of[group.names[0]], len(group.names) if pooled else 1) for group in those]
        counts = [sum(count for of, count in each if of == dim) for dim in layout.dims]
        how = counts, num_columns, pooled, backend
        return dispatch.vectors_of(Asked(ids, feature, places, *slots), weights, scales, offsets, *how)

    in_bags = [group for group in groups if group.kind != "each"]
    unpooled: dict[str, Tensor] = {}
    for group in groups:
        if group.kind == "each":
            unpooled |= group.unpooled(look_up([group], layout.dim_of[group.names[0]], False))
    pooled = look_up(in_bags, layout.num_columns, True) if in_bags else places.new_empty(0, 0, dtype=torch.float32)
    return Vectors(pooled, layout.in_order(unpooled))


def vectors_in_order(layout: Layout, groups: Sequence[Group], found: Sequence[Tensor]) -> Vectors:
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
        if list(group.names) == layout.pooled:
            whole = their.flatten(1)
        else:
            pooled.update(zip(group.names, their.unbind(1), strict=True))
    if whole is None:
        pieces = [pooled[name] for name in layout.pooled]
        whole = torch.cat(pieces, 1) if pieces else found[0].new_empty(0, 0)
    return Vectors(whole, layout.in_order(unpooled))


def _vectors_apart(
    features: Mapping[str, Ids] | PackedIds,
    table: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    layout: Layout,
) -> Tensor | None:
    """The vectors of features that are looked up as they lie; None where they cannot be."""
    if (
        type(features) is not dict or features.keys() != layout.features.keys()
    ):  # others may give anything, or only once
        return None
    given = [features[name] for name in layout.features]
    return dispatch.vectors_apart(given, table, weights, scales, layout.num_columns)


def _one_behind_the_other(groups: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The ids of several groups, the number of each feature, and where the bags begin, None if each is of one id."""
    if len(groups) == 1:
        return groups[0].ids, groups[0].feature, groups[0].offsets
    ids, feature = torch.cat([group.ids.flatten() for group in groups]), torch.cat([group.feature for group in groups])
    if all(group.offsets is None for group in groups):
        return ids, feature, None
    begins, behind = [], 0
    for group in groups:
        num_ids = group.ids.numel()
        own = torch.arange(num_ids, device=ids.device) if group.offsets is None else group.offsets[:-1]
        begins.append(own + behind)
        behind += num_ids
    return ids, feature, torch.cat([*begins, ids.new_full((1,), behind)])


def side_by_side(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """All ids and the feature of each, (N,)."""
    ids = torch.cat([group.ids.flatten() for group in groups])
    return ids, torch.cat([group.numbers().expand_as(group.ids).flatten() for group in groups])


def without_row(groups: Sequence[Group], table: IdTable, places: Tensor) -> tuple[Tensor, Tensor]:
    """What of a batch an insert is for: ids that have no row, and their features; all where each sighting counts."""
    ids, feature = side_by_side(groups)
    if table.sketch is not None or table.evicts is not None:
        return ids, feature
    unknown = table.find(ids, places[0, feature]) < 0
    return ids[unknown], feature[unknown]


def give_rows(
    table: IdTable, layout: Layout, ids: Tensor, parts: Tensor, draw: Callable[[Changes, Tensor], None]
) -> dict[str, int]:
    """Insert ids, ascending, and draw what is in the rows that are given, as one write; how many new ids of each table.

    ``draw`` is told these rows of the id table, ascending; if it fails, everything is put back.
    """
    part = parts if len(layout.order) > 1 else None

    def insert(changes: Changes) -> list[int]:
        begun = table._insert(changes, ids, part, draw).begun
        nums: list[int] = torch.searchsorted(begun, table.begins).diff().tolist()
        return nums

    try:
        return layout.by_table(table._write(insert))
    except TableFull as full:
        raise full.named(layout.order) from None


def restore_dtypes(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Undo the casts of some buffers, where they have gone."""
    for name, tensor in before.items():
        after = module.get_buffer(name)
        if after.dtype != tensor.dtype:
            setattr(module, name, tensor.to(after.device))
