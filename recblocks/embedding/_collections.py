"""The tables inside torchrec's collections, sharded over ranks or not: whose they are, written to and read from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
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


def configs_of(collection: nn.Module) -> dict[str, Any]:
    """The configuration of each table of an EmbeddingBagCollection or EmbeddingCollection."""
    asked = getattr(collection, "embedding_bag_configs", getattr(collection, "embedding_configs", None))
    if asked is None:
        raise TypeError(f"collections must be of {_KINDS}, not sharded, got {_checks.describe(collection)}")
    return {config.name: config for config in asked()}


def described(collections: Iterable[nn.Module]) -> tuple[dict[str, EmbeddingTable], dict[str, IdFeature]]:
    """The tables and features of some collections, as a lookup names them."""
    tables: dict[str, EmbeddingTable] = {}
    features: dict[str, IdFeature] = {}
    for collection in collections:
        for name, config in configs_of(collection).items():
            if name in tables:
                raise ValueError(f"collections must have tables of different names, got {name!r} twice")
            tables[name] = EmbeddingTable(config.num_embeddings, config.embedding_dim)
            pooling = _POOLINGS[config.pooling.name] if hasattr(config, "pooling") else None
            for feature in config.feature_names:
                if feature in features:
                    raise ValueError(f"collections must look each feature up in one table, got {feature!r} in two")
                features[feature] = IdFeature(name, pooling)
    return tables, features


def weights_of(collections: Iterable[nn.Module]) -> dict[str, Any]:
    """The weight of each table: a tensor, or a ShardedTensor of which this rank has some pieces."""
    found: dict[str, Any] = {}
    for collection in collections:
        if not isinstance(collection, nn.Module):
            raise TypeError(f"collections must be of {_KINDS}, got {_checks.describe(collection)}")
        for key, weight in collection.state_dict().items():
            name = key.split(".")[-2] if key.endswith(".weight") else None
            if name is None or name in found or isinstance(weight, dist.tensor.DTensor):
                raise ValueError(
                    f"collections must have a tensor or a ShardedTensor of each table, got another {key!r}"
                )
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
