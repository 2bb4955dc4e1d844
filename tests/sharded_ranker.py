"""The ranker's training on ranks of a process group; test_sharded_ranker.py runs it in processes of its own."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import pathlib
import warnings
from typing import Any

import torch
from torch import distributed as dist

from examples.transact import world
from examples.transact.data import RankingData
from examples.transact.model import ModelOptions
from examples.transact.train import Trained, TrainOptions, predict, train

MODEL = ModelOptions(length=8, num_slots=3, type_dim=4, mlp=(8,), raw_ids=4, raw_id_capacity=5000)
TRAINING = TrainOptions(epochs=1, batch_size=301, checkpoint_every=5)
LOST_AT = 13


def load(dtype: torch.dtype = torch.float64) -> RankingData:
    """The data; in float64 every layer but the tables is, too."""
    data = world.load(world.WorldOptions(world_users=60))
    torch.set_default_dtype(dtype)
    candidates = dataclasses.replace(
        data.candidates, labels=data.candidates.labels.to(dtype), numeric=data.candidates.numeric.to(dtype)
    )
    return dataclasses.replace(data, vectors=data.vectors.to(dtype), candidates=candidates)


def trained(dtype: torch.dtype) -> dict[str, Any]:
    """What one process makes of it."""
    try:
        data = load(dtype)
        return outcome(train(data, "transact", MODEL, TRAINING), data)
    finally:
        torch.set_default_dtype(torch.float32)


def outcome(trained: Trained, data: RankingData) -> dict[str, Any]:
    """What a training leaves: losses, the dense layers, the rows and vectors of ids, and scores."""
    lookup: Any = trained.ranker.lookup
    dense = {name: one for name, one in trained.ranker.state_dict().items() if not name.startswith("lookup.")}
    vectors = lookup.weights[str(MODEL.raw_ids)] if hasattr(lookup, "weights") else lookup.get_buffer("weight_4")
    slots = lookup.table if hasattr(lookup, "table") else lookup
    return {
        "loss": trained.loss,
        "dense": dense,
        "vectors": vectors.detach(),
        "rows": slots.rows,
        "keys": slots.keys,
        "scores": predict(trained, data.rows_of("report")[:300]),
        "served apart": trained.served_apart,
    }


def run(rank: int, ranks: int, folder: str, dtype: torch.dtype, lost: int | None) -> None:
    """Train on ranks, of which one may be lost after `LOST_AT` steps; the first writes what came out."""
    warnings.simplefilter("ignore")  # torchrec's own deprecations
    torch.set_num_threads(1)
    store = f"file://{folder}/store {ranks} {dtype} {lost}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=dt.timedelta(seconds=60))
    steps: list[int] = []

    def on_step(step: int, *_: float) -> None:
        steps.append(step)
        if step == LOST_AT and rank == lost:
            os._exit(9)

    data = load(dtype)
    options = dataclasses.replace(TRAINING, sharded=True, checkpoint=pathlib.Path(folder) / "checkpoints")
    made = train(data, "transact", MODEL, options, on_step=on_step)
    if rank == 0:
        torch.save(outcome(made, data) | {"steps": steps}, f"{folder}/{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()
