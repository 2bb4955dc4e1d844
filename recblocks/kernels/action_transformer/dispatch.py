"""TransAct's encoder for a user's candidates in one kernel on an NVIDIA GPU, as an operator of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recblocks.kernels.dispatch import on_nvidia, watched

_MOST = 128  # tokens, and numbers of one, of which a multiprocessor's registers hold all
_MOST_LAYERS, _OF_A_LAYER = 2, 12  # the tensors of more take registers too


def runs_on(user: Sequence[Tensor], valid: Tensor, candidates: Tensor, layers: Sequence[Tensor]) -> bool:
    """Whether `encode_candidates` takes them: of bfloat16 or float16 on an NVIDIA GPU, without gradients and autocast.

    Tokens may be 128, and 128 numbers wide, and layers two.
    """
    if watched() or torch.is_autocast_enabled("cuda"):
        return False
    if valid.shape[1] == 0 or len(layers) > _MOST_LAYERS * _OF_A_LAYER:
        return False
    every = [*user, candidates, *layers]
    if candidates.dtype not in (torch.bfloat16, torch.float16) or max(*user[0].shape[1:], candidates.shape[-1]) > _MOST:
        return False
    if not on_nvidia(every) or any(one.dtype != candidates.dtype for one in every):
        return False
    return not (torch.is_grad_enabled() and any(one.requires_grad for one in every))


@torch.library.custom_op("recblocks::encode_candidates", mutates_args=())
def encode_candidates(
    candidates: Tensor,
    own: Tensor,
    user: list[Tensor],
    keys: Tensor | None,
    valid: Tensor,
    layers: list[Tensor],
    num_heads: int,
    num_slots: int,
    max_pool: bool,
    epsilon: float,
) -> Tensor:
    """Users' actions beside each of their candidates, from what `ActionTransformer.encode_user` found; no gradient.

    Args:
        candidates: (B, N, item_dim).
        own: (B, N, d) what of a candidate reaches every token.
        user: residual, scores, candidate_keys and values of `recblocks.sequence.action_transformer.EncodedUser`.
        keys: (B, L) bool; None: all are there.
        valid: (B, S) bool, S slots behind L - S other tokens.
        layers: of each layer qkv, attention_out, attention_norm, ffn_hidden, ffn_out and ffn_norm, weight and bias.
        num_heads: H.
        num_slots: K, how many of the first slots are given back.
        max_pool: whether the largest of all valid slots follows.
        epsilon: of the layer norms.

    Returns:
        (B, N, K, d), or (B, N, K + 1, d) with the max pool; zeros where a slot is invalid or there is none.
    """
    from recblocks.kernels.action_transformer import triton

    had = min(num_slots, valid.shape[1])
    out = own.new_empty((*own.shape[:2], had + max_pool, own.shape[2]))
    if out.numel():
        given = candidates.contiguous(), own.contiguous(), [one.contiguous() for one in user]
        masks = None if keys is None else keys.contiguous(), valid.contiguous()
        contiguous = [one.contiguous() for one in layers]
        by_layer = [contiguous[at : at + _OF_A_LAYER] for at in range(0, len(layers), _OF_A_LAYER)]
        triton.fill(out, *given, *masks, by_layer, num_heads, had, epsilon)
    if had == num_slots:
        return out
    missing = out.new_zeros(*out.shape[:2], num_slots - had, out.shape[3])
    return torch.cat([out[:, :, :had], missing, out[:, :, had:]], 2)


@encode_candidates.register_fake
def _(_candidates: Tensor, own: Tensor, *others: Any) -> Tensor:
    *_, num_slots, max_pool, _ = others
    return own.new_empty((*own.shape[:2], num_slots + max_pool, own.shape[2]))
