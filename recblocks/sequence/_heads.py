"""Queries, keys and values of each head, of one product."""

from __future__ import annotations

from torch import Tensor


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three of (B, num_heads, L, head_dim) from (B, L, 3 num_heads head_dim).

    Parts that lie side by side have their gradients put together in one pass over memory, slices of a stack in three.
    """
    rows, slots, width = qkv.shape
    shape = rows, slots, num_heads, width // (3 * num_heads)
    q, k, v = (part.view(shape).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    return q, k, v
