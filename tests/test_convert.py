"""Converting padded sequences to newest first and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recblocks import from_newest_first, to_newest_first

Rows = tuple[int, list[list[int]]]
ROWS = st.integers(0, 6).flatmap(
    lambda slots: st.lists(st.lists(st.integers(1, 9), max_size=slots), max_size=5).map(lambda rows: (slots, rows))
)
ORDER = st.sampled_from(["oldest_first", "newest_first"])
SIDE = st.sampled_from(["left", "right"])


def pad(rows: list[list[int]], slots: int, side: str, order: str) -> torch.Tensor:
    """Rows are given oldest first."""
    padded = torch.zeros(len(rows), slots, dtype=torch.int64)
    for at, row in enumerate(rows):
        actions = row if order == "oldest_first" else row[::-1]
        first = slots - len(row) if side == "left" else 0
        for slot, action in enumerate(actions):
            padded[at, first + slot] = action
    return padded


@given(given_rows=ROWS, order=ORDER, side=SIDE, how=st.sampled_from(["valid", "lengths", "padding_id"]))
def test_every_layout_comes_to_newest_first(given_rows: Rows, order: str, side: str, how: str) -> None:
    slots, rows = given_rows
    x = pad(rows, slots, side, order)
    mark = {"valid": x != 0, "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int64), "padding_id": 0}
    found, valid = to_newest_first(x, order=order, padding=side, **{how: mark[how]})  # type: ignore[arg-type]
    assert torch.equal(found, pad(rows, slots, "right", "newest_first"))
    assert torch.equal(valid, found != 0)


@given(given_rows=ROWS, order=ORDER, side=SIDE)
def test_and_back(given_rows: Rows, order: str, side: str) -> None:
    slots, rows = given_rows
    newest_first = pad(rows, slots, "right", "newest_first")
    found, real = from_newest_first(newest_first, newest_first != 0, order=order, padding=side)
    assert torch.equal(found, pad(rows, slots, side, order))
    assert torch.equal(real, found != 0)


def test_holes_are_closed_and_what_stood_there_is_gone() -> None:
    x = torch.tensor([[1.0, float("nan"), 3.0, float("inf")]])
    valid = torch.tensor([[True, False, True, False]])
    for columns in (x, torch.stack([x, -x], dim=-1)):
        found, mask = to_newest_first(columns, valid=valid)
        assert mask.tolist() == [[True, True, False, False]]
        assert (found if found.ndim == 2 else found[..., 0]).tolist() == [[3.0, 1.0, 0.0, 0.0]]
    assert found[..., 1].tolist() == [[-3.0, -1.0, 0.0, 0.0]]


def test_without_a_mark_everything_is_real() -> None:
    found, valid = to_newest_first(torch.tensor([[0, 1]]))
    assert found.tolist() == [[1, 0]]
    assert valid.all()


def test_gradients_pass_and_stop_at_padding() -> None:
    x = torch.tensor([[5.0, 1.0, 2.0]], requires_grad=True)
    found, _ = to_newest_first(x, lengths=torch.tensor([2]))
    (found * torch.tensor([[1.0, 10.0, 100.0]])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 10.0, 1.0]]


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(3), {}, ValueError, r"x must have shape \(B, M\)"),
        ([1], {}, TypeError, "x must be a torch.Tensor"),
        (torch.ones(2, 3), {"order": "newest"}, ValueError, "order must be one of 'oldest_first', 'newest_first'"),
        (torch.ones(2, 3), {"valid": torch.ones(2, 3)}, TypeError, "valid must be bool"),
        (torch.ones(2, 3), {"lengths": torch.tensor([1, 4])}, ValueError, r"lengths must be in \[0, 3\], got 1 to 4"),
        (torch.ones(2, 3), {"lengths": torch.tensor([1, 1]), "padding": "tail"}, ValueError, "padding must be one of"),
        (torch.ones(2, 3, 1), {"padding_id": 0}, ValueError, "x must have shape"),
        (
            torch.ones(2, 3),
            {"padding_id": 0, "lengths": torch.tensor([1, 1])},
            ValueError,
            "got lengths and padding_id",
        ),
    ],
)
def test_bad_input(x: torch.Tensor, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_newest_first(x, **options)  # type: ignore[arg-type]
