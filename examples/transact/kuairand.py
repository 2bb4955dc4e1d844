"""KuaiRand as exposures: a chunk is what one user saw on one day, its sequence frozen before the first of it."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

import numpy as np
import scipy.sparse
import torch
from sklearn.decomposition import TruncatedSVD
from torch import Tensor

import recblocks
from examples.transact.data import Bags, Candidates, RankingData, Requests, impressions_before, newest_before
from recblocks import Impressions, Timelines

WATCHED = len(recblocks.KUAIRAND_TYPES)
"""The action type of the videos of which only the order is known."""
DAY, BEIJING = 86_400_000, 8 * 3_600_000
UTILITIES = {"long_view": 1.0, "like": 1.0, "comment": 0.5, "forward": 0.5, "follow": 0.5, "click": 0.3, "hate": -1.0}


@dataclasses.dataclass(frozen=True)
class KuaiRandOptions:
    """Where KuaiRand lies and how it is drawn."""

    data_dir: pathlib.Path | None = None
    """The folder that holds kuairand_pure and kuairand27k_explicit; default: what RECBLOCKS_DATA names."""
    vector_dim: int = 16
    """Width of the item vectors: co-watching before the training days, or else identity."""


def load(
    options: KuaiRandOptions,
    name: Literal["kuairand_pure", "kuairand27k_explicit"],
    *,
    judged: Literal["report", "choose"] = "report",
) -> RankingData:
    """Read what is to be trained on for the part that is judged.

    Pure: the report is on 1 to 8 May after training on 25 to 30 April; choices are made on the 30th after training on
    25 to 29. The explicit part: 19 to 21 April after 7 to 18; the 18th after 7 to 17.
    """
    read = {"kuairand_pure": recblocks.kuairand_pure, "kuairand27k_explicit": recblocks.kuairand27k_explicit}[name]
    seen = read(options.data_dir)
    items = seen.items["item"]
    histories = _histories(seen, items)
    columns = seen.columns
    user = histories.rows_of(columns["user"])
    # Rows run by user and time; a chunk is one user's day, whose first impression freezes the sequence.
    key = user * 100_000 + columns["day"]
    chunks, request = torch.unique(key, return_inverse=True)
    first = torch.full((len(chunks),), torch.iinfo(torch.int64).max).scatter_reduce_(
        0, request, columns["time"], "amin"
    )
    last = torch.zeros_like(first).scatter_reduce_(0, request, columns["time"], "amax")
    order = request.argsort(stable=True)
    size = torch.bincount(request)
    day, test = chunks % 100_000, torch.zeros(len(chunks), dtype=torch.int64).index_copy_(0, request, columns["test"])
    last_day = day == int(day[test == 0].max())
    chosen_on = (test == 0) & last_day & (judged == "choose")
    earlier, is_judged = (test == 0) & ~chosen_on, size >= 4
    if not bool((~earlier & is_judged).any()):
        raise ValueError(f"{name} must hold a later chunk of at least 4 impressions, got none to judge")
    # About midnight: a chunk's labels come when a judged one has begun.
    overlapping = earlier & (last >= first[~earlier & is_judged].min())
    tags = _codes(seen.items["tag"]) if "tag" in seen.items else torch.arange(len(items))
    heads = ("like", "hate") if name == "kuairand27k_explicit" else tuple(UTILITIES)
    item = torch.searchsorted(items, columns["item"])
    # Not the source's dates: about midnight a chunk may begin before the last impressions of the date before.
    shown_on, asked_on = ((time + BEIJING) // DAY for time in (columns["time"], first[request]))
    popularity = impressions_before(item, shown_on, asked_on)
    requests = Requests(
        user=chunks // 100_000,
        newest=newest_before(histories, chunks // 100_000, first),
        day=day,
        time=first,
        categorical={"hour": first // 3_600_000 % 24},
    )
    return RankingData(
        name=name,
        heads=heads,
        utilities=tuple(UTILITIES[head] for head in heads),
        primary=heads[0],
        histories=histories,
        num_action_types=WATCHED + 1,
        positive_types=tuple(kind for kind in range(1, WATCHED + 1) if kind != recblocks.KUAIRAND_TYPES.index("hate")),
        items=items,
        vectors=_vectors(seen, items, options.vector_dim),
        item_categorical={each: _codes(seen.items[each]) for each in ("tag", "author", "music") if each in seen.items},
        topics=tags,
        top_level=tags,
        requests=requests,
        candidates=Candidates(
            request=request[order],
            item=item[order],
            labels=torch.stack([seen.labels[head] for head in heads], 1).float()[order],
            label_names=heads,
            categorical={"surface": columns["surface"][order]},
            numeric=popularity[order],
        ),
        parts={
            "train": earlier & ~overlapping,
            "choose": chosen_on & is_judged,
            "report": (test == 1) & is_judged,
        },
        label_weights={
            head: {action: float(head == action or "hate" in (head, action)) for action in heads} for head in heads
        },
        epochs=2,
        batch_size=256,
        negative_share=1.0,
        window_hours=6.0,
        notes=(
            f"{seen.report['merged']} repeated rows are merged. {int(overlapping.sum())} chunks of the last day of "
            "training are left out, as they end when the first judged one has begun. Chunks of fewer than 4 "
            "impressions are trained on and not judged. Nothing is randomised: position bias is in every figure. No "
            "user embedding: what came before the first day has no times, so none can be learned from it.",
            *(() if "tag" in seen.items else ("No categories are known here: every video is a topic of its own.",)),
        ),
        item_ids={
            each: Bags.where(seen.items[each][:, None] >= 0, seen.items[each][:, None])
            for each in ("author", "tag")
            if each in seen.items
        },
    )


def _histories(seen: Impressions, items: Tensor) -> Timelines:
    """Every impression as an action, and before them what was watched earlier, 1 ms apart, as its times are unknown."""
    columns, earlier = seen.columns, seen.earlier
    before = int(columns["time"].min()) - 1
    user = torch.cat([columns["user"], earlier["user"]])
    item = torch.cat([columns["item"], earlier["item"]])
    kind = torch.cat([columns["action_type"], torch.full_like(earlier["user"], WATCHED)])
    known = torch.isin(item, items)
    time = torch.cat([columns["time"], before - earlier["place"]])
    timelines = Timelines.from_arrays(
        user=user[known], time=time[known], item=item[known], action_type=kind[known], unit="ms"
    )
    return timelines.with_columns(row=torch.searchsorted(items, timelines.columns["item"]))


def _vectors(seen: Impressions, items: Tensor, dim: int) -> Tensor:
    """(I, dim) who watched it before the first impression; where nothing came before, a random vector of its own."""
    known = torch.isin(seen.earlier["item"], items)
    if not bool(known.any()):
        return torch.randn(len(items), dim, generator=torch.Generator().manual_seed(0)) / dim**0.5
    _, user = torch.unique(seen.earlier["user"][known], return_inverse=True)
    item = torch.searchsorted(items, seen.earlier["item"][known])
    shape = (int(user.max()) + 1, len(items))
    matrix = scipy.sparse.csr_matrix((np.ones(len(user), np.float32), (user.numpy(), item.numpy())), shape=shape)
    vectors = torch.from_numpy(
        np.ascontiguousarray(TruncatedSVD(dim, random_state=0).fit(matrix).components_.T)
    ).float()
    return torch.nn.functional.normalize(vectors, dim=1)


def _codes(values: Tensor) -> Tensor:
    return torch.unique(values, return_inverse=True)[1]
