"""All of TransAct's encoder for one user and one candidate in one program of Triton; on CUDA, or in its interpreter.

A program keeps the user's tokens in registers from the end of layer 1's scores, which all candidates share, to what is
given back: whole, or the first slots and the max pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PART = tl.constexpr(16)  # of a head, of hidden units or of keys at a time, so that weights take few registers


@triton.jit
def _line(of, width, WIDTH: tl.constexpr):
    """(WIDTH,) float32, zeros behind the last of ``width``."""
    at = tl.arange(0, WIDTH)
    return tl.load(of + at, at < width, 0.0).to(tl.float32)


@triton.jit
def _matrix(of, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of numbers whose rows are ``stride`` apart, zeros around the real ones."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(of + row[:, None] * stride + column[None, :], inside, 0.0)


@triton.jit
def _times(x, matrix, HOW: tl.constexpr):
    return tl.dot(x.to(matrix.dtype), matrix, input_precision=HOW)


@triton.jit
def _normed(x, weight, bias, epsilon, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Layer norm over the real columns; zeros in the others."""
    mean = tl.sum(x, 1) / DIM
    apart = tl.where((tl.arange(0, WIDTH) < DIM)[None, :], x - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(apart * apart, 1) / DIM + epsilon)
    return apart * scale[:, None] * _line(weight, DIM, WIDTH)[None, :] + _line(bias, DIM, WIDTH)[None, :]


@triton.jit
def _second_half(x, layer, epsilon, DIM: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, HOW: tl.constexpr):
    """Norm, feed-forward, norm."""
    norm, norm_bias, into, into_bias, out, out_bias, last, last_bias = layer
    x = _normed(x, norm, norm_bias, epsilon, DIM, WIDTH)
    own = x.to(into.dtype.element_ty)
    x += _line(out_bias, DIM, WIDTH)[None, :]
    for part in range(0, HIDDEN, _PART):
        hidden = _times(own, tl.trans(_matrix(into + part * DIM, HIDDEN - part, DIM, DIM, _PART, WIDTH)), HOW)
        hidden = tl.maximum(hidden + _line(into_bias + part, HIDDEN - part, _PART)[None, :], 0.0)
        x += _times(hidden, tl.trans(_matrix(out + part, DIM, HIDDEN - part, HIDDEN, WIDTH, _PART)), HOW)
    return _normed(x, last, last_bias, epsilon, DIM, WIDTH)


@triton.jit
def _of_head(own, weight, bias, num, DIM: tl.constexpr, WIDTH: tl.constexpr, HOW: tl.constexpr):
    """(tokens, _PART) some of a head's queries, keys or values, zeros behind the last of ``num``."""
    made = _times(own, tl.trans(_matrix(weight, num, DIM, DIM, _PART, WIDTH)), HOW)
    return (made + _line(bias, num, _PART)[None, :]).to(own.dtype)


@triton.jit
def _attended(
    x,
    attention,
    hidden,
    scale,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HOW: tl.constexpr,
):
    """The tokens and what self-attention adds; ``hidden`` is 0 for a key that is there and -inf for others."""
    qkv, qkv_bias, out, out_bias = attention
    own = x.to(qkv.dtype.element_ty)
    x += _line(out_bias, DIM, WIDTH)[None, :]
    for head in range(HEADS):
        scores = tl.zeros((LENGTH, LENGTH), tl.float32)
        for part in range(0, HEAD, _PART):
            at = head * HEAD + part
            query = _of_head(own, qkv + at * DIM, qkv_bias + at, HEAD - part, DIM, WIDTH, HOW)
            at += DIM
            key = _of_head(own, qkv + at * DIM, qkv_bias + at, HEAD - part, DIM, WIDTH, HOW)
            scores += _times(query, tl.trans(key), HOW)
        scores = scores * scale + hidden[None, :]
        scores = tl.exp(scores - tl.max(scores, 1)[:, None])
        shares = (scores / tl.sum(scores, 1)[:, None]).to(own.dtype)
        for part in range(0, HEAD, _PART):
            at = head * HEAD + part
            of = 2 * DIM + at
            value = _of_head(own, qkv + of * DIM, qkv_bias + of, HEAD - part, DIM, WIDTH, HOW)
            mixed = _times(shares, value, HOW)
            x += _times(mixed, tl.trans(_matrix(out + at, DIM, HEAD - part, DIM, WIDTH, _PART)), HOW)
    return x


@triton.jit
def _scores_of_some_keys(
    scores,
    candidate_keys,
    candidate,
    start,
    TOKENS: tl.constexpr,
    LENGTH: tl.constexpr,
    ITEM: tl.constexpr,
    ITEM_WIDTH: tl.constexpr,
):
    """(tokens, _PART) what the user's part of the scores and the candidate's come to; -inf behind the last key."""
    key = start + tl.arange(0, _PART)
    score = _matrix(scores + start, TOKENS, TOKENS - start, TOKENS, LENGTH, _PART).to(tl.float32)
    of_key = _matrix(candidate_keys + start * ITEM, TOKENS - start, ITEM, ITEM, _PART, ITEM_WIDTH).to(tl.float32)
    score += tl.sum(of_key * candidate[None, :], 1)[None, :]
    return tl.where((key < TOKENS)[None, :], score, -float("inf"))


@triton.jit
def _first_attended(
    x,
    scores,
    candidate_keys,
    values,
    candidate,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    LENGTH: tl.constexpr,
    ITEM: tl.constexpr,
    ITEM_WIDTH: tl.constexpr,
    HOW: tl.constexpr,
):
    """The tokens and what one head of layer 1 adds; first every token's largest score and sum, then the shares."""
    peak = tl.full((LENGTH,), -float("inf"), tl.float32)
    total = tl.zeros((LENGTH,), tl.float32)
    for start in range(0, TOKENS, _PART):
        some = _scores_of_some_keys(scores, candidate_keys, candidate, start, TOKENS, LENGTH, ITEM, ITEM_WIDTH)
        higher = tl.maximum(peak, tl.max(some, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(some - shift[:, None]), 1)
        peak = higher
    for start in range(0, TOKENS, _PART):
        some = _scores_of_some_keys(scores, candidate_keys, candidate, start, TOKENS, LENGTH, ITEM, ITEM_WIDTH)
        shares = tl.exp(some - peak[:, None]) / total[:, None]
        x += _times(shares, _matrix(values + start * DIM, TOKENS - start, DIM, DIM, _PART, WIDTH), HOW)
    return x


@triton.jit
def encode(
    out,
    user,
    keys,
    valid,
    candidates,
    own,
    halves,
    attentions,
    num_candidates,
    scale,
    epsilon,
    TOKENS: tl.constexpr,
    LENGTH: tl.constexpr,
    FIRST: tl.constexpr,
    ITEM: tl.constexpr,
    ITEM_WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    SLOTS: tl.constexpr,
    POOLED: tl.constexpr,
    HOW: tl.constexpr,
):
    """One user and one candidate."""
    residual, scores, candidate_keys, values = user
    pair = tl.program_id(0).to(tl.int64)
    row = pair // num_candidates
    token, column = tl.arange(0, LENGTH), tl.arange(0, WIDTH)
    real = token < TOKENS
    x = _matrix(residual + row * TOKENS * DIM, TOKENS, DIM, DIM, LENGTH, WIDTH).to(tl.float32)
    x += _line(own + pair * DIM, DIM, WIDTH)[None, :]
    candidate = _line(candidates + pair * ITEM, ITEM, ITEM_WIDTH)
    for head in range(HEADS):
        at = (row * HEADS + head) * TOKENS
        of = scores + at * TOKENS, candidate_keys + at * ITEM, values + at * DIM
        x = _first_attended(x, of[0], of[1], of[2], candidate, DIM, WIDTH, TOKENS, LENGTH, ITEM, ITEM_WIDTH, HOW)
    x = _second_half(x, halves[0], epsilon, DIM, WIDTH, HIDDEN, HOW)

    there = real
    if keys is not None:
        there = tl.load(keys + row * TOKENS + token, real, 0) != 0
    hidden = tl.where(there, 0.0, -float("inf"))
    for layer in tl.static_range(len(attentions)):
        x = _attended(x, attentions[layer], hidden, scale, DIM, WIDTH, LENGTH, HEADS, HEAD, HOW)
        x = _second_half(x, halves[layer + 1], epsilon, DIM, WIDTH, HIDDEN, HOW)

    slot = token - FIRST
    kept = real & (slot >= 0)
    shown = tl.load(valid + row * (TOKENS - FIRST) + slot, kept, 0) != 0
    x = tl.where(shown[:, None], x, 0.0)
    to = out + pair * (SLOTS + POOLED) * DIM
    tl.store(to + slot[:, None] * DIM + column[None, :], x, (kept & (slot < SLOTS))[:, None] & (column < DIM)[None, :])
    if POOLED:
        largest = tl.max(tl.where(shown[:, None], x, -float("inf")), 0)
        largest = tl.where(tl.max(shown.to(tl.int32)) > 0, largest, 0.0)
        tl.store(to + SLOTS * DIM + column, largest, column < DIM)


def fill(
    out: Tensor,
    candidates: Tensor,
    own: Tensor,
    user: Sequence[Tensor],
    keys: Tensor | None,
    valid: Tensor,
    layers: Sequence[Sequence[Tensor]],
    num_heads: int,
    num_slots: int,
    epsilon: float,
) -> None:
    """Encode every candidate beside its user; all are contiguous.

    Args:
        out: (B, N, num_slots, d), or (B, N, num_slots + 1, d) with the max pool.
        candidates: (B, N, item_dim).
        own: (B, N, d) what of a candidate reaches every token.
        user: residual (B, L, d), scores (B, H, L, L), candidate_keys (B, H, L, item_dim) and values (B, H L, d).
        keys: (B, L) bool; None: all are there.
        valid: (B, S) bool, S slots behind L - S other tokens.
        layers: of each qkv, attention_out, attention_norm, ffn_hidden, ffn_out and ffn_norm, weight and bias.
        num_heads: H.
        num_slots: how many of the first slots are given back, at most S.
        epsilon: of the layer norms.
    """
    num_pairs, num_candidates = candidates.shape[0] * candidates.shape[1], candidates.shape[1]
    num_tokens, dim = user[0].shape[1:]
    sizes, options = sizes_of(num_tokens, num_tokens - valid.shape[1], candidates.shape[2], dim, layers[0][6].shape[0])
    of_layers = tuple(tuple(one[4:]) for one in layers), tuple(tuple(one[:4]) for one in layers[1:])
    masks = None if keys is None else keys.view(torch.uint8), valid.view(torch.uint8)
    given = out, tuple(user), *masks, candidates, own, *of_layers, num_candidates, (dim // num_heads) ** -0.5, epsilon
    heads = {"HEADS": num_heads, "HEAD": dim // num_heads}
    with torch.cuda.device_of(out):
        encode[(num_pairs,)](
            *given, **sizes, **heads, SLOTS=num_slots, POOLED=out.shape[2] - num_slots, HOW="tf32x3", **options
        )


def sizes_of(
    num_tokens: int, num_others: int, item_dim: int, dim: int, hidden_dim: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernel is built for, and how."""
    length, item_width, width = (max(16, 1 << (size - 1).bit_length()) for size in (num_tokens, item_dim, dim))
    sizes = {"TOKENS": num_tokens, "LENGTH": length, "FIRST": num_others, "ITEM": item_dim, "ITEM_WIDTH": item_width}
    sizes |= {"DIM": dim, "WIDTH": width, "HIDDEN": hidden_dim}
    return sizes, {"num_warps": 8 if length > 64 else 4, "num_stages": 1}
