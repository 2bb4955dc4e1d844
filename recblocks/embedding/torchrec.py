"""Between torchrec and the fused lookup: KeyedJaggedTensor in, KeyedTensor out, weights from and to its collections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn

from recblocks import _checks
from recblocks.embedding import _collections
from recblocks.embedding._layout import EmbeddingTable, Vectors
from recblocks.embedding._packing import PackedIds, pack_jagged
from recblocks.embedding.fused_lookup import FusedEmbeddingLookup
from recblocks.embedding.serving_lookup import ServingLookup
from recblocks.embedding.shardable_lookup import ShardableLookup

if TYPE_CHECKING:
    from torchrec import JaggedTensor, KeyedJaggedTensor, KeyedTensor

Lookup: TypeAlias = FusedEmbeddingLookup | ServingLookup | ShardableLookup
_NAMES = "FusedEmbeddingLookup, ServingLookup, ShardableLookup"


class KeyedLookup(nn.Module):
    """Stands where a torchrec collection stood: a KeyedJaggedTensor in, but of raw ids, and what that gave out.

    Args:
        lookup: what looks up; all its features pool, as in an EmbeddingBagCollection, or none, as in an
            EmbeddingCollection.

    Raises:
        ImportError: torchrec is not installed.
        TypeError, ValueError: for something else, and a lookup of which some features pool and some do not.

    Example:
        >>> from recblocks import EmbeddingTable, IdFeature
        >>> lookup = FusedEmbeddingLookup({"item": EmbeddingTable(9, dim=8)}, {"liked": IdFeature("item")})
        >>> keyed = KeyedLookup(lookup)
        >>> from torchrec import KeyedJaggedTensor
        >>> batch = KeyedJaggedTensor(["liked"], values=torch.tensor([7, -2, 7]), lengths=torch.tensor([2, 1]))
        >>> keyed.insert(batch)
        {'item': 2}
        >>> keyed(batch)["liked"].shape
        torch.Size([2, 8])

    Source:
        torchrec's EmbeddingBagCollection and EmbeddingCollection.
    """

    def __init__(self, lookup: Lookup) -> None:
        super().__init__()
        if not isinstance(lookup, Lookup):
            raise TypeError(f"lookup must be one of {_NAMES}, got {_checks.describe(lookup)}")
        layout = lookup.layout
        if layout.pooled and len(layout.pooled) < len(layout.features):
            others = [name for name in layout.features if name not in layout.pooled]
            raise ValueError(f"lookup must pool all features or none, got {layout.pooled} beside {others}")
        _collections.need_torchrec()
        self.lookup = lookup

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor | dict[str, JaggedTensor]:
        """Look up the lookup's features; other keys are passed over, as in torchrec.

        Args:
            features: (keys, B) bags of int64 ids.

        Returns:
            a KeyedTensor, (B, sum of the widths), keys in the order of the lookup's features; or, where nothing pools,
            a JaggedTensor of (N, dim) a feature.

        Raises:
            TypeError, ValueError: for something else, a key that is missing, ids that are not int64, bags that reach
                past their ids, weighted ids, or bags in another number for each key.
        """
        import torchrec

        layout = self.lookup.layout
        features = self._in_order(features)
        vectors: Vectors = self.lookup(self._packed(features))
        if layout.pooled:
            dims = [layout.dim_of[name] for name in layout.pooled]
            return torchrec.KeyedTensor(keys=list(layout.pooled), length_per_key=dims, values=vectors.pooled)
        lengths = dict(zip(features.keys(), self._lengths(features), strict=True))
        return {
            name: torchrec.JaggedTensor(values=vectors.unpooled[name], lengths=lengths[name])
            for name in layout.features
        }

    def insert(self, features: KeyedJaggedTensor, *, generator: torch.Generator | None = None) -> dict[str, int]:
        """Give the ids that have no row one, like the lookup's own ``insert``, in the default process group.

        Raises:
            TypeError, ValueError: like `forward`'s, the lookup's own, and for a lookup that is only read.
        """
        if isinstance(self.lookup, ServingLookup):
            raise TypeError("lookup must be one that is written, got a ServingLookup")
        return self.lookup.insert(self._packed(self._in_order(features)), generator=generator)

    def _in_order(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features of the lookup, in the order that their ids are packed in."""
        import torchrec

        if not isinstance(features, torchrec.KeyedJaggedTensor):
            raise TypeError(f"features must be a KeyedJaggedTensor, got {_checks.describe(features)}")
        missing = [name for name in self.lookup.layout.features if name not in features.keys()]  # noqa: SIM118
        if missing:
            raise ValueError(f"features must have the keys of the lookup, got none of {missing}")
        if features.weights_or_none() is not None:
            raise ValueError("features must be without weights, which a lookup does not take, got some")
        if features.variable_stride_per_key() or features.inverse_indices_or_none() is not None:
            raise ValueError("features must have one bag a row for each key, got bags of their own number or shared")
        _checks.integers("features.values()", features.values(), "N")
        lengths = features.lengths()
        if _checks.readable(lengths) and (bool((lengths < 0).any()) or int(lengths.sum()) != len(features.values())):
            wanted = f"lengths of at least 0 that add up to {len(features.values())}"
            raise ValueError(f"features must have {wanted}, got {int(lengths.min())} to {int(lengths.max())}")
        order = [name for alike in self.lookup.layout.all_alike[False] for name in alike.names]
        if features.keys() == order:
            return features
        if not features.stride():  # torchrec cannot say which key nothing belongs to
            return torchrec.KeyedJaggedTensor(order, features.values(), lengths=lengths)
        place = {name: at for at, name in enumerate(features.keys())}
        return features.permute([place[name] for name in order])

    def _packed(self, features: KeyedJaggedTensor) -> PackedIds:
        num_ids = features.length_per_key() if features.stride() else [0] * len(features.keys())
        return pack_jagged(self.lookup.layout, features.values(), self._lengths(features), num_ids)

    def _lengths(self, features: KeyedJaggedTensor) -> Tensor:
        """(keys, B) of the bags."""
        lengths: Tensor = features.lengths()
        return lengths.long().view(len(features.keys()), features.stride())


def lookup_from_collections(
    collections: Iterable[nn.Module],
    *,
    ids: Mapping[str, Tensor] | None = None,
    gradient: Literal["dense", "sparse", "sgd", "rowwise_adagrad"] = "dense",
    learning_rate: float = 0.01,
) -> FusedEmbeddingLookup:
    """Make a lookup of the tables, features and weights of torchrec's collections.

    Args:
        collections: EmbeddingBagCollections and EmbeddingCollections, not sharded; each feature in one table.
        ids: of each table the (R,) int64 raw ids that its rows are for; None, or a table that is not named: row r is of
            the id r.
        gradient: like `FusedEmbeddingLookup`'s.
        learning_rate: like `FusedEmbeddingLookup`'s.

    Returns:
        a lookup whose vectors are the same; an id that no row is for has zeros, until these are trained.

    Raises:
        ImportError: torchrec is not installed.
        TypeError, ValueError: for something else, tables of one name, a feature in two tables, and ids that are not a
            table's or not one a row.

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> item = EmbeddingBagConfig(name="item", num_embeddings=9, embedding_dim=8, feature_names=["liked"])
        >>> bags = EmbeddingBagCollection([item])
        >>> lookup = lookup_from_collections([bags])
        >>> torch.equal(lookup({"liked": torch.tensor([4])}).pooled[0], bags.embedding_bags["item"].weight[4])
        True
    """
    _collections.need_torchrec()
    given = _collections.listed(collections)
    weights = _collections.weights_of(given)
    tables, features = _collections.described(given)
    rows_of = _raw_ids(tables, ids)
    options = {"device": next(iter(weights.values())).device, "dtype": torch.float32}
    lookup = FusedEmbeddingLookup(tables, features, gradient=gradient, learning_rate=learning_rate, **options)
    for weight in lookup.weights.values():
        weight.detach().zero_()
    part = {name: number for number, name in enumerate(lookup.layout.order)}
    every = [(rows_of[name], torch.full_like(rows_of[name], part[name])) for name in lookup.layout.order]
    lookup.table.insert(torch.cat([one for one, _ in every]), torch.cat([of for _, of in every]))
    for one in lookup._own_ranges():
        lookup.weights[str(one.dim)].detach()[one.begin : one.end] = weights[one.table].detach().float()
    return lookup


def copy_to_collections(
    lookup: FusedEmbeddingLookup, collections: Iterable[nn.Module], *, ids: Mapping[str, Tensor] | None = None
) -> dict[str, int]:
    """Write a lookup's vectors into the tables of the same names of torchrec's collections, sharded or not.

    Args:
        lookup: whose vectors.
        collections: EmbeddingBagCollections and EmbeddingCollections; tables that the lookup has not are an error. Of a
            sharded one each rank writes what it has.
        ids: like `lookup_from_collections`'s.

    Returns:
        how many rows of each table were written; those whose id the lookup has not are left as they are.

    Raises:
        ImportError: torchrec is not installed.
        TypeError, ValueError: for something else, a table of another width or that the lookup has not, and ids that are
            not a table's or not one a row. Nothing is written then.

    Example:
        >>> from recblocks import EmbeddingTable, IdFeature
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> item = EmbeddingBagConfig(name="item", num_embeddings=9, embedding_dim=8, feature_names=["liked"])
        >>> bags = EmbeddingBagCollection([item])
        >>> lookup = FusedEmbeddingLookup({"item": EmbeddingTable(50, dim=8)}, {"liked": IdFeature("item")})
        >>> lookup.insert({"liked": torch.tensor([4, 7])})
        {'item': 2}
        >>> copy_to_collections(lookup, [bags])
        {'item': 2}
    """
    _collections.need_torchrec()
    if not isinstance(lookup, FusedEmbeddingLookup):
        raise TypeError(f"lookup must be a FusedEmbeddingLookup, got {_checks.describe(lookup)}")
    weights = _collections.weights_of(_collections.listed(collections))
    tables = {name: EmbeddingTable(*weight.size()) for name, weight in weights.items()}
    for name, (_, dim) in tables.items():
        own = lookup.layout.tables.get(name)
        if own is None or own.dim != dim:
            have = {table: each.dim for table, each in lookup.layout.tables.items()}
            raise ValueError(f"collections must have tables of the lookup, {have}, got {name!r} of width {dim}")
    rows_of, written = _raw_ids(tables, ids), {}
    for part, one in enumerate(lookup._own_ranges()):
        if one.table in weights:
            wanted = rows_of[one.table].to(lookup.places.device)
            found = lookup.table.find(wanted, torch.full_like(wanted, part))
            at = torch.nonzero(found >= 0).squeeze(1)
            shift = one.begin - lookup.table.begins[part]
            vectors = lookup.weights[str(one.dim)].detach()[found[at] + shift]
            if bool((vectors.to(weights[one.table].dtype).isinf() & vectors.isfinite()).any()):
                raise ValueError(f"lookup must have vectors that {weights[one.table].dtype} can hold for {one.table!r}")
            written[one.table] = at, vectors
    for name, (at, vectors) in written.items():
        _collections.write_rows(weights[name], at, vectors)
    return {name: len(written[name][0]) for name in tables}


def _raw_ids(tables: Mapping[str, tuple[int, int]], ids: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The id that each row of each table is for."""
    if not isinstance(ids, Mapping | None):
        raise TypeError(f"ids must be a mapping of tables, got {_checks.describe(ids)}")
    given = {} if ids is None else dict(ids)
    unknown = [name for name in given if name not in tables]
    if unknown:
        raise ValueError(f"ids must be of the tables {list(tables)}, got {unknown[0]!r}")
    found = {}
    for name, (num_rows, _) in tables.items():
        found[name] = given.get(name, torch.arange(num_rows))
        _checks.integers(f"ids[{name!r}]", found[name], num_rows)
        if len(torch.unique(found[name])) < num_rows:
            raise ValueError(f"ids[{name!r}] must be different ids, got one for several rows")
    return found
