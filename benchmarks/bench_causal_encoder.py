"""The causal encoder on packed sequences beside padded ones, forward and backward: what of padding's work is gone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks._comparison import Comparison
from recblocks import CausalSequenceEncoder

NUM_USERS, SLOTS, MEDIAN, WIDTH, NUM_LAYERS, NUM_HEADS, NUM_BATCHES = 32, 256, 60, 256, 2, 8, 3
AIM = 0.8  # of as many times as the work is more with padding

Batch = tuple[Tensor, Tensor]


def batch(seed: int, device: torch.device) -> Batch:
    """(T, width) actions and (B + 1) offsets; lengths are lognormal, of a spread of 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (MEDIAN * torch.randn(NUM_USERS, generator=generator).exp()).long().clamp(1, SLOTS)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return torch.randn(int(offsets[-1]), WIDTH, generator=generator).to(device), offsets.to(device)


def work(lengths: Tensor) -> float:
    """Products of a forward and a backward, of which attention's are among slots and older ones."""
    a_slot = 2 * WIDTH * WIDTH * (1 + NUM_LAYERS * (4 + 8) + 8)
    pairs = lengths * (lengths + 1) / 2
    return float(3 * (lengths * a_slot + NUM_LAYERS * 4 * WIDTH * pairs).sum())


def packed(model: CausalSequenceEncoder, given: Batch) -> list[Tensor]:
    x, offsets = given
    return _with_gradients(model, x, lambda leaf: model(leaf, offsets=offsets, max_length=SLOTS))


def padded(model: CausalSequenceEncoder, given: Batch) -> list[Tensor]:
    x, offsets = given
    valid = torch.arange(SLOTS, device=x.device) < offsets.diff()[:, None]
    place = torch.nonzero(valid.flatten()).squeeze(1)

    def embed(leaf: Tensor) -> Tensor:
        rows = leaf.new_zeros(*valid.shape, WIDTH).masked_scatter(valid[..., None], leaf)
        return model(rows, valid).flatten(0, 1).index_select(0, place)  # whose gradient is the fastest

    return _with_gradients(model, x, embed)


def _with_gradients(model: CausalSequenceEncoder, x: Tensor, embed: Callable[[Tensor], Tensor]) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    embeddings = embed(leaf)
    aim = torch.linspace(-1, 1, embeddings.numel(), dtype=x.dtype, device=x.device).view_as(embeddings)
    return [embeddings.detach(), *torch.autograd.grad((embeddings * aim).sum(), (leaf, *model.parameters()))]


def exact(model: CausalSequenceEncoder, given: Batch) -> list[Tensor]:
    return padded(model, (given[0].double(), given[1]))


def newest(
    model: CausalSequenceEncoder, x: Tensor, *, newest_only: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    with torch.inference_mode():
        found: Tensor = model(x.to(dtype), newest_only=newest_only)
    return [found if newest_only else found[:, 0]]


def comparisons(device: torch.device) -> Iterator[Comparison]:
    torch.manual_seed(0)
    model = CausalSequenceEncoder(
        WIDTH, WIDTH, hidden_dim=WIDTH, num_layers=NUM_LAYERS, num_heads=NUM_HEADS, max_len=SLOTS
    ).to(device)
    batches = [batch(seed, device) for seed in range(NUM_BATCHES)]
    needed = sum(work(offsets.diff()) for _, offsets in batches) / NUM_BATCHES
    saving = work(torch.full((NUM_USERS,), SLOTS)) / needed
    yield Comparison(
        op=f"causal encoder, forward and backward, {saving:.2f} times the work padded",
        sizes={"users": NUM_USERS, "slots": SLOTS, "median": MEDIAN, "width": WIDTH, "layers": NUM_LAYERS},
        dtype="float32",
        batches=batches,
        exact=functools.partial(exact, copy.deepcopy(model).double()),
        forms={"packed": functools.partial(packed, model), "padded": functools.partial(padded, model)},
        # Sums over T slots round by at most T 2**-24 of what they sum, of which most cancels.
        allowed=1e-4,
        flops=needed,
        bars={"padded": AIM * saving},
    )
    a_slot = 2 * WIDTH * WIDTH * (1 + (NUM_LAYERS - 1) * (4 + 8) + 2)  # of the last block keys and values alone
    attention = (NUM_LAYERS - 1) * 4 * WIDTH * SLOTS * (SLOTS + 1) / 2
    yield Comparison(
        op="causal encoder, the newest action's embedding",
        sizes={"users": NUM_USERS, "slots": SLOTS, "width": WIDTH, "layers": NUM_LAYERS},
        dtype="float32",
        batches=[torch.randn(NUM_USERS, SLOTS, WIDTH, device=device) for _ in range(NUM_BATCHES)],
        exact=functools.partial(newest, copy.deepcopy(model).double(), dtype=torch.float64),
        forms={
            "newest_only": functools.partial(newest, model, newest_only=True),
            "every action's": functools.partial(newest, model),
        },
        allowed=1e-5,  # of numbers that a layer's norm keeps near 1
        flops=NUM_USERS * (SLOTS * a_slot + attention),
    )
