"""Random time-window mask: in training, a row's most recent hours are sometimes hidden from the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recblocks import _checks

_LARGEST_WINDOW = 2**53  # below it float64 holds every integer, so that an age compares exactly with a window


def random_time_window_mask(
    action_time: Tensor,
    request_time: Tensor,
    *,
    max_window: float,
    valid: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mask what was done within a random time before the request: ``t_req - T < t < t_req``, T ~ U(0, max_window).

    Every row draws its own T. An action at the request's very time, or after it, is not in the interval. A masked
    action is absent: give ``valid & ~masked`` to the sequence model and to whatever else reads the sequence.

    Args:
        action_time: (B, S) int64. Any number may stand at an invalid slot.
        request_time: (B,) int64, in the unit of ``action_time``.
        max_window: the longest window, in that unit; above 0, at most 2**53.
        valid: (B, S) bool, True = a real action; where it is given, a real action after its request is an error.
        generator: source of randomness, on the device of the times; `torch.compile` takes none yet.

    Returns:
        (B, S) bool, True = masked. Times are compared exactly, over all of int64.

    Raises:
        TypeError, ValueError: a wrong shape or dtype, or a window out of bounds; and on a CPU an action after its
            request, at a slot known to be valid.

    Example:
        >>> hour = 3600
        >>> action_time = 1_700_000_000 - hour * torch.tensor([[1, 6, 12, 18], [1, 6, 12, 18]])
        >>> request_time = torch.tensor([1_700_000_000, 1_700_000_000])
        >>> generator = torch.Generator().manual_seed(5)
        >>> random_time_window_mask(action_time, request_time, max_window=24 * hour, generator=generator)
        tensor([[ True,  True,  True, False],
                [ True,  True, False, False]])

    Source: TransAct, section 3.3.4.

    Note:
        The paper hides an action from self-attention; its place in the output would then still reach the first columns
        and the max pool, so here it is absent from everything. It draws T "in each forward pass"; we draw one a row.
    """
    _check(action_time, request_time, valid, max_window)
    uniform = torch.rand(request_time.shape, generator=generator, dtype=torch.float64, device=request_time.device)
    window = (max_window * uniform)[:, None]
    # The difference of two int64 may wrap: of an older time only below 0, and of a later one it is not asked.
    age = request_time[:, None] - action_time
    return (action_time < request_time[:, None]) & (age > 0) & (age < window)


class RandomTimeWindowMask(nn.Module):
    """`random_time_window_mask` in training, nothing masked in evaluation.

    Args:
        max_window: the longest window, in the unit of the times given to ``forward``; the paper takes 24 hours.

    Raises:
        TypeError, ValueError: a window out of bounds.

    Example:
        >>> mask = RandomTimeWindowMask(max_window=24 * 3600).eval()
        >>> mask(torch.tensor([[1_700_000_000, 1_600_000_000]]), torch.tensor([1_700_000_001]))
        tensor([[False, False]])

    Source: TransAct, section 3.3.4.
    """

    def __init__(self, *, max_window: float) -> None:
        super().__init__()
        _check_window(max_window)
        self.max_window = max_window

    def forward(
        self,
        action_time: Tensor,
        request_time: Tensor,
        *,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mask a random window a row in training.

        Args:
            action_time: (B, S) int64.
            request_time: (B,) int64.
            valid: (B, S) bool, or None, as `random_time_window_mask` has it.
            generator: source of randomness in training, as `random_time_window_mask` has it.

        Returns:
            (B, S) bool, True = masked; in evaluation all False.

        Raises:
            TypeError, ValueError: as `random_time_window_mask`.
        """
        if self.training:
            return random_time_window_mask(
                action_time, request_time, max_window=self.max_window, valid=valid, generator=generator
            )
        _check(action_time, request_time, valid, self.max_window)
        return torch.zeros_like(action_time, dtype=torch.bool)


def _check(action_time: Tensor, request_time: Tensor, valid: Tensor | None, max_window: float) -> None:
    _checks.integers("action_time", action_time, "B", "S")
    _checks.integers("request_time", request_time, action_time.shape[0])
    if valid is not None:
        _checks.mask("valid", valid, *action_time.shape)
        _checks.none_late(valid & (action_time > request_time[:, None]))
    _check_window(max_window)


def _check_window(max_window: float) -> None:
    _checks.number("max_window", max_window, above=0, at_most=_LARGEST_WINDOW)
