"""A transformer over a user's newest actions and a candidate: TransAct's encoder, with one user's work done once."""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from recblocks import _checks
from recblocks.kernels.action_transformer.dispatch import encode_candidates as encode_in_one_kernel
from recblocks.kernels.action_transformer.dispatch import runs_on
from recblocks.kernels.dispatch import watched
from recblocks.sequence._post_norm_layer import PostNormLayer
from recblocks.sequence.compression import OutputCompression
from recblocks.sequence.fusion import fuse_append, fuse_concat

_UNITS_PER_SECOND = {"s": 1, "ms": 1000}
# So many attention scores of float32 are 1 MiB: on a CPU the work on some candidates at a time stays in its cache.
_CACHED_SCORES = 2**18
# Tokens for each of their numbers, from which on a layer's products of weights are soon earned back.
_LEAST_TOKENS = 2
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


class EncodedUser(NamedTuple):
    """What `ActionTransformer.encode_user` finds once for all candidates of a user; L tokens, d = ``out_dim``.

    The tokens are the user's own, if there is one, and the slots of the actions; on a CPU those alone that some user
    attends to, so that what is hidden from all of them costs nothing.

    Attributes:
        residual: (B, L, d) the user's part of each token, before layer 1's norm.
        scores: (B, H, L, L) the user's part of layer 1's attention scores of each head; −inf for a key to leave out.
        candidate_keys: (B, H, L, item_dim) what a candidate is multiplied with for its part of the scores of each key.
        values: (B, H L, d) the user's part of layer 1's values, through the output projection.
        keys: (B, L) bool, which tokens are attended to; None: all of them.
        slots: (L,) or, behind a user's token, (L − 1,) int64, which slot each of the other tokens is.
        valid: (B, S) bool, as given: which of the outputs are real.
    """

    residual: Tensor
    scores: Tensor
    candidate_keys: Tensor
    values: Tensor
    keys: Tensor | None
    slots: Tensor
    valid: Tensor


class ActionTransformer(nn.Module):
    """Encode a user's actions beside a candidate: what each of them says about it.

    ``x_i = [type_i | item_i | candidate]`` (concat), or ``x_i = [type_i | item_i]`` and one more slot
    ``[0 | candidate]`` (append); then ``num_layers`` times ``u = LN(x + MHSA(x))``,
    ``x = LN(u + W2 ReLU(W1 u + b1) + b2)``. Every slot attends to all the valid ones.

    Positions are added to the fused input: ``"learned"``, a row a slot; ``"sinusoidal"``, ``sin(i / 10000^(2k/d))`` and
    cos of slot i in turn; ``"linear"``, ``w log1p(seconds from the action to the request)``. An appended candidate
    is newer than slot 0: it has a learned row of its own, the sinusoid of slot −1, and 0 seconds.

    A user's embedding is one more token ``W user + b`` in an action's place, fused with the candidate as an action is.
    It has no position and stands for nothing in the output.

    Args:
        item_dim: width of an item's embedding, an action's item and the candidate alike.
        num_action_types: size of the vocabulary of types; None: no types.
        type_dim: width of the learned embedding of a type; without types it counts 0.
        num_layers: how many layers.
        num_heads: attention heads, a divisor of ``out_dim``.
        hidden_dim: width inside the feed-forward network.
        dropout: share that training drops of attention weights and of the outputs of attention, ReLU and feed-forward.
        fusion: ``"concat"``, ``"append"``, or None for a sequence without a candidate.
        positions: None, ``"learned"``, ``"sinusoidal"`` or ``"linear"``.
        max_len: the longest sequence, for learned positions and only for them.
        user_dim: width of a user's embedding; None: no user token.
        unit: ``"s"`` or ``"ms"``: what the times count.
        device, dtype: of the parameters.

    Attributes:
        out_dim: type_dim + 2 item_dim with concat, else type_dim + item_dim.

    Raises:
        TypeError, ValueError: a size that is no int of at least 1, heads that do not divide out_dim, a dropout not in
            [0, 1), an unknown choice, or a max_len that is missing or of no use.

    Example:
        >>> model = ActionTransformer(item_dim=8, num_action_types=3, type_dim=4).eval()
        >>> item, action_type = torch.randn(2, 5, 8), torch.randint(3, (2, 5))
        >>> valid = torch.tensor([[True, True, True, True, True], [True, False, False, False, False]])
        >>> out, _ = model(item, action_type, torch.randn(2, 8), valid=valid)
        >>> out.shape
        torch.Size([2, 5, 20])
        >>> user = model.encode_user(item[:1], action_type[:1], valid=valid[:1])
        >>> model.encode_candidates(user, torch.randn(1000, 8)).shape
        torch.Size([1000, 5, 20])

    Source: TransAct, sections 3.3.1 to 3.3.3 and table 8; the user token: Rethinking Personalized Ranking, section 2.2;
        linear positions: Behavior Sequence Transformer, arXiv 1905.06874.

    Note:
        The papers do not say how the user's embedding becomes as wide as an action, nor what a position is added to.
        The Behavior Sequence Transformer embeds the seconds; TransAct names it a linear projection, ours of their
        log1p, as seconds reach 10^7. Weights start as in torch.nn.TransformerEncoderLayer.
    """

    def __init__(
        self,
        *,
        item_dim: int,
        num_action_types: int | None = None,
        type_dim: int = 32,
        num_layers: int = 2,
        num_heads: int = 1,
        hidden_dim: int = 32,
        dropout: float = 0.1,
        fusion: str | None = "concat",
        positions: str | None = None,
        max_len: int | None = None,
        user_dim: int | None = None,
        unit: str = "s",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"item_dim": item_dim, "type_dim": type_dim, "num_layers": num_layers, "num_heads": num_heads}
        optional = {"num_action_types": num_action_types, "max_len": max_len, "user_dim": user_dim}
        sizes |= {"hidden_dim": hidden_dim} | {name: size for name, size in optional.items() if size is not None}
        for name, size in sizes.items():
            _checks.positive_int(name, size)
        _checks.number("dropout", dropout, at_least=0, below=1)
        _checks.choice("fusion", fusion, ("concat", "append", None))
        _checks.choice("positions", positions, (None, "learned", "sinusoidal", "linear"))
        _checks.choice("unit", unit, _UNITS_PER_SECOND)
        _given("max_len", max_len, 'positions="learned"', wanted=positions == "learned")
        action_dim = item_dim + (0 if num_action_types is None else type_dim)
        out_dim = action_dim + (item_dim if fusion == "concat" else 0)
        if out_dim % num_heads:
            raise ValueError(f"num_heads must divide out_dim = {out_dim}, got {num_heads}")

        self.item_dim = item_dim
        self.num_action_types = num_action_types
        self.fusion = fusion
        self.positions = positions
        self.max_len = max_len
        self.user_dim = user_dim
        self.units_per_second = _UNITS_PER_SECOND[unit]
        self.out_dim = out_dim
        if num_action_types is not None:
            self.type_table = nn.Embedding(num_action_types, type_dim, device=device, dtype=dtype)
        if user_dim is not None:
            self.user_token = nn.Linear(user_dim, action_dim, device=device, dtype=dtype)
        if max_len is not None:
            num_positions = max_len + (1 if fusion == "append" else 0)
            self.position = nn.Parameter(torch.empty(num_positions, out_dim, device=device, dtype=dtype))
        if positions == "linear":
            self.age = nn.Linear(1, out_dim, bias=False, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            PostNormLayer(
                out_dim, num_heads=num_heads, hidden_dim=hidden_dim, dropout=dropout, device=device, dtype=dtype
            )
            for _ in range(num_layers)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw learned positions from N(0, 0.02²) and reset every layer, as torch.nn does."""
        for name, child in self.named_children():
            for layer in self.layers if name == "layers" else [child]:
                layer.reset_parameters()  # type: ignore[operator]
        if self.max_len is not None:
            nn.init.normal_(self.position, std=0.02)

    def forward(
        self,
        item: Tensor,
        action_type: Tensor | None = None,
        candidate: Tensor | None = None,
        *,
        valid: Tensor,
        user: Tensor | None = None,
        action_time: Tensor | None = None,
        request_time: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode each row's actions beside its candidate.

        Args:
            item: (B, S, item_dim) the embedding of each action's item; slot 0 is the most recent.
            action_type: (B, S) int64 in 0..num_action_types−1; None without types.
            candidate: (B, item_dim) the item to be ranked; None without fusion.
            valid: (B, S) bool, True = a real action that no mask hides; holes may be anywhere.
            user: (B, user_dim) the user's embedding, with ``user_dim`` only.
            action_time: (B, S) int64 in units of ``unit``, with linear positions only.
            request_time: (B,) int64 in units of ``unit``, with linear positions only.

        Returns:
            (B, L, out_dim) in the parameters' dtype, under autocast too, and (B, L) bool which of them are real: the
            L = S actions, and behind them an appended candidate (L = S+1). Zeros where not real. What stands at an
            invalid slot changes nothing, and no row changes another one.

        Raises:
            TypeError, ValueError: a wrong shape or dtype, more slots than max_len, an argument that is missing or of no
                use; and on a CPU an unknown type, or an action after its request, at a valid slot.
        """
        x, seen = self._actions(item, action_type, valid, user)
        _given("candidate", candidate, "there is a fusion", wanted=self.fusion is not None)
        if candidate is not None:
            _checks.floating("candidate", candidate, item.shape[0], self.item_dim)
            candidate = candidate.to(x.dtype)
            if self.fusion == "concat":
                x = fuse_concat(x, candidate)
            else:
                x, seen = fuse_append(x, candidate, valid=seen)
        x = self._add_positions(x, valid, action_time, request_time)
        keys = _keys(seen)
        for layer in self.layers:
            x = layer(x, keys)
        first = 0 if user is None else 1
        return self._output(x[:, first:], seen[:, first:]), seen[:, first:]

    def encode_user(
        self,
        item: Tensor,
        action_type: Tensor | None = None,
        *,
        valid: Tensor,
        user: Tensor | None = None,
        action_time: Tensor | None = None,
        request_time: Tensor | None = None,
    ) -> EncodedUser:
        """Do once what layer 1 need not do for each candidate; `encode_candidates` does the rest. For fusion concat.

        A token is ``t_i + c``, the user's part and the candidate's. In ``(q_i + q_c)·(k_j + k_c)`` what does not depend
        on j cancels in the softmax, so ``q_i·k_j`` serves every candidate, and each adds ``q_c·k_j``, a number a key.

        Args:
            item: (B, S, item_dim), a row a user; this and the others are as in `forward`.
            action_type: (B, S) int64, or None.
            valid: (B, S) bool.
            user: (B, user_dim), or None.
            action_time: (B, S) int64, or None.
            request_time: (B,) int64, or None.

        Returns:
            `EncodedUser`.

        Raises:
            TypeError, ValueError: as `forward`; or another fusion, or dropout in training, which is drawn by candidate.
        """
        if self.fusion != "concat":
            raise ValueError(f'encode_user needs fusion="concat", got {self.fusion!r}')
        layer = self._first_layer()
        if layer.dropout and self.training:
            raise ValueError(f"encode_user needs eval() or dropout = 0, got dropout = {layer.dropout} in training")
        actions, seen = self._actions(item, action_type, valid, user)
        t = self._add_positions(functional.pad(actions, (0, self.item_dim)), valid, action_time, request_time)
        slots, is_full = _slots_of_any(valid)
        first = t.shape[1] - valid.shape[1]  # 1 with a user's token
        tokens = functional.pad(slots + first, (first, 0))
        t = t[:, tokens]
        keys = None if is_full else _keys(seen[:, tokens])
        q, k, v = layer.heads(t)  # (B, H, L, d / H)
        scale = layer.head_dim**-0.5
        query_weight, _, _ = layer.qkv.weight[:, -self.item_dim :].view(3, layer.num_heads, layer.head_dim, -1)
        out_weight = layer.attention_out.weight.view(self.out_dim, layer.num_heads, layer.head_dim)
        scores = q @ k.transpose(2, 3) * scale
        return EncodedUser(
            residual=t + layer.attention_out.bias,
            scores=scores if keys is None else scores.masked_fill(~keys[:, None, None], -torch.inf),
            candidate_keys=k @ query_weight * scale,
            values=(v @ out_weight.permute(1, 2, 0)).flatten(1, 2),
            keys=keys,
            slots=slots,
            valid=valid,
        )

    def encode_candidates(
        self, encoded: EncodedUser, candidates: Tensor, *, compression: OutputCompression | None = None
    ) -> Tensor:
        """Encode users' actions beside many candidates each, as `forward` would with a row a pair, but faster.

        With one head, the layers behind the first take two projections of a token for four.

        On an NVIDIA GPU one Triton kernel does all of it for two layers of bfloat16 or float16, up to 128 tokens and an
        ``out_dim`` of 128, where no gradient is asked for; between them nothing is rounded but the factors of products.

        Args:
            encoded: of `encode_user`.
            candidates: (N, item_dim) for one user, or (B, N, item_dim), N for each user.
            compression: what the output goes through; None: it comes whole.

        Returns:
            (N, S, out_dim), or (B, N, S, out_dim); zeros where ``encoded.valid`` is False. With a compression
            (N, out_columns * out_dim), or (B, N, out_columns * out_dim).

        Raises:
            TypeError, ValueError: a wrong shape or dtype, or slots that the compression does not take.
        """
        if isinstance(candidates, Tensor) and candidates.ndim == 2:
            _checks.floating("candidates", candidates, "N", self.item_dim)
            if encoded.valid.shape[0] != 1:
                wanted = f"({encoded.valid.shape[0]}, N, {self.item_dim})"
                raise ValueError(f"candidates must have shape {wanted}, got {_checks.describe(candidates)}")
            return self.encode_candidates(encoded, candidates[None], compression=compression)[0]
        _checks.floating("candidates", candidates, encoded.valid.shape[0], "N", self.item_dim)
        candidates = candidates.to(encoded.residual.dtype)
        of_layers = [one for layer in self.layers for one in layer.parameters()]
        has_all = encoded.slots.shape[0] == encoded.valid.shape[1]
        takes = has_all and (compression is None or compression.columns == "first")
        takes = takes and runs_on(encoded[:4], encoded.valid, candidates, of_layers)
        if takes and all(map(_is_plain, self.layers)):
            return self._in_one_kernel(encoded, candidates, compression)
        x = self._in_chunks(encoded, candidates)
        if compression is None:
            return x
        valid = encoded.valid.repeat_interleave(x.shape[1], dim=0)
        compressed: Tensor = compression(x.flatten(0, 1), valid)
        return compressed.view(*x.shape[:2], -1)

    def _in_one_kernel(self, encoded: EncodedUser, candidates: Tensor, compression: OutputCompression | None) -> Tensor:
        first = self._first_layer()
        num_slots = encoded.valid.shape[1] if compression is None else compression.num_slots
        max_pool = compression is not None and compression.max_pool
        x: Tensor = encode_in_one_kernel(
            candidates,
            self._own(candidates),
            [encoded.residual, encoded.scores, encoded.candidate_keys, encoded.values],
            encoded.keys,
            encoded.valid,
            [one for layer in self.layers for one in layer.parameters()],
            first.num_heads,
            num_slots,
            max_pool,
            first.attention_norm.eps,
        )
        return x if compression is None else x.flatten(2)

    def _own(self, candidates: Tensor) -> Tensor:
        """What of a candidate (B, n, item_dim) reaches every token before layer 1's norm, (B, n, out_dim).

        Shares sum to 1, so its own value arrives whole, and it is the same at every token.
        """
        first = self._first_layer()
        value_weight = first.qkv.weight[-self.out_dim :, -self.item_dim :]
        own = functional.pad(candidates, (self.out_dim - self.item_dim, 0))
        return own + candidates @ value_weight.T @ first.attention_out.weight.T

    def _in_chunks(self, encoded: EncodedUser, candidates: Tensor) -> Tensor:
        """(B, N, S, out_dim)."""
        step = max(candidates.shape[1], 1)
        if candidates.device.type == "cpu":
            step = max(_CACHED_SCORES // max(encoded.scores.numel(), 1), 1)
        some = torch.split(candidates, step, dim=1)
        x = torch.cat([self._encode_some(encoded, each) for each in some], dim=1)
        num_slots = encoded.valid.shape[1]
        if encoded.slots.shape[0] < num_slots:
            x = x.new_zeros(*x.shape[:2], num_slots, self.out_dim).index_copy_(2, encoded.slots, x)
        return x

    def _encode_some(self, encoded: EncodedUser, candidates: Tensor) -> Tensor:
        """(B, n, L, out_dim), without the user's token."""
        first = self._first_layer()
        rows, num, _ = candidates.shape
        tokens = encoded.residual.shape[1]
        bias = torch.einsum("bnc,bhlc->bnhl", candidates, encoded.candidate_keys)
        shares = (encoded.scores.transpose(1, 2)[:, None] + bias[:, :, None]).softmax(-1)
        attended = shares.flatten(3).flatten(1, 2) @ encoded.values
        own = self._own(candidates)[:, :, None]
        x = (attended.view(rows, num, tokens, self.out_dim) + encoded.residual[:, None]).add_(own)
        x = first.feed_forward(first.attention_norm(x)).flatten(0, 1)

        keys = None if encoded.keys is None else encoded.keys.repeat_interleave(num, dim=0)
        many = not watched() and x.shape[0] * tokens > _LEAST_TOKENS * self.out_dim
        for layer in list(self.layers)[1:]:
            x = layer.one_head(x, keys) if many and _has_one_plain_head(layer) else layer(x, keys)
        x = x.view(rows, num, tokens, self.out_dim)[:, :, tokens - encoded.slots.shape[0] :]
        if encoded.keys is not None:
            x = x.masked_fill(~encoded.valid[:, None, encoded.slots, None], 0)
        return x.to(first.qkv.weight.dtype)

    def _actions(
        self, item: Tensor, action_type: Tensor | None, valid: Tensor, user: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Every action as [type | item], behind the user's token if there is one; and which of them are there."""
        _checks.floating("item", item, "B", "S", self.item_dim)
        rows, slots, _ = item.shape
        _checks.mask("valid", valid, rows, slots)
        _given("action_type", action_type, "there are types", wanted=self.num_action_types is not None)
        _given("user", user, "there is a user_dim", wanted=self.user_dim is not None)
        x = item.to(self._first_layer().qkv.weight.dtype)
        if action_type is not None:
            _checks.integers("action_type", action_type, rows, slots)
            action_type = action_type.masked_fill(~valid, 0)
            if _checks.readable(action_type):
                self._check_types(action_type)
            x = torch.cat([self.type_table(action_type), x], dim=2)
        x = x.masked_fill(~valid[..., None], 0)
        if user is None:
            return x, valid
        _checks.floating("user", user, rows, self.user_dim)
        token = self.user_token(user.to(x.dtype)).to(x.dtype)
        return torch.cat([token[:, None], x], dim=1), functional.pad(valid, (1, 0), value=True)

    def _check_types(self, action_type: Tensor) -> None:
        assert self.num_action_types is not None
        unknown = (action_type < 0) | (action_type >= self.num_action_types)
        if bool(unknown.any()):
            wanted = f"in [0, {self.num_action_types}) where valid"
            raise ValueError(f"action_type must be {wanted}, got {int(action_type[unknown][0])}")

    def _add_positions(
        self, x: Tensor, valid: Tensor, action_time: Tensor | None, request_time: Tensor | None
    ) -> Tensor:
        linear = self.positions == "linear"
        _given("action_time", action_time, 'positions="linear"', wanted=linear)
        _given("request_time", request_time, 'positions="linear"', wanted=linear)
        if self.positions is None:
            return x
        slots = valid.shape[1]
        is_append = self.fusion == "append"
        if action_time is not None and request_time is not None:
            age = functional.pad(self._log_age(valid, action_time, request_time), (0, int(is_append)))
            position = self.age(age[..., None])
        else:
            index = functional.pad(torch.arange(slots, device=x.device), (0, int(is_append)), value=-1)
            position = self._learned(index, slots) if self.positions == "learned" else self._sinusoid(index)
        return x + functional.pad(position, (0, 0, 0 if self.user_dim is None else 1, 0)).to(x.dtype)

    def _learned(self, index: Tensor, slots: int) -> Tensor:
        assert self.max_len is not None
        if slots > self.max_len:
            raise ValueError(f"item must have at most max_len = {self.max_len} slots a row, got {slots}")
        return self.position[index]

    def _sinusoid(self, index: Tensor) -> Tensor:
        dtype = torch.promote_types(self._first_layer().qkv.weight.dtype, torch.float32)
        exponents = torch.arange(0, self.out_dim, 2, dtype=dtype, device=index.device) / self.out_dim
        angle = index[:, None] * 10000.0**-exponents
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, : self.out_dim]

    def _log_age(self, valid: Tensor, action_time: Tensor, request_time: Tensor) -> Tensor:
        _checks.integers("action_time", action_time, *valid.shape)
        _checks.integers("request_time", request_time, valid.shape[0])
        late = valid & (action_time > request_time[:, None])
        _checks.none_late(late)
        # The difference is exact in int64; only then may it be rounded.
        age = (request_time[:, None] - action_time).masked_fill(~valid | late, 0)
        dtype = self.age.weight.dtype
        seconds = age.to(torch.promote_types(dtype, torch.float32)) / self.units_per_second
        return seconds.log1p().to(dtype)

    def _output(self, x: Tensor, valid: Tensor) -> Tensor:
        return x.masked_fill(~valid[..., None], 0).to(self._first_layer().qkv.weight.dtype)

    def _first_layer(self) -> PostNormLayer:
        layer = self.layers[0]
        assert isinstance(layer, PostNormLayer)
        return layer


def _has_one_plain_head(layer: nn.Module) -> TypeGuard[PostNormLayer]:
    return _is_plain(layer) and layer.num_heads == 1 and not (layer.training and layer.dropout)


def _is_plain(layer: nn.Module) -> TypeGuard[PostNormLayer]:
    """Whether its parameters tell all that it does: it has no hook, and nothing was swapped for something else."""
    parts = [*layer.children()]
    return (
        type(layer) is PostNormLayer
        and all(type(part) in (nn.Linear, nn.LayerNorm) and part.bias is not None for part in parts)
        and not any(any(getattr(one, hooks) for hooks in _HOOKS) for one in (layer, *parts))
    )


def _keys(seen: Tensor) -> Tensor:
    """What is attended to: what is there, and in a row without anything all of it, so that no share is NaN."""
    return seen | ~seen.any(1, keepdim=True)


def _slots_of_any(valid: Tensor) -> tuple[Tensor, bool]:
    """The slots that are valid in some row, and whether each row has them all; unread, all slots and False."""
    if watched() or not _checks.readable(valid):
        return torch.arange(valid.shape[1], device=valid.device), False
    slots = torch.nonzero(valid.any(0)).squeeze(1)
    return slots, bool(valid[:, slots].all())


def _given(name: str, value: object, reason: str, *, wanted: bool) -> None:
    if wanted and value is None:
        raise ValueError(f"{name} must be given where {reason}, got None")
    if not wanted and value is not None:
        raise ValueError(f"{name} must be None unless {reason}, got {_checks.describe(value)}")
