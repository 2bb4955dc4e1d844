"""Between padded sequences of other libraries and newest first with the padding at the tail."""

from __future__ import annotations

import torch
from torch import Tensor

from recblocks import _checks

ORDERS = ("oldest_first", "newest_first")
SIDES = ("left", "right")


def to_newest_first(
    x: Tensor,
    *,
    valid: Tensor | None = None,
    lengths: Tensor | None = None,
    padding_id: int | None = None,
    order: str = "oldest_first",
    padding: str = "left",
) -> tuple[Tensor, Tensor]:
    """Bring padded sequences to newest first: slot 0 is the most recent action, padding is at the tail.

    Which slots are real comes from one of ``valid``, ``lengths`` and ``padding_id``; without any of them all are.

    Args:
        x: (B, M) or (B, M, ...), any dtype.
        valid: (B, M) bool, True = a real action; it may have holes, which are closed.
        lengths: (B,) int64, real actions of each row, on the side away from ``padding``.
        padding_id: what stands at padded slots of an integer ``x`` (B, M). A real action with this id would be lost.
        order: "oldest_first" or "newest_first", the order of ``x``.
        padding: "left" or "right", where ``x`` is padded; read with ``lengths`` only.

    Returns:
        The sequences, zeros at invalid slots, and their ``valid`` (B, M).

    Raises:
        ValueError: more than one of ``valid``, ``lengths`` and ``padding_id``, or a length outside [0, M].

    Example:
        >>> to_newest_first(torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]), padding_id=0)
        (tensor([[6, 5, 0, 0],
                [4, 3, 2, 1]]), tensor([[ True,  True, False, False],
                [ True,  True,  True,  True]]))
    """
    _checks.choice("order", order, ORDERS)
    real = _real_slots(x, valid, lengths, padding_id, padding)
    if order == "oldest_first":
        x, real = x.flip(1), real.flip(1)
    places = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    return _take(x, places, real.gather(1, places))


def from_newest_first(
    x: Tensor, valid: Tensor, *, order: str = "oldest_first", padding: str = "left"
) -> tuple[Tensor, Tensor]:
    """Undo ``to_newest_first``: bring newest-first sequences to another order and padding side.

    Args:
        x: (B, M) or (B, M, ...), any dtype.
        valid: (B, M) bool, True = a real action; it may have holes, which are closed.
        order: "oldest_first" or "newest_first", the order to give.
        padding: "left" or "right", where to put the padding.

    Returns:
        The sequences, zeros at padded slots, and their mask (B, M), True = a real action.

    Example:
        >>> from_newest_first(torch.tensor([[6, 5, 0, 0]]), torch.tensor([[True, True, False, False]]))
        (tensor([[0, 0, 5, 6]]), tensor([[False, False,  True,  True]]))
    """
    _checks.choice("order", order, ORDERS)
    _checks.choice("padding", padding, SIDES)
    real = _real_slots(x, valid, None, None, padding)
    if order == "oldest_first":
        x, real = x.flip(1), real.flip(1)
    key = real if padding == "left" else ~real
    places = key.to(torch.uint8).argsort(dim=1, stable=True)
    return _take(x, places, real.gather(1, places))


def _real_slots(
    x: Tensor, valid: Tensor | None, lengths: Tensor | None, padding_id: int | None, padding: str
) -> Tensor:
    _checks.tensor("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (B, M) or (B, M, ...), got {_checks.describe(x)}")
    rows, slots = x.shape[:2]
    given = [
        name
        for name, value in (("valid", valid), ("lengths", lengths), ("padding_id", padding_id))
        if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"only one of valid, lengths and padding_id may be given, got {' and '.join(given)}")
    if valid is not None:
        _checks.mask("valid", valid, rows, slots)
        return valid
    if lengths is not None:
        _checks.choice("padding", padding, SIDES)
        _checks.integers("lengths", lengths, rows)
        if _checks.readable(lengths) and rows and not 0 <= int(lengths.min()) <= int(lengths.max()) <= slots:
            raise ValueError(f"lengths must be in [0, {slots}], got {int(lengths.min())} to {int(lengths.max())}")
        place = torch.arange(slots, device=x.device)
        return place >= slots - lengths[:, None] if padding == "left" else place < lengths[:, None]
    if padding_id is not None:
        _checks.integer("padding_id", padding_id)
        _checks.tensor("x", x, "B", "M")
        return x != padding_id
    return torch.ones(rows, slots, dtype=torch.bool, device=x.device)


def _take(x: Tensor, places: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    over = (...,) + (None,) * (x.ndim - 2)
    taken = x.gather(1, places[over].expand(x.shape))
    return torch.where(real[over], taken, torch.zeros((), dtype=x.dtype, device=x.device)), real
