"""Several embeddings a user: the oracle that picks the closest one, and the blend of what each retrieves."""

from __future__ import annotations

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.evaluation._pairs import Pairs, check_pairs
from recblocks.evaluation.retrieval import TopK, check_embeddings, compute_dtype, rows_per_block


@torch.no_grad()
def closest_embedding(
    embeddings: Tensor,
    corpus: Tensor,
    positives: Pairs,
    *,
    valid: Tensor | None = None,
    metric: str = "euclidean",
    max_elements: int = 2**24,
) -> Tensor:
    """Of a user's several embeddings the one closest to each positive: the oracle that bounds them from above.

    The user is represented by ``argmin_c d(u_c, p)``, one choice for each positive. The result indexes
    ``embeddings.flatten(0, 1)``, so ``retrieval_ranks(embeddings.flatten(0, 1), corpus, (closest, item))`` are the
    oracle's ranks.

    Args:
        embeddings: (Q, C, D) floating, the C embeddings of each user.
        corpus: (N, D) floating.
        positives: (query (P,), item (P,)) int64.
        valid: (Q, C) bool, True = the user has this embedding; None: all. A user with positives needs at least one.
        metric: "euclidean" or "inner_product".
        max_elements: gathered numbers in memory at a time.

    Returns:
        (P,) int64 in [0, Q * C).

    Raises:
        TypeError, ValueError: a wrong dtype or shape, rows outside their range, or a positive whose user has nothing
            valid.

    Example:
        >>> medoids = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> closest_embedding(medoids, torch.tensor([[0.6, 0.8]]), (torch.tensor([0]), torch.tensor([0])))
        tensor([1])

    Source: PinnerFormer, section 4.2.1.
    """
    _checks.floating("embeddings", embeddings, "Q", "C", "D")
    num_queries, num_embeddings, dim = embeddings.shape
    check_embeddings(embeddings.flatten(0, 1), corpus, metric)
    check_pairs("positives", positives, num_queries, corpus.shape[0])
    if valid is None:
        valid = torch.ones(num_queries, num_embeddings, dtype=torch.bool, device=embeddings.device)
    _checks.mask("valid", valid, num_queries, num_embeddings)
    if _checks.readable(valid) and not bool(valid.any(1)[positives[0]].all()):
        raise ValueError("valid must leave every user that has positives at least one embedding, got a user with none")
    dtype = compute_dtype(embeddings, corpus)
    chosen = torch.empty_like(positives[0])
    step = rows_per_block(max_elements, num_embeddings * dim)
    for block in torch.split(torch.arange(len(chosen), device=chosen.device), step):
        query, item = positives[0][block], positives[1][block]
        own, item_vector = embeddings[query].to(dtype), corpus[item].to(dtype)[:, None]
        closeness = -(own - item_vector).square().sum(2) if metric == "euclidean" else (own * item_vector).sum(2)
        best = closeness.masked_fill(~valid[query], -torch.inf).argmax(1)
        chosen[block] = query * num_embeddings + best
    return chosen


def round_robin(items: Tensor, *, k: int, valid: Tensor | None = None) -> TopK:
    """Blend a user's lists: the best item of each list in turn, then the second best of each, and so on.

    An item that is already in the blend is passed over, so the turn is its list's last word in that round.

    Args:
        items: (Q, C, K) int64, rows or ids; C lists a user, the weightiest first, each with its K items, best first.
        k: length of the blend.
        valid: (Q, C, K) bool, True = an item; None: all.

    Returns:
        TopK(items (Q, k) int64, scores (Q, k) float32, valid (Q, k) bool); the scores 0, -1, -2, ... only order. Where
        the lists hold fewer than k different items, ``valid`` is False, the score -inf and the item 0.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, or k below 1.

    Note:
        The paper does not say what an item does that several embeddings retrieve; showing it once is ours.

    Example:
        >>> round_robin(torch.tensor([[[1, 2, 3], [1, 4, 5]]]), k=4).items
        tensor([[1, 2, 4, 3]])

    Source: PinnerFormer, section 4.2.1.
    """
    _checks.integers("items", items, "Q", "C", "K")
    _checks.positive_int("k", k)
    if valid is None:
        valid = torch.ones_like(items, dtype=torch.bool)
    _checks.mask("valid", valid, *items.shape)
    turns, valid = items.transpose(1, 2).flatten(1), valid.transpose(1, 2).flatten(1)
    tail = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)
    turns, valid = turns.gather(1, tail), valid.gather(1, tail)
    ordered, by_item = torch.sort(turns, dim=1, stable=True)
    first = torch.ones_like(valid)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    kept = valid & torch.empty_like(valid).scatter_(1, by_item, first)
    order = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)[:, :k]
    missing = k - order.shape[1]
    blend = torch.nn.functional.pad(turns.gather(1, order), (0, missing))
    shown = torch.nn.functional.pad(kept.gather(1, order), (0, missing))
    scores = -torch.arange(k, dtype=torch.float32, device=items.device).expand(len(items), k)
    return TopK(blend.masked_fill(~shown, 0), scores.masked_fill(~shown, -torch.inf), shown)
