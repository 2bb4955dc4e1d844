"""What a model has to beat: popularity, the user's own past, and PinnerSage's clusters of it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import scipy.cluster.hierarchy
import torch
from torch import Tensor

import recblocks
from examples.pinnerformer.data import Dataset
from examples.pinnerformer.evaluate import LIST, Answer, Method, Window, by_lists, ranks_in
from recblocks import Timelines

POPULARITY_DAYS = 28
HALF_LIFE = 90.0


def popularity(data: Dataset) -> Callable[[Window], Tensor]:
    """Scores (U, C), the same for all: actions of the training users in the 28 days before the window."""

    def scores(window: Window) -> Tensor:
        past, _ = recblocks.split_by_time(data.train, window.start)
        _, recent = recblocks.split_by_time(past, window.start - POPULARITY_DAYS * data.day)
        _, item, _ = _positive_places(data, recent)
        return torch.bincount(item, minlength=len(data.corpus)).float().expand(len(data.judged), -1)

    return scores


def own_most_recent(data: Dataset) -> Callable[[Window], Tensor]:
    """Scores (U, C): the user's items by their latest action; of one time, the one that stands first."""

    def scores(window: Window) -> Tensor:
        past, _ = recblocks.split_by_time(data.judged, window.start)
        user, item, index = _positive_places(data, past)
        result = torch.zeros(len(past), len(data.corpus))
        newness = 1 / (1 + index - past.starts[user]).float()
        result.view(-1).scatter_reduce_(0, user * len(data.corpus) + item, newness, "amax")
        return result

    return scores


def own_most_frequent(data: Dataset) -> Callable[[Window], Tensor]:
    """Scores (U, C): how often the user acted on each item, halving in 90 days; of equals the newest first."""

    def scores(window: Window) -> Tensor:
        past, _ = recblocks.split_by_time(data.judged, window.start)
        user, item, index = _positive_places(data, past)
        days = (window.start - past.columns["time"][index]) / data.day
        weight = 0.5 ** (days / HALF_LIFE) - 1e-7 * (index - past.starts[user])
        result = torch.zeros(len(past), len(data.corpus), dtype=torch.float64)
        return result.view(-1).index_add_(0, user * len(data.corpus) + item, weight.double()).view_as(result)

    return scores


def frequent_and_popular(data: Dataset, *, popular: float = 100.0) -> Callable[[Window], Tensor]:
    """Own frequency plus ``popular`` times an item's share of all recent actions."""
    frequent, crowd = own_most_frequent(data), popularity(data)

    def scores(window: Window) -> Tensor:
        counts = crowd(window)[:1].double()
        return frequent(window).add_(popular * counts / counts.sum())

    return scores


class Neighbours:
    """The nearest items of an item by content; each is looked up once, whoever asks."""

    def __init__(self, data: Dataset) -> None:
        self.content = torch.nn.functional.normalize(data.content, dim=1)
        self.corpus = self.content[data.corpus]
        self._place = torch.full((len(self.content),), -1)
        self._lists = recblocks.TopK(
            torch.empty(0, LIST, dtype=torch.int64), torch.empty(0, LIST), torch.empty(0, LIST, dtype=torch.bool)
        )

    def of(self, items: Tensor) -> recblocks.TopK:
        """(Q, 50) nearest corpus places of items (Q,), nearest first."""
        new = torch.unique(items[self._place[items] < 0])
        found = recblocks.retrieve(self.content[new], self.corpus, k=LIST)
        self._place[new] = torch.arange(len(new)) + len(self._lists.items)
        self._lists = recblocks.TopK(*(torch.cat(parts) for parts in zip(self._lists, found, strict=True)))
        return recblocks.TopK(*(part[self._place[items]] for part in self._lists))


class PinnerSage:
    """Medoids of Ward clusters of what a user acted on in the last 90 days, the weightiest ``num_clusters`` of them.

    A cluster weighs the sum of exp(-0.01 days) over its actions. Items are compared by content. What was clustered or
    looked up once is kept for the next question, so a `PinnerSage` answers one thread.
    """

    def __init__(self, data: Dataset, *, days: int = 90) -> None:
        self.data = data
        self.near = Neighbours(data)
        self.days = days
        self.medoids = functools.cache(self._medoids)
        self._trees: dict[tuple[int, int], np.ndarray] = {}

    def _medoids(self, start: int, num_clusters: int) -> tuple[Tensor, Tensor]:
        """(U, num_clusters) rows of items, the weightiest cluster first, and which of them there are."""
        past, _ = recblocks.split_by_time(self.data.judged, start)
        _, recent = recblocks.split_by_time(past, start - self.days * self.data.day)
        items = torch.zeros(len(past), num_clusters, dtype=torch.int64)
        valid = torch.zeros(len(past), num_clusters, dtype=torch.bool)
        for user, (low, high) in enumerate(zip(recent.starts.tolist(), recent.ends.tolist(), strict=True)):
            item = recent.columns["row"][low:high]
            weight = torch.exp(-0.01 * (start - recent.columns["time"][low:high]) / self.data.day)
            different, place = torch.unique(item, return_inverse=True)
            weights = torch.zeros(len(different)).index_add_(0, place, weight.float())
            if len(different) <= 2:
                chosen = different[weights.argsort(descending=True)][:num_clusters]
            else:
                chosen = self._of_user((start, user), different, weights, num_clusters)
            items[user, : len(chosen)], valid[user, : len(chosen)] = chosen, True
        return items, valid

    def _of_user(self, key: tuple[int, int], items: Tensor, weights: Tensor, num_clusters: int) -> Tensor:
        vectors = self.near.content[items]
        if key not in self._trees:
            self._trees[key] = scipy.cluster.hierarchy.linkage(vectors.numpy(), "ward")
        labels = scipy.cluster.hierarchy.fcluster(self._trees[key], num_clusters, "maxclust")
        cluster = torch.from_numpy(np.ascontiguousarray(labels)).long() - 1
        count = int(cluster.max()) + 1
        same = (cluster[:, None] == cluster).float()
        spread = (torch.cdist(vectors, vectors).square() * same).sum(1)
        mass = torch.zeros(count).index_add_(0, cluster, weights)
        order = torch.argsort(spread, stable=True)
        order = order[torch.argsort(cluster[order], stable=True)]
        first = torch.cat([torch.ones(1, dtype=torch.bool), cluster[order].diff() != 0])
        return items[order[first]][mass.argsort(descending=True)]

    def oracle(self, num_clusters: int) -> Method:
        """Each positive is looked for with the medoid closest to it: a bound, not a list that anybody could show."""

        def answer(window: Window) -> Answer:
            items, valid = self.medoids(window.start, num_clusters)
            user, item = window.positives
            ranks = torch.full_like(user, LIST)
            known = valid.any(1)[user]
            positives = (user[known], item[known])
            medoids = self.near.content[items]
            closest = recblocks.closest_embedding(medoids, self.near.corpus, positives, valid=valid)
            ranks[known] = ranks_in(self.near.of(items.flatten()[closest]), positives[1])
            return Answer(ranks, None)

        return answer

    def blended(self, num_clusters: int) -> Method:
        """The medoids' lists in turn: the first one's best item, the second one's best, and so on."""

        def answer(window: Window) -> Answer:
            items, valid = self.medoids(window.start, num_clusters)
            lists = self.near.of(items.flatten())
            shape = (*items.shape, LIST)
            shown = lists.valid.view(shape) & valid[..., None]
            return by_lists(recblocks.round_robin(lists.items.view(shape), k=LIST, valid=shown), window)

        return answer


def _positive_places(data: Dataset, timelines: Timelines) -> tuple[Tensor, Tensor, Tensor]:
    """(user row, place in the corpus, index) of the positive actions on items of the corpus."""
    user, index = timelines.actions()
    item = data.corpus_place[timelines.columns["row"][index]]
    kept = (item >= 0) & data.positive(timelines.gather(index))
    return user[kept], item[kept], index[kept]
