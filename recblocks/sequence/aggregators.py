"""Other ways to sum up a sequence, as baselines of the encoders: average pooling, a CNN, an RNN, an LSTM."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from recblocks import _checks
from recblocks.kernels import dispatch


def average_pool(x: Tensor, valid: Tensor) -> Tensor:
    """Average the valid slots: ``Σ_s valid[s] x[s] / Σ_s valid[s]``, and zeros where nothing is valid.

    Args:
        x: (B, S, D).
        valid: (B, S) bool, True = a real action. What stands at another slot changes nothing.

    Returns:
        (B, D), in the dtype of ``x``.

    Raises:
        TypeError, ValueError: a wrong shape or dtype.

    Example:
        >>> x = torch.tensor([[[1.0, 2.0], [9.0, 9.0], [4.0, 0.0]]])
        >>> average_pool(x, torch.tensor([[True, False, True]]))
        tensor([[2.5000, 1.0000]])

    Source: TransAct, section 4.3.2.
    """
    _check(x, valid, "D")
    total = x.masked_fill(~valid[..., None], 0).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / valid.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)


class AveragePooling(nn.Module):
    """`average_pool` behind the interface of the other aggregators.

    Args:
        in_dim: width of an action.

    Attributes:
        out_dim: in_dim.

    Raises:
        TypeError, ValueError: a width that is no int of at least 1.

    Example:
        >>> AveragePooling(2)(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]), torch.tensor([[True, True]]))
        tensor([[2., 4.]])

    Source: TransAct, section 4.3.2.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        _checks.positive_int("in_dim", in_dim)
        self.in_dim = in_dim
        self.out_dim = in_dim

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Average the valid of (B, S, in_dim) actions: (B, out_dim) in the dtype of ``x``, zeros where none is."""
        _check(x, valid, self.in_dim)
        return average_pool(x, valid)


class CNNAggregator(nn.Module):
    """The greatest answer of each filter: ``max_i relu(Σ_j W_j x[i + j] + b)``, j = 0..kernel_size−1.

    A window starts at every slot; an invalid slot, and one beyond the sequence, is zeros. The maximum is over the
    windows that hold a valid slot. What stands at an invalid slot changes nothing, nor does more padding.

    Args:
        in_dim: width of an action.
        channels: how many filters.
        kernel_size: how many slots a window holds; windows are 1 slot apart.
        device, dtype: of the parameters.

    Attributes:
        out_dim: channels.

    Raises:
        TypeError, ValueError: a size that is no int of at least 1.

    Example:
        >>> aggregate = CNNAggregator(16, channels=8)
        >>> aggregate(torch.randn(2, 50, 16), torch.ones(2, 50, dtype=torch.bool)).shape
        torch.Size([2, 8])

    Source: TransAct, section 4.3.2: "a 1-d CNN with 256 output channels", "kernel size is 4 and stride is 1".

    Note:
        The paper does not say how its CNN pads, which activation it has, or how its output becomes one vector.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        channels: int = 256,
        kernel_size: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"in_dim": in_dim, "channels": channels, "kernel_size": kernel_size}.items():
            _checks.positive_int(name, size)
        self.in_dim = in_dim
        self.out_dim = channels
        self.kernel_size = kernel_size
        self.filters = nn.Conv1d(in_dim, channels, kernel_size, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the filters anew, as torch.nn.Conv1d does."""
        self.filters.reset_parameters()

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Sum up each sequence.

        Args:
            x: (B, S, in_dim) actions of any float dtype; slot 0 is the most recent.
            valid: (B, S) bool, True = a real action.

        Returns:
            (B, out_dim) in the parameters' dtype; zeros where nothing is valid.

        Raises:
            TypeError, ValueError: a wrong shape or dtype.
        """
        _check(x, valid, self.in_dim)
        dtype = self.filters.weight.dtype
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[0], self.out_dim, dtype=dtype)
        beyond = self.kernel_size - 1
        present = functional.pad(x.to(dtype).masked_fill(~valid[..., None], 0), (0, 0, 0, beyond))
        answers = functional.relu(self.filters(present.transpose(1, 2)))
        holds_valid = functional.pad(valid, (0, beyond)).unfold(1, self.kernel_size, 1).any(2)
        # An answer is at least 0, so that 0 in place of what does not count leaves the maximum as it is.
        return answers.masked_fill(~holds_valid[:, None], 0).amax(2).to(dtype)


class RNNAggregator(nn.Module):
    """The top layer's last state after reading the valid actions from the oldest to the newest.

    ``h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``, ``num_layers`` of them on top of each other. Invalid slots
    are skipped. Parameters are named and drawn as those of `torch.nn.RNN`, whose state_dict fits.

    Args:
        in_dim: width of an action.
        hidden_dim: width of a state.
        num_layers: how many layers.
        device, dtype: of the parameters.

    Attributes:
        out_dim: hidden_dim.

    Raises:
        TypeError, ValueError: a size that is no int of at least 1.

    Example:
        >>> aggregate = RNNAggregator(16, hidden_dim=8)
        >>> aggregate(torch.randn(2, 50, 16), torch.ones(2, 50, dtype=torch.bool)).shape
        torch.Size([2, 8])

    Source: TransAct, section 4.3.2: "2 RNN layers with a hidden dimension of 256".

    Note:
        The paper does not say which state its ranker reads, nor in which order actions are read.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        hidden_dim: int = 256,
        num_layers: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = hidden_dim
        self.num_layers = num_layers
        _register_recurrent_parameters(self, 1, in_dim, hidden_dim, num_layers, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/√hidden_dim, 1/√hidden_dim), as torch.nn.RNN does."""
        _reset_recurrent_parameters(self, self.out_dim)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Sum up each sequence.

        Args:
            x: (B, S, in_dim) actions of any float dtype; slot 0 is the most recent.
            valid: (B, S) bool, True = a real action.

        Returns:
            (B, out_dim) in the parameters' dtype; zeros where nothing is valid. What stands at an invalid slot changes
            nothing.

        Raises:
            TypeError, ValueError: a wrong shape or dtype.
        """
        _check(x, valid, self.in_dim)
        weights = tuple(self.parameters())
        dtype = weights[0].dtype
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[0], self.out_dim, dtype=dtype)
        start = x.new_zeros(self.num_layers, x.shape[0], self.out_dim, dtype=dtype)
        actions = _oldest_first(x.to(dtype), valid)
        states, _ = torch.rnn_tanh(actions, start, weights, True, self.num_layers, 0.0, self.training, False, True)
        return _state_after_the_newest(states, valid).to(dtype)


class LSTMAggregator(nn.Module):
    """The top layer's last state of a long short-term memory after reading the valid actions from the oldest on.

    ``c_t = f ⊙ c_{t-1} + i ⊙ g``, ``h_t = o ⊙ tanh(c_t)`` with i, f, o = sigmoid and g = tanh of
    ``W_ih x_t + b_ih + W_hh h_{t-1} + b_hh``, ``num_layers`` of them on top of each other. Invalid slots are skipped.
    Parameters are named and drawn as those of `torch.nn.LSTM`, whose state_dict fits.

    Args:
        in_dim: width of an action.
        hidden_dim: width of a state.
        num_layers: how many layers.
        device, dtype: of the parameters.

    Attributes:
        out_dim: hidden_dim.

    Raises:
        TypeError, ValueError: a size that is no int of at least 1.

    Example:
        >>> aggregate = LSTMAggregator(16, hidden_dim=8)
        >>> aggregate(torch.randn(2, 50, 16), torch.ones(2, 50, dtype=torch.bool)).shape
        torch.Size([2, 8])

    Source: TransAct, section 4.3.2: "2 LSTM layers with the hidden size of 256".

    Note:
        The paper does not say which state its ranker reads, nor in which order actions are read.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        hidden_dim: int = 256,
        num_layers: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = hidden_dim
        self.num_layers = num_layers
        _register_recurrent_parameters(self, 4, in_dim, hidden_dim, num_layers, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/√hidden_dim, 1/√hidden_dim), as torch.nn.LSTM does."""
        _reset_recurrent_parameters(self, self.out_dim)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Sum up each sequence.

        Args:
            x: (B, S, in_dim) actions of any float dtype; slot 0 is the most recent.
            valid: (B, S) bool, True = a real action.

        Returns:
            (B, out_dim) in the parameters' dtype; zeros where nothing is valid. What stands at an invalid slot changes
            nothing.

        Raises:
            TypeError, ValueError: a wrong shape or dtype.
        """
        _check(x, valid, self.in_dim)
        weights = tuple(self.parameters())
        dtype = weights[0].dtype
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[0], self.out_dim, dtype=dtype)
        start = x.new_zeros(self.num_layers, x.shape[0], self.out_dim, dtype=dtype)
        actions = _oldest_first(x.to(dtype), valid)
        if torch.compiler.is_compiling():
            # On a CPU the compiler takes an operator whose backward it cannot trace, unless the input needs a gradient.
            actions = actions + 0 * weights[0][0, 0]
        # Under autocast torch asks oneDNN for an LSTM in bfloat16, which fails on a CPU without instructions for it.
        with dispatch.without_autocast(x.device) if x.device.type == "cpu" else contextlib.nullcontext():
            states, _, _ = torch.lstm(
                actions, (start, start), weights, True, self.num_layers, 0.0, self.training, False, True
            )
        return _state_after_the_newest(states, valid).to(dtype)


def _check(x: Tensor, valid: Tensor, width: int | str) -> None:
    _checks.floating("x", x, "B", "S", width)
    _checks.mask("valid", valid, *x.shape[:2])


def _register_recurrent_parameters(
    module: nn.Module,
    num_gates: int,
    in_dim: int,
    hidden_dim: int,
    num_layers: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Register on the module itself what torch.nn.RNN or LSTM would hold: the compiler refuses those two Modules."""
    for name, size in {"in_dim": in_dim, "hidden_dim": hidden_dim, "num_layers": num_layers}.items():
        _checks.positive_int(name, size)
    gates = num_gates * hidden_dim
    for layer in range(num_layers):
        below = in_dim if layer == 0 else hidden_dim
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (gates, below), "weight_hh": (gates, hidden_dim)}
        shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            module.register_parameter(f"{name}_l{layer}", parameter)


def _reset_recurrent_parameters(module: nn.Module, hidden_dim: int) -> None:
    bound = 1 / math.sqrt(hidden_dim)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound)


def _oldest_first(x: Tensor, valid: Tensor) -> Tensor:
    """Put a row's valid actions first, the oldest before the newer, and zeros behind them."""
    slots = torch.arange(valid.shape[1], device=valid.device)
    order = torch.where(valid, -slots, 1).argsort(dim=1)
    return x.masked_fill(~valid[..., None], 0).gather(1, order[..., None].expand_as(x))


def _state_after_the_newest(states: Tensor, valid: Tensor) -> Tensor:
    """Take each row's state at its last valid step; zeros where it has none."""
    num_valid = valid.sum(1)[:, None, None]
    last = (num_valid - 1).clamp(min=0).expand(-1, 1, states.shape[2])
    return states.gather(1, last).masked_fill(num_valid == 0, 0)[:, 0]
