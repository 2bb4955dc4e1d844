"""Explicit feature crosses of bounded degree (DCN v2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recblocks import _checks
from recblocks.kernels.cross.dispatch import cross_layer, runs_on


class CrossNetwork(nn.Module):
    """Multiply the input with a learned transformation of itself, layer by layer.

    ``x_{l+1} = x_0 ⊙ f_l(x_l) + x_l``, where ``f_l(x)`` is

    - full rank: ``W_l x + b_l``;
    - low rank: ``U_l V_lᵀ x + b_l``;
    - experts: ``Σ_i g_i(x) U_li relu(C_li relu(V_liᵀ x)) + b_l``, where all layers share the gates
      ``g(x) = softmax(G x)``.

    After L layers every output is a polynomial of degree L + 1 in the inputs (experts: with those gates and kinks).

    Args:
        in_dim: width D of the input, and of the output.
        num_layers: L.
        rank: None is full rank, with D² weights a layer; else the width of each U and V, with 2 D rank.
        num_experts: how many low-rank experts are mixed; 1 is plain low rank.
        device, dtype: of the parameters.

    Attributes:
        in_dim: as given.
        layers: L parts. Full rank: ``weight`` is W and ``bias`` b. Otherwise ``down.weight`` (num_experts * rank, D) is
            every Vᵀ, one below the other, ``up.weight`` (D, num_experts * rank) every U, side by side, ``up.bias`` b,
            and ``mix`` (num_experts, rank, rank) every C, None where there is one expert.
        gate: a ``torch.nn.Linear`` of G (num_experts, D); None where there is one expert.

    Raises:
        TypeError, ValueError: a size that is no int of at least 1, or several experts without a rank.

    Example:
        >>> cross = CrossNetwork(2, num_layers=1)
        >>> with torch.no_grad():
        ...     _ = cross.layers[0].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        >>> cross(torch.tensor([3.0, 5.0])).tolist()  # 3 * 5 + 3, and 5 * 0 + 5
        [18.0, 5.0]

    Source: Wang et al., DCN V2 (arXiv 2008.13535), equations 1 to 4; TransAct, section 3.1, takes the full rank.

    Note:
        The paper leaves the gate and the activation g of equation 4 open. Ours are torchrec's: a softmax without bias,
        and relu. Since the gates add up to 1, the bias stands outside of the sum. Every expert's matrix is drawn by its
        own fans, where torchrec takes the stack of all experts for one.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        num_layers: int,
        rank: int | None = None,
        num_experts: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.positive_int("in_dim", in_dim)
        _checks.positive_int("num_layers", num_layers)
        _checks.positive_int("num_experts", num_experts)
        if rank is not None:
            _checks.positive_int("rank", rank)
        elif num_experts > 1:
            raise ValueError(f"rank must be an int where num_experts is above 1, got None with {num_experts} experts")

        self.in_dim = in_dim
        self.layers = nn.ModuleList(
            nn.Linear(in_dim, in_dim, device=device, dtype=dtype)
            if rank is None
            else _LowRank(in_dim, rank, num_experts, device, dtype)
            for _ in range(num_layers)
        )
        self.gate = nn.Linear(in_dim, num_experts, bias=False, device=device, dtype=dtype) if num_experts > 1 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W, U, V and C by Xavier's normal rule and the gate as torch.nn.Linear does; the biases become 0."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                _draw(layer, self.in_dim + self.in_dim)
            elif isinstance(layer, _LowRank):
                layer.reset_parameters()
        if self.gate is not None:
            self.gate.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Cross the features ``x`` (..., in_dim), of any float dtype.

        Returns:
            (..., in_dim) in the parameters' dtype, under autocast too.

        Raises:
            TypeError, ValueError: ``x`` is no floating-point tensor of width in_dim.
        """
        _checks.floating("x", x)
        if x.ndim == 0 or x.shape[-1] != self.in_dim:
            raise ValueError(f"x must have shape (..., {self.in_dim}), got {_checks.describe(x)}")
        first = crossed = x.to(next(self.parameters()).dtype)
        last: nn.Module
        for layer in self.layers:
            if isinstance(layer, _LowRank):
                gates = None if self.gate is None else self.gate(crossed).softmax(-1)
                hidden, last = layer(crossed, gates), layer.up
            else:
                hidden, last = crossed, layer
            if runs_on(first, crossed, hidden, last):
                crossed = cross_layer(first, crossed, hidden, last.weight, last.bias)
            else:
                crossed = torch.addcmul(crossed, first, last(hidden))
        return crossed


class _LowRank(nn.Module):
    """``Vᵀ x``, or with gates what the experts make of it, for ``up``, which holds every U and b, to multiply.

    x is (..., D) and gates (..., num_experts).
    """

    def __init__(
        self,
        in_dim: int,
        rank: int,
        num_experts: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Linear(in_dim, num_experts * rank, bias=False, device=device, dtype=dtype)
        mix = torch.empty(num_experts, rank, rank, device=device, dtype=dtype)
        self.mix = nn.Parameter(mix) if num_experts > 1 else None
        self.up = nn.Linear(num_experts * rank, in_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        _draw(self.down, self.down.in_features + self.rank)
        _draw(self.up, self.rank + self.up.out_features)
        if self.mix is not None:
            nn.init.normal_(self.mix, std=_xavier(self.rank + self.rank))

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.down(x)
        if gates is not None:
            experts = hidden.reshape(*gates.shape, self.rank).relu()
            experts = torch.einsum("...ei,eoi->...eo", experts, self.mix).relu()
            hidden = (gates[..., None] * experts).flatten(-2)
        return hidden


def _draw(linear: nn.Linear, fans: int) -> None:
    """Fill the weight by the fans of one expert's matrix, not of all those that stand in it."""
    nn.init.normal_(linear.weight, std=_xavier(fans))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _xavier(fans: int) -> float:
    return math.sqrt(2 / fans)
