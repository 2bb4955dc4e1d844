"""Exact retrieval: the rank of each positive among a corpus, Recall@k as PinnerFormer prints it, and the k nearest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.evaluation._pairs import ItemMask, Pairs, check_pairs, unique_pairs
from recblocks.evaluation.per_user import recall_per_user

METRICS = ("euclidean", "inner_product")
_NEVER = 2**53
"""The rank of a positive whose own score is NaN: no list is that long, and a float64 still holds it."""


class TopK(NamedTuple):
    """Each query's best items, best first; ``valid`` is False where fewer than k items were to be had."""

    items: Tensor
    scores: Tensor
    valid: Tensor


def recall_at_k(
    queries: Tensor,
    corpus: Tensor,
    positives: Pairs,
    *,
    k: int = 10,
    metric: str = "euclidean",
    in_corpus: Tensor | None = None,
    excluded: Pairs | None = None,
    max_elements: int = 2**24,
) -> Tensor:
    """Mean over users of the share of their positives that stand among the k nearest items of the corpus.

    ``Recall@k(U) = 1/|P_U| sum_{P in P_U} 1{ |{N in corpus, N != P : d(U, P) >= d(U, N)}| < k }``.

    An item at the positive's own distance counts against it (ties hurt). Every user with positives weighs the same;
    users without are left out: `recall_per_user` gives one number a user, and so says which.

    Args:
        queries: (Q, D) floating, one embedding a user.
        corpus: (N, D) floating, one embedding an item.
        positives: (query (P,), item (P,)) int64: rows of ``queries`` and of ``corpus``. Repeats count once.
        k: length of the list.
        metric: "euclidean", the paper's distance, or "inner_product" (closer is larger); on unit vectors they agree.
        in_corpus: (N,) bool, None: all True. A row that is False counts against nobody: it is there to be a positive
            that the corpus does not hold (the paper's corpus is random).
        excluded: (query (E,), item (E,)) int64: items that do not count against that query, such as those the user has
            seen. A positive among them is judged all the same.
        max_elements: scores in memory at a time.

    Returns:
        A float64 scalar.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, rows outside their range, no positive at all, or k below 1.

    Note:
        The paper does not say whether the positive itself, when the corpus holds it, counts against itself; here it
        does not. An item whose score is NaN counts against every positive, and a positive whose own score is NaN ranks
        2^53: a broken embedding never scores, however long the list.

    Example:
        >>> users = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> items = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> recall_at_k(users, items, (torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1])), k=1)
        tensor(0.2500, dtype=torch.float64)

    Source: PinnerFormer, section 4.1.
    """
    check_embeddings(queries, corpus, metric)
    check_pairs("positives", positives, queries.shape[0], corpus.shape[0])
    if not positives[0].numel():
        raise ValueError("positives must hold at least one pair, got none")
    positives = unique_pairs(positives)
    ranks = retrieval_ranks(
        queries, corpus, positives, metric=metric, in_corpus=in_corpus, excluded=excluded, max_elements=max_elements
    )
    return recall_per_user(ranks, positives[0], k=k).value.mean()


@torch.no_grad()
def retrieval_ranks(
    queries: Tensor,
    corpus: Tensor,
    positives: Pairs,
    *,
    metric: str = "euclidean",
    in_corpus: Tensor | None = None,
    excluded: Pairs | None = None,
    max_elements: int = 2**24,
) -> Tensor:
    """How many other items of the corpus are at least as close to the query as each positive: its rank, from 0.

    ``rank(U, P) = |{N in corpus, N != P : d(U, P) >= d(U, N)}|``, the items that ``excluded`` names for U left out. The
    scores are products of whole blocks; queries times items is never in memory.

    Args:
        queries: (Q, D) floating.
        corpus: (N, D) floating.
        positives: (query (P,), item (P,)) int64; repeats are answered as often as they are asked.
        metric: "euclidean" or "inner_product".
        in_corpus: (N,) bool; see `recall_at_k`.
        excluded: (query (E,), item (E,)) int64; see `recall_at_k`.
        max_elements: scores in memory at a time.

    Returns:
        (P,) int64.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, or rows outside their range.

    Note:
        d is compared through ``<u, n> - |n|^2 / 2``, which orders as -d does, in float32 at least and outside autocast.
        Equal item embeddings get equal scores, bit for bit, which a matrix product alone does not promise. Far from
        the origin the two terms cancel: where ``|n|^2`` is 10^7 times the squared distances that matter, float32 cannot
        tell them apart. Shift queries and corpus by the corpus' mean first, or give float64.

    Example:
        >>> items = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
        >>> retrieval_ranks(items[:1], items, (torch.tensor([0, 0]), torch.tensor([0, 1])))
        tensor([0, 2])

    Source: PinnerFormer, section 4.1.
    """
    check_embeddings(queries, corpus, metric)
    check_pairs("positives", positives, queries.shape[0], corpus.shape[0])
    mask = item_mask(in_corpus, excluded, queries.shape[0], corpus.shape[0])
    scorer = corpus_scorer(corpus, metric, compute_dtype(queries, corpus))
    return blocked_ranks(scorer(queries), positives, corpus.shape[0], mask, max_elements)


@torch.no_grad()
def positive_ranks(
    scores: Tensor,
    positives: Pairs,
    *,
    in_corpus: Tensor | None = None,
    excluded: Pairs | None = None,
    max_elements: int = 2**24,
) -> Tensor:
    """`retrieval_ranks` from scores: for models that have no embeddings, popularity or past counts.

    ``rank(q, p) = |{n != p : not scores[q, n] < scores[q, p]}|``, and 2^53 where ``scores[q, p]`` is NaN.

    Args:
        scores: (Q, N) floating, larger is better.
        positives: (query (P,), item (P,)) int64.
        in_corpus: (N,) bool; see `recall_at_k`.
        excluded: (query (E,), item (E,)) int64; see `recall_at_k`.
        max_elements: scores copied at a time.

    Returns:
        (P,) int64.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, or rows outside their range.

    Example:
        >>> positive_ranks(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), (torch.tensor([0, 0]), torch.tensor([0, 1])))
        tensor([0, 3])

    Source: PinnerFormer, section 4.1.
    """
    _checks.floating("scores", scores, "Q", "N")
    num_queries, num_items = scores.shape
    check_pairs("positives", positives, num_queries, num_items)
    mask = item_mask(in_corpus, excluded, num_queries, num_items)
    return blocked_ranks(lambda rows: scores[rows], positives, num_items, mask, max_elements)


@torch.no_grad()
def retrieve(
    queries: Tensor,
    corpus: Tensor,
    *,
    k: int = 10,
    metric: str = "euclidean",
    in_corpus: Tensor | None = None,
    excluded: Pairs | None = None,
    max_elements: int = 2**24,
) -> TopK:
    """The k nearest items of each query, exactly, less the ones it must not be given.

    Args:
        queries: (Q, D) floating.
        corpus: (N, D) floating.
        k: items a query.
        metric: "euclidean" or "inner_product".
        in_corpus: (N,) bool, None: all True; a row that is False is never returned.
        excluded: (query (E,), item (E,)) int64: never returned for that query, for example what the user has seen.
        max_elements: scores in memory at a time.

    Returns:
        TopK(items (Q, k) int64 corpus rows, scores (Q, k), valid (Q, k) bool), best first; scores are inner products,
        or minus the squared distance. Where fewer than k items are left, ``valid`` is False, the score -inf and the row
        0. The order of ties is not defined.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, or rows outside their range.

    Example:
        >>> items = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> retrieve(items[:1], items, k=2, excluded=(torch.tensor([0]), torch.tensor([0]))).items
        tensor([[1, 2]])
    """
    check_embeddings(queries, corpus, metric)
    mask = item_mask(in_corpus, excluded, queries.shape[0], corpus.shape[0])
    rows = torch.arange(queries.shape[0], device=queries.device)
    scores_of = corpus_scorer(corpus, metric, compute_dtype(queries, corpus))(queries)
    best = _blocked_top_k(scores_of, rows, corpus.shape[0], k, mask, max_elements)
    if metric == "inner_product":
        return best
    norms = queries.to(best.scores.dtype).square().sum(1, keepdim=True)
    return best._replace(scores=torch.where(best.valid, (2 * best.scores - norms).clamp(max=0.0), best.scores))


@torch.no_grad()
def top_k(
    scores: Tensor,
    *,
    k: int = 10,
    in_corpus: Tensor | None = None,
    excluded: Pairs | None = None,
    max_elements: int = 2**24,
) -> TopK:
    """`retrieve` from scores: the k items of each row that score highest, less the ones it must not be given.

    Args:
        scores: (Q, N) floating, larger is better; NaN comes last.
        k: items a row.
        in_corpus: (N,) bool; see `retrieve`.
        excluded: (query (E,), item (E,)) int64; see `retrieve`.
        max_elements: scores copied at a time.

    Returns:
        TopK(items (Q, k), scores (Q, k), valid (Q, k)); see `retrieve`.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, or rows outside their range.

    Example:
        >>> top_k(torch.tensor([[3.0, 1.0, 2.0]]), k=2).items
        tensor([[0, 2]])
    """
    _checks.floating("scores", scores, "Q", "N")
    num_queries, num_items = scores.shape
    mask = item_mask(in_corpus, excluded, num_queries, num_items)
    rows = torch.arange(num_queries, device=scores.device)
    return _blocked_top_k(lambda block: scores[block], rows, num_items, k, mask, max_elements)


def check_embeddings(queries: Tensor, corpus: Tensor, metric: str) -> None:
    """Require queries (Q, D), corpus (N, D) and a known metric."""
    _checks.floating("queries", queries, "Q", "D")
    _checks.floating("corpus", corpus, "N", queries.shape[1])
    _checks.choice("metric", metric, METRICS)


def item_mask(in_corpus: Tensor | None, excluded: Pairs | None, num_queries: int, num_items: int) -> ItemMask:
    """Check; then which rows of the corpus each query may be given."""
    if in_corpus is not None:
        _checks.mask("in_corpus", in_corpus, num_items)
    if excluded is not None:
        check_pairs("excluded", excluded, num_queries, num_items)
    return ItemMask(in_corpus, excluded, num_items)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype given, float32 at least."""
    dtype = torch.float32
    for one in tensors:
        dtype = torch.promote_types(dtype, one.dtype)
    return dtype


def rows_per_block(max_elements: int, row_size: int) -> int:
    """Rows of ``row_size`` numbers that fit into ``max_elements``, one at least."""
    _checks.positive_int("max_elements", max_elements)
    return max(1, max_elements // max(1, row_size))


def corpus_scorer(corpus: Tensor, metric: str, dtype: torch.dtype) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """The function from queries (Q, D) to the one from query rows (q,) to scores (q, N).

    Equal items score the same to the last bit. What it needs to know of the corpus is worked out once.
    """
    corpus = corpus.to(dtype)
    half_norms = corpus.square().sum(1) / 2 if metric == "euclidean" else None
    copies, originals = _repeated_rows(corpus)

    def scores_of(queries: Tensor, rows: Tensor) -> Tensor:
        with torch.autocast(corpus.device.type, enabled=False):
            scores = queries[rows].to(dtype) @ corpus.T
        if half_norms is not None:
            scores -= half_norms
        if copies.numel():
            scores[:, copies] = scores[:, originals]
        return scores

    return lambda queries: functools.partial(scores_of, queries)


def _repeated_rows(x: Tensor) -> Pairs:
    """Rows of x (N, D) that repeat an earlier one, and that earlier row; found by a hash and then compared."""
    generator = torch.Generator(x.device).manual_seed(0)
    factors = torch.randint(2**62, (x.shape[1],), generator=generator, device=x.device) * 2 + 1
    hashes = [_row_hashes(block, factors) for block in torch.split(x, rows_per_block(2**20, x.shape[1]))]
    _, group = torch.unique(torch.cat(hashes), return_inverse=True)
    rows = torch.arange(x.shape[0], device=x.device)
    first = torch.full_like(rows, x.shape[0]).scatter_reduce_(0, group, rows, "amin")[group]
    copies = rows[first != rows]
    equal = (x[copies] == x[first[copies]]).all(1)
    return copies[equal], first[copies][equal]


def _row_hashes(x: Tensor, factors: Tensor) -> Tensor:
    """``sum_d factor_d mix(bits of x_d)`` modulo 2^64; mix carries the high bits down: the low ones are often all 0."""
    bits = (x + 0.0).view(torch.int32 if x.dtype == torch.float32 else torch.int64).to(torch.int64)  # -0.0 becomes 0.0
    bits = bits * -7046029254386353131
    return ((bits ^ (bits >> 29)) * factors).sum(1)


def blocked_ranks(
    scores_of: Callable[[Tensor], Tensor], positives: Pairs, num_items: int, mask: ItemMask, max_elements: int
) -> Tensor:
    """Ranks (P,) of the positives; no more than ``max_elements`` scores are in memory at a time."""
    query, item = positives
    ranks = torch.empty_like(item)
    for block in torch.split(torch.argsort(query), rows_per_block(max_elements, num_items)):
        rows, row = torch.unique_consecutive(query[block], return_inverse=True)
        ranks[block] = _block_ranks(scores_of(rows), row, item[block], mask.of(rows))
    return ranks


def _block_ranks(scores: Tensor, row: Tensor, item: Tensor, allowed: Tensor | None) -> Tensor:
    """Ranks (p,) of the positives (row (p,), item (p,)) in scores (q, N); NaN is below nothing, so it always counts."""
    own = scores[row, item]
    counts = (scores[row] < own[:, None]).logical_not_()
    if allowed is not None:
        counts &= allowed if len(allowed) == 1 else allowed[row]
    counts[torch.arange(len(row), device=row.device), item] = False
    return counts.view(torch.uint8).sum(1, dtype=torch.int64).masked_fill_(own.isnan(), _NEVER)


def _blocked_top_k(
    scores_of: Callable[[Tensor], Tensor],
    rows: Tensor,
    num_items: int,
    k: int,
    mask: ItemMask,
    max_elements: int,
) -> TopK:
    _checks.positive_int("k", k)
    step = rows_per_block(max_elements, num_items)
    blocks = [_block_top_k(scores_of(block), min(k, num_items), mask.of(block)) for block in torch.split(rows, step)]
    best = TopK(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
    missing = k - best.items.shape[1]
    pad = torch.nn.functional.pad
    return TopK(
        pad(best.items, (0, missing)), pad(best.scores, (0, missing), value=-torch.inf), pad(best.valid, (0, missing))
    )


def _block_top_k(scores: Tensor, k: int, allowed: Tensor | None) -> TopK:
    """NaN and -inf that are scores come before what is not allowed."""
    if allowed is None and _checks.readable(scores):
        best, items = scores.topk(k, dim=1)  # NaN first
        if not best[:, :1].isnan().any():
            return TopK(items, best, torch.ones_like(items, dtype=torch.bool))
    lowest = torch.finfo(scores.dtype).min
    keys = scores.nan_to_num(nan=lowest, neginf=lowest, posinf=torch.inf)
    if allowed is not None:
        keys.masked_fill_(~allowed, -torch.inf)
    best, items = keys.topk(k, dim=1)
    valid = best > -torch.inf
    scores = scores.gather(1, items).masked_fill_(~valid, -torch.inf)
    return TopK(items.masked_fill_(~valid, 0), scores, valid)
