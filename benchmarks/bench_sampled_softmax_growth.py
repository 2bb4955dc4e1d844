"""The sampled softmax as rows, and as negatives, double: time grows with them, and extra memory does not.

Each size is checked against the reference in float64, which takes the rows some at a time, for it holds rows x columns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks._comparison import Comparison
from benchmarks.bench_sampled_softmax import ALLOWED, DIM, Batch, batch, loss_of, step

SIZES = [1024 * 2**at for at in range(7)]
FIXED = 4096  # negatives while the rows double, rows while the negatives do
ROWS_AT_A_TIME = 1024
OF_ROWS = "queries", "positives", "log_q_positives", "row_users", "pair_queries", "weights"


def ours(data: Batch) -> list[Tensor]:
    return step(functools.partial(loss_of, backend="chunked", reduction="sum"), torch.float32, data)


def exact(data: Batch) -> list[Tensor]:
    of_sum = functools.partial(loss_of, backend="reference", reduction="sum")
    found: list[list[Tensor]] = []
    for begin in range(0, len(data["queries"]), ROWS_AT_A_TIME):
        rows = slice(begin, begin + ROWS_AT_A_TIME)
        some = data | {name: data[name][rows] for name in OF_ROWS}
        found.append(step(of_sum, torch.float64, some))
    loss, queries, positives, negatives, temperature = zip(*found, strict=True)
    return [sum(loss), torch.cat(queries), torch.cat(positives), sum(negatives), sum(temperature)]


def comparisons(device: torch.device) -> Iterator[Comparison]:
    for what in ("rows", "negatives"):
        for size in SIZES:
            rows, negatives = (size, FIXED) if what == "rows" else (FIXED, size)
            yield Comparison(
                op=f"sampled softmax as {what} double",
                sizes={"rows": rows, "negatives": negatives, "dim": DIM},
                dtype="float32",
                batches=[batch(rows, rows, 0, device, negatives)],
                exact=exact,
                forms={"chunked": ours},
                allowed=ALLOWED,
                flops=3 * 2 * rows * negatives * DIM,
                rounds=5,
            )
