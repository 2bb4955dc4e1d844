"""The standard encoder layer of the first transformer, post-norm with ReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from recblocks.sequence._heads import split_heads


class PostNormLayer(nn.Module):
    """``u = LN(x + MHSA(x))``, then ``LN(u + W2 ReLU(W1 u + b1) + b2)``.

    Equal to torch.nn.TransformerEncoderLayer, whose fast path makes outputs depend on what else is in the batch.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        hidden_dim: int,
        dropout: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.attention_out = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.attention_norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.ffn_hidden = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.ffn_out = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.ffn_norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Reset every layer as torch.nn.TransformerEncoderLayer starts."""
        for layer in self.children():
            layer.reset_parameters()  # type: ignore[operator]
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.attention_out.bias)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Tokens (B, L, dim) and (B, L) bool which of them are attended to, at least one a row unless L is 0.

        Without keys all are.
        """
        q, k, v = self.heads(x)
        p = self.dropout if self.training else 0.0
        mask = None if keys is None else keys[:, None, None]
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        attended = self.attention_out(attended.transpose(1, 2).flatten(2))
        return self.feed_forward(self.attention_norm(x + self._drop(attended)))

    def one_head(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """What `forward` gives without dropout, where there is one head: two projections of each token, not four.

        ``q_i·k_j = (Wk^T Wq x_i + Wk^T bq)·x_j`` and what does not depend on j, which the softmax cancels; and shares a
        sum to 1, so ``Wo Σ_j a_ij (Wv x_j + bv) = Wo Wv Σ_j a_ij x_j + Wo bv``.
        """
        (query, key, value), (query_bias, _, value_bias) = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        out, out_bias = self.attention_out.weight, self.attention_out.bias
        mask = None if keys is None else keys[:, None, None]
        q = functional.linear(x, key.T @ query, key.T @ query_bias)[:, None]
        attended = functional.scaled_dot_product_attention(q, x[:, None], x[:, None], attn_mask=mask)[:, 0]
        attended = functional.linear(attended, out @ value, out @ value_bias + out_bias)
        return self.feed_forward(self.attention_norm(x + attended))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, num_heads, L, head_dim)."""
        return split_heads(self.qkv(x), self.num_heads)

    def feed_forward(self, u: Tensor) -> Tensor:
        """The second half, of tokens (..., dim)."""
        hidden = self._drop(functional.relu(self.ffn_hidden(u)))
        out: Tensor = self.ffn_norm(u + self._drop(self.ffn_out(hidden)))
        return out

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)
