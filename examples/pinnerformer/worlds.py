"""Train in the three simulated worlds and print which of the expected orderings come out.

``python -m examples.pinnerformer.worlds``. The worlds were written down before any model was trained on them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

import recblocks
from examples.pinnerformer import evaluate
from examples.pinnerformer.data import DataOptions, Dataset, load
from examples.pinnerformer.model import ModelOptions
from examples.pinnerformer.train import OBJECTIVES, TrainOptions, train

POOL = 200  # columns, about the share of the corpus that the paper's pool has of its index


@dataclasses.dataclass(frozen=True)
class Options:
    """How much to train; every model of a world gets the same."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions] = dataclasses.field(
        default_factory=lambda: ModelOptions(
            dim=64, hidden_dim=64, max_len=128, item_hidden_dim=128, temperature=0.05, start="content"
        )
    )
    steps: int = 1000
    users_per_batch: int = 32
    learning_rate: float = 2e-3
    seeds: int = 3
    worlds: tuple[str, ...] = ("interests", "markov", "uniform")
    world_users: int | None = None
    device: str = "cpu"
    threads: int = 1


@dataclasses.dataclass(frozen=True)
class Claim:
    """One thing that ought to be seen: the first model is better than the second, or equal to it."""

    text: str
    better: Tensor
    """(U, 1) recall of the judged users of every seed."""
    worse: Tensor
    present: Tensor
    equal: bool = False


class Results:
    """Recall of every judged user, by model and protocol, over all seeds."""

    def __init__(self) -> None:
        self._judged: dict[tuple[str, str], list[evaluate.Judged]] = {}

    def add(self, model: str, protocol: str, judged: evaluate.Judged) -> None:
        """Keep one seed's numbers."""
        self._judged.setdefault((model, protocol), []).append(judged)

    def recall(self, model: str, protocol: str) -> Tensor:
        """(U, 1) over all seeds."""
        return torch.cat([judged.recall for judged in self._judged[model, protocol]])

    def present(self, model: str, protocol: str) -> Tensor:
        """(U, 1) over all seeds."""
        return torch.cat([judged.present for judged in self._judged[model, protocol]])

    def of_seeds(self, model: str, protocol: str) -> list[float]:
        """The mean of each seed."""
        return [float(judged.recall[judged.present].mean()) for judged in self._judged[model, protocol]]

    def measured(self) -> Sequence[tuple[str, str]]:
        """(model, protocol) of everything measured."""
        return list(self._judged)

    def claim(self, first: str, second: str, protocol: str, *, equal: bool = False) -> Claim:
        """That one model is better than another under a protocol, or equal to it."""
        sign = "=" if equal else ">"
        return Claim(
            f"{first} {sign} {second} ({protocol})",
            self.recall(first, protocol),
            self.recall(second, protocol),
            self.present(first, protocol),
            equal,
        )


def main(options: Options) -> None:
    """Train, judge and compare, world by world."""
    torch.set_num_threads(options.threads)
    console = Console()
    for world in options.worlds:
        results = Results()
        for seed in range(options.seeds):
            data = load(DataOptions(data=world, world_users=options.world_users, world_seed=seed))
            for name, changed in _models(world, options, seed).items():
                console.print(f"{world}, seed {seed}: {name}")
                _judge(results, name, data, options, changed)
        _print_recall(console, world, results)
        _print_claims(console, _claims(world, results))


def _models(world: str, options: Options, seed: int) -> dict[str, TrainOptions]:
    base = TrainOptions(
        steps=options.steps,
        users_per_batch=options.users_per_batch,
        learning_rate=options.learning_rate,
        max_in_batch=POOL * 5000 // 13192,
        num_random=POOL * 8192 // 13192,
        seed=seed,
        device=options.device,
    )
    if world == "uniform":
        return {"logQ": base, "no logQ": dataclasses.replace(base, log_q=False)}
    models = {name: dataclasses.replace(base, objective=name) for name in OBJECTIVES}
    if world == "interests":
        models["in-batch"] = dataclasses.replace(base, negatives="in_batch", max_in_batch=POOL)
        models["random"] = dataclasses.replace(base, negatives="random", num_random=POOL)
    return models


def _judge(results: Results, name: str, data: Dataset, options: Options, changed: TrainOptions) -> None:
    model = train(data, options.model, changed).model.cpu()
    max_len = options.model.max_len
    retrieval = evaluate.judge(name, data, evaluate.windows(data), evaluate.by_model(data, model, max_len=max_len))
    results.add(name, "14 days", retrieval)
    for protocol in evaluate.PROTOCOLS:
        results.add(name, protocol, evaluate.protocol_recall(data, model, protocol=protocol, max_len=max_len))


def _claims(world: str, results: Results) -> list[Claim]:
    claim = results.claim
    if world == "uniform":
        return [claim("logQ", "no logQ", "14 days", equal=True)]
    if world == "markov":
        # SASRec predicts next actions too, from every position; the other two predict a window.
        pairs = itertools.product(("next_action", "sasrec"), ("dense_all_action", "all_action"))
        return [claim(*pair, "realtime") for pair in [*pairs, ("next_action", "sasrec")]]
    orders = [("dense_all_action", "all_action"), ("all_action", "sasrec"), ("sasrec", "next_action")]
    pools = [("dense_all_action", "in-batch"), ("in-batch", "random")]
    claims = [claim(first, second, "14 days") for first, second in orders + pools]
    for name in ("dense_all_action", "sasrec"):
        present = results.present(name, "realtime")
        recall = functools.partial(results.recall, name)
        claims.append(Claim(f"{name}: realtime > daily", recall("realtime"), recall("daily"), present))
        claims.append(Claim(f"{name}: daily > once", recall("daily"), recall("once"), present))
    drop = {name: results.recall(name, "realtime") - results.recall(name, "once") for name in OBJECTIVES}
    present = results.present("sasrec", "realtime")
    text = "realtime to once, sasrec drops by more than dense_all_action"
    claims.append(Claim(text, drop["sasrec"], drop["dense_all_action"], present))
    return claims


def _print_recall(console: Console, world: str, results: Results) -> None:
    table = Table(title=f"{world}: Recall@{evaluate.K} of each seed")
    for heading in ("model", "judged by", "mean", "seeds"):
        table.add_column(heading)
    for model, protocol in results.measured():
        means = results.of_seeds(model, protocol)
        seeds = ", ".join(f"{mean:.4f}" for mean in means)
        table.add_row(model, protocol, f"{sum(means) / len(means):.4f}", seeds)
    console.print(table)


def _print_claims(console: Console, claims: Sequence[Claim]) -> None:
    table = Table(title="expected, and what came out")
    for heading in ("expected", "difference", "95 %", "verdict"):
        table.add_column(heading)
    for claim in claims:
        less = recblocks.paired_bootstrap(
            claim.better, claim.worse, present=claim.present, generator=torch.Generator().manual_seed(0)
        )
        table.add_row(
            claim.text, f"{less.mean:+.4f}", f"[{less.low:+.4f}, {less.high:+.4f}]", _verdict(less, equal=claim.equal)
        )
    console.print(table)


def _verdict(less: recblocks.Interval, *, equal: bool) -> str:
    if less.low <= 0 <= less.high:
        return "comes out" if equal else "not told apart"
    if equal:
        return "DOES NOT COME OUT: they differ"
    return "comes out" if less.low > 0 else "DOES NOT COME OUT: the other way round"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
