"""Train a ranker whose tables of raw ids torchrec shards over ranks; start it with torchrun."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from examples.transact.model import Batch, Ranker, Share
from examples.transact.steps import adam, set_rate
from recblocks import FusedEmbeddingLookup, ServingLookup

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations of fbgemm and torchrec while they are imported
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.model_parallel import get_default_sharders
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

EPS = 1e-8  # what a fused lookup's own row-wise Adagrad has


def start(device: str) -> None:
    """Join the ranks that torchrun started.

    Raises:
        ValueError: torchrun started none.
    """
    if "RANK" not in os.environ:
        command = "torchrun --nproc-per-node 2 -m examples.transact --sharded --raw-ids 16"
        raise ValueError(f"sharded must be started with torchrun, as in: {command}")
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


class Sharded:
    """The steps of `steps.OneProcess` over ranks, each with its share of a batch, and of the tables.

    torchrec plans where the tables go: each whole on one rank or cut by rows. They are not cut by columns, where
    row-wise Adagrad would not be that of whole rows.

    Args:
        ranker: what is trained, with a `ShardableLookup`.
        rate: of AdamW, at its peak.
        raw_id_rate: of row-wise Adagrad, at its peak.
        device: of this rank.
    """

    def __init__(self, ranker: Ranker, *, rate: float, raw_id_rate: float, device: torch.device) -> None:
        self.ranker, self.rate, self.raw_id_rate = ranker, rate, raw_id_rate
        tables = ranker.lookup.layout.tables
        apply_optimizer_in_backward(RowWiseAdagrad, ranker.lookup.table_weights(), {"lr": raw_id_rate, "eps": EPS})
        ranks = dist.get_world_size()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        planner = EmbeddingShardingPlanner(
            topology=Topology(world_size=ranks, local_world_size=local, compute_device=device.type),
            constraints={name: ParameterConstraints(sharding_types=["table_wise", "row_wise"]) for name in tables},
        )
        plan = planner.collective_plan(ranker, get_default_sharders(), dist.group.WORLD)
        self.forward = DistributedModelParallel(ranker, device=device, plan=plan)
        self.optimizer = adam(ranker, rate)

    def own(self, places: Tensor) -> tuple[Tensor, Share]:
        """What of a batch is this rank's: as many rows as the others have, or one more."""
        shares, rank = places.tensor_split(dist.get_world_size()), dist.get_rank()
        return shares[rank], Share(sum(len(one) for one in shares[:rank]), len(places))

    def begin(self, factor: float, batch: Batch, generator: torch.Generator) -> None:
        """Set the rates to a share of their peaks, and give ids that are new to any rank their rows."""
        set_rate(self.optimizer, self.rate * factor)
        set_rate(self.forward.fused_optimizer, self.raw_id_rate * factor)
        self.forward.fused_optimizer.step()  # tells the tables their rate; what updates them is backward
        self.ranker.lookup.insert(batch.ids, generator=generator)

    def step(self, losses: Tensor, share: Share) -> float:
        """Train on the losses of all ranks; the mean over all rows."""
        loss = losses.sum() * (dist.get_world_size() / share.total)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        return mean.item() / dist.get_world_size()

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint holds: what every rank has, and what is in pieces."""
        every = self.forward.state_dict()
        pieces = {name: one for name, one in every.items() if hasattr(one, "local_shards")}
        whole = {name: one for name, one in every.items() if name not in pieces}
        rest = {"ranker": whole, "optimizer": self.optimizer.state_dict()}
        return rest, {"weights": pieces, "adagrad": self.forward.fused_optimizer.state_dict()}

    def load(self, rest: dict[str, Any], tables: dict[str, Any]) -> None:
        """Take a checkpoint over, whatever the number of ranks that wrote it."""
        self.forward.load_state_dict({**rest["ranker"], **tables["weights"]})
        self.forward.fused_optimizer.load_state_dict(tables["adagrad"])
        self.optimizer.load_state_dict(rest["optimizer"])

    def served(self, build: Callable[[ServingLookup], Ranker], batch: Batch) -> tuple[Ranker, float]:
        """On rank 0 a ranker that looks up in a copy of all tables, and by how much its logits differ from theirs."""
        fused: FusedEmbeddingLookup | None = self.ranker.lookup.to_fused()
        with torch.no_grad():
            said = self.ranker(batch)
        if fused is None:
            return self.ranker, 0.0
        ranker = build(ServingLookup(fused, dtype=torch.float32)).to(batch.candidate.device)
        whole = {name: one for name, one in self.ranker.state_dict().items() if not name.startswith("lookup.")}
        own = {name: one for name, one in ranker.state_dict().items() if name.startswith("lookup.")}
        ranker.load_state_dict({**whole, **own})
        with torch.no_grad():
            return ranker.eval(), float((ranker(batch) - said).abs().max())
