"""What a training does in each step, in one process; `sharded` has the same over ranks."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.transact.model import Batch, Ranker, Share


class OneProcess:
    """Steps of AdamW, and of row-wise Adagrad for the vectors of raw ids.

    Args:
        ranker: what is trained.
        rate: of AdamW, at its peak.
        raw_id_rate: of row-wise Adagrad, at its peak.
        compiled: whether the ranker is compiled.
    """

    def __init__(self, ranker: Ranker, *, rate: float, raw_id_rate: float, compiled: bool) -> None:
        self.ranker, self.rate, self.raw_id_rate = ranker, rate, raw_id_rate
        self.forward: nn.Module = torch.compile(ranker, dynamic=True) if compiled else ranker
        self.optimizer = adam(ranker, rate)

    def own(self, places: Tensor) -> tuple[Tensor, Share | None]:
        """What of a batch is this process's."""
        return places, None

    def begin(self, factor: float, batch: Batch, generator: torch.Generator) -> None:
        """Set the rates to a share of their peaks, and give ids that are new their rows."""
        set_rate(self.optimizer, self.rate * factor)
        if self.ranker.lookup is not None:
            self.ranker.lookup.learning_rate.fill_(self.raw_id_rate * factor)
            self.ranker.lookup.insert(batch.ids, generator=generator)

    def step(self, losses: Tensor, share: Share | None) -> float:  # noqa: ARG002
        """Train on the (B, H) losses of a batch; their mean over B."""
        loss = losses.sum() / len(losses)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def state(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What a checkpoint holds: what every process has, and what is in pieces."""
        return {"ranker": self.ranker.state_dict(), "optimizer": self.optimizer.state_dict()}, None

    def load(self, rest: dict[str, Any], tables: dict[str, Any] | None) -> None:  # noqa: ARG002
        """Take a checkpoint over."""
        self.ranker.load_state_dict(rest["ranker"])
        self.optimizer.load_state_dict(rest["optimizer"])


def own_device(device: str) -> torch.device:
    """Of several ranks on GPUs each has its own."""
    if device == "cuda" and dist.is_initialized():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(device)


def adam(ranker: Ranker, rate: float) -> torch.optim.Optimizer:
    """AdamW of everything but the vectors of raw ids."""
    dense = [weight for name, weight in ranker.named_parameters() if not name.startswith("lookup.")]
    return torch.optim.AdamW(dense, lr=rate, weight_decay=1e-4)


def set_rate(optimizer: Any, rate: float) -> None:
    """Of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
