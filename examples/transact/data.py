"""What a ranker reads: requests and their candidates, histories frozen before each request, features without leaks."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.pinnerformer.infer import Histories
from recblocks import Timelines


@dataclasses.dataclass(frozen=True)
class Requests:
    """R requests: whose, when, and what was known of them then."""

    user: Tensor
    """(R,) rows of the histories."""
    newest: Tensor
    """(R,) index of the newest action strictly before the request; the end of the user's actions if none is."""
    day: Tensor
    """(R,) the day, counted as the data counts it; for splits and for what is known a day before."""
    time: Tensor
    """(R,) in the histories' unit."""
    categorical: dict[str, Tensor]
    """(R,) codes from 0."""
    user_embedding: Tensor | None = None
    """(R, E) what the retrieval example knew of the user a day before."""


@dataclasses.dataclass(frozen=True)
class Candidates:
    """N candidates, each shown at one request, and what came of it."""

    request: Tensor
    """(N,) ascending."""
    item: Tensor
    """(N,) rows of the item tables."""
    labels: Tensor
    """(N, H) float32, 0 or 1."""
    label_names: tuple[str, ...]
    """(H,) of the labels' columns."""
    categorical: dict[str, Tensor]
    """(N,) codes from 0."""
    numeric: Tensor
    """(N, F) float32, known before the request."""


class Bags(NamedTuple):
    """Raw ids of the items, some of each: an author, tags."""

    ids: Tensor
    """(N,) any int64."""
    offsets: Tensor
    """(I + 1,) where each item's begin and the last one's end."""

    @classmethod
    def where(cls, known: Tensor, ids: Tensor) -> Bags:
        """Those that are known of (I, K) ids."""
        sizes = known.sum(1)
        return cls(ids[known], torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]))

    def of(self, rows: Tensor) -> Bags:
        """Those of some items, in turn."""
        begins, sizes = self.offsets[rows], self.offsets.diff()[rows]
        ends = sizes.cumsum(0)
        place = torch.arange(int(sizes.sum())) + (begins - ends + sizes).repeat_interleave(sizes)
        return Bags(self.ids[place], torch.cat([ends.new_zeros(1), ends]))


@dataclasses.dataclass(frozen=True)
class RankingData:
    """Everything that training and evaluation need to know about some exposures.

    Raises:
        ValueError: labels in another order than the heads or not 0 or 1, utilities of other heads, a request that is in
            several parts, or a code of a user, a request, an item or an action type that there is not.
    """

    name: str
    heads: tuple[str, ...]
    utilities: tuple[float, ...]
    """What each head is worth in the score that ranks (TA eq. 3)."""
    primary: str
    """The head that comparisons are about."""
    histories: Timelines
    """Columns row (item), action_type, time and others, newest first."""
    num_action_types: int
    positive_types: tuple[int, ...]
    """Types that are positive engagement (BST's second variant reads only these)."""
    vectors: Tensor
    """(I, D) fixed vectors of the items."""
    items: Tensor
    """(I,) raw ids."""
    item_categorical: dict[str, Tensor]
    """(I,) codes from 0."""
    topics: Tensor
    """(I,) the kind of an item, which hand-made counts are kept of."""
    top_level: Tensor
    """(I,) top-level category, which diversity counts."""
    requests: Requests
    candidates: Candidates
    parts: dict[str, Tensor]
    """"train", "choose", "report": (R,) bool."""
    label_weights: dict[str, dict[str, float]]
    """What each action adds to the weight of each head's cross entropy, [head][action] (TA Table 7)."""
    epochs: int
    """How often training reads them, unless it is told."""
    batch_size: int
    """Candidates of a step, unless it is told."""
    negative_share: float
    """Share of the candidates without any action that training reads, unless it is told."""
    window_hours: float
    """The longest time window that training TransAct masks, unless it is told; 0: none. The paper has 24 everywhere."""
    notes: tuple[str, ...] = ()
    item_ids: dict[str, Bags] = dataclasses.field(default_factory=dict)
    """Raw ids that the items have beside their own."""

    def __post_init__(self) -> None:
        """Refuse what would be read as something else."""
        heads, labels = len(self.heads), self.candidates.labels
        if self.candidates.label_names != self.heads:
            raise ValueError(
                f"heads must be the labels' names in their order, {self.candidates.label_names}, got {self.heads}"
            )
        if labels.shape != (len(self.candidates.item), heads):
            wanted = f"({len(self.candidates.item)}, {heads}), a column for each of {', '.join(self.heads)}"
            raise ValueError(f"labels must have shape {wanted}, got {tuple(labels.shape)}")
        if bool(((labels != 0) & (labels != 1)).any()):
            raise ValueError(f"labels must be 0 or 1, got {labels[(labels != 0) & (labels != 1)][0].item()}")
        if len(self.utilities) != heads or self.primary not in self.heads:
            raise ValueError(f"utilities and primary must be of {self.heads}, got {self.utilities} and {self.primary}")
        if bool((torch.stack([*self.parts.values()]).sum(0) > 1).any()):
            raise ValueError(
                f"a request must be in at most one of the parts {', '.join(self.parts)}, got one in several"
            )
        for name, bags in self.item_ids.items():
            if name in ("user", "item", "seen") or len(bags.offsets) != len(self.items) + 1:
                wanted = f"named other than user, item and seen, with {len(self.items) + 1} offsets"
                raise ValueError(f"item_ids must be {wanted}, got {name!r} with {len(bags.offsets)}")
        _check_codes("user", self.requests.user, len(self.histories))
        _check_codes("request", self.candidates.request, len(self.requests.user))
        _check_codes("item", self.candidates.item, len(self.vectors))
        _check_codes("row", self.histories.columns["row"], len(self.vectors))
        _check_codes("action_type", self.histories.columns["action_type"], self.num_action_types)

    def digest(self) -> str:
        """What tells these data from others of the same name: of all that training reads."""
        histories = {name: self.histories.columns[name] for name in ("row", "action_type", "time")}
        requests = {"user": self.requests.user, "newest": self.requests.newest, "asked": self.requests.time}
        shown = {name: getattr(self.candidates, name) for name in ("request", "item", "labels", "numeric")}
        read = {**histories, **requests, **shown, "vectors": self.vectors, "train": self.parts["train"]}
        return digest_of(self.name, read)

    def rows_of(self, part: str) -> Tensor:
        """The candidates of a part's requests."""
        return torch.nonzero(self.parts[part][self.candidates.request]).squeeze(1)


def _check_codes(name: str, codes: Tensor, size: int) -> None:
    if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(f"{name} must be in [0, {size}), got {int(codes.min())} to {int(codes.max())}")


def digest_of(described: str, tensors: Mapping[str, Tensor]) -> str:
    """What tells some tensors, and how they came about, from others."""
    digest = hashlib.sha256(described.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:24]


def text_ids(values: list[str]) -> Tensor:
    """(N,) an id for each text, the same in every process: 64 bits of BLAKE2b."""
    ids = {value: hashlib.blake2b(value.encode(), digest_size=8).digest() for value in set(values)}
    return torch.from_numpy(np.frombuffer(b"".join(ids[value] for value in values), np.int64).copy())


def newest_before(histories: Timelines, rows: Tensor, times: Tensor) -> Tensor:
    """(R,) index of each user's newest action strictly before a time; the end of their actions where there is none."""
    return Histories(histories).newest(rows, times - 1)


def impressions_before(item: Tensor, day: Tensor, asked: Tensor) -> Tensor:
    """(N, 1) log1p of how often each item was shown before a day.

    Args:
        item: (N,) rows of the items, one an impression.
        day: (N,) when it was shown.
        asked: (N,) before which day.
    """
    days, place = torch.unique(day, return_inverse=True)
    counts = torch.zeros(len(days) + 1, int(item.max()) + 1)
    counts.view(-1).index_add_(0, (place + 1) * counts.shape[1] + item, torch.ones(len(item)))
    return counts.cumsum(0)[torch.searchsorted(days, asked), item, None].log1p()


def count_earlier(
    histories: Timelines, values: Tensor, users: Tensor, wanted: Tensor, newest: Tensor, *, length: int | None = None
) -> Tensor:
    """How many of a user's actions from ``newest`` on (of the next ``length``) have each wanted value.

    Args:
        histories: whose actions.
        values: (A,) codes from 0 of every action.
        users, newest: (N,) of each question.
        wanted: (N,) or (N, K) values asked for; the answers have its shape.
        length: so many newest actions; None: all of them.
    """
    row, index = histories.actions()
    bits = int(len(values) + (length or 0)).bit_length()
    num_values = int(torch.maximum(values.max(), wanted.max())) + 1
    key = (((row * num_values + values[index]) << bits) | index).sort().values
    last = histories.ends[users] if length is None else torch.minimum(newest + length, histories.ends[users])
    if wanted.ndim == 2:
        users, newest, last = users[:, None], newest[:, None], last[:, None]
    pair = (users * num_values + wanted) << bits
    return torch.searchsorted(key, pair | last) - torch.searchsorted(key, pair | newest)


def hand_made_counts(data: RankingData, *, length: int | None = 50) -> Tensor:
    """(N, F) log1p of how often the user met the item, its topic, and each action type, before the request."""
    histories, candidates, requests = data.histories, data.candidates, data.requests
    items, types = histories.columns["row"].long(), histories.columns["action_type"].long()
    topics, mine = data.topics[items], data.topics[candidates.item]
    kinds, kind = data.num_action_types, torch.arange(data.num_action_types)

    def counts(values: Tensor, wanted: Tensor) -> Tensor:
        user, newest = requests.user[candidates.request], requests.newest[candidates.request]
        return count_earlier(histories, values, user, wanted, newest, length=length)

    met = torch.stack([counts(items, candidates.item), counts(topics, mine)], 1)
    by_type = [
        counts(types, kind.expand(len(mine), -1)),
        counts(topics * kinds + types, mine[:, None] * kinds + kind),
        counts(items * kinds + types, candidates.item[:, None] * kinds + kind),
    ]
    return torch.cat([met, torch.stack(by_type, 2).flatten(1)], 1).float().log1p()


def sampling_chance(labels: Tensor, share: float) -> Tensor:
    """(N,) the chance to train on a row: 1 with any label, else ``share`` (TA 4.1.1)."""
    return torch.where(labels.any(1), 1.0, share)
