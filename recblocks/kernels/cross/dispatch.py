"""A layer of a cross network in one product on an NVIDIA GPU, as an operator of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recblocks.kernels.dispatch import on_nvidia, transformed


def runs_on(first: Tensor, crossed: Tensor, hidden: Tensor, last: nn.Module) -> bool:
    """Whether `cross_layer` takes them, with the weight and bias of a plain linear map.

    All are of one dtype on an NVIDIA GPU, without gradients, autocast and transforms. A gradient needs the product
    itself, which is then better made alone.
    """
    if transformed() or torch.compiler.is_exporting() or torch.is_autocast_enabled("cuda"):
        return False
    if type(last) is not nn.Linear or last._forward_hooks or last._forward_pre_hooks or first.ndim < 2:
        return False
    given = first, crossed, hidden, last.weight, last.bias
    if not on_nvidia(given) or any(one.dtype != first.dtype for one in given) or first.dtype == torch.float64:
        return False
    return not (torch.is_grad_enabled() and any(one.requires_grad for one in given))


@torch.library.custom_op("recblocks::cross_layer", mutates_args=())
def cross_layer(first: Tensor, crossed: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``first ⊙ (W hidden + b) + crossed``, without a gradient.

    Args:
        first: (..., D) the network's input.
        crossed: (..., D) the layer's input.
        hidden: (..., K) what is multiplied: the layer's input, or what low rank makes of it.
        weight: (D, K).
        bias: (D,).

    Returns:
        (..., D).
    """
    from recblocks.kernels.cross import triton

    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    if out.numel():
        first, crossed, hidden = (one.contiguous().flatten(0, -2) for one in (first, crossed, hidden))
        triton.fill(out.flatten(0, -2), first, crossed, hidden, weight.contiguous(), bias.contiguous())
    return out


@cross_layer.register_fake
def _(first: Tensor, *_: Any) -> Tensor:
    return torch.empty(first.shape, dtype=first.dtype, device=first.device)
