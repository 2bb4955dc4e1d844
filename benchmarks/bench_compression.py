"""Output compression beside the same written out by hand, eager and compiled; forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks._comparison import Comparison
from benchmarks._compiled import compiled
from benchmarks._sequences import sequences
from recblocks import OutputCompression

NUM_ROWS, SLOTS, WIDTH, KEPT, NUM_BATCHES = 512, 100, 96, 10, 3


def written_out(x: Tensor, valid: Tensor) -> Tensor:
    hidden = ~valid[..., None]
    first = x[:, :KEPT].masked_fill(hidden[:, :KEPT], 0)
    return torch.cat([first.flatten(1), x.masked_fill(hidden, -torch.inf).amax(1)], dim=1)


def trained(compress: Callable[[Tensor, Tensor], Tensor], given: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The output, and the gradient by what was compressed."""
    x = given[0].detach().requires_grad_()
    z = compress(x, given[1])
    aim = torch.linspace(-1, 1, z.numel(), dtype=z.dtype, device=z.device).view_as(z)
    return [z.detach(), *torch.autograd.grad((z * aim).sum(), x)]


def comparisons(device: torch.device) -> Iterator[Comparison]:
    forms = {"recblocks": OutputCompression(KEPT), "eager": written_out} | compiled("eager", written_out, device)
    yield Comparison(
        op="output compression, forward and backward",
        sizes={"rows": NUM_ROWS, "slots": SLOTS, "width": WIDTH, "kept": KEPT},
        dtype="float32",
        batches=[sequences(NUM_ROWS, SLOTS, WIDTH, seed, device) for seed in range(NUM_BATCHES)],
        exact=lambda given: trained(written_out, (given[0].double(), given[1])),
        forms={name: functools.partial(trained, compress) for name, compress in forms.items()},
        allowed=1e-6,  # numbers are picked, not summed
        moved=2 * 4 * NUM_ROWS * SLOTS * WIDTH,
    )
