"""The chunked sampled softmax against the reference, and P positives of one query against P rows; forward and backward.

Other losses of this kind hold rows x columns or run on CUDA alone; where one is missing the table says so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks._comparison import Comparison
from benchmarks._compiled import compiled
from recblocks import own_positive_mask, sampled_softmax_loss

NUM_ROWS, NUM_IN_BATCH, NUM_RANDOM, DIM, NUM_PAIRS, NUM_BATCHES = 4096, 5000, 8192, 256, 8, 2
NUM_COLUMNS = NUM_IN_BATCH + NUM_RANDOM
# A float32 dot product of unit vectors over τ = 0.1 is off by some 2**-23 * 10, a probability by that share.
ALLOWED = 200 * torch.finfo(torch.float32).eps

Batch: TypeAlias = dict[str, Tensor]


def unit_vectors(number: int, generator: torch.Generator) -> Tensor:
    return functional.normalize(torch.randn(number, DIM, generator=generator), dim=1)


def items_and_log_q(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids by a power law, so that a pool holds duplicates."""
    items = (torch.rand(number, generator=generator) ** 3 * 10**5).long() * 104729 - 10**15
    return items, torch.rand(number, generator=generator).log() - 9


def batch(num_queries: int, num_pairs: int, seed: int, device: torch.device, num_columns: int = NUM_COLUMNS) -> Batch:
    """About 6 rows a user, unit embeddings."""
    generator = torch.Generator().manual_seed(seed)
    pair_queries = torch.arange(num_pairs) % num_queries
    row_users = torch.randint(num_queries // 6 + 1, (num_queries,), generator=generator) * 7919 - 10**12
    items, log_q = items_and_log_q(num_pairs + num_columns, generator)
    drawn = {
        "queries": unit_vectors(num_queries, generator),
        "positives": unit_vectors(num_pairs, generator),
        "negatives": unit_vectors(num_columns, generator),
        "log_q_positives": log_q[:num_pairs],
        "log_q_negatives": log_q[num_pairs:],
        "row_users": row_users,
        "column_items": torch.cat([items[: num_columns // 3], items[num_pairs:]])[:num_columns],
        "positive_users": row_users[pair_queries],
        "positive_items": items[:num_pairs],
        "pair_queries": pair_queries,
        "weights": torch.rand(num_pairs, generator=generator),
    }
    return {name: one.to(device) for name, one in drawn.items()}


def loss_of(
    data: Batch,
    leaves: list[Tensor],
    temperature: Tensor,
    backend: str,
    row_a_positive: bool = False,
    reduction: str = "mean",
) -> Tensor:
    queries, row_users = leaves[0], data["row_users"]
    pair_queries: Tensor | None = data["pair_queries"]
    if row_a_positive:
        queries, row_users, pair_queries = queries[data["pair_queries"]], row_users[data["pair_queries"]], None
    elif len(queries) == len(data["pair_queries"]):
        pair_queries = None
    return sampled_softmax_loss(
        queries,
        leaves[1],
        leaves[2],
        log_q_positives=data["log_q_positives"],
        log_q_negatives=data["log_q_negatives"],
        own=(row_users, data["column_items"], data["positive_users"], data["positive_items"]),
        temperature=temperature,
        weights=data["weights"],
        pair_queries=pair_queries,
        reduction=reduction,
        backend=backend,
    )


def step(
    of: Callable[..., Tensor],
    dtype: torch.dtype,
    data: Batch,
    numbers: torch.dtype | None = None,
    names: tuple[str, ...] = ("queries", "positives", "negatives"),
) -> list[Tensor]:
    """Loss and gradients, with embeddings of ``dtype`` and a temperature of ``numbers``, else of the same."""
    leaves = [data[name].to(dtype).detach().requires_grad_() for name in names]
    temperature = torch.tensor(0.1, dtype=numbers or dtype, device=leaves[0].device, requires_grad=True)
    loss = of(data, leaves, temperature)
    return [loss.detach(), *torch.autograd.grad(loss, (*leaves, temperature))]


def form(dtype: torch.dtype = torch.float32, **options: object) -> functools.partial[list[Tensor]]:
    return functools.partial(step, functools.partial(loss_of, **options), dtype)


def written_out(data: Batch, leaves: list[Tensor], temperature: Tensor) -> Tensor:
    """The loss as a user would write it: one product in the embeddings' dtype, and all logits in float32."""
    queries, positives, negatives = leaves
    users, columns, positive_users, items = (
        data[name] for name in ("row_users", "column_items", "positive_users", "positive_items")
    )
    positive_logits = (queries.float() * positives.float()).sum(1) / temperature - data["log_q_positives"]
    logits = (queries @ negatives.t()).float() / temperature - data["log_q_negatives"]
    logits = logits.masked_fill(own_positive_mask(users, columns, positive_users, items), -torch.inf)
    losses = functional.softplus(logits.logsumexp(1) - positive_logits)
    return (data["weights"] * losses).sum() / data["weights"].sum()


def in_bfloat16(device: torch.device, num_rows: int = 32768, num_columns: int = NUM_COLUMNS) -> Comparison:
    """What a GPU is for: embeddings of bfloat16, whose products a matrix unit makes."""
    batches = [batch(num_rows, num_rows, seed, device, num_columns) for seed in range(NUM_BATCHES)]
    embeddings = "queries", "positives", "negatives"
    for data in batches:
        data |= {name: data[name].bfloat16() for name in embeddings}

    def of(loss: Callable[..., Tensor]) -> functools.partial[list[Tensor]]:
        return functools.partial(step, loss, torch.bfloat16, numbers=torch.float32)

    modes = {name: of(one) for name, one in compiled("eager", written_out, device).items()}
    return Comparison(
        op="sampled softmax, forward and backward",
        sizes={"rows": num_rows, "columns": num_columns, "dim": DIM},
        dtype="bfloat16",
        batches=batches,
        exact=form(torch.float64, backend="chunked"),
        forms={
            "triton": of(functools.partial(loss_of, backend="triton")),
            "chunked": of(functools.partial(loss_of, backend="chunked")),
            "eager": of(written_out),
        }
        | modes,
        allowed=2**-7,  # of the largest number: probabilities and sums are rounded to bfloat16, in eager twice
        flops=4 * 2 * num_rows * num_columns * DIM,  # logits twice, and the gradients of both sides
        bars={"eager": 4.0},
    )


def column_as_positive(data: Batch, leaves: list[Tensor], temperature: Tensor) -> Tensor:
    """What the peers compute: cross entropy over all columns, the positive being one of them."""
    queries, negatives = leaves
    rows = torch.arange(len(queries), device=queries.device)
    columns = torch.arange(len(negatives), device=queries.device)
    own = rows, columns, rows, data["targets"]
    positives = negatives.index_select(0, data["targets"])
    return sampled_softmax_loss(queries, positives, negatives, own=own, temperature=temperature)


def cross_entropy(data: Batch, leaves: list[Tensor], temperature: Tensor) -> Tensor:
    queries, negatives = leaves
    return functional.cross_entropy((queries @ negatives.t()).to(temperature.dtype) / temperature, data["targets"])


def liger(data: Batch, leaves: list[Tensor], temperature: Tensor) -> Tensor:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    queries, negatives = leaves
    of_rows: Tensor = loss(negatives, (queries / temperature).to(queries.dtype), data["targets"])
    return of_rows


def cut_cross_entropy(data: Batch, leaves: list[Tensor], temperature: Tensor) -> Tensor:
    """Without its filter, which drops gradients."""
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    queries, negatives = leaves
    of_rows: Tensor = loss((queries / temperature).to(queries.dtype), negatives, data["targets"], filter_eps=None)
    return of_rows


PEERS = {"Liger": ("liger_kernel", liger), "cut-cross-entropy": ("cut_cross_entropy", cut_cross_entropy)}


def plain(device: torch.device, num_rows: int = 32768, num_columns: int = NUM_COLUMNS) -> Comparison:
    """Without mask and log q, which other fused losses have not."""
    batches = [batch(num_rows, num_rows, seed, device, num_columns) for seed in range(NUM_BATCHES)]
    for data in batches:
        data |= {name: data[name].bfloat16() for name in ("queries", "negatives")}
        data["targets"] = torch.randint(num_columns, (num_rows,), device=device)

    def of(loss: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16) -> functools.partial[list[Tensor]]:
        numbers = torch.promote_types(dtype, torch.float32)
        return functools.partial(step, loss, dtype, numbers=numbers, names=("queries", "negatives"))

    modes = {name: of(one) for name, one in compiled("eager", cross_entropy, device).items()}
    here = {name: loss for name, (module, loss) in PEERS.items() if importlib.util.find_spec(module) is not None}
    return Comparison(
        op="cross entropy over a pool, forward and backward",
        sizes={"rows": num_rows, "columns": num_columns, "dim": DIM},
        dtype="bfloat16",
        batches=batches,
        exact=of(cross_entropy, torch.float64),
        forms={"recblocks": of(column_as_positive), "eager": of(cross_entropy)}
        | modes
        | {name: of(loss) for name, loss in here.items()},
        allowed=2**-6,  # of the largest number: peers round logits, probabilities and sums to bfloat16
        flops=4 * 2 * num_rows * num_columns * DIM,  # logits twice, and the gradients of both sides
        absent={name: "not installed" for name in PEERS if name not in here},
    )


def comparisons(device: torch.device) -> Iterator[Comparison]:
    plain = functools.partial(loss_of, backend="reference")
    modes = {
        name: functools.partial(step, one, torch.float32) for name, one in compiled("reference", plain, device).items()
    }
    flops = 3 * 2 * NUM_ROWS * NUM_COLUMNS * DIM  # logits, and the gradients of both sides
    yield Comparison(
        op="sampled softmax, forward and backward",
        sizes={"rows": NUM_ROWS, "columns": NUM_COLUMNS, "dim": DIM},
        dtype="float32",
        batches=[batch(NUM_ROWS, NUM_ROWS, seed, device) for seed in range(NUM_BATCHES)],
        exact=form(torch.float64, backend="reference"),
        forms={
            "chunked": form(backend="chunked"),
            "eager": functools.partial(step, written_out, torch.float32),
            "reference": form(backend="reference"),
        }
        | modes,
        allowed=ALLOWED,
        flops=flops,
        bars={"eager": 1.8, "reference": 1.8}
        | {"reference, compiled, default": 1.3, "reference, compiled, max-autotune": 1.3},
        absent=dict.fromkeys(PEERS, "runs on CUDA alone") if device.type == "cpu" else {},
    )
    yield Comparison(
        op=f"sampled softmax, {NUM_PAIRS} positives a query",
        sizes={"queries": NUM_ROWS // NUM_PAIRS, "positives": NUM_ROWS, "columns": NUM_COLUMNS, "dim": DIM},
        dtype="float32",
        batches=[batch(NUM_ROWS // NUM_PAIRS, NUM_ROWS, seed, device) for seed in range(NUM_BATCHES)],
        exact=form(torch.float64, backend="reference"),
        forms={
            "pair_queries": form(backend="chunked"),
            "a row a positive": form(backend="chunked", row_a_positive=True),
        },
        allowed=ALLOWED,
        flops=flops / NUM_PAIRS,
        bars={"a row a positive": 5.0},
    )
    if device.type == "cuda":
        yield in_bfloat16(device)
        yield plain(device)
