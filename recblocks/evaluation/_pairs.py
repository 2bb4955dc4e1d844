"""Pairs of a query and a corpus row, as two vectors of indices: checks, sets, and lookup by query."""

from __future__ import annotations

import torch
from torch import Tensor

from recblocks import _checks

Pairs = tuple[Tensor, Tensor]


def check_pairs(name: str, pairs: object, num_queries: int, num_items: int) -> None:
    """Require ``(query (P,), item (P,))``, int64, inside their ranges."""
    if not isinstance(pairs, tuple) or len(pairs) != 2:
        raise TypeError(f"{name} must be a tuple of two index vectors (query, item), got {_checks.describe(pairs)}")
    query, item = pairs
    _checks.integers(f"{name}[0] (query)", query, "P")
    _checks.integers(f"{name}[1] (item)", item, query.shape[0])
    check_rows(f"{name}[0] (query)", query, num_queries)
    check_rows(f"{name}[1] (item)", item, num_items)


def check_rows(name: str, rows: Tensor, limit: int) -> None:
    """Require row indices in [0, limit); looks at the numbers on a CPU only."""
    if rows.numel() and _checks.readable(rows):
        low, high = (int(end) for end in rows.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must lie in [0, {limit}), got values from {low} to {high}")


def unique_pairs(pairs: Pairs) -> Pairs:
    """Each different (query, item) once, sorted by query, then item.

    A user who bought a product five times has it once among the positives: the paper's P_U is a set.

    Args:
        pairs: (query (P,), item (P,)), int64.

    Returns:
        (query (P',), item (P',)) with P' <= P.

    Example:
        >>> query, item = unique_pairs((torch.tensor([1, 0, 1]), torch.tensor([7, 3, 7])))
        >>> query.tolist(), item.tolist()
        ([0, 1], [3, 7])

    Source: PinnerFormer, section 4.1.
    """
    query, item = pairs
    _checks.integers("pairs[0] (query)", query, "P")
    _checks.integers("pairs[1] (item)", item, query.shape[0])
    order = torch.argsort(item, stable=True)
    order = order[torch.argsort(query[order], stable=True)]
    query, item = query[order], item[order]
    first = torch.ones_like(query, dtype=torch.bool)
    first[1:] = (query[1:] != query[:-1]) | (item[1:] != item[:-1])
    return query[first], item[first]


class ItemMask:
    """Which corpus rows a query may be given: a mask over the corpus, less each query's excluded pairs."""

    def __init__(self, in_corpus: Tensor | None, excluded: Pairs | None, num_items: int) -> None:
        self.in_corpus = in_corpus
        self.num_items = num_items
        self.excluded: Pairs | None = None
        if excluded is not None and excluded[0].numel():
            order = torch.argsort(excluded[0])
            self.excluded = (excluded[0][order], excluded[1][order])

    def of(self, rows: Tensor) -> Tensor | None:
        """Allowed rows (q or 1, N) of the queries ``rows`` (q,), ascending and different; None: every row."""
        whole = None if self.in_corpus is None else self.in_corpus[None]
        if self.excluded is None:
            return whole
        query, item = self.excluded
        start, stop = torch.searchsorted(query, rows), torch.searchsorted(query, rows, right=True)
        count = stop - start
        if whole is None:
            allowed = torch.ones(len(rows), self.num_items, dtype=torch.bool, device=rows.device)
        else:
            allowed = whole.repeat(len(rows), 1)
        local = torch.repeat_interleave(count)
        within = torch.arange(len(local), device=rows.device) - (count.cumsum(0) - count)[local]
        allowed[local, item[start[local] + within]] = False
        return allowed
