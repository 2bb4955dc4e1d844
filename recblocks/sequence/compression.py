"""Compress a sequence model's output into one vector: some of its columns, and the max pool of all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recblocks import _checks

_COLUMNS = ("first", "random", "all")


def compress_output(x: Tensor, columns: Tensor, valid: Tensor, *, max_pool: bool = True) -> Tensor:
    """Set the chosen columns and the max pool side by side: ``[x[:, c_1] | … | x[:, c_K] | max_s x[:, s]]``.

    The maximum is over the valid slots. A chosen slot that is invalid, or that the sequence does not have, gives zeros,
    and so does the max pool of a row with nothing valid. What stands at an invalid slot changes nothing.

    Args:
        x: (B, S, D) a sequence model's output; slot 0 is the most recent action.
        columns: (K,) int64 c, the slots to take, at least 0.
        valid: (B, S) bool, True = a real action.
        max_pool: whether the maximum follows the columns.

    Returns:
        (B, K*D), or (B, (K+1)*D) with the max pool, in the dtype of ``x``.

    Raises:
        TypeError, ValueError: a wrong shape or dtype; and on a CPU a negative column.

    Example:
        >>> x = torch.tensor([[[1.0, 2.0], [9.0, 9.0], [4.0, 0.0]]])
        >>> valid = torch.tensor([[True, False, True]])
        >>> compress_output(x, torch.tensor([0, 1]), valid)
        tensor([[1., 2., 0., 0., 4., 2.]])

    Source: TransAct, section 3.3.5.
    """
    _checks.floating("x", x, "B", "S", "D")
    _checks.integers("columns", columns, "K")
    _checks.mask("valid", valid, *x.shape[:2])
    if _checks.readable(columns) and bool((columns < 0).any()):
        raise ValueError(f"columns must be at least 0, got {_checks.describe(columns)} with {int(columns.min())}")
    rows, slots, _ = x.shape
    if slots == 0:
        return x.new_zeros(rows, (columns.shape[0] + max_pool) * x.shape[2])

    missing = columns >= slots
    at = columns.masked_fill(missing, 0)
    absent = ~valid.index_select(1, at) | missing
    kept = x.index_select(1, at).masked_fill(absent[..., None], 0)
    if not max_pool:
        return kept.flatten(1)
    pool = x.masked_fill(~valid[..., None], -torch.inf).amax(1).masked_fill(~valid.any(1, keepdim=True), 0)
    return torch.cat([kept, pool[:, None]], dim=1).flatten(1)


class OutputCompression(nn.Module):
    """Compress a sequence model's output to its first, random or all columns, and the max pool.

    Every row of the paper's Table 4, for sequences of S slots:

    ==========================  ==========================================================================
    a random column             ``OutputCompression(1, columns="random", max_len=S, max_pool=False)``
    the first column            ``OutputCompression(1, max_pool=False)``
    K random columns            ``OutputCompression(K, columns="random", max_len=S, max_pool=False)``
    the first K columns         ``OutputCompression(K, max_pool=False)``
    all columns                 ``OutputCompression(S, columns="all", max_pool=False)``
    max pool                    ``OutputCompression(0)``
    the first K and max pool    ``OutputCompression(K)``; the paper takes K = 10
    all columns and max pool    ``OutputCompression(S, columns="all")``
    ==========================  ==========================================================================

    Args:
        num_slots: K, how many columns are taken; 0, for first columns only, leaves the max pool alone.
        columns: ``"first"``: slots 0..K−1, zeros for those that a shorter sequence lacks. ``"random"``: K of the slots
            0..max_len−1, ascending. ``"all"``: every sequence must have exactly K slots.
        max_pool: whether the max pool follows the columns.
        max_len: for random columns, the longest sequence.
        generator: source of the random columns.
        device: of the random columns.

    Attributes:
        slots: for random columns, (K,) int64 which they are; a buffer, saved with the state. Otherwise None.

    Raises:
        TypeError, ValueError: sizes or choices that do not fit each other.

    Example:
        >>> compression = OutputCompression(10)
        >>> x = torch.randn(2, 50, 96)
        >>> compression(x, torch.ones(2, 50, dtype=torch.bool)).shape, compression.out_columns * 96
        (torch.Size([2, 1056]), 1056)

    Source: TransAct, section 3.3.5 and Table 4.

    Note:
        The paper does not say when random columns are drawn. Here once, at construction, without replacement, so that
        what reads the output finds the same slot at the same place in every batch, in training and in serving.
    """

    slots: Tensor | None

    def __init__(
        self,
        num_slots: int,
        *,
        columns: str = "first",
        max_pool: bool = True,
        max_len: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _checks.choice("columns", columns, _COLUMNS)
        if columns == "first" and max_pool:
            _checks.count("num_slots", num_slots)
        else:
            _checks.positive_int("num_slots", num_slots)
        if columns == "random":
            _checks.positive_int("max_len", max_len)
            assert max_len is not None
            if max_len < num_slots:
                raise ValueError(f"max_len must be at least num_slots = {num_slots}, got {max_len}")
        elif max_len is not None:
            raise ValueError(f"max_len must be None for {columns} columns, got {max_len}")
        self.num_slots = num_slots
        self.columns = columns
        self.max_pool = max_pool
        self.max_len = max_len
        slots = torch.empty(num_slots, dtype=torch.int64, device=device) if columns == "random" else None
        self.register_buffer("slots", slots)
        self.reset_parameters(generator=generator)

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Draw the random columns anew, if there are any."""
        if self.slots is not None:
            assert self.max_len is not None
            place = torch.device("cpu") if generator is None else generator.device
            drawn = torch.randperm(self.max_len, generator=generator, device=place)[: self.num_slots]
            self.slots.copy_(drawn.sort().values)

    @property
    def out_columns(self) -> int:
        """How many columns, each D wide, the output has: K, and 1 more with the max pool."""
        return self.num_slots + self.max_pool

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Compress, as `compress_output` does.

        Args:
            x: (B, S, D) a sequence model's output; slot 0 is the most recent action.
            valid: (B, S) bool, True = a real action.

        Returns:
            (B, out_columns * D), in the dtype of ``x``.

        Raises:
            TypeError, ValueError: a wrong shape or dtype, over max_len slots, or not K where all columns are taken.
        """
        _checks.floating("x", x, "B", "S", "D")
        slots = x.shape[1]
        if self.columns == "all" and slots != self.num_slots:
            raise ValueError(f"x must have num_slots = {self.num_slots} slots a row, got {_checks.describe(x)}")
        if self.max_len is not None and slots > self.max_len:
            raise ValueError(f"x must have at most max_len = {self.max_len} slots a row, got {_checks.describe(x)}")
        columns = torch.arange(self.num_slots, device=x.device) if self.slots is None else self.slots
        return compress_output(x, columns, valid, max_pool=self.max_pool)
