"""The dense all-action loss beside the same pairs as a list, and beside eager, as a wider window holds more pairs."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks._comparison import Comparison
from benchmarks.bench_sampled_softmax import ALLOWED, DIM, Batch, items_and_log_q, step, unit_vectors
from recblocks import dense_all_action_loss, own_positive_mask, sampled_softmax_loss

NUM_ROWS, NUM_POSITIVES, NUM_RANDOM, NUM_USERS, NUM_DAYS = 4096, 5000, 8192, 64, 90
WINDOWS = 1, 4, 16, 64  # days
EMBEDDINGS = "queries", "positives", "negatives"


def batch(seed: int, device: torch.device) -> Batch:
    """Users' queries and positives at random days, unit embeddings."""
    generator = torch.Generator().manual_seed(seed)

    def among(most: int, number: int) -> Tensor:
        return torch.randint(most, (number,), generator=generator)

    items, log_q = items_and_log_q(NUM_POSITIVES + NUM_RANDOM, generator)
    drawn = {
        "queries": unit_vectors(NUM_ROWS, generator),
        "positives": unit_vectors(NUM_POSITIVES, generator),
        "negatives": unit_vectors(NUM_RANDOM, generator),
        "query_users": among(NUM_USERS, NUM_ROWS) * 7919 - 10**12,
        "query_times": among(NUM_DAYS, NUM_ROWS),
        "positive_users": among(NUM_USERS, NUM_POSITIVES) * 7919 - 10**12,
        "positive_times": among(NUM_DAYS, NUM_POSITIVES),
        "positive_items": items[:NUM_POSITIVES],
        "negative_items": items[NUM_POSITIVES:],
        "log_q_positives": log_q[:NUM_POSITIVES],
        "log_q_negatives": log_q[NUM_POSITIVES:],
    }
    return {name: one.to(device) for name, one in drawn.items()}


def pairs(data: Batch, window: int) -> Tensor:
    """(rows, positives) bool."""
    later = data["positive_times"] - data["query_times"][:, None]
    return (data["query_users"][:, None] == data["positive_users"]) & (later > 0) & (later <= window)


def pairless(data: Batch, leaves: list[Tensor], temperature: Tensor, window: int, backend: str) -> Tensor:
    others = {name: one for name, one in data.items() if name not in (*EMBEDDINGS, "listed")}
    return dense_all_action_loss(*leaves, **others, window=window, temperature=temperature, backend=backend)  # type: ignore[arg-type]


def listed(data: Batch, leaves: list[Tensor], temperature: Tensor, window: int, backend: str) -> Tensor:  # noqa: ARG001
    """A loader made the list; only what is done with it is timed."""
    row, column = data["listed"]
    queries, positives, negatives = leaves
    log_q = torch.cat([data["log_q_positives"], data["log_q_negatives"]])
    items = torch.cat([data["positive_items"], data["negative_items"]])
    return sampled_softmax_loss(
        queries,
        positives.index_select(0, column),  # whose gradient is the fastest
        torch.cat([positives, negatives]),
        log_q_positives=log_q[column],
        log_q_negatives=log_q,
        own=(data["query_users"], items, data["positive_users"], data["positive_items"]),
        pair_queries=row,
        temperature=temperature,
        backend=backend,
    )


def eager(data: Batch, leaves: list[Tensor], temperature: Tensor, window: int) -> Tensor:
    """As a user would write it: one product, a mask of rows x columns, and one of rows x positives."""
    queries, positives, negatives = leaves
    items = torch.cat([data["positive_items"], data["negative_items"]])
    logits = queries @ torch.cat([positives, negatives]).t() / temperature
    logits = logits - torch.cat([data["log_q_positives"], data["log_q_negatives"]]).to(logits)
    own = own_positive_mask(data["query_users"], items, data["positive_users"], data["positive_items"])
    sums = logits.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    met = pairs(data, window)
    losses = functional.softplus(sums - logits[:, : positives.shape[0]])
    return losses.masked_fill(~met, 0).sum() / met.sum()


def comparisons(device: torch.device) -> Iterator[Comparison]:
    for window in WINDOWS:
        data = batch(0, device)
        data["listed"] = torch.stack(torch.nonzero(pairs(data, window), as_tuple=True))
        forms = {
            "pairless": functools.partial(pairless, window=window, backend="chunked"),
            "a list of pairs": functools.partial(listed, window=window, backend="chunked"),
            "eager": functools.partial(eager, window=window),
        }
        yield Comparison(
            op="dense all-action loss as pairs grow",
            sizes={
                "rows": NUM_ROWS,
                "columns": NUM_POSITIVES + NUM_RANDOM,
                "dim": DIM,
                "pairs": data["listed"].shape[1],
            },
            dtype="float32",
            batches=[data],
            exact=functools.partial(step, functools.partial(listed, window=window, backend="reference"), torch.float64),
            forms={name: functools.partial(step, one, torch.float32) for name, one in forms.items()},
            allowed=ALLOWED,
            flops=3 * 2 * NUM_ROWS * (NUM_POSITIVES + NUM_RANDOM) * DIM,  # logits, and the gradients of both sides
        )
