"""The label-weight-matrix BCE beside the same written out by hand, eager and compiled; forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._comparison import Comparison
from benchmarks._compiled import compiled
from recblocks import label_weighted_bce_with_logits

NUM_ROWS, NUM_HEADS, NUM_BATCHES = 1 << 17, 10, 3


def batch(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits, and labels of which one in ten is 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(NUM_ROWS, NUM_HEADS, generator=generator)
    labels = (torch.rand(NUM_ROWS, NUM_HEADS, generator=generator) < 0.1).float()
    return logits.to(device), labels.to(device)


def written_out(logits: Tensor, labels: Tensor, matrix: Tensor) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (labels @ matrix.T * losses).sum() / len(logits)


def trained(loss: Callable[..., Tensor], matrix: Tensor, given: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The loss, and its gradient by the logits."""
    logits = given[0].to(matrix.dtype).detach().requires_grad_()
    value = loss(logits, given[1].to(matrix.dtype), matrix)
    return [value.detach(), *torch.autograd.grad(value, logits)]


def comparisons(device: torch.device) -> Iterator[Comparison]:
    matrix = torch.rand(NUM_HEADS, NUM_HEADS, generator=torch.Generator().manual_seed(0)).to(device)
    forms = {"recblocks": label_weighted_bce_with_logits, "eager": written_out}
    forms |= compiled("eager", written_out, device)
    yield Comparison(
        op="label-weighted BCE, forward and backward",
        sizes={"rows": NUM_ROWS, "heads": NUM_HEADS},
        dtype="float32",
        batches=[batch(seed, device) for seed in range(NUM_BATCHES)],
        exact=functools.partial(trained, written_out, matrix.double()),
        forms={name: functools.partial(trained, loss, matrix) for name, loss in forms.items()},
        # A sum of 1.3 million numbers; pairwise sums are off by some log2 of that many roundings.
        allowed=1e-5,
        moved=3 * 4 * NUM_ROWS * NUM_HEADS,
    )
