"""The retrieval example's user embedding, joined point in time: a request reads what a daily job knew a day before it.

A request on day D reads the embedding of what happened by the end of day D - 2. A job that starts then has all of day
D - 1 to infer it and to bring it to the feature store (PF 4.2.2, "daily"), so it is between 24 and 48 hours old when it
is read. The model itself, the items' content included, is that of the first request's embedding, and stays.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import recblocks
from examples.pinnerformer import checkpoint
from examples.pinnerformer.data import Dataset, every_purchase, product_words, purchase_vectors, text_vectors
from examples.pinnerformer.infer import Histories, embed_users, model_columns
from examples.pinnerformer.model import ModelOptions
from examples.pinnerformer.train import TrainOptions, train
from examples.transact.data import digest_of
from recblocks import Timelines

SIZES = ModelOptions(dim=32, hidden_dim=32, item_hidden_dim=96)
TRAINING = TrainOptions()
_EVER = 100_000  # days, as requests may come for ever
_VERSION = 1  # of what is prepared; another number leaves older caches alone


def daily_cuts(times: Tensor, *, start: int, unit: str) -> Tensor:
    """The last instant that the embedding read at each time knows: the end of the day before the day before.

    Args:
        times: (R,) of the requests, none before ``start``.
        start: beginning of a day; days are counted from it.
        unit: "s" or "ms".

    Returns:
        (R,) int64.

    Example:
        >>> times = torch.tensor([10, 11]) * 86_400
        >>> daily_cuts(times, start=10 * 86_400, unit="s") + 1 == times - 86_400
        tensor([True, True])
    """
    return recblocks.reference_times(times, start=start - 1, protocol="daily", num_days=_EVER, unit=unit)


def user_embeddings(
    data: Dataset,
    histories: Timelines,
    users: Tensor,
    times: Tensor,
    *,
    start: int,
    sizes: ModelOptions = SIZES,
    training: TrainOptions = TRAINING,
) -> Tensor:
    """Train on ``data``, then embed each user who makes a request as of a day before, once a day.

    Args:
        data: what was known by ``data.cut``, not later than what the first request may read.
        histories: all actions, with the columns that the model reads.
        users: (R,) rows of the histories.
        times: (R,) of the requests.
        start: see `daily_cuts`.
        sizes: of the model.
        training: of the model.

    Returns:
        (R, sizes.dim) of unit length; zeros for users without any action by then.

    Raises:
        ValueError: the data know more than the first request may.
    """
    cuts = daily_cuts(times, start=start, unit=histories.unit)
    if bool((cuts < data.cut).any()):
        raise ValueError(f"data.cut must be at most {int(cuts.min())}, which the first request reads, got {data.cut}")
    model = train(data, sizes, training).model.cpu()
    points = recblocks.embedding_points(users, cuts)
    embedded = embed_users(model, Histories(histories), points.user, points.cut, max_len=sizes.max_len)
    return embedded[points.query]


def journey_embeddings(
    histories: Timelines,
    text: Mapping[str, list[str]],
    users: Tensor,
    times: Tensor,
    *,
    start: int,
    num_surfaces: int,
    cache: pathlib.Path | None = None,
    sizes: ModelOptions = SIZES,
    training: TrainOptions = TRAINING,
) -> Tensor:
    """`user_embeddings` of The Complete Journey's households, or what an earlier run prepared of the same.

    Args:
        histories: every purchase, with the row of its product.
        text: fields of every product.
        users: (R,) rows of the histories.
        times: (R,) of the requests.
        start: see `daily_cuts`.
        num_surfaces: stores.
        cache: where it is kept; default ``$XDG_CACHE_HOME/recblocks``, else ``~/.cache/recblocks``.
        sizes: of the model.
        training: of the model.

    Returns:
        (R, sizes.dim).
    """
    cuts = daily_cuts(times, start=start, unit=histories.unit)
    known, _ = recblocks.split_by_time(histories, int(cuts.max()))
    owner, index = known.actions()
    options = (dataclasses.asdict(sizes), dataclasses.asdict(training), start, num_surfaces)
    described = json.dumps([_VERSION, torch.__version__, *options, dict(text)])
    digest = digest_of(described, model_columns(known, index) | {"owner": owner, "users": users, "cuts": cuts})

    def prepare() -> Tensor:
        data = _journey_data(known, text, start=start, num_surfaces=num_surfaces, dim=sizes.dim)
        return user_embeddings(data, known, users, times, start=start, sizes=sizes, training=training)

    folder = cache or pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "recblocks"
    return _cached(folder / f"completejourney-user-embedding-{digest}.pt", prepare)


def _journey_data(
    histories: Timelines, text: Mapping[str, list[str]], *, start: int, num_surfaces: int, dim: int
) -> Dataset:
    """Every purchase by the end of the day before the day before ``start``, and the products as they were known."""
    words = product_words(dict(text))
    cut = int(daily_cuts(torch.tensor([start]), start=start, unit=histories.unit))
    past, _ = recblocks.split_by_time(histories, cut)
    past = past.select(past.ends > past.starts)
    bought, popularity = purchase_vectors(past, cut, num_items=len(words), dim=dim)
    return Dataset(
        name="completejourney",
        options={},
        train=past,
        judged=past,
        content=torch.cat([bought, text_vectors(words, dim=dim), popularity], 1),
        identity_dim=dim,
        items=torch.arange(len(words)),
        topics=torch.zeros(len(words), dtype=torch.int64),
        corpus=torch.unique(past.columns["row"][past.actions()[1]]),
        positive=every_purchase,
        num_action_types=3,  # plain, discounted, coupon
        num_surfaces=num_surfaces,
        cut=cut,
        num_windows=0,
    )


def _cached(path: pathlib.Path, prepare: Callable[[], Tensor]) -> Tensor:
    """What the file holds; if there is no whole file, what ``prepare`` returns, written beside and put in place."""
    try:
        whole: Tensor = checkpoint.load(path)["embeddings"]
        return whole
    except (FileNotFoundError, ValueError):
        pass
    embeddings = prepare()
    part = path.with_name(f".{path.stem}-{uuid.uuid4().hex}")
    try:
        checkpoint.save(part, {"embeddings": embeddings})
        part.replace(path)
    finally:
        for left in (part, part.with_suffix(".partial")):
            left.unlink(missing_ok=True)
    return embeddings
