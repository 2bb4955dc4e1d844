"""PinnerFormer, assembled: actions and items in, one unit embedding a user and a slot, one unit embedding an item."""

from __future__ import annotations

import dataclasses
import threading
from typing import Literal

import torch
from torch import Tensor, nn

from examples.pinnerformer.data import Dataset
from recblocks import ActionEncoder, CausalSequenceEncoder, ItemEncoder, LearnedTemperature

_SEEDED = threading.Lock()


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Sizes of the model."""

    dim: int = 128
    """Width of a user's and an item's embedding."""
    hidden_dim: int = 128
    """Width of the transformer."""
    num_layers: int = 2
    num_heads: int = 4
    max_len: int = 256
    """Newest actions of a user that are read."""
    item_hidden_dim: int = 384
    """Width inside the item tower."""
    temperature: float = 0.015
    """Temperature at the start; it is learned."""
    start: Literal["content", "random"] = "content"
    """"content": before training a user is the mean of their items' content; "random": as torch.nn draws."""


class PinnerFormer(nn.Module):
    """Embed packed sequences of actions, and items, by their content.

    Args:
        content: (N, F) content embedding of every item.
        identity_dim: how many leading columns of ``content`` the "content" start keeps as they are.
        num_action_types, num_surfaces, unit: see `ActionEncoder`.
        options: sizes.
    """

    content: Tensor

    def __init__(
        self,
        content: Tensor,
        *,
        identity_dim: int,
        num_action_types: int,
        num_surfaces: int,
        unit: str,
        options: ModelOptions,
    ) -> None:
        super().__init__()
        self.register_buffer("content", content, persistent=False)
        self.actions = ActionEncoder(
            item_dim=content.shape[1],
            num_action_types=num_action_types,
            num_surfaces=num_surfaces,
            type_dim=8,
            surface_dim=8,
            unit=unit,
        )
        self.encoder = CausalSequenceEncoder(
            self.actions.out_dim,
            options.dim,
            hidden_dim=options.hidden_dim,
            num_layers=options.num_layers,
            num_heads=options.num_heads,
            max_len=options.max_len,
        )
        self.items = ItemEncoder(content.shape[1], options.dim, hidden_dim=options.item_hidden_dim)
        self.temperature = LearnedTemperature(options.temperature)
        if options.start == "content":
            start_from_content(self, min(identity_dim, options.dim, options.hidden_dim))

    def forward(self, columns: dict[str, Tensor], offsets: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of packed slots (T, dim) and of item rows (R, dim), and the temperature, in one graph."""
        return self.embed_slots(columns, offsets), self.embed_items(items), self.temperature()

    def embed_slots(self, columns: dict[str, Tensor], offsets: Tensor) -> Tensor:
        """Embed packed sequences, newest first: one embedding at every action."""
        actions = self.actions(
            self.content[columns["row"]],
            columns["action_type"],
            columns["surface"],
            columns["duration"],
            columns["time"],
            offsets=offsets,
        )
        embedded: Tensor = self.encoder(actions, offsets=offsets)
        return embedded

    def embed_items(self, rows: Tensor) -> Tensor:
        """Embed items by their rows of ``content``; each different one once."""
        different, place = torch.unique(rows, return_inverse=True)
        embedded: Tensor = self.items(self.content[different])[place]
        return embedded


def build_model(data: Dataset, options: ModelOptions, *, seed: int = 0) -> PinnerFormer:
    """A model of the sizes that the data asks for; of several built at once each draws from its own seed."""
    with _SEEDED:
        torch.manual_seed(seed)
        return PinnerFormer(
            data.content,
            identity_dim=data.identity_dim,
            num_action_types=data.num_action_types,
            num_surfaces=data.num_surfaces,
            unit=data.train.unit,
            options=options,
        )


@torch.no_grad()
def start_from_content(model: PinnerFormer, width: int) -> None:
    """Let the untrained model already retrieve what resembles a user's past, which minutes of training would not reach.

    The item tower passes the first ``width`` columns of the content through; so do the projection, the first attention
    (uniform over the past) and the output MLP: a user starts as ten times the mean of their items plus the newest.
    An MLP is the identity with W1 = [I, -I] and W2 = [I, -I]^T, since GELU(x) - GELU(-x) = x.
    The last two columns, which make all contents equally long, are no part of a user.
    """
    identity = torch.eye(width)
    encoder = model.encoder
    encoder.project.weight.zero_()
    encoder.project.weight[:width, :width] = identity * encoder.project.weight.shape[0] ** 0.5
    for depth, block in enumerate(encoder.blocks):
        block.ffn_out.weight.zero_()
        block.attention_out.weight.zero_()
        for layer in (block.ffn_out, block.attention_out, block.qkv):
            layer.bias.zero_()
        if depth == 0:
            queries, _, values = block.qkv.weight.chunk(3)
            queries.zero_()
            values.zero_()
            values[:width, :width] = identity
            block.attention_out.weight[:width, :width] = identity * 10
    _pass_through(encoder.out_hidden, encoder.out, width)
    encoder.out.weight[width - 2 :] = 0
    _pass_through(model.items.hidden, model.items.out, width)


def _pass_through(hidden: nn.Linear, out: nn.Linear, width: int) -> None:
    identity = torch.eye(width)
    for layer in (hidden, out):
        layer.bias.zero_()
    out.weight.zero_()
    hidden.weight[: 2 * width].zero_()
    hidden.weight[:width, :width], hidden.weight[width : 2 * width, :width] = identity, -identity
    out.weight[:width, :width], out.weight[:width, width : 2 * width] = identity, -identity
