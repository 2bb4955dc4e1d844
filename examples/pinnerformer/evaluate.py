"""Judge embeddings and scores alike: recall of each user in each window, and how varied the lists are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import recblocks
from examples.pinnerformer.data import Dataset
from examples.pinnerformer.infer import Histories, embed_items, embed_users
from examples.pinnerformer.model import PinnerFormer

K = 10
LIST = 50
DAYS = 14
PROTOCOLS = ("once", "daily", "realtime")


@dataclasses.dataclass(frozen=True)
class Window:
    """14 days, and what the judged users will like in them."""

    start: int
    """In the timelines' unit; what happened up to it is known."""
    positives: tuple[Tensor, Tensor]
    """(user row (P,), place in the corpus (P,)), each pair once."""
    outside: int
    """Positives that the corpus does not hold, which nobody is judged on."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What one method did."""

    name: str
    recall: Tensor
    """(U, W) Recall@10; what stands where a user has no positives means nothing."""
    present: Tensor
    """(U, W) bool, True = the user has positives in the window."""
    lists: recblocks.TopK | None
    """(U, 50) the first window's lists, corpus places, best first; None: the method has no lists."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A method's answer for one window: the rank of each positive, exact up to 48, and a list for every user."""

    ranks: Tensor
    lists: recblocks.TopK | None


Method = Callable[[Window], Answer]


def windows(data: Dataset) -> list[Window]:
    """The judged windows, one after the other from the cut on."""
    place = data.corpus_place
    result = []
    for number in range(data.num_windows):
        start = data.cut + number * DAYS * data.day
        _, future = recblocks.split_by_time(data.judged, start)
        inside, _ = recblocks.split_by_time(future, start + DAYS * data.day)
        user, index = inside.actions()
        kept = data.positive(inside.gather(index))
        user, item = user[kept], inside.columns["row"][index[kept]]
        user, item = recblocks.unique_pairs((user, item))
        known = place[item] >= 0
        result.append(Window(start, (user[known], place[item[known]]), int((~known).sum())))
    return result


def repeat_share(data: Dataset, judged_windows: list[Window]) -> float:
    """Share of all positives that their user had an action on before the window: what memory alone could find."""
    repeats, total = 0, 0
    for window in judged_windows:
        past, _ = recblocks.split_by_time(data.judged, window.start)
        user, index = past.actions()
        seen = user * len(data.content) + past.columns["row"][index]
        user, place = window.positives
        repeats += int(torch.isin(user * len(data.content) + data.corpus[place], seen).sum())
        total += len(user)
    return repeats / max(total, 1)


def judge(name: str, data: Dataset, judged_windows: list[Window], method: Method) -> Judged:
    """Ask a method about every window."""
    shape = (len(data.judged), len(judged_windows))
    recall, present = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    lists = None
    for number, window in enumerate(judged_windows):
        answer = method(window)
        user, value = recblocks.recall_per_user(answer.ranks, window.positives[0], k=K)
        recall[user, number], present[user, number] = value, True
        if number == 0:
            lists = answer.lists
    return Judged(name, recall, present, lists)


def by_model(data: Dataset, model: PinnerFormer, *, max_len: int) -> Method:
    """Embed every judged user as of the window's start; retrieve by inner product."""
    histories, items = Histories(data.judged), embed_items(model, data.corpus)
    everybody = torch.arange(len(data.judged))

    def answer(window: Window) -> Answer:
        cuts = torch.full_like(everybody, window.start)
        users = embed_users(model, histories, everybody, cuts, max_len=max_len)
        return by_embeddings(users, items, window)

    return answer


def by_embeddings(users: Tensor, items: Tensor, window: Window) -> Answer:
    """List by inner product; a user without any embedding yet (zeros) is shown nothing."""
    lists = recblocks.retrieve(users, items, k=LIST, metric="inner_product")
    return by_lists(lists._replace(valid=lists.valid & users.any(1, keepdim=True)), window)


def by_scores(scores: Callable[[Window], Tensor]) -> Method:
    """List by scores (U, C); what scores 0 is in nobody's list."""

    def answer(window: Window) -> Answer:
        lists = recblocks.top_k(scores(window), k=LIST)
        return by_lists(lists._replace(valid=lists.valid & (lists.scores > 0)), window)

    return answer


def by_lists(lists: recblocks.TopK, window: Window) -> Answer:
    """Rank by the users' lists."""
    user, item = window.positives
    return Answer(ranks_in(recblocks.TopK(*(part[user] for part in lists)), item), lists)


def ranks_in(lists: recblocks.TopK, item: Tensor) -> Tensor:
    """How many others score at least as much as each item (P,) in its list (P, 50); the length where it is not in it.

    An item that a tie keeps out of the list has at least 50 others before it, so this is Recall@10's exact rank rule
    without comparing every positive with the whole corpus.
    """
    found = (lists.items == item[:, None]) & lists.valid
    own = lists.scores.masked_fill(~found, -torch.inf).amax(1, keepdim=True)
    rank = ((lists.scores >= own) & lists.valid).sum(1) - 1
    return torch.where(found.any(1), rank, lists.items.shape[1])


def protocol_recall(data: Dataset, model: PinnerFormer, *, protocol: str, max_len: int) -> Judged:
    """Recall@10 of each specific action in the first window, from embeddings made once, daily or in real time."""
    histories = Histories(data.judged)
    user, index = data.judged.actions()
    item = data.corpus_place[data.judged.columns["row"][index]]
    kept = data.positive(data.judged.gather(index)) & (item >= 0)
    ranked = recblocks.protocol_ranks(
        lambda users, cuts: embed_users(model, histories, users, cuts, max_len=max_len),
        embed_items(model, data.corpus),
        (user[kept], item[kept], data.judged.columns["time"][index[kept]]),
        start=data.cut,
        protocol=protocol,
        num_days=DAYS,
        unit=data.judged.unit,
        metric="inner_product",
    )
    user, value = recblocks.recall_per_user(ranked.ranks, ranked.pair_user, k=K)
    recall, present = torch.zeros(len(data.judged), 1, dtype=torch.float64), torch.zeros(len(data.judged), 1).bool()
    recall[user, 0], present[user, 0] = value, True
    return Judged(protocol, recall, present, None)
