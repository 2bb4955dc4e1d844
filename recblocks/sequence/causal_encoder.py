"""A causal transformer over newest-first sequences: one unit embedding at every action, from it and older ones only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recblocks import _checks
from recblocks.kernels.dispatch import watched
from recblocks.sequence._heads import split_heads

# Of packed sequences; with more of them attention spends less on padding, and more calls.
_MAX_GROUPS = 8


class CausalSequenceEncoder(nn.Module):
    """Embed a user at every action from that action and the older ones.

    ``V = X W + PE``; then ``num_layers`` times ``U = V + MHSA(LN(V))``, ``V = U + W2 GELU(W1 LN(U) + b1) + b2``; then
    ``e = y / |y|`` where ``y = W2 GELU(W1 LN(V) + b1) + b2``. Every W1 widens fourfold. Slot i attends to the valid
    slots j ≥ i: itself and what is older. PE is learned, a row a slot. Slot 0, the most recent, is the user's one.

    Padded (B, M) and packed (T,) sequences give the same numbers. Packed, only attention spends work on padding: on a
    CPU, where lengths are read, up to the longest of about as long sequences, elsewhere up to ``max_length``.

    Args:
        in_dim: width of an encoded action.
        out_dim: width of an embedding.
        hidden_dim: width inside, a multiple of ``num_heads``.
        num_layers: how many blocks.
        num_heads: attention heads.
        max_len: the longest sequence, hence how many positions are learned.
        dropout: share of attention weights, and of the outputs of attention and feed-forward, dropped in training.
        device, dtype: of the parameters.

    Attributes:
        out_dim: as given.

    Raises:
        TypeError, ValueError: a size that is no int of at least 1, heads that do not divide hidden_dim, or a dropout
            not in [0, 1).

    Example:
        >>> encoder = CausalSequenceEncoder(16, 8, hidden_dim=32, num_layers=2, num_heads=4, max_len=10)
        >>> users = encoder(torch.randn(3, 10, 16), lengths=torch.tensor([10, 2, 0]))[:, 0]
        >>> users.norm(dim=-1).detach().round(decimals=4)
        tensor([1., 1., 0.])
        >>> encoder(torch.randn(12, 16), offsets=torch.tensor([0, 10, 12, 12]), max_length=10).shape
        torch.Size([12, 8])

    Source: PinnerFormer, sections 3.2 and A.2, equation 3.

    Note:
        The paper prints b2 twice in its output MLP; the inner one is b1. It does not mention dropout; 0 is its model.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        max_len: int,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "out_dim": out_dim, "hidden_dim": hidden_dim}
        sizes |= {"num_layers": num_layers, "num_heads": num_heads, "max_len": max_len}
        for name, size in sizes.items():
            _checks.positive_int(name, size)
        if hidden_dim % num_heads:
            raise ValueError(f"num_heads must divide hidden_dim = {hidden_dim}, got {num_heads}")
        _checks.number("dropout", dropout, at_least=0, below=1)

        self.in_dim = in_dim
        self.out_dim = out_dim
        self.max_len = max_len
        self.project = nn.Linear(in_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.position = nn.Parameter(torch.empty(max_len, hidden_dim, device=device, dtype=dtype))
        self.blocks = nn.ModuleList(
            _Block(hidden_dim, num_heads, dropout, device=device, dtype=dtype) for _ in range(num_layers)
        )
        self.out_norm = nn.LayerNorm(hidden_dim, device=device, dtype=dtype)
        self.out_hidden = nn.Linear(hidden_dim, 4 * hidden_dim, device=device, dtype=dtype)
        self.out = nn.Linear(4 * hidden_dim, out_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the positions from N(0, 0.02²) and reset every layer, as torch.nn does."""
        nn.init.normal_(self.position, std=0.02)
        for layer in (self.project, *self.blocks, self.out_norm, self.out_hidden, self.out):
            layer.reset_parameters()

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        max_length: int | None = None,
        newest_only: bool = False,
    ) -> Tensor:
        """Embed padded sequences, or packed ones given ``offsets``.

        Args:
            x: (B, M, in_dim) or packed (T, in_dim) encoded actions of any float dtype; slot 0 is the most recent.
            valid: (B, M) bool, True = a real action; holes may be anywhere. None: as ``lengths`` says, or all are.
            lengths: (B,) int64, how many of a row's first slots are real; instead of ``valid``.
            offsets: (B+1,) int64 where each packed sequence starts, ending with T.
            max_length: at least the longest packed sequence, at most max_len, which None stands for. Where lengths are
                not read (compiled, or on a GPU), attention takes this many slots a row, and a longer sequence gets
                wrong embeddings, and no other one does.
            newest_only: only the embedding at each sequence's newest valid action, its user's one. The last block and
                the output MLP are then spent on that alone.

        Returns:
            (B, M, out_dim) or (T, out_dim), with ``newest_only`` (B, out_dim), in the parameters' dtype, under autocast
            too: unit vectors where valid, zeros elsewhere and for a sequence without a valid action. What stands at an
            invalid slot changes nothing; NaN at a valid one may reach every slot of its sequence, older ones too, and
            no other sequence.

        Raises:
            TypeError, ValueError: a wrong shape or dtype, more slots than max_len, arguments that exclude each other;
                and on a CPU lengths outside 0..M, offsets that do not ascend to T, or a sequence over max_length.
        """
        if offsets is not None:
            if valid is not None or lengths is not None:
                raise ValueError("offsets must stand alone, got valid or lengths beside it")
            return self._packed(x, offsets, self.max_len if max_length is None else max_length, newest_only)
        if max_length is not None:
            raise ValueError("max_length must come with offsets, got it without")
        return self._padded(x, valid, lengths, newest_only)

    def _padded(self, x: Tensor, valid: Tensor | None, lengths: Tensor | None, newest_only: bool) -> Tensor:
        _checks.floating("x", x, "B", "M", self.in_dim)
        rows, slots, _ = x.shape
        if slots > self.max_len:
            raise ValueError(f"x must have at most max_len = {self.max_len} slots a row, got {_checks.describe(x)}")
        valid = _as_valid(valid, lengths, rows, slots, x.device)
        if newest_only and slots == 0:
            return self._nobody(rows, x)
        order, place = _oldest_first(valid)

        h = self.project(x.to(self.project.weight.dtype).masked_fill(~valid[..., None], 0)) + self.position[:slots]
        h = h.gather(1, order[..., None].expand_as(h))
        *blocks, last = self.blocks
        for block in blocks:
            h = block(h)
        if newest_only:
            num_valid = valid.sum(1)
            newest: Tensor = self._embed(last(h, newest_of=num_valid))
            return newest.masked_fill(num_valid[:, None] == 0, 0)
        e = self._embed(last(h))
        return e.gather(1, place[..., None].expand_as(e)).masked_fill(~valid[..., None], 0)

    def _packed(self, x: Tensor, offsets: Tensor, max_length: int, newest_only: bool) -> Tensor:
        _checks.floating("x", x, "T", self.in_dim)
        _checks.offsets("offsets", offsets, x.shape[0])
        _checks.positive_int("max_length", max_length)
        if max_length > self.max_len:
            raise ValueError(f"max_length must be at most max_len = {self.max_len}, got {max_length}")
        lengths = offsets.diff()
        if _checks.readable(lengths) and bool((lengths > max_length).any()):
            raise ValueError(f"offsets must hold no sequence over {max_length}, got one of {int(lengths.max())}")

        if newest_only and x.shape[0] == 0:
            return self._nobody(lengths.shape[0], x)
        row = torch.arange(lengths.shape[0], device=x.device).repeat_interleave(lengths, output_size=x.shape[0])
        slot = torch.arange(x.shape[0], device=x.device) - offsets[row]
        groups = _of_like_length(lengths, row, slot, max_length)
        order = None
        if len(groups) > 1:
            order = torch.cat([group.tokens for group in groups])
            x, slot = x.index_select(0, order), slot[order]
        h = self.project(x.to(self.project.weight.dtype)) + functional.embedding(slot, self.position)
        *blocks, last = self.blocks
        for block in blocks:
            h = block(h, groups)
        if newest_only:
            sequences = torch.cat([group.sequences for group in groups])
            ordered = lengths[sequences]
            e = self._embed(last(h, groups, newest_of=ordered)).masked_fill(ordered[:, None] == 0, 0)
            return torch.zeros_like(e).index_copy(0, sequences, e)
        e = self._embed(last(h, groups))
        return e if order is None else torch.zeros_like(e).index_copy(0, order, e)

    def _nobody(self, rows: int, like: Tensor) -> Tensor:
        """(rows, out_dim) zeros of sequences without a valid action, in the graph of the parameters."""
        x = like.new_zeros(rows, 1, self.in_dim)
        return self._padded(x, torch.zeros(rows, 1, dtype=torch.bool, device=like.device), None, newest_only=True)

    def _embed(self, h: Tensor) -> Tensor:
        y = self.out(functional.gelu(self.out_hidden(self.out_norm(h))))
        dtype = self.out.weight.dtype
        return functional.normalize(y.to(torch.promote_types(dtype, torch.float32)), dim=-1).to(dtype)


class _Group(NamedTuple):
    """Packed sequences whose attention is done as one."""

    tokens: Tensor
    """(t,) which tokens are theirs, ascending."""
    place: Tensor
    """(t,) where each of them goes among rows × slots."""
    rows: int
    slots: int
    sequences: Tensor
    """(rows,) which sequences they are, ascending."""


class _Block(nn.Module):
    """Pre-norm causal self-attention and feed-forward, over sequences that stand oldest first."""

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        dropout: float,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(hidden_dim, device=device, dtype=dtype)
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, device=device, dtype=dtype)
        self.attention_out = nn.Linear(hidden_dim, hidden_dim, device=device, dtype=dtype)
        self.ffn_norm = nn.LayerNorm(hidden_dim, device=device, dtype=dtype)
        self.ffn_hidden = nn.Linear(hidden_dim, 4 * hidden_dim, device=device, dtype=dtype)
        self.ffn_out = nn.Linear(4 * hidden_dim, hidden_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        for layer in self.children():
            layer.reset_parameters()  # type: ignore[operator]

    def forward(self, v: Tensor, groups: Sequence[_Group] | None = None, *, newest_of: Tensor | None = None) -> Tensor:
        """Padded (B, M, H), or packed (T, H) group after group; given lengths, the newest token of each: (B, H)."""
        qkv = self.qkv(self.attention_norm(v))
        if groups is None:
            attended = self._attend(qkv, newest_of)
            if newest_of is not None:
                last = (newest_of - 1).clamp(min=0)
                v = v.gather(1, last[:, None, None].expand(-1, 1, v.shape[-1])).squeeze(1)
        else:
            parts = qkv.split([group.tokens.shape[0] for group in groups])
            rows = [group.rows for group in groups]
            lengths = [None] * len(groups) if newest_of is None else torch.split(newest_of, rows)
            attended = torch.cat([self._attend_packed(*each) for each in zip(parts, groups, lengths, strict=True)])
            if newest_of is not None:
                first = newest_of.cumsum(0) - newest_of  # packed sequences stand newest first
                v = v.index_select(0, first.clamp(max=v.shape[0] - 1))
        u = v + self._drop(self.attention_out(attended))
        return u + self._drop(self.ffn_out(functional.gelu(self.ffn_hidden(self.ffn_norm(u)))))

    def _attend_packed(self, qkv: Tensor, group: _Group, lengths: Tensor | None) -> Tensor:
        slots = group.slots if lengths is None else max(1, group.slots)
        padded = qkv.new_zeros(group.rows * slots, qkv.shape[-1]).index_copy(0, group.place, qkv)
        attended = self._attend(padded.view(group.rows, slots, qkv.shape[-1]), lengths)
        return attended if lengths is not None else attended.flatten(0, 1).index_select(0, group.place)

    def _attend(self, qkv: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, M, H), or given lengths (B, H) of the newest token, which is a row's last valid one."""
        q, k, v = split_heads(qkv, self.num_heads)
        p = self.dropout if self.training else 0.0
        if lengths is None:
            # Padding stands behind the last valid token, so the causal rule alone hides it and no mask is needed.
            attended = functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
            return attended.transpose(1, 2).flatten(2)
        last = (lengths - 1).clamp(0, q.shape[2] - 1)[:, None, None, None]
        q = q.gather(2, last.expand(-1, q.shape[1], 1, q.shape[3]))
        visible = torch.arange(k.shape[2], device=k.device) <= last
        return functional.scaled_dot_product_attention(q, k, v, visible, dropout_p=p).flatten(1)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


def _of_like_length(lengths: Tensor, row: Tensor, slot: Tensor, max_length: int) -> list[_Group]:
    """Groups of about as long sequences, padded to their longest; where lengths cannot be read one, to max_length.

    A row's oldest token goes to the first of its places, so that the rest of them lie behind it.
    """
    behind = lengths[row] - 1 - slot
    if watched() or not _checks.readable(lengths) or row.shape[0] == 0:
        # The clamp keeps a sequence over max_length, where no check could look, out of the next row's places.
        place = row * max_length + behind.clamp(max=max_length - 1)
        tokens, sequences = (torch.arange(one.shape[0], device=row.device) for one in (row, lengths))
        return [_Group(tokens, place, lengths.shape[0], max_length, sequences)]
    step = -(-int(lengths.max()) // _MAX_GROUPS)
    kind = (lengths + step - 1) // step
    groups = []
    for one in torch.unique(kind):
        mine = kind == one
        tokens = torch.nonzero(mine[row]).squeeze(1)
        rows, slots = int(mine.sum()), int(lengths[mine].max())
        place = (mine.cumsum(0) - 1)[row[tokens]] * slots + behind[tokens]
        groups.append(_Group(tokens, place, rows, slots, torch.nonzero(mine).squeeze(1)))
    return groups


def _as_valid(valid: Tensor | None, lengths: Tensor | None, rows: int, slots: int, device: torch.device) -> Tensor:
    if valid is not None:
        if lengths is not None:
            raise ValueError("lengths must be None beside valid: one of them says what is real")
        _checks.mask("valid", valid, rows, slots)
        return valid
    if lengths is None:
        return torch.ones(rows, slots, dtype=torch.bool, device=device)
    _checks.integers("lengths", lengths, rows)
    if _checks.readable(lengths) and bool(((lengths < 0) | (lengths > slots)).any()):
        raise ValueError(f"lengths must be in [0, {slots}], got {_checks.describe(lengths)} with one that is not")
    return torch.arange(slots, device=device) < lengths[:, None]


def _oldest_first(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Put a row's valid slots first, oldest to newest, and the others behind: (what stands where, where each goes)."""
    slots = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    num_valid, valid_so_far = valid.sum(1, keepdim=True), valid.cumsum(1)
    place = num_valid - valid_so_far + slots.masked_fill(valid, 0)
    return torch.zeros_like(place).scatter(1, place, slots), place
