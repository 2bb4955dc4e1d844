"""Sampled softmax with logQ correction over a shared pool of negatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recblocks import _checks
from recblocks.kernels import dispatch
from recblocks.kernels.own_positives import check_own
from recblocks.kernels.sampled_softmax import chunked
from recblocks.kernels.sampled_softmax.dispatch import resolve
from recblocks.kernels.sampled_softmax.pool import Pool, unused_columns
from recblocks.losses._pool_terms import LOG_SUM_EXP, check_log_q, clear, inverse_of, unless_all

Own = tuple[Tensor, Tensor, Tensor, Tensor]


def sampled_softmax_loss(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    log_q_positives: Tensor | None = None,
    log_q_negatives: Tensor | None = None,
    masked: Tensor | None = None,
    own: Own | None = None,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    pair_queries: Tensor | None = None,
    correct_positive: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Cross entropy of each positive against the pool columns that its row may see.

    ``l_r = softplus(L_r - s_r)``, ``s_r = <u_r, p_r> / τ - log q(p_r)`` and
    ``L_r = log Σ_c exp(<u_r, n_c> / τ - log q(n_c))`` over the columns c that are not masked for row r, which is
    ``-log softmax`` of the positive among itself and those columns.

    What is masked is absent, and so is a row of weight 0: it may hold NaN and changes neither loss nor gradient. NaN in
    anything else reaches the gradients of all. A row of finite numbers whose every column is masked has loss 0 and
    gradient 0.
    Logits are float32 (float64 where an embedding is), under autocast too. Embeddings of bfloat16 are factors as they
    are with "triton", and probabilities are rounded likewise where gradients are made of both.

    Args:
        queries: (R, D) user embeddings, floating point. With ``pair_queries`` (U, D).
        positives: (R, D) the embedding of each row's positive item.
        negatives: (N, D) the pool. An item that stands in it twice counts twice.
        log_q_positives: (R,) log of the probability that a pool column is this item. Both log q or neither.
        log_q_negatives: (N,) the same of each column.
        masked: (R, N) bool, True = the column is excluded for the row. With ``pair_queries`` (U, N). For small cases.
        own: instead of ``masked`` the four id vectors of :func:`own_positive_mask`: ``row_users`` (R,) or, with
            ``pair_queries``, (U,); ``column_items`` (N,); ``positive_users`` (P,); ``positive_items`` (P,).
        temperature: τ > 0, a number or a tensor of shape (), such as what :class:`LearnedTemperature` returns.
        weights: (R,) of each pair, at least 0; None is 1 each.
        pair_queries: (R,) int64 in [0, U), the query row of each positive, in any order. P positives of one embedding
            then cost one row instead of P. A query without a pair changes nothing.
        correct_positive: False leaves the positive's logit as it is; ``log_q_positives`` is then not needed, and
            ``log_q_negatives``, the log of an expected count, may exceed 0.
        reduction: "none" gives the l_r (R,), 0 where the weight is 0; "sum" gives Σ w_r l_r; "mean" divides that by
            Σ w_r, and is 0 where Σ w_r is.
        backend: "reference" holds rows x columns and can be differentiated twice; "chunked" holds a few rows at a
            time and cannot; "triton", likewise, is for NVIDIA GPUs and bfloat16 embeddings of at most 256 numbers or
            others of at most 64. "auto" takes "triton" where those are given and "chunked" elsewhere on a CPU and on
            CUDA, but neither inside a torch.func transform.

    Returns:
        () or, for "none", (R,); float32, or float64 where an embedding is.

    Raises:
        TypeError: an argument is not a tensor of the dtype it takes.
        ValueError: shapes disagree; both ``masked`` and ``own``, or one log q without the other; on a CPU also a
            negative weight, a log q that is not finite or, with ``correct_positive``, exceeds 0, a ``pair_queries``
            out of range, a temperature that is not above 0.
        ImportError: backend "triton" without the package.
        RuntimeError: a fast backend is differentiated twice, or transformed by torch.func.

    Example:
        >>> import torch
        >>> users, items = torch.tensor([1, 1, 2]), torch.tensor([10, 20, 30])
        >>> u, p = torch.eye(3), torch.eye(3)
        >>> loss = sampled_softmax_loss(u, p, p, own=(users, items, users, items), reduction="none")
        >>> [round(value, 4) for value in loss.tolist()]  # log(1 + 1/e) where one column is left, log(1 + 2/e) for two
        [0.3133, 0.3133, 0.5514]

    Source: PinnerFormer, section 3.3, equation 2; masking as in A.3.

    Note:
        The paper averages with equal weight per user on each GPU; see :func:`equal_user_weights` for ours.
    """
    _checks.choice("reduction", reduction, ("none", "sum", "mean"))
    _check_shapes(queries, positives, negatives, log_q_positives, log_q_negatives, masked, own, weights, pair_queries)
    factors = torch.promote_types(torch.promote_types(queries.dtype, positives.dtype), negatives.dtype)
    backend = resolve(backend, queries.device, factors, queries.shape[1])
    if not isinstance(correct_positive, bool):
        raise TypeError(f"correct_positive must be a bool, got {_checks.describe(correct_positive)}")
    _check_log_q_given(log_q_positives, log_q_negatives, correct_positive)
    _check_pairs(weights, pair_queries, queries.shape[0])
    present = _present(weights, pair_queries, queries)
    masks = (masked, [] if own is None else list(own), present.rows)
    if correct_positive:
        check_log_q("log_q_positives", log_q_positives, correct_positive, lambda: _absent(present.pairs))
    else:
        log_q_positives = None
    check_log_q("log_q_negatives", log_q_negatives, correct_positive, lambda: unused_columns(*masks))

    dtype = torch.promote_types(factors, torch.float32)
    if backend != "triton" or factors == torch.float16:  # whose range ends above the probabilities of a large pool
        factors = dtype
    with dispatch.without_autocast(queries.device):
        queries, positives = clear(queries.to(factors), present.rows), clear(positives.to(dtype), present.pairs)
        inverse_temperature = inverse_of(temperature, positives)
        shift = None if log_q_positives is None else -clear(log_q_positives.to(dtype), present.pairs)
        bias = None if log_q_negatives is None else -log_q_negatives.to(dtype)
        pool = Pool(negatives.to(factors), bias, *masks)
        weights = positives.new_ones(positives.shape[0]) if weights is None else weights.to(dtype)

        if backend == "chunked" and reduction != "none":
            given = queries, positives, shift, pool, inverse_temperature, weights, pair_queries
            total = chunked.sum_of_losses(*given)
        else:
            paired = queries if pair_queries is None else queries.index_select(0, pair_queries)
            positive_logits = (paired * positives).sum(1) * inverse_temperature
            if shift is not None:
                positive_logits = positive_logits + shift
            log_sum_exp = LOG_SUM_EXP[backend](queries, pool, inverse_temperature)
            if pair_queries is not None:
                log_sum_exp = log_sum_exp.index_select(0, pair_queries)
            losses = clear(-F.logsigmoid(positive_logits - log_sum_exp), present.pairs)
            if reduction == "none":
                return losses
            total = (weights * losses).sum()
        if reduction == "sum":
            return total
        weight = weights.sum()
        return total / torch.where(weight == 0, 1, weight)


class _Present(NamedTuple):
    """Which rows count for anything: pairs of weight above 0, and query rows with such a pair; None is all."""

    pairs: Tensor | None
    rows: Tensor | None


def _present(weights: Tensor | None, pair_queries: Tensor | None, queries: Tensor) -> _Present:
    pairs = None if weights is None else weights != 0
    rows = pairs
    if pair_queries is not None:
        ones = torch.ones_like(pair_queries) if pairs is None else pairs.long()
        rows = (
            torch.zeros(queries.shape[0], dtype=torch.int64, device=queries.device).index_add(0, pair_queries, ones) > 0
        )
    return _Present(unless_all(pairs), unless_all(rows))


def _absent(present: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.bool) if present is None else ~present


def _check_shapes(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    log_q_positives: Tensor | None,
    log_q_negatives: Tensor | None,
    masked: Tensor | None,
    own: Own | None,
    weights: Tensor | None,
    pair_queries: Tensor | None,
) -> None:
    _checks.floating("queries", queries, None, None)
    num_rows, dim = queries.shape
    _checks.floating("positives", positives, num_rows if pair_queries is None else None, dim)
    num_pairs = positives.shape[0]
    _checks.floating("negatives", negatives, None, dim)
    num_columns = negatives.shape[0]
    if log_q_positives is not None:
        _checks.floating("log_q_positives", log_q_positives, num_pairs)
    if log_q_negatives is not None:
        _checks.floating("log_q_negatives", log_q_negatives, num_columns)
    if masked is not None and own is not None:
        raise ValueError("masked and own were both given; give one of them")
    if masked is not None:
        _checks.mask("masked", masked, num_rows, num_columns)
    if own is not None:
        if not isinstance(own, (tuple, list)) or len(own) != 4:
            raise ValueError(
                "own must be (row_users, column_items, positive_users, positive_items), "
                f"got {len(own) if isinstance(own, (tuple, list)) else _checks.describe(own)}"
            )
        check_own(own, num_rows=num_rows, num_columns=num_columns)
    if weights is not None:
        _checks.floating("weights", weights, num_pairs)
    if pair_queries is not None:
        _checks.integers("pair_queries", pair_queries, num_pairs)


def _check_pairs(weights: Tensor | None, pair_queries: Tensor | None, num_rows: int) -> None:
    if weights is not None:
        _checks.not_negative("weights", weights)
    if pair_queries is not None and _checks.readable(pair_queries):
        bad = (pair_queries < 0) | (pair_queries >= num_rows)
        if bad.any():
            raise ValueError(f"pair_queries must be at least 0 and below {num_rows}, got {pair_queries[bad][0].item()}")


def _check_log_q_given(positives: Tensor | None, negatives: Tensor | None, correct_positive: bool) -> None:
    if negatives is None and positives is not None:
        raise ValueError("log_q_positives was given without log_q_negatives; give both, or neither")
    if correct_positive and positives is None and negatives is not None:
        raise ValueError("log_q_negatives was given without log_q_positives; give both, or correct_positive=False")
