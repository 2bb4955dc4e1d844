"""An item index over raw ids through faiss: exact (flat) or approximate (HNSW)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recblocks import _checks
from recblocks._files import replacing
from recblocks.evaluation._pairs import Pairs, check_rows
from recblocks.evaluation.retrieval import METRICS, TopK

KINDS = ("flat", "hnsw")
_INSTALL = "pip install recblocks[retrieval]"


class ItemIndex:
    """The k nearest items of a query, by raw int64 id, from a faiss index in memory.

    ``kind="flat"`` compares with every item and is exact. ``kind="hnsw"`` walks a graph of ``num_links`` links an item
    and finds most of them in a fraction of the time; a larger ``ef_search`` finds more and takes longer.

    Args:
        ids: (N,) int64, each once, any value.
        vectors: (N, D) floating; held in float32.
        kind: "flat" or "hnsw".
        metric: "euclidean" or "inner_product"; on unit vectors they order alike.
        num_links: HNSW's M.
        ef_construction: candidates looked at for each item's links while building.
        ef_search: candidates kept in a search, k at least.

    Raises:
        ImportError: faiss is not installed.
        TypeError, ValueError: a wrong dtype or shape, a repeated id, or a non-finite vector.

    Example:
        >>> index = ItemIndex(torch.tensor([70, -1, 90]), torch.eye(3))
        >>> index.search(torch.tensor([[0.1, 0.9, 0.2]]), k=2).items
        tensor([[-1, 90]])

    Source: PinnerFormer, section 3.6; Malkov and Yashunin 2018 for HNSW.
    """

    def __init__(
        self,
        ids: Tensor,
        vectors: Tensor,
        *,
        kind: str = "flat",
        metric: str = "euclidean",
        num_links: int = 32,
        ef_construction: int = 80,
        ef_search: int = 64,
    ) -> None:
        faiss = _checks.optional("faiss", _INSTALL)
        _checks.integers("ids", ids, "N")
        _checks.floating("vectors", vectors, ids.shape[0], "D")
        _checks.choice("kind", kind, KINDS)
        _checks.choice("metric", metric, METRICS)
        for name, value in (
            ("num_links", num_links),
            ("ef_construction", ef_construction),
            ("ef_search", ef_search),
        ):
            _checks.positive_int(name, value)
        if len(torch.unique(ids)) != len(ids):
            raise ValueError(f"ids must hold each id once, got {len(ids) - len(torch.unique(ids))} repeats")
        if not bool(vectors.isfinite().all()):
            raise ValueError("vectors must be finite, got NaN or infinity")
        code = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
        if kind == "flat":
            inner = faiss.IndexFlat(vectors.shape[1], code)
        else:
            inner = faiss.IndexHNSWFlat(vectors.shape[1], num_links, code)
            inner.hnsw.efConstruction = ef_construction
            inner.hnsw.efSearch = ef_search
        index = faiss.IndexIDMap(inner)
        index.add_with_ids(_array(vectors), ids.detach().cpu().numpy())
        self._hold(index, inner)

    def _hold(self, index: Any, inner: Any) -> None:
        """Searches go through ``inner``, whose answers are rows: with ids -1 could be an id or the lack of one."""
        faiss = _checks.optional("faiss", _INSTALL)
        self._index, self._inner = index, inner
        self._euclidean = inner.metric_type == faiss.METRIC_L2
        self.ids = torch.from_numpy(faiss.vector_to_array(index.id_map))
        self._sorted_ids, self._row_of_sorted = self.ids.sort()

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: Tensor, *, k: int = 10, excluded: Pairs | None = None) -> TopK:
        """The k nearest items of each query, less the ones it must not be given.

        Args:
            queries: (Q, D) floating.
            k: items a query.
            excluded: (query (E,), id (E,)) int64: ids never returned for that query row, such as what the user has
                seen; ids that the index does not hold are passed over. Every query searches for k plus the most that
                one query excludes, so a few very long histories cost all.

        Returns:
            TopK(items (Q, k) raw ids, scores (Q, k) float32, valid (Q, k) bool), best first, on the device of
            ``queries``; scores are inner products, or minus the squared distance. Where fewer than k items were found,
            ``valid`` is False, the score -inf and the id 0.

        Raises:
            TypeError, ValueError: a wrong dtype or shape, a non-finite query, a row outside its range, or k below 1.
        """
        _checks.floating("queries", queries, "Q", self._inner.d)
        _checks.positive_int("k", k)
        if not bool(queries.isfinite().all()):
            raise ValueError("queries must be finite, got NaN or infinity")
        query, row = self._excluded_rows(excluded, len(queries))
        most = int(torch.bincount(query).max()) if len(query) else 0
        width = max(1, min(k + most, len(self)))
        distances, found = (torch.from_numpy(part) for part in self._inner.search(_array(queries), width))
        valid = found >= 0
        if len(query):
            cells = torch.arange(len(queries))[:, None] * len(self) + found
            valid &= ~torch.isin(cells, query * len(self) + row)
        order = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)[:, :k]
        missing = k - order.shape[1]
        pad = torch.nn.functional.pad
        valid = pad(valid.gather(1, order), (0, missing))
        rows = pad(found.gather(1, order), (0, missing)).masked_fill_(~valid, 0)
        scores = pad(distances.gather(1, order), (0, missing))
        scores = (-scores if self._euclidean else scores).masked_fill_(~valid, -torch.inf)
        items = (self.ids[rows] if len(self) else rows).masked_fill_(~valid, 0)
        return TopK(items.to(queries.device), scores.to(queries.device), valid.to(queries.device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file in faiss's own format; a crash leaves the old file whole.

        Args:
            path: the file; it is replaced.
        """
        faiss = _checks.optional("faiss", _INSTALL)
        with replacing(path) as scratch:
            faiss.write_index(self._index, os.fspath(scratch))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ItemIndex:
        """Read an index that `save` wrote.

        Args:
            path: the file.

        Returns:
            The index, equal in every answer.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut short, or holds something else.
        """
        faiss = _checks.optional("faiss", _INSTALL)
        if not Path(path).is_file():
            raise FileNotFoundError(f"path must be a file that ItemIndex.save wrote, got {os.fspath(path)!r}")
        try:
            index = faiss.read_index(os.fspath(path))
        except RuntimeError as error:
            raise ValueError(
                f"path must be a whole index that ItemIndex.save wrote, got {os.fspath(path)!r}"
            ) from error
        if not isinstance(index, faiss.IndexIDMap):
            raise ValueError(f"path must be an index that ItemIndex.save wrote, got a faiss {type(index).__name__}")
        new = cls.__new__(cls)
        new._hold(index, faiss.downcast_index(index.index))
        return new

    def _excluded_rows(self, excluded: Pairs | None, num_queries: int) -> Pairs:
        """Excluded (query, index row), each once; ids that the index does not hold are gone."""
        none = torch.zeros(0, dtype=torch.int64)
        if excluded is None:
            return none, none
        if not isinstance(excluded, tuple) or len(excluded) != 2:
            raise TypeError(f"excluded must be a tuple (query, id), got {_checks.describe(excluded)}")
        _checks.integers("excluded[0] (query)", excluded[0], "E")
        _checks.integers("excluded[1] (id)", excluded[1], excluded[0].shape[0])
        query, item = excluded[0].cpu(), excluded[1].cpu()
        check_rows("excluded[0] (query)", query, num_queries)
        if not len(self):
            return none, none
        place = torch.searchsorted(self._sorted_ids, item).clamp(max=len(self) - 1)
        known = self._sorted_ids[place] == item
        cells = torch.unique(query[known] * len(self) + self._row_of_sorted[place[known]])
        return cells // len(self), cells % len(self)


def _array(x: Tensor) -> Any:
    return x.detach().to("cpu", torch.float32).contiguous().numpy()
