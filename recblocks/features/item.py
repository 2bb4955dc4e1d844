"""The item tower: from an item's content embedding to a unit vector beside the users'."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recblocks import _checks


class ItemEncoder(nn.Module):
    """``y / |y|`` where ``y = W2 GELU(W1 x + b1) + b2``.

    Args:
        in_dim: width of an item's content embedding.
        out_dim: width of the output, that of the user embedding.
        hidden_dim: width between the two layers.
        device, dtype: of the parameters.

    Attributes:
        out_dim: as given.

    Raises:
        TypeError, ValueError: a width that is no int of at least 1.

    Example:
        >>> encoder = ItemEncoder(16, 8, hidden_dim=32)
        >>> items = encoder(torch.randn(3, 16))
        >>> items.shape, items.norm(dim=-1).detach().round(decimals=4)
        (torch.Size([3, 8]), tensor([1., 1., 1.]))

    Source: PinnerFormer, section 3.2: "an MLP that takes only PinSage as an input", then the L2 norm.

    Note:
        The paper does not say how deep its MLP is, nor its activation; we take those of the user's output MLP.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.positive_int("in_dim", in_dim)
        _checks.positive_int("out_dim", out_dim)
        _checks.positive_int("hidden_dim", hidden_dim)
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.hidden = nn.Linear(in_dim, hidden_dim, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_dim, out_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw both layers anew, as torch.nn.Linear does."""
        self.hidden.reset_parameters()
        self.out.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Encode content embeddings ``x`` (..., in_dim), of any float dtype.

        Returns:
            (..., out_dim) unit vectors in the parameters' dtype, under autocast too; the norm is taken in float32 at
            least. A ``y`` of zeros stays zeros.

        Raises:
            TypeError, ValueError: ``x`` is no floating-point tensor of width in_dim.
        """
        _checks.floating("x", x)
        if x.ndim == 0 or x.shape[-1] != self.in_dim:
            raise ValueError(f"x must have shape (..., {self.in_dim}), got {_checks.describe(x)}")
        dtype = self.out.weight.dtype
        y = self.out(nn.functional.gelu(self.hidden(x.to(dtype))))
        return nn.functional.normalize(y.to(torch.promote_types(dtype, torch.float32)), dim=-1).to(dtype)
