"""Judge rankers: HIT@3 and AUC per head, AUC within requests, calibration, diversity; paired over users."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

import recblocks
from examples.transact.data import RankingData
from recblocks import Calibration, Interval, UserMeans

K = 3


@dataclasses.dataclass(frozen=True)
class Judged:
    """What one ranker, or one rule, did on the judged requests."""

    name: str
    probabilities: Tensor
    """(N, H) of the judged rows; a rule's scores stand in every column."""
    hits: Tensor
    """(U, H) hits in the top 3, summed over each user's requests."""
    topics: Tensor
    """(U,) mean number of distinct top-level categories in the top 3."""
    num_requests: Tensor
    """(U,) float64."""
    inside: tuple[UserMeans, ...]
    """AUC within each user's requests, by head."""
    is_model: bool = True
    """False: a rule, whose scores are no probabilities."""


@dataclasses.dataclass(frozen=True)
class Head:
    """One head's figures."""

    hit: Interval
    """HIT@3 a request (TA eq. 4 divides by users; requests make parts of any length comparable)."""
    auc: Interval
    chunk_auc: Interval
    calibration: Calibration | None


class Jury:
    """Judges everything on the same rows and the same resampled users."""

    def __init__(self, data: RankingData, part: str) -> None:
        self.data = data
        self.rows = data.rows_of(part)
        self.request = data.candidates.request[self.rows]
        self.user = data.requests.user[self.request]
        self.labels = data.candidates.labels[self.rows]
        users, place = torch.unique(data.requests.user[torch.unique(self.request)], return_inverse=True)
        self.num_requests = torch.bincount(place, minlength=len(users)).double()

    def judge(
        self, name: str, probabilities: Tensor, *, utilities: Sequence[float] | None = None, is_model: bool = True
    ) -> Judged:
        """Rank every request by the blended score, with the data's utilities unless others are given."""
        worth = torch.tensor(self.data.utilities if utilities is None else utilities, dtype=torch.float64)
        scores = recblocks.blend_scores(probabilities, worth) if is_model else probabilities[:, 0]
        topics = self.data.top_level[self.data.candidates.item[self.rows]]
        return Judged(
            name,
            probabilities,
            recblocks.hit_per_user(scores, self.labels, self.user, self.request, k=K).value,
            recblocks.distinct_per_user(scores, topics, self.user, self.request, k=K).value,
            self.num_requests,
            tuple(
                recblocks.chunk_auc_per_user(mine, labels, self.user, self.request)
                for mine, labels in zip(probabilities.unbind(1), self.labels.unbind(1), strict=True)
            ),
            is_model,
        )

    def oracle(self) -> Judged:
        """The bound of every head: each request ranked by that head's labels themselves, unwanted ones last."""
        unwanted = torch.tensor(self.data.utilities) < 0
        labels = torch.where(unwanted, -self.labels, self.labels).double()
        hits = [
            recblocks.hit_per_user(mine, self.labels[:, head, None], self.user, self.request, k=K).value
            for head, mine in enumerate(labels.unbind(1))
        ]
        ranked = self.judge("oracle", labels, is_model=False)
        return dataclasses.replace(ranked, name="oracle (each head ranked by its own labels)", hits=torch.cat(hits, 1))

    def head(self, judged: Judged, head: int) -> Head:
        """One head's figures with 95 % intervals over users."""
        labels, scores = self.labels[:, head], judged.probabilities[:, head]
        inside = judged.inside[head]
        return Head(
            self._mean(judged.hits[:, head] / self.num_requests, self.num_requests),
            recblocks.auc_bootstrap(scores, labels, self.user, num_resamples=300, generator=seeded()),
            self._mean(inside.value, inside.num_chunks.double()),
            self.calibration(judged, head) if judged.is_model else None,
        )

    def figure(self, judged: Judged, measure: str, head: int) -> float:
        """One of a head's figures, "HIT@3", "AUC" or "AUC in requests", without its interval."""
        labels, scores = self.labels[:, head], judged.probabilities[:, head]
        if measure == "HIT@3":
            return float(judged.hits[:, head].sum() / self.num_requests.sum())
        if measure == "AUC":
            return float(recblocks.auc(scores, labels))
        return float(recblocks.chunk_auc(scores, labels, self.user, self.request))

    def calibration(self, judged: Judged, head: int) -> Calibration:
        """One head's predicted and observed rates."""
        return recblocks.calibration(judged.probabilities[:, head], self.labels[:, head])

    def less_hit(self, one: Judged, other: Judged, head: int) -> Interval:
        """HIT@3 a request of one less the other's, over the same users."""
        return self._less(
            one.hits[:, head] / self.num_requests, other.hits[:, head] / self.num_requests, self.num_requests
        )

    def less_auc(self, one: Judged, other: Judged, head: int) -> Interval:
        """AUC of one less the other's."""
        ours, theirs = one.probabilities[:, head], other.probabilities[:, head]
        return recblocks.paired_auc_bootstrap(
            ours, theirs, self.labels[:, head], self.user, num_resamples=300, generator=seeded()
        )

    def less_chunk_auc(self, one: Judged, other: Judged, head: int) -> Interval:
        """AUC within requests of one less the other's."""
        ours, theirs = one.inside[head], other.inside[head]
        return self._less(ours.value, theirs.value, ours.num_chunks.double())

    def diversity(self, judged: Judged) -> Interval:
        """Distinct top-level categories in the top 3."""
        return self._mean(judged.topics, self.num_requests)

    def less_diverse(self, one: Judged, other: Judged) -> Interval:
        """Distinct top-level categories in the top 3 of one less the other's."""
        return self._less(one.topics, other.topics, self.num_requests)

    def _mean(self, values: Tensor, weights: Tensor) -> Interval:
        return recblocks.bootstrap_mean(values, weights=weights, num_resamples=2000, generator=seeded())

    def _less(self, values: Tensor, other: Tensor, weights: Tensor) -> Interval:
        return recblocks.paired_bootstrap(values, other, weights=weights, num_resamples=2000, generator=seeded())


def seeded() -> torch.Generator:
    """Everything is judged on the same resamples."""
    return torch.Generator().manual_seed(0)
