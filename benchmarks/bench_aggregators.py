"""The baseline aggregators beside what torch has for the same weights; inference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks._comparison import Comparison
from benchmarks._compiled import compiled
from benchmarks._sequences import sequences
from recblocks import AveragePooling, LSTMAggregator

NUM_ROWS, SLOTS, WIDTH, HIDDEN, NUM_BATCHES = 256, 50, 96, 256, 3
LAYERS = 2


def written_out(x: Tensor, valid: Tensor) -> Tensor:
    return (x * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)


def packed(lstm: nn.LSTM, x: Tensor, valid: Tensor) -> Tensor:
    """The state after the newest action, of sequences that torch is given oldest first and packed."""
    lengths = valid.sum(1)
    order = (lengths[:, None] - 1 - torch.arange(x.shape[1], device=x.device)).clamp(min=0)
    oldest_first = x.gather(1, order[..., None].expand_as(x))
    _, (states, _) = lstm(pack_padded_sequence(oldest_first, lengths.cpu(), batch_first=True, enforce_sorted=False))
    return states[-1]


@torch.inference_mode()
def inferred(aggregate: Callable[[Tensor, Tensor], Tensor], given: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [aggregate(*given)]


def comparisons(device: torch.device) -> Iterator[Comparison]:
    torch.manual_seed(0)
    lstm = LSTMAggregator(WIDTH, hidden_dim=HIDDEN, num_layers=LAYERS).to(device).eval()
    theirs = nn.LSTM(WIDTH, HIDDEN, num_layers=LAYERS, batch_first=True).to(device).eval()
    theirs.load_state_dict(lstm.state_dict())
    of_a_step = 2 * 4 * HIDDEN * (WIDTH + HIDDEN) + (LAYERS - 1) * 2 * 4 * HIDDEN * 2 * HIDDEN
    batches = [sequences(NUM_ROWS, SLOTS, WIDTH, seed, device) for seed in range(NUM_BATCHES)]
    steps = sum(int(valid.sum()) for _, valid in batches) / NUM_BATCHES
    kinds: dict[str, tuple[dict[str, Callable[..., Tensor]], Callable[..., Tensor], float, float]] = {
        "average pooling": (
            {"recblocks": AveragePooling(WIDTH), "eager": written_out} | compiled("eager", written_out, device),
            written_out,
            0.0,
            4.0 * NUM_ROWS * SLOTS * WIDTH,
        ),
        "LSTM": (
            {"recblocks": lstm, "torch, packed": functools.partial(packed, theirs)},
            functools.partial(packed, copy.deepcopy(theirs).double()),
            steps * of_a_step,
            0.0,
        ),
    }
    for name, (forms, exact, flops, moved) in kinds.items():
        yield Comparison(
            op=f"aggregators, {name}, inference",
            sizes={"rows": NUM_ROWS, "slots": SLOTS, "width": WIDTH},
            dtype="float32",
            batches=batches,
            exact=functools.partial(_in_float64, exact),
            forms={form: functools.partial(inferred, aggregate) for form, aggregate in forms.items()},
            allowed=1e-5,  # fifty steps, each a sum of some hundred products
            flops=flops,
            moved=moved,
        )


def _in_float64(exact: Callable[[Tensor, Tensor], Tensor], given: tuple[Tensor, Tensor]) -> list[Tensor]:
    return inferred(exact, (given[0].double(), given[1]))
