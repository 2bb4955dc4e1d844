"""Train PinnerFormer, judge it beside its baselines, and write a report: ``python -m examples.pinnerformer``."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import tyro
from rich.console import Console

import recblocks
from examples.pinnerformer import baselines, evaluate, report
from examples.pinnerformer.data import DataOptions, Dataset, load
from examples.pinnerformer.model import ModelOptions
from examples.pinnerformer.train import Trained, TrainOptions, train
from examples.side_by_side import OnStep, train_side_by_side


@dataclasses.dataclass(frozen=True)
class Options:
    """Train PinnerFormer, judge it beside its baselines, and write a report."""

    data: tyro.conf.OmitArgPrefixes[DataOptions] = dataclasses.field(default_factory=DataOptions)
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = dataclasses.field(default_factory=ModelOptions)
    train: tyro.conf.OmitArgPrefixes[TrainOptions] = dataclasses.field(default_factory=TrainOptions)
    out: pathlib.Path = pathlib.Path("build/pinnerformer")
    """Folder of the report and the checkpoints."""
    resume: bool = False
    """Go on from the checkpoints in --out."""
    save_every: int = 200
    """Steps between two checkpoints."""
    sasrec_steps: int | None = None
    """Steps of each of the two SASRec baselines; 0: leave them out; default: as many as --steps."""
    protocols: bool = False
    """Also judge PinnerFormer action by action, from embeddings made once, daily and in real time."""
    threads: int = 1
    """CPU threads of each model."""
    jobs: int = 3
    """Models trained, and methods judged, at a time; under torchrun one model is trained at a time."""


def main(options: Options) -> None:
    """Run everything."""
    began = time.monotonic()
    torch.set_num_threads(options.threads)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("nccl" if options.train.device.startswith("cuda") else "gloo")
    try:
        console = Console(quiet=ranks > 1 and dist.get_rank() > 0, width=None if sys.stdout.isatty() else 130)
        data = load(options.data)
        console.print(
            f"{data.name}: {len(data.train)} users to train on, {len(data.judged)} to judge, "
            f"{len(data.corpus)} items to retrieve"
        )
        models = _train_all(console, data, options, jobs=options.jobs if ranks == 1 else 1)
        if ranks == 1 or dist.get_rank() == 0:
            _report(console, data, options, models, began)
        if ranks > 1:
            dist.barrier()
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def _models(options: Options) -> Iterator[tuple[str, TrainOptions]]:
    yield "PinnerFormer", options.train
    steps = options.train.steps if options.sasrec_steps is None else options.sasrec_steps
    if steps:
        sasrec = dataclasses.replace(options.train, objective="sasrec", steps=steps)
        yield "SASRec, softmax", sasrec
        yield "SASRec, BCE", dataclasses.replace(sasrec, loss="bce")


def _train_all(console: Console, data: Dataset, options: Options, *, jobs: int) -> dict[str, Trained]:
    def training(name: str, changed: TrainOptions) -> Callable[[OnStep], Trained]:
        return lambda on_step: train(
            data,
            options.model,
            changed,
            path=options.out / f"{name.lower().replace(', ', '-')}.pt",
            resume=options.resume,
            save_every=options.save_every,
            on_step=lambda step, loss: on_step(step, changed.steps, loss),
        )

    return train_side_by_side(console, {name: training(name, each) for name, each in _models(options)}, jobs=jobs)


def _methods(data: Dataset, options: Options, models: dict[str, Trained]) -> Iterator[dict[str, evaluate.Method]]:
    """Everything that is judged, in groups that share nothing."""
    for name, trained in models.items():
        yield {name: evaluate.by_model(data, trained.model, max_len=options.model.max_len)}
    scores = {
        "popularity, 28 days": baselines.popularity(data),
        "own most recent": baselines.own_most_recent(data),
        "own most frequent": baselines.own_most_frequent(data),
        "own frequency + popularity": baselines.frequent_and_popular(data),
    }
    yield {name: evaluate.by_scores(score) for name, score in scores.items()}
    clusters = baselines.PinnerSage(data)
    yield {
        f"PinnerSage {count}, {how}": method
        for count in (5, 20)
        for how, method in (("oracle", clusters.oracle(count)), ("round robin", clusters.blended(count)))
    }


def _judge_all(
    data: Dataset, options: Options, models: dict[str, Trained], windows: list[evaluate.Window]
) -> list[evaluate.Judged]:
    def judge(methods: dict[str, evaluate.Method]) -> list[evaluate.Judged]:
        return [evaluate.judge(name, data, windows, method) for name, method in methods.items()]

    groups = list(_methods(data, options, models))
    with ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(judge, group) for group in reversed(groups)]  # PinnerSage takes longest
        return [judged for group in reversed(running) for judged in group.result()]


def _by_protocol(data: Dataset, options: Options, trained: Trained) -> list[str]:
    """What fresher embeddings are worth: recall of each action of the first window (PF 4.2.3)."""
    judged = [
        evaluate.protocol_recall(data, trained.model, protocol=protocol, max_len=options.model.max_len)
        for protocol in evaluate.PROTOCOLS
    ]
    means = [recblocks.bootstrap_mean(one.recall, present=one.present, generator=_seeded()) for one in judged]
    recall = ", ".join(
        f"{one.name} {mean.mean:.4f} [{mean.low:.4f}, {mean.high:.4f}]" for one, mean in zip(judged, means, strict=True)
    )
    gains = [
        f"{better.name} minus {worse.name} {less.mean:+.4f} [{less.low:+.4f}, {less.high:+.4f}]"
        for worse, better in itertools.pairwise(judged)
        for less in [
            recblocks.paired_bootstrap(better.recall, worse.recall, present=worse.present, generator=_seeded())
        ]
    ]
    return [
        f"PinnerFormer's Recall@{evaluate.K} of each action of the first window, by when embeddings are made "
        f"(PF Table 2): {recall}; {', '.join(gains)}."
    ]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _report(console: Console, data: Dataset, options: Options, models: dict[str, Trained], began: float) -> None:
    windows = evaluate.windows(data)
    with console.status("judging"):
        judged = _judge_all(data, options, models, windows)
    rows = report.compare(data, judged)
    inside, outside = (sum(count) for count in zip(*((len(w.positives[0]), w.outside) for w in windows), strict=True))
    notes = [
        *report.verdict(rows),
        f"{evaluate.repeat_share(data, windows):.0%} of the positives repeat an item of their user's past: as far "
        "as that goes, a memory of each item beats one embedding of a user.",
        f"{len(data.judged)} users whom no training saw, {len(windows)} windows of {evaluate.DAYS} days after the cut. "
        "Models are frozen at the cut; each window's embeddings read everything before it. Means over users, then over "
        "windows, with 95 % intervals by bootstrap over users; differences are paired. Coverage is P90 coverage@10 and "
        "entropy that of topics among 50, both in the first window.",
        f"The corpus is the {len(data.corpus)} items known at the cut; {outside} of {inside + outside} positives are "
        "not in it and are left out. A tie counts against the positive.",
        "PinnerSage's oracle picks the cluster closest to each positive, which no server could: a bound, not a list.",
        *(_by_protocol(data, options, models["PinnerFormer"]) if options.protocols else []),
        f"Took {time.monotonic() - began:.0f} s.",
    ]
    title = f"PinnerFormer on {data.name}"
    report.show(console, title, rows, notes)
    figures = report.plots(
        data,
        judged,
        {name: trained.loss for name, trained in models.items()},
        {name: trained.temperature for name, trained in models.items()},
    )
    page = options.out / "report.html"
    report.write(page, title, rows, notes, figures)
    console.print(f"Wrote {page}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
