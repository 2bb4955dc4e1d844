"""Train a model: batches of pairs, one pool of negatives for all ranks, logQ, and checkpoints to resume from."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import recblocks
from examples.pinnerformer import checkpoint
from examples.pinnerformer.data import Dataset
from examples.pinnerformer.infer import model_columns
from examples.pinnerformer.model import ModelOptions, PinnerFormer, build_model
from examples.ranks import is_first_rank
from recblocks import CountMinSketch, Examples, TrainingBatches

OBJECTIVES = {
    "dense_all_action": recblocks.dense_all_action,
    "all_action": recblocks.all_action,
    "sasrec": recblocks.sasrec,
    "next_action": recblocks.next_action,
}


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What the model learns, and for how long."""

    objective: Literal["dense_all_action", "all_action", "sasrec", "next_action"] = "dense_all_action"
    loss: Literal["softmax", "bce"] = "softmax"
    """Sampled softmax, or binary cross-entropy against one random item, as SASRec was published."""
    negatives: Literal["mixed", "in_batch", "random"] = "mixed"
    log_q: bool = True
    """Correct for how likely each negative was to be drawn."""
    max_in_batch: int = 5000
    """In-batch negatives at most; none with --negatives random."""
    num_random: int = 1024
    """Random negatives; none with --negatives in_batch."""
    steps: int = 600
    users_per_batch: int = 8
    max_sequences: int = 1
    """Sequences of one user in a batch."""
    fraction: float = 1.0
    """Of a user's possible sequences."""
    max_labels: int = 32
    """Labels of one sequence (all action, dense all action)."""
    window_days: float = 28.0
    """How far ahead labels lie (all action, dense all action)."""
    learning_rate: float = 1e-3
    warmup: int = 20
    """Steps until the learning rate is reached; then it falls as a cosine to 2 % of it."""
    weight_decay: float = 0.01
    seed: int = 0
    device: str = "cpu"
    compile: bool = False
    """Compile the model with torch.compile."""


@dataclasses.dataclass
class Trained:
    """A model and how it came about."""

    model: PinnerFormer
    loss: list[float]
    temperature: list[float]


def train(
    data: Dataset,
    sizes: ModelOptions,
    options: TrainOptions,
    *,
    path: pathlib.Path | None = None,
    resume: bool = False,
    save_every: int = 200,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train on the data's training users.

    Args:
        data: what to train on.
        sizes: of the model.
        options: of the training.
        path: where the checkpoint lies; None: none is written.
        resume: go on from that checkpoint, if there is one. The result is the same, to the bit, as without a stop.
        save_every: steps between two checkpoints; the last step is always saved.
        on_step: called with the number of finished steps and the loss.
    """
    device = torch.device(options.device)
    model = build_model(data, sizes, seed=options.seed).to(device)
    optimizer = torch.optim.AdamW(_parameter_groups(model, options.weight_decay), lr=options.learning_rate)
    sketch = CountMinSketch(width=1 << 17, depth=4).to(device)
    batches = _batches(data, sizes, options)
    state: dict[str, Any] = {"step": 0, "loss": [], "temperature": []}
    described = _described(data, sizes, options)
    if resume and path is not None and path.exists():
        state = checkpoint.load(path)
        if state["options"] != described:
            raise ValueError(f"{path} was trained with {state['options']}, got {described}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sketch.load_state_dict(state["sketch"])
    else:
        _count_labels(sketch, data, batches)

    forward: nn.Module = torch.compile(model, dynamic=True) if options.compile else model
    if dist.is_initialized():
        forward = DistributedDataParallel(forward)
    for step in range(state["step"], options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * _schedule(step, options)
        generator = torch.Generator().manual_seed((options.seed << 32) + step)
        if options.loss == "bce":
            loss, temperature = _bce(forward, data, batches[step], generator)
        else:
            loss, temperature = _softmax(forward, data, batches[step], options, sketch, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state["loss"].append(recblocks.gather_rows(loss.detach()[None]).mean().item())
        state["temperature"].append(temperature.item())
        if on_step is not None:
            on_step(step + 1, state["loss"][-1])
        if path is not None and is_first_rank() and ((step + 1) % save_every == 0 or step + 1 == options.steps):
            state |= {"step": step + 1, "options": described, "model": model.state_dict()}
            checkpoint.save(path, state | {"optimizer": optimizer.state_dict(), "sketch": sketch.state_dict()})
    return Trained(model.eval(), state["loss"], state["temperature"])


def _softmax(
    model: nn.Module,
    data: Dataset,
    examples: Examples,
    options: TrainOptions,
    sketch: CountMinSketch,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """PinnerFormer's loss: this rank's share, such that the mean over ranks is the whole batch's weighted mean."""
    device = sketch.synced.device
    users = examples.users[examples.pair_row].to(device)
    labels = data.train.columns["row"][examples.pair_label].to(device)
    corpus = data.corpus.to(device)
    sketch.update(labels)
    sketch.all_reduce()

    all_users, all_labels = recblocks.gather_rows(users), recblocks.gather_rows(labels)
    pool = recblocks.mixed_negative_pool(
        len(all_labels),
        len(corpus),
        max_in_batch=0 if options.negatives == "random" else options.max_in_batch,
        num_random=0 if options.negatives == "in_batch" else options.num_random,
        generator=generator,
    )
    in_batch, random = pool.in_batch.to(device), corpus[pool.random.to(device)]
    slots, items, temperature = _embed(model, data, examples, torch.cat([labels, random]))
    positives = items[: len(labels)]
    negatives = torch.cat([recblocks.gather_rows(positives)[in_batch], items[len(labels) :]])
    columns = torch.cat([all_labels[in_batch], random])

    log_q = functools.partial(
        recblocks.mixed_log_q,
        total=sketch.total,
        num_in_batch=pool.num_in_batch,
        num_random=pool.num_random,
        num_candidates=len(corpus),
    )
    slot, pair_queries = _slots_of_pairs(examples)
    weights = recblocks.equal_user_weights(users) * examples.pair_weight.to(device)
    loss = recblocks.sampled_softmax_loss(
        slots[slot.to(device)],
        positives,
        negatives,
        log_q_positives=log_q(sketch.query(labels)) if options.log_q else None,
        log_q_negatives=log_q(sketch.query(columns)) if options.log_q else None,
        own=(examples.users[_row_of_slot(examples)[slot]].to(device), columns, all_users, all_labels),
        temperature=temperature,
        weights=recblocks.rank_weights(weights),
        pair_queries=pair_queries.to(device),
        reduction="sum",
    )
    return loss, temperature


def _bce(model: nn.Module, data: Dataset, examples: Examples, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """SASRec's own loss: each pair's positive against one random item, no correction."""
    device = next(model.parameters()).device
    users = examples.users[examples.pair_row].to(device)
    labels = data.train.columns["row"][examples.pair_label].to(device)
    drawn = torch.randint(len(data.corpus), labels.shape, generator=generator)
    negatives = data.corpus[drawn].to(device)
    slots, items, temperature = _embed(model, data, examples, torch.cat([labels, negatives]))
    slot, pair_queries = _slots_of_pairs(examples)
    queries = slots[slot.to(device)][pair_queries.to(device)]
    logits = (queries.repeat(2, 1) * items).sum(1) / temperature
    wanted = torch.cat([torch.ones(len(labels)), torch.zeros(len(labels))]).to(device)
    losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").view(2, -1).sum(0)
    weights = recblocks.equal_user_weights(users) * examples.pair_weight.to(device)
    return (losses * recblocks.rank_weights(weights)).sum(), temperature


def _embed(model: nn.Module, data: Dataset, examples: Examples, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), examples.valid.sum(1).cumsum(0)])
    columns = model_columns(data.train, examples.actions[examples.valid])
    embedded: tuple[Tensor, Tensor, Tensor] = model(
        {name: column.to(items.device) for name, column in columns.items()}, offsets.to(items.device), items
    )
    return embedded


def _row_of_slot(examples: Examples) -> Tensor:
    return torch.repeat_interleave(examples.valid.sum(1))


def _slots_of_pairs(examples: Examples) -> tuple[Tensor, Tensor]:
    """(Q,) the packed slots that predict anything, each once, and (P,) which of them each pair belongs to."""
    lengths = examples.valid.sum(1)
    first = lengths.cumsum(0) - lengths
    return torch.unique(first[examples.pair_row] + examples.pair_slot, return_inverse=True)


def _batches(data: Dataset, sizes: ModelOptions, options: TrainOptions) -> TrainingBatches:
    knobs: dict[str, Any] = {"max_len": sizes.max_len, "positive": data.positive}
    if options.objective in ("dense_all_action", "all_action"):
        knobs |= {"window_days": options.window_days, "max_labels": options.max_labels}
    batches = functools.partial(
        TrainingBatches,
        data.train,
        functools.partial(OBJECTIVES[options.objective], **knobs),
        users_per_batch=options.users_per_batch,
        fraction=options.fraction,
        max_sequences=options.max_sequences,
        until=data.cut,
        seed=options.seed,
        rank=dist.get_rank() if dist.is_initialized() else 0,
        world_size=dist.get_world_size() if dist.is_initialized() else 1,
    )
    return batches(epochs=math.ceil(options.steps / batches().steps_per_epoch))


def _count_labels(sketch: CountMinSketch, data: Dataset, batches: TrainingBatches) -> None:
    """Let the sketch see an epoch of labels before the first step, whose log q would otherwise be noise."""
    for step in range(min(batches.steps_per_epoch, len(batches))):
        sketch.update(data.train.columns["row"][batches[step].pair_label].to(sketch.synced.device))
    sketch.all_reduce()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors and the temperature do not."""
    parameters = list(model.parameters())
    return [
        {"params": [one for one in parameters if one.ndim >= 2], "weight_decay": weight_decay},
        {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0},
    ]


def _schedule(step: int, options: TrainOptions) -> float:
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / options.steps)
    return min(1.0, (step + 1) / options.warmup) * (0.02 + 0.98 * cosine)


def _described(data: Dataset, sizes: ModelOptions, options: TrainOptions) -> dict[str, Any]:
    """What a checkpoint must agree with; where it runs may differ."""
    described = data.options | dataclasses.asdict(sizes) | dataclasses.asdict(options)
    return {name: value for name, value in described.items() if name not in ("device", "compile")}
