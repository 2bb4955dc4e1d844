"""`retrieve` by inner product beside faiss' flat index and beside `torch.topk` of all scores: the k best items of each.

A flat index is a copy of the items. It is timed with the copy made beforehand, which is in faiss' favour, as `retrieve`
is given plain tensors, and with the copy made in the call. From 1.15 on faiss takes one product after the other where
queries times DIM are below 128,000: it is timed so, and with products of matrices, its best mode.
faiss has as many threads as torch; the memory that it holds is not seen. What is compared are scores, best first, which
ties do not change.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks._comparison import Comparison
from recblocks import retrieve

NUM_QUERIES, NUM_ITEMS, DIM, NUM_BATCHES = 1024, 100_000, 64, 3
LENGTHS = 10, 100
QUERIES_AT_A_TIME = 64  # in float64


def unit_vectors(number: int, generator: torch.Generator) -> Tensor:
    return functional.normalize(torch.randn(number, DIM, generator=generator), dim=1)


def ours(items: Tensor, k: int, queries: Tensor) -> list[Tensor]:
    return [retrieve(queries, items, k=k, metric="inner_product").scores]


def top_k_of_all(items: Tensor, k: int, queries: Tensor) -> list[Tensor]:
    return [(queries @ items.t()).topk(k).values]


def exact(items: Tensor, k: int, queries: Tensor) -> list[Tensor]:
    wide = items.double()
    return [torch.cat([(some.double() @ wide.t()).topk(k).values for some in queries.split(QUERIES_AT_A_TIME)])]


def index_of(faiss: Any, items: Tensor) -> Any:
    index = faiss.IndexFlatIP(DIM)
    index.add(items.numpy())
    return index


def searched(faiss: Any, index: Any, threshold: int, k: int, queries: Tensor) -> list[Tensor]:
    """With products of matrices where there are as many queries as ``threshold``, or numbers in them (from 1.15 on)."""
    before, faiss.cvar.distance_compute_blas_threshold = faiss.cvar.distance_compute_blas_threshold, threshold
    scores, rows = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    index.search(queries.numpy(), k, D=scores.numpy(), I=rows.numpy())
    faiss.cvar.distance_compute_blas_threshold = before
    return [scores]


def added_and_searched(faiss: Any, items: Tensor, k: int, queries: Tensor) -> list[Tensor]:
    return searched(faiss, index_of(faiss, items), 1, k, queries)


def comparisons(device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator().manual_seed(0)
    items = unit_vectors(NUM_ITEMS, generator).to(device)
    batches = [unit_vectors(NUM_QUERIES, generator).to(device) for _ in range(NUM_BATCHES)]
    absent = {}
    if device.type != "cpu":
        absent = {"faiss": "its wheel is for a CPU"}
    elif importlib.util.find_spec("faiss") is None:
        absent = {"faiss": "not installed"}
    else:
        faiss: Any = importlib.import_module("faiss")
        faiss.omp_set_num_threads(torch.get_num_threads())
        index, threshold = index_of(faiss, items), faiss.cvar.distance_compute_blas_threshold
    for k in LENGTHS:
        forms = {
            "recblocks": functools.partial(ours, items, k),
            "topk of all scores": functools.partial(top_k_of_all, items, k),
        }
        if not absent:
            forms["faiss"] = functools.partial(searched, faiss, index, 1, k)
            forms["faiss, its own threshold"] = functools.partial(searched, faiss, index, threshold, k)
            forms["faiss, items added in the call"] = functools.partial(added_and_searched, faiss, items, k)
        yield Comparison(
            op=f"retrieval, the {k} best",
            sizes={"queries": NUM_QUERIES, "items": NUM_ITEMS, "dim": DIM},
            dtype="float32",
            batches=batches,
            exact=functools.partial(exact, items, k),
            forms=forms,
            # A sum of DIM products of unit vectors rounds by at most DIM 2**-24, and the best score is above a half.
            allowed=2 * DIM * 2**-24,
            flops=2 * NUM_QUERIES * NUM_ITEMS * DIM,
            absent=absent,
        )
