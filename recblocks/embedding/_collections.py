"""The tables inside torchrec's collections, sharded over ranks or not: whose they are, written to and read from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import api

from recblocks import _checks
from recblocks.embedding._buckets import Changes
from recblocks.embedding._layout import EmbeddingTable, IdFeature

INSTALL = (
    "pip install torch==2.13.0 fbgemm-gpu-cpu==1.8.0 tensordict torchmetrics pyre-extensions tqdm && "
    "pip install --no-deps torchrec==1.8.0"
)
OF_LOOKUP = "rows_of_a_shardable_lookup"  # marks the configuration of tables whose rows an id table gives
_KINDS = "EmbeddingBagCollections and EmbeddingCollections"
_POOLINGS: dict[str, Any] = {"SUM": "sum", "MEAN": "mean"}


class Piece(NamedTuple):
    """What of a table is on this rank."""

    tensor: Tensor
    begin_row: int
    begin_column: int


def need_torchrec() -> ModuleType:
    """Import torchrec, or say what to install."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of fbgemm and torchrec while they are imported
        return _checks.optional("torchrec", INSTALL)


def described(collections: Sequence[nn.Module]) -> tuple[dict[str, EmbeddingTable], dict[str, IdFeature]]:
    """The tables and features of some collections, as a lookup names them."""
    tables: dict[str, EmbeddingTable] = {}
    features: dict[str, IdFeature] = {}
    for collection in collections:
        configs = getattr(collection, "embedding_bag_configs", getattr(collection, "embedding_configs", None))
        if configs is None:
            raise TypeError(f"collections must not be sharded, got a {type(collection).__name__}")
        for asked in ("is_weighted", "need_indices"):
            if getattr(collection, asked, bool)():
                raise ValueError(f"collections must be without {asked}, which a lookup has not, got {asked}=True")
        for config in configs():
            tables[config.name] = EmbeddingTable(config.num_embeddings, config.embedding_dim)
            pooling = _POOLINGS[config.pooling.name] if hasattr(config, "pooling") else None
            for feature in config.feature_names:
                if feature in features:
                    raise ValueError(f"collections must look each feature up in one table, got {feature!r} in two")
                features[feature] = IdFeature(config.name, pooling)
    return tables, features


def listed(collections: Iterable[nn.Module]) -> list[nn.Module]:
    """The collections, torchrec's own, whose row numbers no `ShardableLookup` has given."""
    from torchrec import EmbeddingBagCollection, EmbeddingCollection
    from torchrec.distributed.embedding import ShardedEmbeddingCollection
    from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

    kinds = EmbeddingBagCollection, EmbeddingCollection, ShardedEmbeddingBagCollection, ShardedEmbeddingCollection
    if isinstance(collections, nn.Module) or not isinstance(collections, Iterable):
        raise TypeError(f"collections must be several, as in a list, got a {type(collections).__name__}")
    found = list(collections)
    if not found:
        raise ValueError("collections must be at least one, got none")
    for one in found:
        if not isinstance(one, kinds):
            raise TypeError(f"collections must be {_KINDS}, got a {type(one).__name__}")
        configs = getattr(one, "_embedding_bag_configs", None) or getattr(one, "_embedding_configs", [])
        if any(hasattr(config, OF_LOOKUP) for config in configs):
            raise ValueError("collections must not be a ShardableLookup's: its load_fused and to_fused know its rows")
    return found


def weights_of(collections: Iterable[nn.Module]) -> dict[str, Any]:
    """The weight of each table: a tensor, or a ShardedTensor of which this rank has some pieces."""
    found: dict[str, Any] = {}
    for collection in collections:
        for key, weight in collection.state_dict().items():
            name = key.split(".")[-2]
            if name in found:
                raise ValueError(f"collections must have tables of different names, got {name!r} twice")
            if not is_sharded(weight) and type(weight) not in (Tensor, nn.Parameter):
                raise TypeError(f"collections must hold Tensors or ShardedTensors, got a {type(weight).__name__}")
            if not is_sharded(weight) and weight.is_meta:
                raise ValueError(f"collections must not be on meta when rows are read or written, got {name!r} there")
            found[name] = weight
    return found


def is_sharded(weight: Any) -> bool:
    """Whether a table is in pieces."""
    return isinstance(weight, api.ShardedTensor)


def pieces_of(weight: Any) -> Iterator[Piece]:
    """What of a table is on this rank: all of it, or some pieces, which may be none."""
    if not is_sharded(weight):
        yield Piece(weight.detach(), 0, 0)
        return
    for shard in weight.local_shards():
        row, column = shard.metadata.shard_offsets
        yield Piece(shard.tensor.detach(), row, column)


def write_rows(weight: Any, rows: Tensor, vectors: Tensor, changes: Changes | None = None) -> None:
    """Write (K, dim) vectors into (K,) different rows of a table, of which each rank keeps what is its own."""
    changes = Changes() if changes is None else changes
    for piece in pieces_of(weight):
        at = rows - piece.begin_row
        mine = (at >= 0) & (at < piece.tensor.shape[0])
        columns = slice(piece.begin_column, piece.begin_column + piece.tensor.shape[1])
        changes.set(piece.tensor, at[mine], vectors[mine, columns])


def whole(weight: Any, *, to_rank: int = 0) -> Tensor | None:
    """All rows of a table on one rank, None on the others; every rank must call it."""
    if not is_sharded(weight):
        alone: Tensor = weight.detach()
        return alone
    rank: int = dist.get_rank(weight._process_group)
    here = torch.empty(weight.size(), dtype=weight.dtype) if rank == to_rank else None
    weight.gather(to_rank, here)
    return here
