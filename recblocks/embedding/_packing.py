"""A batch of features laid side by side, so that all are looked up in one go."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from recblocks import _checks
from recblocks.embedding._layout import Alike, Kind, Layout
from recblocks.kernels.dispatch import watched
from recblocks.kernels.fused_lookup import cpp

Ids: TypeAlias = Tensor | tuple[Tensor, Tensor]
_DTYPE, _DEVICE, _SHAPE, _NDIM = map(operator.attrgetter, ("dtype", "device", "shape", "ndim"))
_IS_CPU = operator.attrgetter("is_cpu")


class Group(NamedTuple):
    """Features of one width that are pooled alike, their ids side by side."""

    kind: Kind
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


def groups_of(
    layout: Layout, features: Mapping[str, Ids] | PackedIds, device: torch.device, backend: str | None
) -> Sequence[Group]:
    """Those of a batch, packed or not; ``backend`` is like `pack`'s."""
    if not isinstance(features, PackedIds):
        return pack(layout, features, device, backend).groups
    if features.made_for != layout.made_for:
        layout.refuse("features", features.made_for)
    names = [name for group in features.groups for name in group.names]
    if len(names) != len(layout.features) or set(names) != set(layout.features):
        raise ValueError(f"features must be packed of {list(layout.features)}, each once, got {names}")
    every = ((group.ids, group.feature, group.offsets, group.sizes) for group in features.groups)
    for one in (tensor for tensors in every for tensor in tensors if tensor is not None):
        _checks.integers("features", one)
        if one.device != device:
            raise ValueError(f"features must be packed on {device} like the lookup, got {one.device}")
    return features.groups


def pack(layout: Layout, features: Mapping[str, Ids], device: torch.device, backend: str | None) -> PackedIds:
    """Lay a batch side by side; ``backend`` is what `dispatch.resolve` says."""
    seen = _plain(layout, features, device)
    groups = None if seen is None else _plain_groups(layout, seen, device, backend)
    if groups is None:
        _check(layout, features, device)
        given = [_parts(features[name]) for name in layout.features]
        alike = layout.alike([offsets is None and ids.ndim == 1 for ids, offsets in given])
        groups = tuple(_group(layout, of, [given[at] for at in of.numbers]) for of in alike)
    return PackedIds(groups, layout.made_for)


def pack_jagged(layout: Layout, ids: Tensor, lengths: Tensor, num_ids: Sequence[int]) -> PackedIds:
    """Take over what lies side by side already.

    Args:
        layout: of features that all are in bags; here they are in the order of ``layout.all_alike[False]``.
        ids: (N,) int64 of all features.
        lengths: (F, B) of the bags, which add up to N.
        num_ids: (F,) how many ids of each feature.
    """
    groups, begin = [], 0
    for of in layout.all_alike[False]:
        end = begin + len(of.names)
        own, ids = torch.split(ids, [sum(num_ids[begin:end]), sum(num_ids[end:])])
        sizes = lengths[begin:end].sum(1)
        if of.kind == "each":
            numbers, shapes = _numbers(layout, of, ids.device).flatten(), tuple((num,) for num in num_ids[begin:end])
            feature = torch.repeat_interleave(numbers, sizes, output_size=own.shape[0])
            groups.append(Group(of.kind, of.names, shapes, own, feature, None, None))
        else:
            offsets = functional.pad(lengths[begin:end].flatten().cumsum(0), (1, 0))
            groups.append(_bags(layout, of, own, offsets, sizes))
        begin = end
    return PackedIds(tuple(groups), layout.made_for)


def _group(layout: Layout, of: Alike, given: list[tuple[Tensor, Tensor | None]]) -> Group:
    if of.kind == "each":
        return _each(layout, of, [ids for ids, _ in given])
    offsets = None if of.kind == "one" else [_offsets(*one) for one in given]
    return _bags(layout, of, *_lay([ids.flatten() for ids, _ in given], offsets))


def _each(layout: Layout, of: Alike, ids: list[Tensor]) -> Group:
    """Features that do not pool, laid side by side."""
    shapes = tuple(tuple(one.shape) for one in ids)
    numbers = _numbers(layout, of, ids[0].device)
    every = [number.expand(math.prod(shape)) for number, shape in zip(numbers, shapes, strict=True)]
    flat = torch.cat([one.flatten() for one in ids])
    return Group("each", of.names, shapes, flat, torch.cat(every), None, None)


def _bags(layout: Layout, of: Alike, ids: Tensor, offsets: Tensor | None, sizes: Tensor | None) -> Group:
    """Features that pool, laid side by side; without offsets each has one id in each bag."""
    ids = ids.view(len(of.names), -1) if offsets is None else ids
    return Group(of.kind, of.names, (), ids, _numbers(layout, of, ids.device), offsets, sizes)


def _numbers(layout: Layout, of: Alike, device: torch.device) -> Tensor:
    """(F, 1) the numbers of these features."""
    every = len(of.numbers) == len(layout.features)
    if device.type == "cpu" and not every:
        return torch.tensor(of.numbers, device=device).unsqueeze(1)
    numbers = torch.arange(len(layout.features), device=device).unsqueeze(1)
    return numbers if every else torch.cat([numbers[at] for at in of.numbers]).unsqueeze(1)


class _Plain(NamedTuple):
    """Hundreds of features, ids or bags, that were seen at once to be right but for the numbers in offsets."""

    ids: list[Tensor]
    offsets: list[Any]
    """None of a feature that is not in bags."""
    flat: list[Tensor]
    """Ids of features that pool, and all offsets."""


def _plain(layout: Layout, features: Mapping[str, Ids], device: torch.device) -> _Plain | None:
    """The features in their order, where they are seen to be right at once; None: each must be looked at."""
    if torch.compiler.is_compiling() or not isinstance(features, Mapping):
        return None
    if features.keys() != layout.features.keys():
        return None
    given: list[Any] = [features[name] for name in layout.features]
    pairs = [one for one in given if type(one) is tuple]
    if not {2}.issuperset(map(len, pairs)):
        return None
    ids = [one[0] if type(one) is tuple else one for one in given]
    offsets = [one[1] if type(one) is tuple else None for one in given]
    begins = [one for _, one in pairs]
    every, flat = ids + begins, [ids[at] for at in layout.pooled_at] + begins
    if set(map(type, every)) != {Tensor} or set(map(_DTYPE, every)) != {torch.int64} or set(map(_NDIM, flat)) != {1}:
        return None
    if not (all(map(_IS_CPU, every)) if device.type == "cpu" else set(map(_DEVICE, every)) == {device}):
        return None
    num_rows = {shape[0] for shape in {ids[at].shape for at in layout.pooled_at if offsets[at] is None}}
    num_rows |= {shape[0] - 1 for shape in set(map(_SHAPE, begins))}
    if len(num_rows) != 1 or min(num_rows) < 0 or any(offsets[at] is not None for at in layout.unpooled_at):
        return None
    return _Plain(ids, offsets, flat)


def _plain_groups(layout: Layout, given: _Plain, device: torch.device, backend: str | None) -> tuple[Group, ...] | None:
    """What is laid side by side at once; None: offsets are wrong, and each must be looked at."""
    ids, offsets, flat = given
    in_cpp = backend == "cpp" and device.type == "cpu" and not watched() and all(map(Tensor.is_contiguous, flat))
    single = [one is None for one in offsets]
    uniform = sum(single) in (len(layout.unpooled), len(layout.features))
    alike = layout.all_alike[all(single)] if uniform else layout.alike(single)
    groups = []
    for of in alike:
        own = [ids[at] for at in of.numbers]
        if of.kind == "each":
            groups.append(_each(layout, of, own))
            continue
        bags: list[Any] | None = None if of.kind == "one" else [offsets[at] for at in of.numbers]
        laid = cpp.lay(own, bags) if in_cpp else _lay(own, bags) if _run(own, bags) else None
        if laid is None:
            return None
        groups.append(_bags(layout, of, *laid))
    return tuple(groups)


def _check(layout: Layout, features: Mapping[str, Ids], device: torch.device) -> None:
    if not isinstance(features, Mapping):
        raise TypeError(f"features must be a mapping of names, or packed, got {_checks.describe(features)}")
    if features.keys() != layout.features.keys():
        missing = [name for name in layout.features if name not in features]
        unknown = [name for name in features if name not in layout.features]
        raise ValueError(f"features must be those of the lookup, got none of {missing} and unknown {unknown}")
    sizes = {}
    for name, given in features.items():
        ids, offsets = _parts(given)
        pools = layout.features[name].pooling is not None
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
    wrong = [name for name in sizes if sizes[name] != sizes[layout.pooled[0]]]
    if wrong:
        first, other = layout.pooled[0], wrong[0]
        rows = f"{sizes[other]} for {other!r} and {sizes[first]} for {first!r}"
        raise ValueError(f"features that pool must have the same number of rows, got {rows}")


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
