"""Log-periodic time encoding, and the two differences of a sequence: since its latest action, and between actions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from recblocks import _checks
from recblocks.kernels.time_waves.dispatch import (
    encode_spans,
    encode_times,
    in_one_kernel,
    log_seconds,
    runs_on,
    whole_and_part,
)

Periods = Sequence[float] | Tensor | npt.NDArray[np.floating[Any]]

_UNITS_PER_SECOND = {"s": 1, "ms": 1000}
_HOUR = 3600.0
_DAY = 24 * _HOUR

PINNERFORMER_PERIODS: tuple[float, ...] = (
    *(hours * _HOUR for hours in (0.25, 0.5, 0.75, 1, 2, 4, 8, 16)),
    *(days * _DAY for days in (1, 7, 28, 365)),
)
"""The 12 periods of absolute time, in seconds: a quarter of an hour to a year (PinnerFormer, section A.1)."""


def log_spaced_periods(num: int, *, shortest: float, longest: float) -> tuple[float, ...]:
    """Space periods evenly on a log scale: ``shortest * (longest / shortest) ** (i / (num - 1))``.

    Args:
        num: how many periods, at least 2.
        shortest: the first period, in seconds.
        longest: the last period, in seconds.

    Returns:
        ``num`` periods in seconds, ascending; the ends are exactly ``shortest`` and ``longest``.

    Raises:
        TypeError, ValueError: ``num`` is no int of at least 2, or not ``0 < shortest < longest``.

    Example:
        >>> [round(period, 3) for period in log_spaced_periods(4, shortest=1, longest=1000)]
        [1.0, 10.0, 100.0, 1000.0]

    Source: PinnerFormer, section A.1: ``log_spaced_periods(32, shortest=1, longest=28 * 86400)`` for time differences.
    """
    _checks.positive_int("num", num)
    _checks.number("num", num, at_least=2)
    _checks.number("shortest", shortest, above=0)
    _checks.number("longest", longest, above=shortest)
    step = math.log(longest / shortest) / (num - 1)
    between = (shortest * math.exp(i * step) for i in range(1, num - 1))
    return (float(shortest), *between, float(longest))


def log_periodic_features(t: Tensor, *, periods: Periods, phase: Tensor | None = None, unit: str = "s") -> Tensor:
    """Encode a time by its place in each period, and by its logarithm.

    ``[cos(2πt/p_1 + φ_1), sin(2πt/p_1 + φ_2), …, cos(2πt/p_P + φ_{2P-1}), sin(2πt/p_P + φ_{2P}), log1p(t)]``

    Whole turns are dropped in integer arithmetic before anything is rounded, so every number is within 2e-6 of the
    formula at the timestamps of today (1.7e12 ms), for periods of a second or longer.

    Args:
        t: (...) times, int64 or finite float64, in ``unit``. The logarithm takes a negative time as 0.
        periods: P periods p, in seconds; fixed, so no gradient.
        phase: (2P,) φ, one phase each for a cosine and its sine; None is zeros.
        unit: ``"s"`` or ``"ms"``: what ``t`` counts. The logarithm is of seconds in either case.

    Returns:
        (..., 2P+1) features, float32 whatever the autocast; float64 where ``phase`` is float64.

    Raises:
        TypeError: ``t`` is of another dtype: float32 resolves only 128 s at 1.7e9 s.
        ValueError: unknown ``unit``, a period that is not positive, a phase of another shape, or, on a CPU, a
            time not finite or beyond int64.

    Example:
        >>> three_in_the_morning = torch.tensor([1_700_017_200_000])
        >>> log_periodic_features(three_in_the_morning, periods=[86400.0], unit="ms").round(decimals=2)
        tensor([[ 0.7100,  0.7100, 21.2500]])

    Source: PinnerFormer, section A.1.

    Note:
        The paper takes ``log(t)``, which a difference of 0 does not have; we take ``log1p``. On a CPU that has a
        compiler of C++ the waves are made in one pass, and elsewhere in plain torch, both within the bound.
    """
    _checks.choice("unit", unit, _UNITS_PER_SECOND)
    _checks.tensor("t", t, dtype=(torch.int64, torch.float64))
    frequencies = torch.tensor(_fixed_point_frequencies(periods, unit), dtype=torch.int64, device=t.device)
    return _encode(t, frequencies, phase, unit)


class LogPeriodicTimeEncoder(nn.Module):
    """`log_periodic_features` with fixed periods and a learned phase.

    The output is float32 (float64 after ``.double()``), and the periods keep all their digits, whatever dtype the
    module is cast to.

    Args:
        periods: P periods, in seconds.
        unit: ``"s"`` or ``"ms"``: what the times given to ``forward`` count.
        learn_phase: whether φ is a parameter (2P,), zeros at first; otherwise it is 0 and ``phase`` is None.
        device, dtype: of the phase.

    Attributes:
        out_dim: 2P + 1.

    Raises:
        TypeError, ValueError: a period that is not a positive number, or an unknown ``unit``.

    Example:
        >>> encoder = LogPeriodicTimeEncoder(PINNERFORMER_PERIODS, unit="ms")
        >>> encoder(torch.tensor([[1_700_000_000_000, 1_600_000_000_000]])).shape
        torch.Size([1, 2, 25])

    Source: PinnerFormer, section A.1.
    """

    frequencies: Tensor
    phase: nn.Parameter | None

    def __init__(
        self,
        periods: Periods,
        *,
        unit: str = "s",
        learn_phase: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.choice("unit", unit, _UNITS_PER_SECOND)
        self.unit = unit
        self.periods = tuple(_as_floats(periods))
        self.out_dim = 2 * len(self.periods) + 1
        # An integer buffer: a cast of the module to a shorter float does not round it, and no call copies it again.
        frequencies = torch.empty(2, len(self.periods), device=device, dtype=torch.int64)
        self.register_buffer("frequencies", frequencies, persistent=False)
        phase = nn.Parameter(torch.empty(2 * len(self.periods), device=device, dtype=dtype)) if learn_phase else None
        self.register_parameter("phase", phase)
        self.register_load_state_dict_post_hook(_fill_after_loading)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the phase with zeros and the buffer from the periods."""
        self._fill_frequencies(self.frequencies.device)
        if self.phase is not None:
            nn.init.zeros_(self.phase)

    def forward(self, t: Tensor) -> Tensor:
        """Encode ``t`` (...), int64 or float64, into (..., 2P+1); see `log_periodic_features`."""
        _checks.tensor("t", t, dtype=(torch.int64, torch.float64))
        return _encode(t, self.frequencies, self.phase, self.unit)

    def _fill_frequencies(self, device: torch.device) -> None:
        values = _fixed_point_frequencies(self.periods, self.unit)
        self.frequencies = torch.tensor(values, dtype=torch.int64, device=device)

    def extra_repr(self) -> str:
        """Show what was asked for."""
        return f"{len(self.periods)} periods, unit={self.unit!r}, learn_phase={self.phase is not None}"


def _fill_after_loading(module: nn.Module, _incompatible_keys: object) -> None:
    """Compute the frequencies, on the CPU or where the phase is if they were left on the meta device."""
    assert isinstance(module, LogPeriodicTimeEncoder)
    device = torch.device("cpu") if module.phase is None else module.phase.device
    module._fill_frequencies(device if module.frequencies.is_meta else module.frequencies.device)


def _as_floats(periods: Periods) -> list[float]:
    values = periods.tolist() if isinstance(periods, (Tensor, np.ndarray)) else periods
    if not isinstance(values, Collection):
        raise TypeError(f"periods must be a sequence of numbers, got {_checks.describe(periods)}")
    if not values:
        raise ValueError("periods must hold at least one period, got none")
    for i, period in enumerate(values):
        _checks.number(f"periods[{i}]", period, above=0)
    return [float(period) for period in values]


def _fixed_point_frequencies(periods: Periods, unit: str) -> list[list[int]]:
    """Turns per unit of time, and per 2**-32 of it, as 64-bit fixed point: int64 counts of 2**-64 of a turn.

    Only the fraction of a turn matters, so a frequency above one turn wraps.
    """
    rows = []
    for parts in (1, 2**32):
        row = []
        for period in _as_floats(periods):
            numerator, denominator = period.as_integer_ratio()
            per_turn = numerator * _UNITS_PER_SECOND[unit] * parts
            nearest = (2**65 * denominator + per_turn) // (2 * per_turn)
            row.append((nearest + 2**63) % 2**64 - 2**63)
        rows.append(row)
    return rows


def _encode(t: Tensor, frequencies: Tensor, phase: Tensor | None, unit: str) -> Tensor:
    if t.is_floating_point() and _checks.readable(t) and not bool((t.abs() < 2.0**63).all()):
        raise ValueError(f"t must be finite and within int64, got {_checks.describe(t)} with one that is not")
    if phase is not None:
        _checks.floating("phase", phase, 2 * frequencies.shape[1])
    if runs_on(t, frequencies, phase):
        phase = None if phase is None else phase.to(torch.float32)
        features: Tensor = encode_times(t, frequencies, phase, _UNITS_PER_SECOND[unit], 0)
        return features
    return _encode_in_torch(t, frequencies, phase, unit)


def _encode_in_torch(t: Tensor, frequencies: Tensor, phase: Tensor | None, unit: str) -> Tensor:
    # An int64 product wraps modulo 2**64, which is one turn: the whole turns fall away and the rest is exact. The
    # frequency is off by half a 2**-64 at most: at 1.7e12 that is 4.6e-8 of a turn, an error of 2.9e-7. Float32 then
    # rounds turns, 2π, their product (up to 1.9e-7 each, an angle of π) and the wave (1.2e-7): 1e-6 together.
    whole, part = whole_and_part(t)
    turns = whole[..., None] * frequencies[0]
    if part is not None:
        turns = turns + part[..., None] * frequencies[1]

    dtype = torch.float32 if phase is None else torch.promote_types(phase.dtype, torch.float32)
    angle = turns.to(dtype) * (2 * math.pi / 2**64)
    cos_angle, sin_angle = angle, angle
    if phase is not None:
        cos_phase, sin_phase = phase.to(dtype).view(-1, 2).unbind(1)
        cos_angle, sin_angle = angle + cos_phase, angle + sin_phase
    waves = torch.stack([cos_angle.cos(), sin_angle.sin()], dim=-1).flatten(-2)
    return torch.cat([waves, log_seconds(t, _UNITS_PER_SECOND[unit])[..., None].to(dtype)], dim=-1)


def time_since_latest(time: Tensor, valid: Tensor | None = None, *, offsets: Tensor | None = None) -> Tensor:
    """How long before its sequence's latest action each action was: ``time[latest] - time[i]``.

    The latest action is the first valid slot, since slot 0 is the most recent.

    Args:
        time: (B, M) times, int64 or float64; or (T,) packed, with ``offsets``.
        valid: (B, M) bool, True = a real action; None: all are.
        offsets: (B+1,) int64 where each packed sequence starts, ending with T.

    Returns:
        The differences, of the shape, dtype and unit of ``time``; 0 where invalid.

    Raises:
        TypeError, ValueError: a wrong shape or dtype, ``valid`` beside ``offsets``, or offsets that do not ascend to T.

    Example:
        >>> time_since_latest(torch.tensor([[90, 70, 10]]), torch.tensor([[True, True, False]]))
        tensor([[ 0, 20,  0]])
        >>> time_since_latest(torch.tensor([90, 70, 10]), offsets=torch.tensor([0, 2, 3]))
        tensor([ 0, 20,  0])

    Source: PinnerFormer, sections 3.1 and A.1.
    """
    _check_times(time, valid, offsets)
    if offsets is not None:
        return time[_per_action(offsets[:-1], offsets, time.shape[0])] - time
    if valid is None:
        return time[:, :1] - time
    is_latest = valid & (valid.cumsum(1) == 1)
    latest = time.masked_fill(~is_latest, 0).sum(1, keepdim=True)
    return (latest - time).masked_fill(~valid, 0)


def gap_to_next_older(time: Tensor, valid: Tensor | None = None, *, offsets: Tensor | None = None) -> Tensor:
    """How long after the action before it each action was: ``time[i] - time[next older]``, 0 for the oldest.

    The next older action is the next valid slot, since slot 0 is the most recent.

    Args:
        time: (B, M) times, int64 or float64; or (T,) packed, with ``offsets``.
        valid: (B, M) bool, True = a real action; None: all are.
        offsets: (B+1,) int64 where each packed sequence starts, ending with T.

    Returns:
        The differences, of the shape, dtype and unit of ``time``; 0 where invalid and at each sequence's oldest.

    Raises:
        TypeError, ValueError: a wrong shape or dtype, ``valid`` beside ``offsets``, or offsets that do not ascend to T.

    Example:
        >>> gap_to_next_older(torch.tensor([[90, 70, 55, 10]]), torch.tensor([[True, False, True, False]]))
        tensor([[35,  0,  0,  0]])
        >>> gap_to_next_older(torch.tensor([90, 70, 10]), offsets=torch.tensor([0, 2, 3]))
        tensor([20,  0,  0])

    Source: PinnerFormer, section A.1: "setting the last one to zero".
    """
    _check_times(time, valid, offsets)
    if offsets is not None:
        place = torch.arange(time.shape[0], device=time.device)
        is_oldest = place + 1 == _per_action(offsets[1:], offsets, time.shape[0])
        return (time - time.roll(-1)).masked_fill(is_oldest, 0)
    if valid is None:
        return nn.functional.pad(time[:, :-1] - time[:, 1:], (0, min(1, time.shape[1])))
    slots = time.shape[1]
    own = torch.arange(slots, device=time.device).expand_as(time).masked_fill(~valid, slots)
    first_valid_from = own.flip(1).cummin(1).values.flip(1)
    older = nn.functional.pad(first_valid_from[:, 1:], (0, min(1, slots)), value=slots)
    is_oldest = older == slots
    return (time - time.gather(1, older.masked_fill(is_oldest, 0))).masked_fill(is_oldest | ~valid, 0)


def encode_action_times(
    time: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    encoders: tuple[LogPeriodicTimeEncoder, LogPeriodicTimeEncoder, LogPeriodicTimeEncoder],
) -> list[Tensor]:
    """Encode an action's time, how long before the latest it was, and how long after the next older, in this order.

    Args:
        time: (B, M) or (T,) as `time_since_latest` takes it, and so the next two.
        valid: (B, M) bool.
        offsets: (B+1,) int64.
        encoders: of the three, of one unit.

    Returns:
        (..., out_dim) of each encoder, or on an NVIDIA GPU one of all three, which one kernel makes. At an invalid slot
        they are those of 0.
    """
    _check_times(time, valid, offsets)
    phases = [one.phase for one in encoders]
    if offsets is None and in_one_kernel(time, phases):
        given = [one.frequencies for one in encoders], [one.float() for one in phases if one is not None]
        return [encode_spans(time, valid, *given, _UNITS_PER_SECOND[encoders[0].unit], 0)]
    absolute = time if valid is None else time.masked_fill(~valid, 0)
    spans = absolute, time_since_latest(time, valid, offsets=offsets), gap_to_next_older(time, valid, offsets=offsets)
    return [encoder(span) for encoder, span in zip(encoders, spans, strict=True)]


def _check_times(time: Tensor, valid: Tensor | None, offsets: Tensor | None) -> None:
    times = (torch.int64, torch.float64)
    if offsets is None:
        _checks.tensor("time", time, "B", "M", dtype=times)
        if valid is not None:
            _checks.mask("valid", valid, *time.shape)
        return
    _checks.tensor("time", time, "T", dtype=times)
    if valid is not None:
        raise ValueError("valid must be None beside offsets: every packed action is valid")
    _checks.offsets("offsets", offsets, time.shape[0])


def _per_action(per_sequence: Tensor, offsets: Tensor, num_actions: int) -> Tensor:
    return per_sequence.repeat_interleave(offsets.diff(), output_size=num_actions)
