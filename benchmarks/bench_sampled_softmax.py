"""The chunked sampled softmax against the reference, and P positives of one query against P rows; forward and backward.

Extra memory is the peak of RssAnon (pages of this process that are not a file's), sampled every half millisecond while
one step runs, less RssAnon before it: mask, tiles and gradients all count. Each is measured in a process of its own,
whose malloc returns every large block at once.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._timing import interleaved, table
from recblocks import sampled_softmax_loss

NUM_ROWS, NUM_IN_BATCH, NUM_RANDOM, DIM = 4096, 5000, 8192, 256
NUM_COLUMNS = NUM_IN_BATCH + NUM_RANDOM
EPSILON = torch.finfo(torch.float32).eps


def batch(num_queries: int, num_pairs: int, num_columns: int, dim: int, *, seed: int = 0) -> dict[str, Tensor]:
    """About 6 rows a user, items by a power law (so that the pool holds duplicates), unit embeddings."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)

    pair_queries = torch.arange(num_pairs) % num_queries
    row_users = torch.randint(num_queries // 6 + 1, (num_queries,), generator=generator) * 7919 - 10**12
    items = (torch.rand(num_pairs + num_columns, generator=generator) ** 3 * 10**5).long() * 104729 - 10**15
    log_q = torch.rand(num_pairs + num_columns, generator=generator).log() - 9
    return {
        "queries": unit(num_queries),
        "positives": unit(num_pairs),
        "negatives": unit(num_columns),
        "log_q_positives": log_q[:num_pairs],
        "log_q_negatives": log_q[num_pairs:],
        "row_users": row_users,
        "column_items": torch.cat([items[: num_columns // 3], items[num_pairs:]])[:num_columns],
        "positive_users": row_users[pair_queries],
        "positive_items": items[:num_pairs],
        "pair_queries": pair_queries,
        "weights": torch.rand(num_pairs, generator=generator),
    }


def step(
    data: dict[str, Tensor], backend: str, *, repeated: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Loss and gradients; ``repeated`` gives every positive a query row of its own."""
    leaves = [data[name].to(dtype).detach().requires_grad_() for name in ("queries", "positives", "negatives")]
    temperature = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    queries, row_users, pair_queries = leaves[0], data["row_users"], data["pair_queries"]
    if repeated:
        queries, row_users, pair_queries = queries[pair_queries], row_users[pair_queries], None
    elif len(queries) == len(pair_queries):
        pair_queries = None
    loss = sampled_softmax_loss(
        queries,
        leaves[1],
        leaves[2],
        log_q_positives=data["log_q_positives"],
        log_q_negatives=data["log_q_negatives"],
        own=(row_users, data["column_items"], data["positive_users"], data["positive_items"]),
        temperature=temperature,
        weights=data["weights"],
        pair_queries=pair_queries,
        backend=backend,
    )
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in (*leaves, temperature))]


def require_equal(got: list[Tensor], want: list[Tensor], tolerance: float) -> float:
    """The largest difference, relative to the largest entry of its tensor; exits where it exceeds the tolerance."""
    worst = max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in zip(got, want, strict=True)
    )
    if not worst <= tolerance:
        raise SystemExit(f"wrong by {worst:.2g} of the largest entry (allowed {tolerance:.2g}): not timed")
    return worst


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def _peak(backend: str, threads: int, out: multiprocessing.Queue[int]) -> None:
    torch.set_num_threads(threads)
    step(batch(32, 32, 64, DIM), backend)  # thread pools and code are in memory before the measurement
    data = batch(NUM_ROWS, NUM_ROWS, NUM_COLUMNS, DIM)
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(data, backend)
    done.set()
    watcher.join()
    out.put(peak - before)


def peak_extra_mib(backend: str) -> float:
    if not os.path.exists("/proc/self/status"):
        return float("nan")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=_peak, args=(backend, torch.get_num_threads(), out))
    process.start()
    process.join()
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return out.get() / 2**20


def main() -> None:
    # A float32 dot product of unit vectors over τ = 0.1 is off by some EPSILON * 10, a probability by that share.
    small = batch(256, 256, 1024, 64)
    exact = step(small, "reference", dtype=torch.float64)
    for backend in ("reference", "chunked"):
        require_equal(step(small, backend), exact, 100 * EPSILON)

    data = batch(NUM_ROWS, NUM_ROWS, NUM_COLUMNS, DIM)
    apart = require_equal(step(data, "chunked"), step(data, "reference"), 200 * EPSILON)
    seconds = interleaved({name: lambda name=name: step(data, name) for name in ("reference", "chunked")})
    rows = [
        (name, seconds[name], seconds["reference"] / seconds[name], peak_extra_mib(name))
        for name in ("reference", "chunked")
    ]
    table(
        f"sampled softmax, own=, {NUM_ROWS} x {NUM_COLUMNS} x {DIM}, apart by {apart:.1g} (bars: 1.8 times, 50 MiB)",
        ("backend", "seconds", "times faster", "extra MiB"),
        rows,
    )

    num_pairs = 8
    data = batch(NUM_ROWS // num_pairs, NUM_ROWS, NUM_COLUMNS, DIM)
    apart = require_equal(step(data, "chunked"), step(data, "chunked", repeated=True), 200 * EPSILON)
    seconds = interleaved(
        {
            "one row a positive": lambda: step(data, "chunked", repeated=True),
            "pair_queries": lambda: step(data, "chunked"),
        }
    )
    table(
        f"pair_queries, {num_pairs} positives a query, apart by {apart:.1g} (bar: 5 times)",
        ("form", "seconds", "times faster"),
        [(name, value, seconds["one row a positive"] / value) for name, value in seconds.items()],
    )


if __name__ == "__main__":
    main()
