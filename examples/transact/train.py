"""Train a ranker: warm-up to the peak rate, cosine decay, weighted cross entropy, negatives sampled and corrected."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from examples.ranks import is_first_rank
from examples.side_by_side import OnStep
from examples.transact.checkpoint import Saved
from examples.transact.data import RankingData, sampling_chance
from examples.transact.model import Inputs, ModelOptions, Ranker, Sequence, lookup_of
from examples.transact.steps import OneProcess, own_device
from recblocks import FusedEmbeddingLookup, ShardableLookup, label_weight_matrix, label_weighted_bce_with_logits

_SEEDED = threading.Lock()


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How a ranker is trained."""

    epochs: int | None = None
    """None: as suits the data."""
    batch_size: int | None = None
    """None: as suits the data."""
    learning_rate: float = 2e-3
    """The peak."""
    warmup: float = 0.1
    """Share of all steps in which the rate rises to its peak; then it falls to 0 as a cosine (TA 4.1.2)."""
    negative_share: float | None = None
    """Share of the candidates without any action that is trained on; probabilities are corrected back. None: as suits
    the data."""
    label_weights: Literal["plain", "matrix"] = "plain"
    """"plain": cross entropy. "matrix": the data's label-weight matrix on top (TA eq. 2)."""
    raw_id_rate: float = 0.02
    """Peak of the learning rate of the vectors of raw ids, which row-wise Adagrad trains."""
    sharded: bool = False
    """Spread the tables of the raw ids over ranks by torchrec; torchrun starts them."""
    checkpoint: pathlib.Path | None = None
    """Folder to write checkpoints to, and to go on from the last one in."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    seed: int = 0
    device: str = "cpu"
    compile: bool = False


@dataclasses.dataclass
class Trained:
    """A ranker and how it came about."""

    ranker: Ranker
    inputs: Inputs
    negative_share: float
    """Share of the rows without any action that its loss stands for."""
    own_weights: Tensor
    """(H,) how much a row with a head's own action alone weighs in it, against one without any."""
    loss: list[float]
    served_apart: float = 0.0
    """By how much the logits of what is served differ at most from those of the tables that were sharded."""


class Scored(NamedTuple):
    """What a trained ranker leaves behind."""

    probabilities: Tensor
    """(N, H); nothing on ranks after the first."""
    loss: list[float]
    served_apart: float = 0.0
    """What `Trained` says."""


def scoring(
    data: RankingData, sequence: Sequence, model_options: ModelOptions, options: TrainOptions, rows: Tensor
) -> Callable[[OnStep], Scored]:
    """`train` and `predict` in one, which only wait for what to call on each step."""

    def score(on_step: OnStep) -> Scored:
        trained = train(data, sequence, model_options, options, on_step=on_step)
        none = torch.empty(0, len(data.heads))
        probabilities = predict(trained, rows, on_step=on_step) if is_first_rank() else none
        return Scored(probabilities, trained.loss, trained.served_apart)

    return score


def train(
    data: RankingData,
    sequence: Sequence,
    model_options: ModelOptions,
    options: TrainOptions,
    *,
    on_step: OnStep | None = None,
) -> Trained:
    """Train on the data's training requests.

    Args:
        data: what to train on.
        sequence: how the ranker reads the realtime sequence.
        model_options: parts and sizes.
        options: of the training.
        on_step: called with the finished steps, all steps, and the loss.

    Returns:
        what was trained; on ranks after the first its tables are in pieces.
    """
    if options.sharded and (not model_options.raw_ids or options.compile or model_options.dropout):
        raise ValueError("sharded must come with raw_ids above 0, whose tables are sharded, no compile and no dropout")
    if options.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {options.checkpoint_every}")
    device = own_device(options.device)
    inputs = Inputs(data, model_options, sequence)
    new_ids = torch.Generator(device).manual_seed(options.seed)
    with _SEEDED:  # of two rankers built at once each draws from its own seed
        lookup = _lookup(data, model_options, options)
        torch.manual_seed(options.seed)
        ranker = Ranker(data, inputs, sequence, model_options, lookup)
    generator = torch.Generator().manual_seed(options.seed)
    windows = torch.Generator(device).manual_seed(options.seed)
    rows = data.rows_of("train")
    epochs = data.epochs if options.epochs is None else options.epochs
    share = data.negative_share if options.negative_share is None else options.negative_share
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not 0 < share <= 1:
        raise ValueError(f"negative_share must be above 0 and at most 1, got {share}")
    labels = data.candidates.labels[rows]
    chance = sampling_chance(labels, share)
    labels = torch.cat([labels, labels.amax(1, keepdim=True)], 1)
    batch_size = data.batch_size if options.batch_size is None else options.batch_size
    steps_an_epoch = math.ceil(float(chance.sum()) / batch_size)
    steps = steps_an_epoch * epochs
    matrix, base = _label_weights(data, options)
    # What the matrix weighs, it weighs against all rows without action: those that are left stand for the others.
    is_plain = options.label_weights == "plain"
    left, stands_for = (share, torch.ones_like(chance)) if is_plain else (1.0, 1 / chance)
    start_from_rates(ranker, labels, (chance * stands_for)[:, None] * (labels @ matrix.T + base))
    model = _steps(ranker, options, device)
    if ranker.lookup is not None:
        ranker.lookup.reset_parameters(generator=new_ids)
    trained = Trained(ranker, inputs, left, (base + matrix.diagonal())[:-1], [])
    saved = None
    if options.checkpoint is not None:
        made_for = data.name, data.digest(), sequence, model_options, options
        saved = Saved(options.checkpoint / sequence, made_for, [windows, new_ids, torch.default_generator])
        trained.loss.extend(saved.resume(model))
    matrix, base = matrix.to(device), base.to(device)
    ranker.train()
    for epoch in range(epochs):
        kept = torch.nonzero(torch.rand(len(rows), generator=generator) < chance).squeeze(1)
        order = kept[torch.randperm(len(kept), generator=generator)]
        for number, places in enumerate(order.tensor_split(steps_an_epoch), start=epoch * steps_an_epoch):
            if number < len(trained.loss):  # done before the checkpoint that this training goes on from
                continue
            mine, of_all = model.own(places)
            batch = inputs(rows[mine]).to(device)
            wanted, weights = labels[mine].to(device), stands_for[mine].to(device)
            model.begin(_schedule(number, steps, options), batch, new_ids)
            logits = model.forward(batch, windows, of_all)
            losses = label_weighted_bce_with_logits(
                logits, wanted, matrix, sample_weights=weights, base_weights=base, reduction="none"
            )
            trained.loss.append(model.step(losses, of_all))
            if saved is not None and (number + 1) % options.checkpoint_every == 0:
                saved.save(model, trained.loss)
            if on_step is not None:
                on_step(len(trained.loss), steps, trained.loss[-1])
    ranker.eval()
    if options.sharded:
        build = functools.partial(Ranker, data, inputs, sequence, model_options)
        trained.ranker, trained.served_apart = model.served(build, inputs(rows[:512]).to(device))
    return trained


def _lookup(
    data: RankingData, model_options: ModelOptions, options: TrainOptions
) -> FusedEmbeddingLookup | ShardableLookup | None:
    """What looks the raw ids up, if they are read: in one process, or ready to be sharded."""
    if not model_options.raw_ids:
        return None
    tables, features = lookup_of(data, model_options)
    if options.sharded:
        return ShardableLookup(tables, features, device="meta")
    return FusedEmbeddingLookup(tables, features, gradient="rowwise_adagrad", dtype=torch.float32)


def _steps(ranker: Ranker, options: TrainOptions, device: torch.device) -> Any:
    """What a step does, in one process or over ranks."""
    rates = {"rate": options.learning_rate, "raw_id_rate": options.raw_id_rate}
    if not options.sharded:
        return OneProcess(ranker.to(device), compiled=options.compile, **rates)
    from examples.transact.sharded import Sharded  # torchrec is needed for nothing else

    return Sharded(ranker, device=device, **rates)


@torch.no_grad()
def start_from_rates(ranker: Ranker, labels: Tensor, weights: Tensor) -> None:
    """Let every head begin at its action's share of the weight, which rare ones would not reach in one epoch.

    Args:
        ranker: whose logits begin so.
        labels: (N, H + 1) 0 or 1; the last column is that of any action.
        weights: (N, H + 1) how much each row is expected to weigh in each head's cross entropy.
    """
    seen = (weights * labels).sum(0) / weights.sum(0)
    ranker.mlp[-1].bias.copy_(seen.clamp(1e-6, 1 - 1e-6).logit())


@torch.no_grad()
def predict(trained: Trained, rows: Tensor, *, batch_size: int = 4096, on_step: OnStep | None = None) -> Tensor:
    """(N, H) probability of each head, as if training had seen every negative and weighed a head's own action as 1.

    With a label-weight matrix that weighs other actions too it is no probability: less where these come instead of the
    head's own, which is what the matrix is for (fewer saves where hides are), more where they come with it.
    ``on_step`` is called after each batch, as it was after the last step of training, so that whoever stops the one
    stops the other.
    """
    inputs, device = trained.inputs, next(trained.ranker.parameters()).device
    _, place, size = torch.unique(inputs.data.candidates.request[rows], return_inverse=True, return_counts=True)
    order = size[place].argsort(stable=True)  # requests of like size, so that little is padded
    parts = []
    for some in rows[order].split(batch_size):
        parts.append(trained.ranker(inputs(some).to(device)).cpu())
        if on_step is not None:
            on_step(len(trained.loss), len(trained.loss), trained.loss[-1])
    logits = torch.cat(parts)
    logits = torch.empty_like(logits).index_copy_(0, order, logits).double()
    return corrected(logits.sigmoid(), trained.negative_share, trained.own_weights)


def corrected(sampled: Tensor, share: float, own_weights: Tensor) -> Tensor:
    """Probabilities (N, H) from those (N, H + 1) of a world in which only a share of the rows without action remain.

    The last column is that of any action. In it a head's own action weighs w_h, and each row stands for itself or,
    without action, for 1 / share rows: ``p_h = r_h / (q_any + (1 - q_any) / share)`` with
    ``r_h = q_h / (q_h + w_h (1 - q_h))``.
    """
    anything, heads = sampled[:, -1:], sampled[:, :-1]
    heads = heads / (heads + own_weights * (1 - heads))
    return (heads / (anything + (1 - anything) / share)).clamp(max=1.0)


def _label_weights(data: RankingData, options: TrainOptions) -> tuple[Tensor, Tensor]:
    """M and the base weights over the heads and "any", whose cross entropy is always plain."""
    size = len(data.heads) + 1
    matrix = torch.zeros(size, size)
    if options.label_weights == "matrix":
        matrix[:-1, :-1] = label_weight_matrix(data.label_weights, data.heads, label_names=data.candidates.label_names)
    return matrix, torch.ones(size)


def _schedule(step: int, steps: int, options: TrainOptions) -> float:
    warmup = max(1.0, options.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup))
