"""A softmax temperature that is learned and stays above a minimum."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recblocks import _checks


class LearnedTemperature(nn.Module):
    """Learn the temperature τ of a softmax.

    ``τ = minimum + softplus(ρ)``, with one learned number ρ.

    τ is computed in float32 (float64 where ρ is), under autocast and after a cast of the module too. Train ρ in
    float32: a bfloat16 parameter loses steps of less than 0.4 %.

    Args:
        init: τ at the start, above ``minimum``.
        minimum: bound that τ never falls below, above 0.
        device: where ρ lives.
        dtype: of ρ.

    Raises:
        TypeError: ``init`` or ``minimum`` is not a number.
        ValueError: ``init`` is not above ``minimum``, or ``minimum`` is not above 0.

    Example:
        >>> temperature = LearnedTemperature(0.1)
        >>> round(temperature().item(), 6)
        0.1

    Source: PinnerFormer, section 3.3.2 (τ in [0.01, ∞)).

    Note:
        The paper constrains τ and does not say how. A clamp has no gradient at its bound, so τ could not leave it.
    """

    def __init__(
        self,
        init: float = 0.1,
        *,
        minimum: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.number("minimum", minimum, above=0)
        _checks.number("init", init, above=minimum)
        self.init = init
        self.minimum = minimum
        self.rho = nn.Parameter(torch.empty(1, device=device, dtype=dtype))  # FSDP2 takes no 0-dim parameter
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set τ to ``init``."""
        excess = self.init - self.minimum
        nn.init.constant_(self.rho, excess + math.log(-math.expm1(-excess)))

    def forward(self) -> Tensor:
        """Return τ, a tensor of shape ()."""
        rho = self.rho.to(torch.promote_types(self.rho.dtype, torch.float32))
        return self.minimum + F.softplus(rho).squeeze(0)  # no autocast takes softplus to a shorter float

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"init={self.init}, minimum={self.minimum}"
