"""Train hybrid rankers, judge them beside each other and hand-made rules, and write a report.

``python -m examples.transact``
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from torch import Tensor

from examples.ranks import is_first_rank, wait_for_ranks
from examples.side_by_side import train_side_by_side
from examples.transact import journey, kuairand, report, world
from examples.transact.data import RankingData, count_earlier
from examples.transact.evaluate import Judged, Jury
from examples.transact.journey import JourneyOptions
from examples.transact.kuairand import KuaiRandOptions
from examples.transact.model import ModelOptions, Sequence
from examples.transact.train import Scored, TrainOptions, scoring
from examples.transact.world import WorldOptions


@dataclasses.dataclass(frozen=True)
class Options:
    """Train hybrid rankers, judge them beside each other and hand-made rules, and write a report."""

    data: Literal["completejourney", "kuairand_pure", "kuairand27k_explicit", "simulator"] = "completejourney"
    """A year of shopping with what the stores promoted; a feed of short videos; or a simulated feed."""
    part: Literal["report", "choose"] = "report"
    """Which requests are judged: the last weeks, touched once, or those that hyperparameters are chosen on, on which
    KuaiRand's rankers train too before the report."""
    models: tuple[Sequence, ...] = ("transact", "transact_unmasked", "average", "counts", "none")
    """How each trained ranker reads the realtime sequence; the first one is compared with the others."""
    journey: tyro.conf.OmitArgPrefixes[JourneyOptions] = dataclasses.field(default_factory=JourneyOptions)
    kuairand: tyro.conf.OmitArgPrefixes[KuaiRandOptions] = dataclasses.field(default_factory=KuaiRandOptions)
    world: tyro.conf.OmitArgPrefixes[WorldOptions] = dataclasses.field(default_factory=WorldOptions)
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = dataclasses.field(default_factory=ModelOptions)
    train: tyro.conf.OmitArgPrefixes[TrainOptions] = dataclasses.field(default_factory=TrainOptions)
    out: pathlib.Path = pathlib.Path("build/transact")
    """Folder of the report and the scores."""
    threads: int = 1
    """CPU threads of each ranker."""
    jobs: int = 2
    """Rankers trained at a time; one where its tables are sharded."""


def main(options: Options) -> None:
    """Run everything, on this process or, where tables are sharded, on the ranks that torchrun started."""
    torch.set_num_threads(options.threads)
    if not options.train.sharded:
        run(options)
        return
    from examples.transact.sharded import start  # torchrec is needed for nothing else

    start(options.train.device)
    try:
        run(options)
        wait_for_ranks()
    finally:
        dist.destroy_process_group()


def run(options: Options) -> None:
    """Train on every rank; judge and report on the first."""
    began = time.monotonic()
    console = Console(quiet=not is_first_rank(), width=None if sys.stdout.isatty() else 130)
    data = load(options)
    console.print(
        f"{data.name}: {len(data.candidates.item)} candidates of {len(data.requests.user)} requests, "
        f"{len(data.rows_of('train'))} to train on, {len(data.rows_of(options.part))} to judge"
    )
    jury = Jury(data, options.part)
    scored = train_all(console, data, options, jury.rows)
    if not is_first_rank():
        return
    judged = [jury.judge(name, each.probabilities) for name, each in scored.items()]
    judged += [jury.judge(name, scores, is_model=False) for name, scores in rules(data, jury.rows, options).items()]
    less = report.compare(jury, judged)
    write_scores(options.out / "scores.parquet", jury, judged)
    tables = report.tables(jury, judged, less)
    served = [
        f"{name}: its tables were sharded over {dist.get_world_size()} ranks; 512 candidates' logits, served from one "
        f"lookup, differ by at most {each.served_apart:.1e}."
        for name, each in scored.items()
        if options.train.sharded
    ]
    notes = [*report.verdict(jury, judged, less), *served, *data.notes, f"Took {time.monotonic() - began:.0f} s."]
    losses = {name: each.loss for name, each in scored.items()}
    report.show(console, tables, notes)
    report.write(options.out / "report.html", data.name, tables, report.plots(jury, judged, losses), notes)
    console.print(f"Wrote {options.out / 'report.html'} and {options.out / 'scores.parquet'}")


def load(options: Options) -> RankingData:
    """Prepare the data, or read what an earlier run prepared; of several ranks the first one prepares."""
    if not is_first_rank():
        wait_for_ranks()
    data = _load(options)
    if is_first_rank():
        wait_for_ranks()
    return data


def _load(options: Options) -> RankingData:
    if options.data == "simulator":
        return world.load(options.world)
    if options.data == "completejourney":
        return journey.load(options.journey, user_embedding=options.model.user_embedding)
    return kuairand.load(options.kuairand, options.data, judged=options.part)


def train_all(console: Console, data: RankingData, options: Options, rows: Tensor) -> dict[str, Scored]:
    """What every ranker that was asked for says of some rows; some of them train at once."""
    trainings = {each: scoring(data, each, options.model, options.train, rows) for each in options.models}
    return train_side_by_side(console, trainings, jobs=1 if options.train.sharded else options.jobs)


def rules(data: RankingData, rows: Tensor, options: Options) -> dict[str, Tensor]:
    """Scores (N, H) without any training, the same for every head."""
    candidates = data.candidates
    request, item = candidates.request[rows], candidates.item[rows]
    user, newest = data.requests.user[request], data.requests.newest[request]
    seen = data.histories.columns["row"].long()
    generator = torch.Generator().manual_seed(0)
    lately = count_earlier(data.histories, seen, user, item, newest, length=options.model.length)
    ever = count_earlier(data.histories, seen, user, item, newest)
    crowd = torch.bincount(candidates.item[data.rows_of("train")], candidates.labels[data.rows_of("train"), 0])
    popular = torch.nn.functional.pad(crowd, (0, len(data.vectors) - len(crowd)))[item]
    tie = popular / (1 + popular.max())
    scores = {
        "random": torch.rand(len(rows), generator=generator),
        f"popularity ({data.heads[0]})": popular,
        f"item's count in the same {options.model.length} actions, then popularity": lately + tie,
        "item's count in the whole past, then popularity": ever + tie,
    }
    return {name: score.double()[:, None].expand(-1, len(data.heads)) for name, score in scores.items()}


def write_scores(path: pathlib.Path, jury: Jury, judged: list[Judged]) -> None:
    """One row a judged candidate: who, when, what, the labels, and every model's probability of every head."""
    data = jury.data
    columns = {
        "user": data.histories.users[jury.user],
        "request": jury.request,
        "time": data.requests.time[jury.request],
        "item": data.items[data.candidates.item[jury.rows]],
        **{f"label_{head}": jury.labels[:, place] for place, head in enumerate(data.heads)},
        **{
            f"{one.name}_{head}": one.probabilities[:, place]
            for one in judged
            if one.is_model
            for place, head in enumerate(data.heads)
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array(column.numpy()) for name, column in columns.items()}), path)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
