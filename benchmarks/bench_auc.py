"""`chunk_auc` beside scikit-learn and torchmetrics, which take a chunk at a time: the mean AUC within requests.

Scores have two digits, so that many are ties. Rows of a chunk stand together: peers get theirs by one split, whereas
`chunk_auc`, which is given no order, sorts all the same. Every chunk holds both labels, on which all of them agree. The
memory that scikit-learn holds is not seen.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks._comparison import Comparison
from recblocks import chunk_auc

NUM_CHUNKS, LONGEST, CHUNKS_A_USER, NUM_BATCHES = 1000, 46, 4, 3  # 4 candidates at least, 25 on average
DIGITS, POSITIVE = 100, 0.2

Batch = dict[str, Tensor]


def batch(generator: torch.Generator) -> Batch:
    """Rows of all chunks, and how many each chunk has."""
    lengths = torch.randint(4, LONGEST + 1, (NUM_CHUNKS,), generator=generator)
    num = int(lengths.sum())
    labels = (torch.rand(num, generator=generator) < POSITIVE).long()
    first = lengths.cumsum(0) - lengths
    labels[first], labels[first + 1] = 1, 0
    chunk = torch.arange(NUM_CHUNKS).repeat_interleave(lengths)
    scores = torch.randint(DIGITS, (num,), generator=generator) / DIGITS
    return {"scores": scores, "labels": labels, "user": chunk // CHUNKS_A_USER, "chunk": chunk, "lengths": lengths}


def ours(data: Batch) -> list[Tensor]:
    return [chunk_auc(data["scores"], data["labels"], data["user"], data["chunk"])]


def chunks(data: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores and labels of each."""
    lengths = data["lengths"].tolist()
    return zip(data["scores"].split(lengths), data["labels"].split(lengths), strict=True)


def exact(data: Batch) -> list[Tensor]:
    """By the definition: pairs in order, ties 1/2."""
    found = []
    for scores, labels in chunks(data):
        apart = scores[labels == 1].double()[:, None] - scores[labels == 0].double()
        found.append(((apart > 0).double() + (apart == 0).double() / 2).mean())
    return [torch.stack(found).mean()]


def of_scikit_learn(data: Batch) -> list[Tensor]:
    auc = importlib.import_module("sklearn.metrics").roc_auc_score
    data = {name: one.cpu() for name, one in data.items()}
    found = [auc(labels.numpy(), scores.numpy()) for scores, labels in chunks(data)]
    return [torch.tensor(found, dtype=torch.float64).mean()]


def of_torchmetrics(data: Batch) -> list[Tensor]:
    auc = importlib.import_module("torchmetrics.functional.classification").binary_auroc
    return [torch.stack([auc(scores, labels) for scores, labels in chunks(data)]).mean()]


def of_its_retrieval(data: Batch) -> list[Tensor]:
    metric = importlib.import_module("torchmetrics.retrieval").RetrievalAUROC()
    return [metric(data["scores"], data["labels"], indexes=data["chunk"])]


PEERS: dict[str, tuple[str, Callable[[Batch], list[Tensor]]]] = {
    "scikit-learn, a chunk at a time": ("sklearn", of_scikit_learn),
    "torchmetrics, a chunk at a time": ("torchmetrics", of_torchmetrics),
    "torchmetrics' RetrievalAUROC": ("torchmetrics", of_its_retrieval),
}


def comparisons(device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator().manual_seed(0)
    here = {name: form for name, (module, form) in PEERS.items() if importlib.util.find_spec(module) is not None}
    batches = [batch(generator) for _ in range(NUM_BATCHES)]
    yield Comparison(
        op="AUC within chunks",
        sizes={"chunks": NUM_CHUNKS, "rows": sum(len(one["scores"]) for one in batches) // NUM_BATCHES},
        dtype="float32",
        batches=[{name: one.to(device) for name, one in data.items()} for data in batches],
        exact=exact,
        forms={"recblocks": ours} | here,
        allowed=1e-6,  # torchmetrics' are of float32
        absent={name: "not installed" for name in PEERS if name not in here},
    )
