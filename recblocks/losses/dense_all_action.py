"""Dense all-action loss: every later positive of a user's window, without a list of pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recblocks import _checks
from recblocks.kernels import dispatch
from recblocks.kernels.dense_all_action import chunked
from recblocks.kernels.dense_all_action.dispatch import row_losses as triton_row_losses
from recblocks.kernels.sampled_softmax.dispatch import resolve
from recblocks.kernels.sampled_softmax.pool import Pool, clear_unused, unused_columns
from recblocks.kernels.windows import Windows, horizon, windows
from recblocks.losses._pool_terms import LOG_SUM_EXP, check_log_q, clear, inverse_of, unless_all


def dense_all_action_loss(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    query_users: Tensor,
    query_times: Tensor,
    positive_users: Tensor,
    positive_times: Tensor,
    positive_items: Tensor,
    negative_items: Tensor,
    window: int,
    log_q_positives: Tensor | None = None,
    log_q_negatives: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    correct_positive: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Sampled softmax of every query and every positive that its user meets in the window after it.

    ``l_i = Σ_p softplus(L_i - s_ip)`` over the positives p of query i's user with ``0 < time_p - time_i <= window``;
    ``s_ip = <u_i, v_p> / τ - log q(v_p)`` and ``L_i = log Σ_c exp(<u_i, v_c> / τ - log q(v_c))`` over columns c of the
    pool, which are the positives of all users and the negatives, but for those whose item is any positive of i's user.

    It is :func:`sampled_softmax_loss` with both as its pool and a pair of each query and each positive in its window.
    Here they are found by user and time, and their logits are those of the pool: all pairs for the price of the rows.

    What holds of absence there holds here: a query of weight 0 or without a pair may hold NaN, and so may a column that
    is masked for every other query and in none's window. Fast backends hold a tile of rows x columns at most.

    Args:
        queries: (U, D) embeddings of users at some time, floating point, in any order.
        positives: (P, D) the embedding of every positive action of the batch, in any order; each stands once here,
            however many queries have it ahead of them, and is a column of the pool.
        negatives: (N, D) the pool's other columns, such as random items; N may be 0.
        query_users: (U,) int64 user of each query; any value.
        query_times: (U,) int64 time of each query, in any unit.
        positive_users: (P,) int64 user of each positive.
        positive_times: (P,) int64 time of each positive, in the same unit.
        positive_items: (P,) int64 item of each positive; any value.
        negative_items: (N,) int64 item of each negative.
        window: K > 0, in the times' unit, such as ``28 * 86400`` for four weeks of seconds.
        log_q_positives: (P,) log of the probability that a pool column is this item. Both log q or neither.
        log_q_negatives: (N,) the same of each negative.
        temperature: τ > 0, a number or a tensor of shape (), such as what :class:`LearnedTemperature` returns.
        weights: (U,) of each pair of the query, at least 0, or anything where there is no pair; None is 1 each. With n
            pairs a query as :func:`positives_in_window` counts them, ``1 / n`` averages over its positives, and
            ``equal_user_weights(query_users, counts=n)`` gives every user the same weight.
        correct_positive: False leaves s as ``<u, v> / τ``; log q may then exceed 0, as the log of an expected count.
        reduction: "none" gives the l_i (U,), 0 where the weight is 0; "sum" gives Σ w_i l_i; "mean" divides that by
            Σ w_i n_i, and is 0 where that is.
        backend: as of :func:`sampled_softmax_loss`.

    Returns:
        () or, for "none", (U,); float32, or float64 where an embedding is.

    Raises:
        TypeError: an argument is not a tensor of the dtype it takes.
        ValueError: shapes disagree; one log q without the other; a window below 1; on a CPU also a negative weight, a
            log q that is not finite or, with ``correct_positive``, exceeds 0, a temperature that is not above 0.
        ImportError: backend "triton" without the package.
        RuntimeError: a fast backend is differentiated twice, or transformed by torch.func.

    Example:
        >>> import torch
        >>> user, time, item = torch.tensor([1, 1, 1, 2]), torch.tensor([10, 20, 30, 20]), torch.tensor([5, 6, 7, 8])
        >>> actions = {"query_users": user, "query_times": time, "positive_users": user, "positive_times": time}
        >>> loss = dense_all_action_loss(
        ...     torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(1, 8), **actions, window=15,
        ...     positive_items=item, negative_items=torch.tensor([9]), reduction="none",
        ... )
        >>> loss.exp().round().tolist()  # the action 10 later, among itself and items 8 and 9; none after the last
        [3.0, 3.0, 1.0, 1.0]

    Source: PinnerFormer, section 3.4.3 and equation 2, with all positives of a window instead of one that is drawn;
        Rethinking Personalized Ranking, section 2.1.3 averages over them.

    Note:
        The paper caps the in-batch columns at 5000; here every positive is one.
    """
    _checks.choice("reduction", reduction, ("none", "sum", "mean"))
    _checks.floating("queries", queries, None, None)
    num_rows, dim = queries.shape
    _checks.floating("positives", positives, None, dim)
    _checks.floating("negatives", negatives, None, dim)
    num_positives, num_negatives = positives.shape[0], negatives.shape[0]
    window = _check_actions(query_users, query_times, positive_users, positive_times, window, num_rows, num_positives)
    _checks.integers("positive_items", positive_items, num_positives)
    _checks.integers("negative_items", negative_items, num_negatives)
    if (log_q_positives is None) != (log_q_negatives is None):
        raise ValueError("log_q_positives and log_q_negatives must both be given, or neither")
    if log_q_positives is not None:
        _checks.floating("log_q_positives", log_q_positives, num_positives)
        _checks.floating("log_q_negatives", log_q_negatives, num_negatives)
    if weights is not None:
        _checks.floating("weights", weights, num_rows)
    if not isinstance(correct_positive, bool):
        raise TypeError(f"correct_positive must be a bool, got {_checks.describe(correct_positive)}")
    factors = torch.promote_types(torch.promote_types(queries.dtype, positives.dtype), negatives.dtype)
    backend = resolve(backend, queries.device, factors, dim)

    found: Windows | Tensor
    if backend == "reference":
        found = _met(query_users, query_times, positive_users, positive_times, window)
        counts = found.sum(1)
    else:
        found = windows(query_users, query_times, positive_users, positive_times, window)
        counts = found.last_column - found.first_column
        queries, query_users, weights = _in_order(found.row_order, queries, query_users, weights)
        positives, positive_users, positive_items, log_q_positives = _in_order(
            found.column_order, positives, positive_users, positive_items, log_q_positives
        )
    if weights is not None:
        weights = weights.masked_fill(counts == 0, 0)
        _checks.not_negative("weights", weights)
    counted = counts > 0 if weights is None else (counts > 0) & (weights != 0)
    met, present = _met_by_any(found, counted), unless_all(counted)
    own = [query_users, torch.cat([positive_items, negative_items]), positive_users, positive_items]
    log_q = None
    if log_q_positives is not None and log_q_negatives is not None:
        log_q = torch.cat([log_q_positives, log_q_negatives])

        def absent() -> Tensor:
            return unused_columns(None, own, present) & ~F.pad(met, (0, num_negatives))

        check_log_q("log_q_positives", log_q_positives, correct_positive, lambda: absent()[:num_positives])
        check_log_q("log_q_negatives", log_q_negatives, correct_positive, lambda: absent()[num_positives:])

    dtype = torch.promote_types(factors, torch.float32)
    if backend != "triton" or factors == torch.float16:  # whose range ends above the probabilities of a large pool
        factors = dtype
    with dispatch.without_autocast(queries.device):
        queries = clear(queries.to(factors), present)
        columns = torch.cat([positives.to(factors), negatives.to(factors)])
        bias = None if log_q is None else -log_q.to(dtype)
        inverse_temperature = inverse_of(temperature, columns.new_empty(0, dtype=dtype))
        pool = Pool(columns, bias, None, own, present)
        weights = torch.ones_like(counts, dtype=dtype) if weights is None else weights.to(dtype)

        if isinstance(found, Windows) and backend == "chunked":
            pairs = chunked.Pairs(found.first_column, found.last_column, num_positives, correct_positive)
            given = queries, clear_unused(pool, met), inverse_temperature, pairs
            losses = chunked.row_losses(*given) if reduction == "none" else chunked.sum_of_losses(*given, weights)
        else:
            log_sum_exp = LOG_SUM_EXP[backend](queries, pool, inverse_temperature)
            positives = clear(columns[:num_positives], met)
            shift = None if bias is None or not correct_positive else clear(bias[:num_positives], met)
            losses = _ROW_LOSSES[backend](queries, positives, shift, inverse_temperature, log_sum_exp, found)
        if reduction == "none":
            losses = clear(losses, present)
            return losses if isinstance(found, Tensor) else losses.index_select(0, found.row_order.argsort())
        total = losses if losses.ndim == 0 else (weights * clear(losses, present)).sum()
        if reduction == "sum":
            return total
        weight = (weights * counts).sum()
        return total / torch.where(weight == 0, 1, weight)


def positives_in_window(
    query_users: Tensor, query_times: Tensor, positive_users: Tensor, positive_times: Tensor, *, window: int
) -> Tensor:
    """Count the positives that each query of :func:`dense_all_action_loss` has.

    ``n_i`` is the number of positives of query i's user with ``0 < time_p - time_i <= window``.

    Args:
        query_users: (U,) int64 user of each query; any value.
        query_times: (U,) int64 time of each query, in any unit.
        positive_users: (P,) int64 user of each positive.
        positive_times: (P,) int64 time of each positive, in the same unit.
        window: K > 0, in the times' unit.

    Returns:
        (U,) int64.

    Raises:
        TypeError: an argument is not of the type it takes.
        ValueError: shapes disagree, or a window below 1.

    Example:
        >>> import torch
        >>> user, time = torch.tensor([1, 1, 1, 2]), torch.tensor([10, 20, 30, 20])
        >>> positives_in_window(user, time, user, time, window=20)
        tensor([2, 1, 0, 0])

    Source: PinnerFormer, section 3.4.2 (the window of K days).
    """
    window = _check_actions(query_users, query_times, positive_users, positive_times, window, None, None)
    found = windows(query_users, query_times, positive_users, positive_times, window)
    return torch.empty_like(query_users).index_copy(0, found.row_order, found.last_column - found.first_column)


def _row_losses(
    queries: Tensor,
    positives: Tensor,
    shift: Tensor | None,
    inverse_temperature: Tensor,
    log_sum_exp: Tensor,
    met: Tensor,
) -> Tensor:
    """The reference: all pairs' logits at once, and where they are met, (U, P)."""
    logits = (queries * inverse_temperature) @ positives.t()
    if shift is not None:
        logits = logits + shift
    losses = -F.logsigmoid(logits - log_sum_exp[:, None])
    return losses.masked_fill(~met, 0).sum(1)


_ROW_LOSSES: dict[str, Callable[..., Tensor]] = {"reference": _row_losses, "triton": triton_row_losses}


def _met(
    query_users: Tensor, query_times: Tensor, positive_users: Tensor, positive_times: Tensor, window: int
) -> Tensor:
    """(U, P) bool, True = the positive is the query's."""
    later = positive_times > query_times[:, None]
    return (positive_users == query_users[:, None]) & later & (positive_times <= horizon(query_times, window)[:, None])


def _met_by_any(found: Windows | Tensor, present: Tensor) -> Tensor:
    """(P,) bool, True = the positive is a present query's."""
    if isinstance(found, Tensor):
        return (found & present[:, None]).any(0)
    before = F.pad(present.long().cumsum(0), (1, 0))
    return before[found.last_row] > before[found.first_row]


def _in_order(order: Tensor, *given: Any) -> tuple[Any, ...]:
    return tuple(None if one is None else one.index_select(0, order) for one in given)


def _check_actions(
    query_users: Tensor,
    query_times: Tensor,
    positive_users: Tensor,
    positive_times: Tensor,
    window: int,
    num_queries: int | None,
    num_positives: int | None,
) -> int:
    """Require users and times of fitting lengths; return the window as an int."""
    _checks.integers("query_users", query_users, num_queries)
    _checks.integers("query_times", query_times, query_users.shape[0])
    _checks.integers("positive_users", positive_users, num_positives)
    _checks.integers("positive_times", positive_times, positive_users.shape[0])
    return _checks.integer("window", window, at_least=1)
