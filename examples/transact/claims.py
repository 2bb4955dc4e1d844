"""Train the rankers that the expected orderings are about, several seeds each, and print which orderings come out.

``python -m examples.transact.claims --data responsive``. The worlds were written down before any ranker was trained;
the claim about the positive heads, the paper's label weights, the masked window's length, the one epoch, types of 32
columns, the start of weighted heads, gradients that are not clipped and Student's intervals came after the first runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy.stats
import torch
import tyro
from rich.console import Console
from rich.table import Table

from examples.page import interval_text
from examples.side_by_side import train_side_by_side
from examples.transact import journey, kuairand, world
from examples.transact.data import RankingData
from examples.transact.evaluate import Judged, Jury
from examples.transact.journey import JourneyOptions
from examples.transact.kuairand import KuaiRandOptions
from examples.transact.model import ModelOptions
from examples.transact.model import Sequence as Reads
from examples.transact.train import TrainOptions, scoring
from examples.transact.world import WorldOptions
from recblocks import Interval


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained; every ranker of a seed gets the same."""

    data: Literal["completejourney", "kuairand_pure", "responsive", "indifferent"] = "completejourney"
    part: Literal["report", "choose"] = "report"
    """Which requests are judged; KuaiRand trains on the days of choosing too before the report."""
    seeds: int = 3
    """Of the rankers, from ``--seed`` on; and in the simulated worlds of the users and all they do."""
    journey: tyro.conf.OmitArgPrefixes[JourneyOptions] = dataclasses.field(
        default_factory=lambda: JourneyOptions(baskets=20_000)
    )
    kuairand: tyro.conf.OmitArgPrefixes[KuaiRandOptions] = dataclasses.field(default_factory=KuaiRandOptions)
    world_users: int | None = None
    """Users instead of the world's own number."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = dataclasses.field(default_factory=ModelOptions)
    train: tyro.conf.OmitArgPrefixes[TrainOptions] = dataclasses.field(default_factory=TrainOptions)
    threads: int = 1
    """CPU threads of each ranker."""
    jobs: int = 2
    """Rankers trained at a time."""


Measure = Literal["HIT@3", "AUC", "AUC in requests", "distinct categories"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One thing that ought to be seen: by some measure one ranker has more than another, or as much."""

    one: str
    other: str
    measure: Measure
    head: str | None
    """Whose actions are measured; distinct categories are of no head."""
    expected: Literal["more", "less", "same", "not less", "within", "open"] = "more"
    bar: float = 0.0
    """How much more the mean over the seeds ought to be, or with "within" how much of the other's it may lose."""
    heads: Literal["all", "positive"] = "all"
    """Which heads rank; without those of negative utility a hide lowers a score only as far as it lowers the others."""

    def __post_init__(self) -> None:
        """Refuse what says nothing."""
        if self.heads == "positive" and self.measure.startswith("AUC"):
            raise ValueError(f"{self.measure} is of one head, whichever heads rank")

    def text(self) -> str:
        """The claim in words."""
        what = self.measure if self.head is None else f"{self.measure} of {self.head}"
        sign = {"more": ">", "less": "<", "same": "=", "not less": "not below", "within": "/", "open": "against"}
        bar = {"more": f" by {self.bar:g}" if self.bar else "", "within": f" - 1 not below -{self.bar:.0%}"}
        by = "" if self.heads == "all" else ", ranked by the positive heads"
        return f"{what}: {self.one} {sign[self.expected]} {self.other}{bar.get(self.expected, '')}{by}"

    def less(self, jury: Jury, judged: dict[str, Judged]) -> Interval:
        """What one ranker has more than the other; as a share of the other's with "within"."""
        one, other = judged[self.one], judged[self.other]
        if self.head is None:
            return jury.less_diverse(one, other)
        head = jury.data.heads.index(self.head)
        less = {"HIT@3": jury.less_hit, "AUC": jury.less_auc, "AUC in requests": jury.less_chunk_auc}
        found = less[self.measure](one, other, head)
        if self.expected != "within":
            return found
        whole = jury.figure(other, self.measure, head)
        return Interval(*(value / whole for value in found))


def main(options: Options) -> None:
    """Train, judge and compare, seed by seed; what a seed says is printed when it is known."""
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}")
    torch.set_num_threads(options.threads)
    console = Console(width=190)
    is_world = options.data in ("responsive", "indifferent")
    claims = _claims(options.data)
    of_positive = [claim for claim in claims if claim.heads == "positive"]
    rank_by_positive = dict.fromkeys(name for claim in of_positive for name in (claim.one, claim.other))
    found: list[list[Interval]] = [[] for _ in claims]
    every_seed = range(options.train.seed, options.train.seed + options.seeds)
    for seed in every_seed:
        if seed == options.train.seed or is_world:
            data = _load(options, seed)
        jury = Jury(data, options.part)
        rankers = {
            name: scoring(data, reads, options.model, how, jury.rows)
            for name, (reads, how) in _rankers(options, seed).items()
        }
        scored = train_side_by_side(console, rankers, jobs=options.jobs)
        judged = {name: jury.judge(name, each.probabilities) for name, each in scored.items()}
        positive = [max(utility, 0.0) for utility in data.utilities]
        by_positive = {
            name: jury.judge(name, scored[name].probabilities, utilities=positive) for name in rank_by_positive
        }
        shown = list(dict.fromkeys((claim.measure, claim.head) for claim in claims))
        headings = ("ranker", *(measure if head is None else f"{measure} of {head}" for measure, head in shown))
        listed = judged | {f"{name}, by positive heads": each for name, each in by_positive.items()}
        rows = [[name, *(f"{_figure(jury, each, *what):.4f}" for what in shown)] for name, each in listed.items()]
        console.print(_table(f"{data.name}, {options.part}, seed {seed}", headings, rows))
        for claim, intervals in zip(claims, found, strict=True):
            intervals.append(claim.less(jury, judged if claim.heads == "all" else by_positive))
            console.print(f"{claim.text()}: {interval_text(intervals[-1], '+')}")
    seeds = [f"seed {seed}, 95 %" for seed in every_seed]
    verdicts = [_row(claim, intervals, same_users=not is_world) for claim, intervals in zip(claims, found, strict=True)]
    console.print(_table("expected, and what came out", ("expected", "mean, 95 %", *seeds, "verdict"), verdicts))


def _load(options: Options, seed: int) -> RankingData:
    if options.data == "completejourney":
        return journey.load(options.journey, user_embedding=options.model.user_embedding)
    if options.data == "kuairand_pure":
        return kuairand.load(options.kuairand, options.data, judged=options.part)
    return world.load(WorldOptions(world=options.data, world_users=options.world_users, world_seed=seed))


def _rankers(options: Options, seed: int) -> dict[str, tuple[Reads, TrainOptions]]:
    """What each reads and how it is trained, by name."""
    trained = dataclasses.replace(options.train, seed=seed)
    if options.data in ("completejourney", "kuairand_pure"):
        return {
            "TransAct": ("transact", trained),
            "none": ("none", trained),
            "average": ("average", trained),
            "counts": ("counts", trained),
        }
    return {
        "TransAct": ("transact", trained),
        "TransAct, no window mask": ("transact_unmasked", trained),
        "TransAct, no types": ("transact_untyped", trained),
        "TransAct, label matrix": ("transact", dataclasses.replace(trained, label_weights="matrix")),
        "BST": ("bst", trained),
        "average": ("average", trained),
        "none": ("none", trained),
    }


def _claims(data: str) -> list[Claim]:
    if data == "completejourney":
        measures: tuple[Measure, ...] = ("AUC in requests", "HIT@3")
        against = [Claim("TransAct", other, measure, "buy") for measure in measures for other in ("none", "average")]
        return against + [Claim("TransAct", "counts", measure, "buy", "open") for measure in measures]
    if data == "kuairand_pure":
        claims = [
            Claim("TransAct", "none", "AUC", "long_view", bar=0.008),
            Claim("TransAct", "average", "AUC", "long_view", bar=0.005),
            Claim("TransAct", "none", "AUC", "like", bar=0.035),
            Claim("TransAct", "average", "AUC", "like", bar=0.035),
        ]
        for head in ("long_view", "like"):
            claims += [Claim("TransAct", other, "HIT@3", head, "within", 0.01) for other in ("none", "average")]
        return claims + [Claim("TransAct", "counts", "AUC", head, "open") for head in ("long_view", "like")]
    claims = [
        Claim("TransAct", "BST", "HIT@3", "save"),
        Claim("BST", "average", "HIT@3", "save"),
        Claim("TransAct", "TransAct, no types", "HIT@3", "hide", "less"),
        Claim("TransAct", "TransAct, no window mask", "distinct categories", None),
        Claim("TransAct", "TransAct, no window mask", "HIT@3", "save", "not less"),
        Claim("TransAct, label matrix", "TransAct", "HIT@3", "hide", "less"),
        Claim("TransAct, label matrix", "TransAct", "HIT@3", "hide", "less", heads="positive"),
    ]
    if data == "responsive":
        return claims
    return [dataclasses.replace(claim, expected="same") for claim in claims]


def _figure(jury: Jury, judged: Judged, measure: Measure, head: str | None) -> float:
    if head is None:
        return jury.diversity(judged).mean
    return jury.figure(judged, measure, jury.data.heads.index(head))


def _row(claim: Claim, found: Sequence[Interval], *, same_users: bool) -> list[str]:
    mean = _mean(found, same_users=same_users)
    shown = (interval_text(one, "+") for one in (mean, *found))
    return [claim.text(), *shown, _verdict(claim, mean, found)]


def _mean(found: Sequence[Interval], *, same_users: bool) -> Interval:
    """The mean over seeds: of the same users as wide as these make it; else Student's, from how far the seeds differ.

    Only the latter holds what another training would change, and of three seeds it is wide: "no difference told" is not
    "no difference". Of one seed both are that seed's.
    """
    means = np.array([one.mean for one in found])
    if same_users or len(found) == 1:
        half = sum((one.high - one.low) / 2 for one in found) / len(found)
    else:
        half = scipy.stats.t.ppf(0.975, len(found) - 1) * means.std(ddof=1) / len(found) ** 0.5
    return Interval(float(means.mean()), float(means.mean() - half), float(means.mean() + half))


def _verdict(claim: Claim, mean: Interval, found: Sequence[Interval]) -> str:
    above, below = sum(one.low > 0 for one in found), sum(one.high < 0 for one in found)
    if claim.expected == "open":
        winner = {above: claim.one, below: claim.other}.get(len(found))
        return "not told apart" if winner is None else f"{winner} has more"
    holds = {
        "more": above == len(found) and mean.mean >= claim.bar,
        "less": below == len(found),
        "same": mean.low <= 0 <= mean.high,
        "not less": below == 0,
        "within": mean.mean >= -claim.bar,
    }[claim.expected]
    seen = f"{above} of {len(found)} above 0, {below} below"
    if claim.expected == "same":
        return f"{'no difference told from 0' if holds else 'A DIFFERENCE'}: {seen}"
    return "comes out" if holds else f"DOES NOT COME OUT: {seen}"


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("ranker", "expected", "verdict") else "right")
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
