"""The hybrid ranker (Pinnability, TA Figure 2): features, the realtime sequence and a batch user embedding, crossed."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from examples.transact.data import RankingData, hand_made_counts
from recblocks import (
    ActionTransformer,
    AveragePooling,
    CNNAggregator,
    CrossNetwork,
    EmbeddingTable,
    FusedEmbeddingLookup,
    IdFeature,
    LSTMAggregator,
    OutputCompression,
    RandomTimeWindowMask,
    RNNAggregator,
    ServingLookup,
    ShardableLookup,
)

Ids = Tensor | tuple[Tensor, Tensor]

Sequence = Literal[
    "none", "average", "cnn", "rnn", "lstm", "bst", "bst_positive",
    "transact", "transact_untyped", "transact_unmasked", "counts", "transact_counts",
]  # fmt: skip
"""How the realtime sequence is read: not at all; by average pooling, a CNN, an RNN or an LSTM of the items (TA Table
3); by BST, all or the positive ones of them (TA Table 1); by TransAct, as it is, without types, or without window
mask; as hand-made counts of how often the user met the item, its topic and each type; by TransAct beside these."""

TYPED = ("transact", "transact_unmasked", "transact_counts")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Parts and sizes of the ranker."""

    length: int = 50
    """Newest actions that are read, S."""
    type_dim: int = 32
    """Width of a type's embedding (TA 4.1.2)."""
    num_layers: int = 2
    hidden_dim: int = 32
    """Width of the transformer's feed-forward network."""
    dropout: float = 0.0
    """Of TransAct and BST. The paper's 0.1 takes a quarter more time and won nothing here; a training with it repeats
    itself only with one job."""
    start: Literal["match", "random"] = "match"
    """How TransAct begins: attending to actions on items like the candidate, or as torch draws it."""
    num_slots: int = 10
    """First columns of the transformer's output that are kept beside the max pool, K."""
    window_hours: float | None = None
    """Longest random time window that is masked in training TransAct (TA 3.3.4); 0: none. None: as suits the data."""
    user_embedding: bool = True
    """Read the user's embedding of the day before, where the data has one."""
    raw_ids: int = 0
    """Width of the vectors learned for raw ids of users, items, authors and tags, beside the fixed ones; 0: none."""
    raw_id_capacity: int = 200_000
    """How many ids of each of these kinds there is room for."""
    embedding_dim: int = 8
    """Width of the embedding of each categorical feature."""
    cross_layers: int = 2
    mlp: tuple[int, ...] = (128, 64)


class Share(NamedTuple):
    """Which rows of a batch over several ranks one of them has."""

    begin: int
    total: int


class Batch(NamedTuple):
    """B candidates of Q requests as the ranker reads them; what belongs to a request stands once."""

    candidate: Tensor
    """(B,) rows of the items."""
    request: Tensor
    """(B,) places in the Q requests."""
    items: Tensor
    """(Q, S) rows of the items."""
    types: Tensor
    times: Tensor
    valid: Tensor
    request_time: Tensor
    """(Q,)."""
    categorical: Tensor
    """(B, C) codes."""
    numeric: Tensor
    """(B, F)."""
    user: Tensor
    """(Q, E), E = 0 without user embeddings."""
    ids: dict[str, Ids]
    """What `lookup_of` makes looks up; empty without raw ids."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        moved: Batch = tree_map(lambda part: part.to(device), self)
        return moved


class Inputs:
    """Finds a ranker's inputs for any rows of some data.

    Args:
        data: whose candidates, requests and histories.
        options: how many actions, and whether there are user embeddings.
        sequence: how the ranker reads the realtime sequence: all actions or the positive ones, counts or none.

    Raises:
        ValueError: histories without any action that the ranker could read.
    """

    def __init__(self, data: RankingData, options: ModelOptions, sequence: Sequence) -> None:
        requests, candidates = data.requests, data.candidates
        per_item = [column[candidates.item] for column in data.item_categorical.values()]
        per_request = [column[candidates.request] for column in requests.categorical.values()]
        self.categorical = torch.stack([*candidates.categorical.values(), *per_item, *per_request], 1)
        tables = (candidates.categorical, data.item_categorical, requests.categorical)
        self.sizes = [int(column.max()) + 1 for table in tables for column in table.values()]
        has_counts = sequence in ("counts", "transact_counts")
        counted = [hand_made_counts(data, length=options.length)] if has_counts else []
        self.numeric = torch.cat([candidates.numeric, *counted], 1)
        has_users = options.user_embedding and requests.user_embedding is not None
        self.users = requests.user_embedding if has_users else torch.empty(len(requests.user), 0)
        wanted = data.positive_types if sequence == "bst_positive" else tuple(range(data.num_action_types))
        types = data.histories.columns["action_type"].long()
        self.actions = torch.nonzero(torch.isin(types, torch.tensor(wanted))).squeeze(1)
        if not len(self.actions):
            raise ValueError(f"histories must hold actions of types {wanted}, got none")
        self.data = data
        self.options = options
        self.raw_users = data.histories.users[data.requests.user]

    def __call__(self, rows: Tensor) -> Batch:
        data, histories = self.data, self.data.histories
        request, place = torch.unique(data.candidates.request[rows], return_inverse=True)
        user = data.requests.user[request]
        known = torch.stack([data.requests.newest[request], histories.ends[user]])
        newest, end = torch.searchsorted(self.actions, known)[..., None]
        place_of_action = newest + torch.arange(self.options.length)
        valid = place_of_action < end
        index = self.actions[torch.where(valid, place_of_action, 0)]
        actions = histories.gather(index, ("row", "action_type", "time"))
        actions = {name: torch.where(valid, column, 0) for name, column in actions.items()}
        late = valid & (actions["time"] >= data.requests.time[request][:, None])
        if bool(late.any()):
            raise ValueError(f"actions must be before their request, got {int(late.sum())} that are not")
        return Batch(
            candidate=data.candidates.item[rows],
            request=place,
            items=actions["row"],
            types=actions["action_type"].long(),
            times=actions["time"],
            valid=valid,
            request_time=data.requests.time[request],
            categorical=self.categorical[rows],
            numeric=self.numeric[rows],
            user=self.users[request],
            ids=self._raw_ids(rows, request, actions["row"][valid]) if self.options.raw_ids else {},
        )

    def _raw_ids(self, rows: Tensor, request: Tensor, seen: Tensor) -> dict[str, Ids]:
        """Those of some candidates, of their requests, and of the items of all actions in turn."""
        items = self.data.candidates.item[rows]
        of_items = {name: tuple(bags.of(items)) for name, bags in self.data.item_ids.items()}
        own = {"user": self.raw_users[request], "item": self.data.items[items], "seen": self.data.items[seen]}
        return {**own, **of_items}


def lookup_of(data: RankingData, options: ModelOptions) -> tuple[dict[str, EmbeddingTable], dict[str, IdFeature]]:
    """The tables and features of the raw ids."""
    table = EmbeddingTable(options.raw_id_capacity, options.raw_ids)
    alone = {name: IdFeature(of, pooling=None) for name, of in (("user", "user"), ("item", "item"), ("seen", "item"))}
    return (
        dict.fromkeys(("user", "item", *data.item_ids), table),
        {**alone, **{name: IdFeature(name, pooling="mean") for name in data.item_ids}},
    )


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm of what needs no gradient, over the batches of all ranks where there are several, of 2 rows at least.

    torch's SyncBatchNorm is for GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, F)."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        wide = x.double()
        num = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        total = torch.cat([num[None], wide.sum(0)])
        dist.all_reduce(total)
        mean = total[1:] / total[0]
        squares = (wide - mean).square().sum(0)
        dist.all_reduce(squares)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(x.dtype), self.momentum)
            self.running_var.lerp_((squares / (total[0] - 1)).to(x.dtype), self.momentum)
            self.num_batches_tracked += 1
        normed = (wide - mean) / (squares / total[0] + self.eps).sqrt()
        return normed.to(x.dtype) * self.weight + self.bias


class Ranker(nn.Module):
    """Logits of each head, and of any action at all, for candidates.

    Args:
        data: whose item vectors, sizes and heads.
        inputs: what its batches hold.
        sequence: how it reads the realtime sequence.
        options: parts and sizes.
        lookup: looks the raw ids up, where there are any.
    """

    vectors: Tensor

    def __init__(
        self,
        data: RankingData,
        inputs: Inputs,
        sequence: Sequence,
        options: ModelOptions,
        lookup: FusedEmbeddingLookup | ServingLookup | ShardableLookup | None = None,
    ) -> None:
        super().__init__()
        # Columns of about 1, as learned embeddings start: unit vectors of many columns would be faint beside them.
        self.register_buffer("vectors", data.vectors / data.vectors.square().mean().sqrt(), persistent=False)
        self.lookup = lookup
        item_dim = data.vectors.shape[1] + options.raw_ids
        self.embeddings = nn.ModuleList(nn.Embedding(size, options.embedding_dim) for size in inputs.sizes)
        for table in self.embeddings:
            nn.init.normal_(table.weight, std=0.05)
        self.norm = GlobalBatchNorm(inputs.numeric.shape[1])
        self.reads = sequence
        day = 86_400 if data.histories.unit == "s" else 86_400_000
        self.window = None
        hours = data.window_hours if options.window_hours is None else options.window_hours
        if hours and sequence.startswith("transact") and sequence != "transact_unmasked":
            self.window = RandomTimeWindowMask(max_window=hours / 24 * day)
        self.sequence, self.compression, sequence_dim = _sequence(data, sequence, options, item_dim)
        features = len(inputs.sizes) * options.embedding_dim + inputs.numeric.shape[1] + item_dim
        learned = options.raw_ids * (1 + len(data.item_ids))  # the user's own, and those that the item has
        width = features + inputs.users.shape[1] + sequence_dim + learned
        self.cross = CrossNetwork(width, num_layers=options.cross_layers)
        widths = [width, *options.mlp]
        hidden = [layer for low, high in itertools.pairwise(widths) for layer in (nn.Linear(low, high), nn.ReLU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(widths[-1], len(data.heads) + 1))

    def forward(self, batch: Batch, generator: torch.Generator | None = None, share: Share | None = None) -> Tensor:
        """(B, H + 1) logits; the last column is that of any action.

        Args:
            batch: what to score.
            generator: draws the windows that are masked in training.
            share: which of the rows of a batch over several ranks these are.
        """
        embedded = [table(batch.categorical[:, column]) for column, table in enumerate(self.embeddings)]
        candidate, items = self.vectors[batch.candidate], self.vectors[batch.items]
        learned = []
        if self.lookup is not None:
            found = self.lookup(batch.ids)
            user, item, seen = (found.unpooled[name] for name in ("user", "item", "seen"))
            learned = [user[batch.request], *([found.pooled] if self.lookup.layout.pooled else [])]
            candidate = torch.cat([candidate, item], 1)
            places = batch.valid[..., None].expand(-1, -1, seen.shape[1])
            items = torch.cat([items, seen.new_zeros(places.shape).masked_scatter(places, seen)], 2)
        parts = [*embedded, self.norm(batch.numeric), candidate, batch.user[batch.request], *learned]
        if self.sequence is not None:
            parts.append(self._read(batch, items, candidate, generator, share))
        logits: Tensor = self.mlp(self.cross(torch.cat(parts, 1)))
        return logits

    def _read(
        self, batch: Batch, items: Tensor, candidate: Tensor, generator: torch.Generator | None, share: Share | None
    ) -> Tensor:
        if isinstance(self.sequence, ActionTransformer) and self.sequence.fusion == "concat" and not self.training:
            return self._read_once(batch, items, candidate)
        known = (items, batch.types, batch.times, batch.valid, batch.request_time)
        items, types, times, valid, request_time = (part[batch.request] for part in known)
        if self.window is not None:
            valid = valid & ~self._window(times, request_time, valid, generator, share)
        if not isinstance(self.sequence, ActionTransformer):
            pooled: Tensor = self.sequence(items, valid=valid)
            return pooled
        out, seen = self.sequence(items, self._types(types), candidate, valid=valid)
        compressed: Tensor = self.compression(out, seen)
        if self.reads.startswith("bst"):
            return torch.cat([compressed, out[:, -1]], 1)
        return compressed

    def _window(
        self,
        times: Tensor,
        request_time: Tensor,
        valid: Tensor,
        generator: torch.Generator | None,
        share: Share | None,
    ) -> Tensor:
        """Each rank draws for the rows of all, and keeps what is its own."""
        if share is None:
            masked: Tensor = self.window(times, request_time, valid=valid, generator=generator)
            return masked
        mine = slice(share.begin, share.begin + len(times))
        every = [part.new_zeros(share.total, *part.shape[1:]) for part in (times, request_time, valid)]
        for whole, part in zip(every, (times, request_time, valid), strict=True):
            whole[mine] = part
        masked = self.window(every[0], every[1], valid=every[2], generator=generator)
        return masked[mine]

    def _read_once(self, batch: Batch, items: Tensor, candidate: Tensor) -> Tensor:
        """The same where nothing is drawn, with each request's sequence encoded once for all its candidates."""
        encoded = self.sequence.encode_user(items, self._types(batch.types), valid=batch.valid)
        order = batch.request.argsort(stable=True)
        size = torch.bincount(batch.request)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - (size.cumsum(0) - size)[batch.request[order]]
        padded = candidate.new_zeros(len(size), int(size.max()), candidate.shape[1])
        padded[batch.request, place] = candidate
        out = self.sequence.encode_candidates(encoded, padded)[batch.request, place]
        compressed: Tensor = self.compression(out, batch.valid[batch.request])
        return compressed

    def _types(self, types: Tensor) -> Tensor | None:
        return types if self.reads in TYPED else None


def _sequence(
    data: RankingData, sequence: Sequence, options: ModelOptions, item_dim: int
) -> tuple[nn.Module | None, OutputCompression | None, int]:
    """What reads the sequence, what compresses its output, and how wide the result is."""
    if sequence in ("none", "counts"):
        return None, None, 0
    if sequence in ("average", "cnn", "rnn", "lstm"):
        made = {"cnn": CNNAggregator, "rnn": RNNAggregator, "lstm": LSTMAggregator}
        kind = made.get(sequence)
        reader = AveragePooling(item_dim) if kind is None else kind(item_dim)
        return reader, None, reader.out_dim
    bst = sequence.startswith("bst")
    transformer = ActionTransformer(
        item_dim=item_dim,
        num_action_types=data.num_action_types if sequence in TYPED else None,
        type_dim=options.type_dim,
        num_layers=options.num_layers,
        hidden_dim=options.hidden_dim,
        dropout=options.dropout,
        fusion="append" if bst else "concat",
        positions="learned" if bst else None,
        max_len=options.length + 1 if bst else None,
    )
    if options.start == "match" and not bst:
        start_from_matches(transformer, item_dim)
    compression = OutputCompression(options.num_slots)
    columns = compression.out_columns + (1 if bst else 0)  # BST's candidate has a slot of its own, the last
    return transformer, compression, columns * transformer.out_dim


@torch.no_grad()
def start_from_matches(transformer: ActionTransformer, item_dim: int) -> None:
    """Let the untrained transformer find actions on the candidate itself, which minutes of training would not reach.

    Layer 1 attends by the product of the candidate and each action's item. What it finds is taken from the candidate's
    columns, where a match leaves nothing, and added to the type's: what was done. All else starts small. An appended
    candidate has no columns of its own, so this is for concat alone.
    """
    layer = transformer.layers[0]
    columns = torch.arange(transformer.out_dim)
    types, items, candidate = columns.split([len(columns) - 2 * item_dim, item_dim, item_dim])
    found, done = columns[:item_dim], columns[item_dim : item_dim + len(types)]
    layer.qkv.weight *= 0.1
    layer.attention_out.weight *= 0.1
    queries, keys, values = layer.qkv.weight.chunk(3)
    queries[found, candidate] = keys[found, items] = 1.4
    values[found, items] = values[done, types] = 1.0
    layer.attention_out.weight[candidate, found] = -1.0
    layer.attention_out.weight[types, done] = 1.0
