"""Print how torchrec would spread tables like the ranker's, but large, over 1, 8 and 64 GPUs, and what each would hold.

Here they may be cut by columns too, which the ranker's own training leaves out: row-wise Adagrad is then another one.

``python -m examples.transact.plans``
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import sys
import warnings
from typing import NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations of fbgemm and torchrec while they are imported
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, PoolingType
    from torchrec.distributed.model_parallel import get_default_sharders
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

KINDS = ["table_wise", "row_wise", "column_wise"]
ID_TABLE_BYTES = 14.1
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Options:
    """Print how torchrec would spread the ranker's tables, and what each GPU would hold."""

    users: int = 300_000_000
    """Rows of the table of users; one id a request."""
    items: int = 200_000_000
    """Rows of the table of items; the candidate and the sequence."""
    authors: int = 4_000_000
    tags: int = 1_000_000
    raw_ids: int = 64
    """Width of the rows of users and items."""
    bag_dim: int = 512
    """Width of the rows of authors and tags."""
    length: int = 100
    """Actions of a sequence."""
    batch_size: int = 1024
    """Rows of each GPU's batch."""
    gpus: tuple[int, ...] = (1, 8, 64)
    local: int = 8
    """GPUs of a machine."""
    memory_gib: float = 80.0
    """Of each GPU."""
    host_gib: float = 1500.0
    """Of each machine."""


class Planned(NamedTuple):
    """What becomes of a table."""

    table: str
    rows: int
    kind: str
    kernel: str
    shards: list[tuple[int, float, float]]
    """Of each shard the rank, and GiB on the GPU and on the host."""


class Tables(nn.Module):
    """The ranker's tables, without memory for them."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        meta, dim = torch.device("meta"), options.raw_ids
        alone = {"user": (options.users, ["user"]), "item": (options.items, ["item", "seen"])}
        bags = {"author": options.authors, "tag": options.tags}
        self.each = EmbeddingCollection(
            device=meta,
            tables=[
                EmbeddingConfig(name=name, embedding_dim=dim, num_embeddings=rows, feature_names=features)
                for name, (rows, features) in alone.items()
            ],
        )
        self.bags = EmbeddingBagCollection(
            device=meta,
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    embedding_dim=options.bag_dim,
                    num_embeddings=rows,
                    feature_names=[name],
                    pooling=PoolingType.MEAN,
                )
                for name, rows in bags.items()
            ],
        )


def plan(options: Options, gpus: int) -> list[Planned]:
    """What torchrec's planner decides for so many GPUs, with row-wise Adagrad in the backward.

    Raises:
        torchrec's PlannerError: the tables do not fit.
    """
    tables = Tables(options)
    apply_optimizer_in_backward(RowWiseAdagrad, list(tables.parameters()), {"lr": 0.01})
    local = min(gpus, options.local)
    lengths = {"user": [1.0], "item": [1.0, float(options.length)], "author": [1.0], "tag": [3.0]}
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=gpus,
            local_world_size=local,
            compute_device="cuda",
            hbm_cap=int(options.memory_gib * GIB),
            ddr_cap=int(options.host_gib * GIB / local),
        ),
        batch_size=options.batch_size,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
        constraints={
            name: ParameterConstraints(sharding_types=KINDS, pooling_factors=factors)
            for name, factors in lengths.items()
        },
    )
    planner.plan(tables, get_default_sharders())
    return [
        Planned(
            option.name,
            option.tensor.shape[0],
            option.sharding_type,
            option.compute_kernel,
            [(shard.rank, shard.storage.hbm / GIB, shard.storage.ddr / GIB) for shard in option.shards],
        )
        for option in planner._best_plan
    ]


def main(options: Options) -> None:
    """Print a plan for each number of GPUs."""
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 130)
    narrow, wide = options.users + options.items, options.authors + options.tags
    size = 4 * (narrow * (options.raw_ids + 1) + wide * (options.bag_dim + 1))
    console.print(
        f"{narrow + wide:,} rows in float32, each with its Adagrad sum: {size / GIB:.0f} GiB. The id table, on each "
        f"rank: {(narrow + wide) * ID_TABLE_BYTES / GIB:.1f} GiB, which torchrec does not know of. 15 % are kept free."
    )
    for gpus in options.gpus:
        planned = plan(options, gpus)
        table = Table(
            "table",
            "rows",
            "sharding",
            "kernel",
            "shards",
            "GiB of a shard: GPU, host",
            title="1 GPU" if gpus == 1 else f"{gpus} GPUs",
        )
        held: dict[int, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for one in planned:
            largest = [max(shard[place] for shard in one.shards) for place in (1, 2)]
            sizes = f"{largest[0]:.2f}, {largest[1]:.2f}"
            table.add_row(one.table, f"{one.rows:,}", one.kind, one.kernel, str(len(one.shards)), sizes)
            for rank, gpu, host in one.shards:
                held[rank][0] += gpu
                held[rank][1] += host
        console.print(table)
        id_table = (narrow + wide) * ID_TABLE_BYTES / GIB
        most = [max(one[place] for one in held.values()) for place in (0, 1)]
        console.print(
            f"The fullest of {gpus}: {most[0]:.1f} of {options.memory_gib:.0f} GiB, {most[1]:.1f} GiB of its host; and "
            f"the id table's {id_table:.1f} GiB."
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
