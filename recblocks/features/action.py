"""What one action looks like to a model, and which actions it can look at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recblocks import _checks
from recblocks.features.time import (
    PINNERFORMER_PERIODS,
    LogPeriodicTimeEncoder,
    encode_action_times,
    log_spaced_periods,
)


class KeptActions(NamedTuple):
    """What `drop_out_of_vocabulary` keeps; per row, ``valid`` + the three counts = the valid actions given.

    Attributes:
        slots: (B, max_len) int64, which input slot each output slot takes, ascending; 0 where invalid.
        valid: (B, max_len) bool, True = a kept action; the padding is at the tail.
        unknown_type: (B,) int64, how many were dropped for their type.
        unknown_surface: (B,) int64, how many of a known type were dropped for their surface.
        truncated: (B,) int64, how many in the vocabulary were older than the newest max_len of them.
    """

    slots: Tensor
    valid: Tensor
    unknown_type: Tensor
    unknown_surface: Tensor
    truncated: Tensor


def drop_out_of_vocabulary(
    action_type: Tensor, surface: Tensor, valid: Tensor, *, num_action_types: int, num_surfaces: int, max_len: int
) -> KeptActions:
    """Choose the newest ``max_len`` actions whose type and surface are in the vocabulary.

    An action is kept where ``0 <= action_type < num_action_types`` and ``0 <= surface < num_surfaces``. The kept ones
    close ranks in the order in which they stand, and only then are cut to ``max_len``. Gather each column with
    ``column.gather(1, kept.slots)``.

    Args:
        action_type: (B, S) int64.
        surface: (B, S) int64.
        valid: (B, S) bool, True = a real action; slot 0 is the most recent.
        num_action_types: size of the vocabulary of types.
        num_surfaces: size of the vocabulary of surfaces.
        max_len: how many slots the output has.

    Returns:
        `KeptActions`: the slots to take, and how many actions were dropped for which reason.

    Raises:
        TypeError, ValueError: a wrong shape or dtype, or a size that is no int of at least 1.

    Example:
        >>> action_type, surface = torch.tensor([[0, 7, 1, 1]]), torch.tensor([[0, 0, -1, 1]])
        >>> kept = drop_out_of_vocabulary(
        ...     action_type, surface, torch.ones(1, 4, dtype=torch.bool), num_action_types=2, num_surfaces=2, max_len=3
        ... )
        >>> kept.slots, kept.valid
        (tensor([[0, 3, 0]]), tensor([[ True,  True, False]]))
        >>> kept.unknown_type, kept.unknown_surface, kept.truncated
        (tensor([1]), tensor([1]), tensor([0]))

    Source: PinnerFormer, section 3.1: "drop sequence elements with out of vocabulary terms".
    """
    _checks.integers("action_type", action_type, "B", "S")
    _checks.integers("surface", surface, *action_type.shape)
    _checks.mask("valid", valid, *action_type.shape)
    _checks.positive_int("num_action_types", num_action_types)
    _checks.positive_int("num_surfaces", num_surfaces)
    _checks.positive_int("max_len", max_len)

    of_known_type = valid & _is_index(action_type, num_action_types)
    known = of_known_type & _is_index(surface, num_surfaces)
    num_known = known.sum(1)

    # Each kept action goes to the place that its rank gives it; all the others share a last column, which is cut off.
    rank = known.cumsum(1) - 1
    place = rank.masked_fill(~known, max_len).clamp(max=max_len)
    own_slot = torch.arange(known.shape[1], device=known.device).expand_as(place)
    slots = own_slot.new_zeros(known.shape[0], max_len + 1).scatter(1, place, own_slot)[:, :max_len]
    kept = torch.arange(max_len, device=known.device) < num_known[:, None]

    return KeptActions(
        slots=slots,
        valid=kept,
        unknown_type=valid.sum(1) - of_known_type.sum(1),
        unknown_surface=of_known_type.sum(1) - num_known,
        truncated=(num_known - max_len).clamp(min=0),
    )


class ActionEncoder(nn.Module):
    """Encode each action: what was acted on, how, where, for how long and when.

    ``item ‖ type ‖ surface ‖ log1p(duration) ‖ time ‖ time since the latest action ‖ gap to the next older one``

    The three times are log-periodic, of 25, 65 and 65 numbers, each with a learned phase of its own.

    Args:
        item_dim: width of an item's embedding.
        num_action_types: size of the vocabulary of types.
        num_surfaces: size of the vocabulary of surfaces.
        type_dim: width of the learned embedding of a type.
        surface_dim: width of the learned embedding of a surface.
        unit: ``"s"`` or ``"ms"``: what the times count.
        device, dtype: of the parameters.

    Attributes:
        out_dim: item_dim + type_dim + surface_dim + 156.

    Raises:
        TypeError, ValueError: a size that is no int of at least 1, or an unknown ``unit``.

    Example:
        >>> encoder = ActionEncoder(
        ...     item_dim=16, num_action_types=3, num_surfaces=2, type_dim=4, surface_dim=4, unit="s"
        ... )
        >>> actions = encoder(
        ...     item=torch.randn(1, 2, 16),
        ...     action_type=torch.tensor([[2, 0]]),
        ...     surface=torch.tensor([[1, 1]]),
        ...     duration=torch.tensor([[12.5, 0.0]]),
        ...     time=torch.tensor([[1_700_000_000, 1_699_990_000]]),
        ... )
        >>> actions.shape
        torch.Size([1, 2, 180])

    Source: PinnerFormer, sections 3.1 and A.1.

    Note:
        The paper takes ``log(duration)``, which a duration of 0 does not have; we take ``log1p``.
    """

    def __init__(
        self,
        *,
        item_dim: int,
        num_action_types: int,
        num_surfaces: int,
        type_dim: int,
        surface_dim: int,
        unit: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.positive_int("item_dim", item_dim)
        _checks.positive_int("num_action_types", num_action_types)
        _checks.positive_int("num_surfaces", num_surfaces)
        _checks.positive_int("type_dim", type_dim)
        _checks.positive_int("surface_dim", surface_dim)
        self.item_dim = item_dim
        self.type_table = nn.Embedding(num_action_types, type_dim, device=device, dtype=dtype)
        self.surface_table = nn.Embedding(num_surfaces, surface_dim, device=device, dtype=dtype)
        differences = log_spaced_periods(32, shortest=1, longest=28 * 86400)
        self.time = LogPeriodicTimeEncoder(PINNERFORMER_PERIODS, unit=unit, device=device, dtype=dtype)
        self.since_latest = LogPeriodicTimeEncoder(differences, unit=unit, device=device, dtype=dtype)
        self.gap = LogPeriodicTimeEncoder(differences, unit=unit, device=device, dtype=dtype)
        times = self.time.out_dim + self.since_latest.out_dim + self.gap.out_dim
        self.out_dim = item_dim + type_dim + surface_dim + 1 + times

    def reset_parameters(self) -> None:
        """Draw both tables anew, as torch.nn.Embedding does, and reset the three time encoders."""
        for part in (self.type_table, self.surface_table, self.time, self.since_latest, self.gap):
            part.reset_parameters()

    def forward(
        self,
        item: Tensor,
        action_type: Tensor,
        surface: Tensor,
        duration: Tensor,
        time: Tensor,
        valid: Tensor | None = None,
        *,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Encode padded sequences (B, M), or packed ones (T,) with ``offsets``; slot 0 is the most recent.

        Args:
            item: (B, M, item_dim) or (T, item_dim) embeddings of the items, of any float dtype.
            action_type: (B, M) or (T,) int64 below num_action_types; see `drop_out_of_vocabulary`.
            surface: (B, M) or (T,) int64 below num_surfaces.
            duration: (B, M) or (T,) seconds, not negative, of any float dtype.
            time: (B, M) or (T,) int64 or float64, in ``unit``.
            valid: (B, M) bool, True = a real action; None: all are. What stands at an invalid slot changes nothing.
            offsets: (B+1,) int64 where each packed sequence starts, ending with T.

        Returns:
            (B, M, out_dim) or (T, out_dim) in the parameters' dtype; zeros where invalid.

        Raises:
            TypeError, ValueError: a wrong shape or dtype, ``valid`` beside ``offsets``, offsets that do not ascend to
                T; and on a CPU, at a valid slot, a type or surface out of the vocabulary, or a duration that is not
                finite or negative.
        """
        _checks.tensor("time", time, *(("B", "M") if offsets is None else ("T",)))
        shape = time.shape
        _checks.floating("item", item, *shape, self.item_dim)
        _checks.integers("action_type", action_type, *shape)
        _checks.integers("surface", surface, *shape)
        _checks.floating("duration", duration, *shape)
        times = encode_action_times(time, valid, offsets, (self.time, self.since_latest, self.gap))

        if valid is not None:
            action_type, surface, duration = (
                column.masked_fill(~valid, 0) for column in (action_type, surface, duration)
            )
        _check_indices("action_type", action_type, self.type_table.num_embeddings)
        _check_indices("surface", surface, self.surface_table.num_embeddings)
        _checks.not_negative("duration", duration)

        parts = [
            item,
            self.type_table(action_type),
            self.surface_table(surface),
            duration.to(torch.promote_types(duration.dtype, torch.float32)).log1p()[..., None],
            *times,
        ]
        actions = torch.cat([part.to(self.type_table.weight.dtype) for part in parts], dim=-1)
        return actions if valid is None else actions.masked_fill(~valid[..., None], 0)


def _is_index(values: Tensor, size: int) -> Tensor:
    return (values >= 0) & (values < size)


def _check_indices(name: str, values: Tensor, size: int) -> None:
    if _checks.readable(values) and not bool(_is_index(values, size).all()):
        outside = values[~_is_index(values, size)][0]
        raise ValueError(
            f"{name} must be in [0, {size}) at every valid slot, got {int(outside)}; "
            "drop_out_of_vocabulary chooses the actions that are"
        )
