"""What a run reads: timelines, item content, who trains and who is judged, and when the future starts."""

from __future__ import annotations

import dataclasses
import datetime as dt
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import scipy.sparse
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

import recblocks
from recblocks import Timelines

DAY = 86_400


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which data, and who is judged when."""

    data: Literal["completejourney", "interests", "markov", "uniform"] = "completejourney"
    """A year of shopping, or one of the three simulated worlds."""
    judged: Literal["held_out", "training"] = "held_out"
    """"held_out": a fifth of the users, who are in no training. "training": a fifth of the others, three months
    earlier; hyperparameters are chosen on these."""
    cache: pathlib.Path | None = None
    """Where prepared timelines are kept; default: see `recblocks.completejourney`."""
    world_users: int | None = None
    """Users of a simulated world instead of its own number."""
    world_seed: int = 0


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Everything that training and evaluation need to know about some data."""

    name: str
    options: dict[str, str | int | None]
    """What was asked for; a checkpoint is good for the same alone."""
    train: Timelines
    judged: Timelines
    content: Tensor
    """(N, F) of every item; the ``row`` column of the timelines says which one an action was on."""
    identity_dim: int
    """So many leading columns of ``content`` are vectors of equal length whose products measure likeness; the last two
    of them only make the lengths equal."""
    items: Tensor
    """(N,) raw id of every item."""
    topics: Tensor
    """(N,) topic of every item."""
    corpus: Tensor
    """(C,) rows of the items that may be retrieved."""
    positive: Callable[[Mapping[str, Tensor]], Tensor]
    num_action_types: int
    num_surfaces: int
    cut: int
    """The end of training, in the timelines' unit."""
    num_windows: int
    """Windows of 14 days that are judged, the first one right after the cut."""

    @property
    def day(self) -> int:
        """A day in the timelines' unit."""
        return DAY if self.train.unit == "s" else DAY * 1000

    @property
    def corpus_place(self) -> Tensor:
        """(N,) place of each item in the corpus, -1 where it is not in it."""
        place = torch.full((len(self.content),), -1)
        place[self.corpus] = torch.arange(len(self.corpus))
        return place


def load(options: DataOptions) -> Dataset:
    """Prepare the data, or read what an earlier run prepared."""
    if options.data == "completejourney":
        return _complete_journey(options)
    return _simulated(options)


def _described(options: DataOptions) -> dict[str, str | int | None]:
    described = dataclasses.asdict(options)
    return {name: value for name, value in described.items() if name != "cache"}


def _split(timelines: Timelines, judged: str) -> tuple[Timelines, Timelines]:
    train, held_out = recblocks.split_by_user(timelines, held_out=0.2)
    if judged == "held_out":
        return train, held_out
    return recblocks.split_by_user(train, held_out=0.2, salt=1)


def _simulated(options: DataOptions) -> Dataset:
    world = {"interests": recblocks.INTERESTS, "markov": recblocks.MARKOV, "uniform": recblocks.UNIFORM}[options.data]
    if options.world_users is not None:
        world = dataclasses.replace(world, num_users=options.world_users)
    seen = recblocks.simulate(world, seed=options.world_seed)
    names = ("user", "time", "item", "action_type", "surface", "duration")
    timelines = Timelines.from_arrays(unit=seen.unit, **{name: seen.actions[name] for name in names})
    timelines = timelines.with_columns(row=timelines.columns["item"])
    train, judged = _split(timelines, options.judged)
    start, days = int(timelines.columns["time"].min()), 14 if options.judged == "held_out" else 28
    return Dataset(
        name=options.data,
        options=_described(options),
        train=train,
        judged=judged,
        content=torch.nn.functional.pad(seen.items.embedding, (0, 2)),  # of equal length as they are
        identity_dim=seen.items.embedding.shape[1] + 2,
        items=torch.arange(len(seen.items.topic)),
        topics=seen.items.topic,
        corpus=torch.arange(len(seen.items.topic)),
        positive=recblocks.positive_engagement,
        num_action_types=4,  # save, closeup, click, hide
        num_surfaces=3,  # home, search, related
        cut=start + (world.days - days) * DAY * 1000,
        num_windows=1,
    )


def _complete_journey(options: DataOptions) -> Dataset:
    source = recblocks.completejourney(options.cache)
    timelines = source.timelines
    timelines = timelines.with_columns(row=torch.searchsorted(source.items, timelines.columns["item"]))
    cut = "2017-10-01" if options.judged == "held_out" else "2017-07-01"
    cut_time = int(dt.datetime.fromisoformat(cut).replace(tzinfo=dt.timezone.utc).timestamp())
    train, judged = _split(timelines, options.judged)
    known = recblocks.split_by_time(timelines, cut_time)[0]
    corpus = torch.unique(known.columns["row"][known.actions()[1]])
    bought, popularity = purchase_vectors(train, cut_time, num_items=len(source.items), dim=128)
    content = torch.cat([bought, text_vectors(product_words(source.item_text), dim=64), popularity], 1)
    _, topics = np.unique(source.item_text["product_category"], return_inverse=True)
    return Dataset(
        name="completejourney",
        options=_described(options),
        train=train,
        judged=judged,
        content=content,
        identity_dim=bought.shape[1],
        items=source.items,
        topics=torch.from_numpy(topics),
        corpus=corpus,
        positive=every_purchase,
        num_action_types=3,  # plain, discounted, coupon
        num_surfaces=len(source.stores),
        cut=cut_time,
        num_windows=6,
    )


def every_purchase(action: Mapping[str, Tensor]) -> Tensor:
    """What counts as positive engagement in a store: all of it."""
    return torch.ones_like(action["time"], dtype=torch.bool)


def product_words(text: dict[str, list[str]]) -> list[str]:
    """A line a product: each field as one word, marked with its name; category and type word by word as well."""
    rows = zip(*text.values(), strict=True)
    lines = []
    for row in rows:
        fields = dict(zip(text, row, strict=True))
        whole = [f"{name}={re.sub(r'[^A-Z0-9]+', '_', value)}" for name, value in fields.items() if value]
        lines.append(" ".join([*whole, fields["product_category"], fields["product_type"]]))
    return lines


def purchase_vectors(
    train: Timelines, cut: int, *, num_items: int, dim: int, half_life: float = 90.0
) -> tuple[Tensor, Tensor]:
    """Item vectors from who bought what before the cut: (N, dim) of unit length, and (N, 3) popularity.

    A truncated SVD of households × items, purchases halving in weight every ``half_life`` days, keeps an item's length:
    the more it is bought, the longer. An encoder for unit vectors would lose that, so two more columns take up the
    rest, with opposite signs (their mean is 0, as layer norms like it): where a user has 0 there, products are those of
    the vectors as they were.
    """
    past = recblocks.split_by_time(train, cut)[0]
    user, index = past.actions()
    item, days = past.columns["row"][index], (cut - past.columns["time"][index]) / DAY
    weight = (0.5 ** (days / half_life)).float()
    shape = (len(past), num_items)
    matrix = scipy.sparse.csr_matrix((weight.numpy(), (user.numpy(), item.numpy())), shape=shape)
    svd = TruncatedSVD(dim - 2, n_iter=3, random_state=0).fit(matrix)
    vectors = torch.from_numpy(np.ascontiguousarray(svd.components_.T)).float()
    length = vectors.norm(dim=1, keepdim=True)
    longest = length[length > 0].quantile(0.997)  # the few items beyond are made as long as this one
    vectors = vectors / torch.maximum(length, longest)
    rest = ((1 - vectors.square().sum(1, keepdim=True)).clamp(min=0) / 2).sqrt()
    counts = torch.bincount(item, minlength=num_items)
    recent = torch.bincount(item[days < 28], minlength=num_items)
    popularity = torch.stack([counts.log1p() / 5, recent.log1p() / 5, (counts > 0).float()], 1)
    return torch.cat([vectors, rest, -rest], 1), popularity


def text_vectors(text: list[str], *, dim: int) -> Tensor:
    """(N, dim) latent semantic vectors of the items' words, of mean square length 1."""
    words = TfidfVectorizer(token_pattern=r"\S+", min_df=2, sublinear_tf=True).fit_transform(text)
    vectors = torch.from_numpy(TruncatedSVD(dim, n_iter=3, random_state=0).fit_transform(words)).float()
    return vectors / vectors.square().sum(1).mean().sqrt()
