"""The Complete Journey's promotions as exposures: a basket is a request, what its store promoted are the candidates."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import recblocks
from examples.pinnerformer.data import purchase_vectors
from examples.transact.data import Bags, Candidates, RankingData, Requests, newest_before, text_ids
from examples.transact.user_embedding import journey_embeddings
from recblocks import Promotions, Timelines

DAY = 86_400
HEADS = ("buy", "two", "coupon")
WEEKS = {"train": (20, 40), "choose": (41, 44), "report": (45, 52)}


@dataclasses.dataclass(frozen=True)
class JourneyOptions:
    """How exposures are drawn from The Complete Journey's promotions."""

    unbought: int = 60
    """Promoted products that were not bought, drawn for each basket."""
    baskets: int | None = 9_000
    """Training baskets, drawn at random, as many as four minutes allow; None: all. `claims` takes 20,000."""
    judged_baskets: int | None = 2_500
    """Baskets of each of the other parts."""
    purchase_dim: int = 12
    """Width of the part of a product's vector that tells with what it was bought before the training weeks."""
    product_category_dim: int = 6
    product_type_dim: int = 8
    product_identity_dim: int = 14
    """Widths of the parts that tell its category, its type, and itself from any other."""
    exposure_seed: int = 0
    """Of the candidates that are drawn and of the random parts of the products' vectors."""


def load(options: JourneyOptions, *, user_embedding: bool = True) -> RankingData:
    """Read the year, draw the candidates; prepare the households' embeddings, if they are wanted."""
    promotions, source = recblocks.completejourney_promotions(), recblocks.completejourney()
    generator = torch.Generator().manual_seed(options.exposure_seed)
    products = promotions.products
    rows = torch.searchsorted(products, source.timelines.columns["item"])
    histories = source.timelines.with_columns(row=rows)
    bought = _bought(histories, promotions)
    drawn = _draw_candidates(
        promotions, bought, _choose_baskets(promotions, bought, options, generator), options, generator
    )
    asked = {name: column[drawn.baskets] for name, column in promotions.requests.items()}
    user = histories.rows_of(asked["user"])
    text = {name: _codes(values) for name, values in promotions.product_text.items()}
    return RankingData(
        name="completejourney promotions",
        heads=HEADS,
        utilities=(1.0, 0.0, 0.0),
        primary="buy",
        histories=histories,
        num_action_types=3,  # plain, discounted, coupon
        positive_types=(0, 1, 2),
        items=products,
        vectors=_vectors(histories, promotions, text["product_category"], text["product_type"], options),
        item_categorical={name: text[name] for name in ("department", "brand", "product_category", "product_type")},
        topics=text["product_category"],
        top_level=text["department"],
        requests=Requests(
            user=user,
            newest=newest_before(histories, user, asked["time"]),
            day=asked["time"] // DAY,
            time=asked["time"],
            categorical={
                "store": asked["surface"],
                "hour": asked["time"] // 3600 % 24,
                "weekday": asked["time"] // DAY % 7,
            },
            user_embedding=_user_embedding(histories, promotions, user, asked["time"]) if user_embedding else None,
        ),
        candidates=Candidates(
            request=drawn.request,
            item=drawn.item,
            labels=drawn.labels,
            label_names=HEADS,
            categorical={
                "display": promotions.display[drawn.promotion].long(),
                "mailer": promotions.mailer[drawn.promotion].long(),
            },
            numeric=_popularity(histories, promotions, asked["week"][drawn.request], drawn.item),
        ),
        parts={name: (asked["week"] >= low) & (asked["week"] <= high) for name, (low, high) in WEEKS.items()},
        label_weights={head: {action: float(head == action) for action in HEADS} for head in HEADS},
        epochs=1,
        batch_size=512,
        negative_share=0.1,
        window_hours=24.0,
        notes=(
            f"A basket that bought something promoted is a request; its candidates are that and {options.unbought} "
            "promoted products that it did not buy. That it saw them is assumed.",
        ),
        item_ids={
            "author": _text_bags(promotions.product_text, "manufacturer_id"),
            "tag": _text_bags(promotions.product_text, "department", "product_category", "product_type"),
        },
    )


class _Bought(NamedTuple):
    """Every (request, product) that was bought, ascending by both; those of one product in one basket are one."""

    request: Tensor
    item: Tensor
    """Rows of the products."""
    labels: Tensor
    """(B, 3) bool."""
    promotion: Tensor
    """Row of the promotions, -1 where it was bought without one."""


def _bought(histories: Timelines, promotions: Promotions) -> _Bought:
    _, index = histories.actions()
    lines = histories.gather(index, ("row", "basket", "quantity", "action_type"))
    request = _request_of(promotions, lines["basket"])
    num = len(promotions.products)
    pairs, which = torch.unique(request * num + lines["row"], return_inverse=True)
    request, item = pairs // num, pairs % num
    quantity = torch.zeros(len(pairs)).index_add_(0, which, lines["quantity"].float())
    coupon = torch.zeros(len(pairs)).index_add_(0, which, (lines["action_type"] == 2).float())
    labels = torch.stack([quantity > 0, quantity >= 2, coupon > 0], 1)
    return _Bought(request, item, labels, _promotion_of(promotions, request, item))


def _request_of(promotions: Promotions, baskets: Tensor) -> Tensor:
    """The row of each basket among the requests."""
    order = promotions.requests["basket"].argsort()
    return order[torch.searchsorted(promotions.requests["basket"][order], baskets)]


def _promotion_of(promotions: Promotions, request: Tensor, item: Tensor) -> Tensor:
    """(B,) the row of each request's promotion of an item, -1 where there is none."""
    low, high = promotions.starts[request], promotions.ends[request]
    wanted = promotions.products[item].int()
    left, right = low, high
    for _ in range(int((high - low).max()).bit_length()):
        middle = (left + right) >> 1
        below = promotions.items[middle.clamp(max=len(promotions.items) - 1)] < wanted
        below &= left < right
        left, right = torch.where(below, middle + 1, left), torch.where(below, right, middle)
    first = left.clamp(max=len(promotions.items) - 1)
    return torch.where((left < high) & (promotions.items[first] == wanted), left, -1)


def _choose_baskets(
    promotions: Promotions, bought: _Bought, options: JourneyOptions, generator: torch.Generator
) -> Tensor:
    """Requests of all parts that bought at least one promoted product, ascending."""
    week = promotions.requests["week"]
    buys = torch.zeros(len(week), dtype=torch.bool)
    buys[bought.request[(bought.promotion >= 0) & bought.labels[:, 0]]] = True
    chosen = []
    for part, (low, high) in WEEKS.items():
        some = torch.nonzero(buys & (week >= low) & (week <= high)).squeeze(1)
        most = options.baskets if part == "train" else options.judged_baskets
        chosen.append(some[torch.randperm(len(some), generator=generator)[:most]])
    return torch.cat(chosen).sort().values


class _Drawn(NamedTuple):
    baskets: Tensor
    """(R,) rows of the promotions' requests."""
    request: Tensor
    """(N,) ascending places in ``baskets``."""
    item: Tensor
    promotion: Tensor
    labels: Tensor


def _draw_candidates(
    promotions: Promotions, bought: _Bought, baskets: Tensor, options: JourneyOptions, generator: torch.Generator
) -> _Drawn:
    """What each basket bought of the promoted products, and a few of the others, each once."""
    place = torch.full((len(promotions.starts),), -1)
    place[baskets] = torch.arange(len(baskets))
    kept = (bought.promotion >= 0) & bought.labels[:, 0] & (place[bought.request] >= 0)
    low, high = promotions.starts[baskets], promotions.ends[baskets]
    uniform = torch.rand(len(baskets), options.unbought, generator=generator, dtype=torch.float64)
    others = (low[:, None] + (uniform * (high - low)[:, None]).long()).flatten()
    request = torch.cat([place[bought.request[kept]], torch.arange(len(baskets)).repeat_interleave(options.unbought)])
    promotion = torch.cat([bought.promotion[kept], others])
    labels = torch.cat([bought.labels[kept], torch.zeros(len(others), len(HEADS), dtype=torch.bool)])
    # A product drawn twice, or bought, stands once: the first of its rows, which is the bought one.
    key = request * len(promotions.items) + promotion
    order = key.argsort(stable=True)
    first = order[torch.cat([torch.ones(1, dtype=torch.bool), key[order].diff() != 0])]
    item = torch.searchsorted(promotions.products, promotions.items[promotion[first]].long())
    return _Drawn(baskets, request[first], item, promotion[first], labels[first].float())


def _popularity(histories: Timelines, promotions: Promotions, week: Tensor, item: Tensor) -> Tensor:
    """(N, 2) log1p of an item's purchases in the week, and in the four weeks, before the given one."""
    _, index = histories.actions()
    bought_in = promotions.requests["week"][_request_of(promotions, histories.columns["basket"][index])]
    num = len(promotions.products)
    flat = torch.bincount(bought_in * num + histories.columns["row"][index], minlength=54 * num)
    until = flat.view(-1, num).cumsum(0)
    return torch.stack([until[week - 1, item] - until[week - 1 - weeks, item] for weeks in (1, 4)], 1).float().log1p()


def _vectors(
    histories: Timelines, promotions: Promotions, category: Tensor, kind: Tensor, options: JourneyOptions
) -> Tensor:
    """(P, D) the direction of a product's co-purchase, and random ones for its category, for its type and for itself.

    How much two products share, the product of their vectors tells. A product's own direction is half as long again as
    the others, and nothing's product with it is as large as its own. What was not bought before the training weeks, or
    by households of which these columns hold so little that rounding would show, has 0 for co-purchase.
    """
    # Two more columns of a purchase vector hold what it lacks of unit length: how rarely it is bought.
    bought, popularity = purchase_vectors(
        histories, _first_time(promotions) - 1, num_items=len(promotions.products), dim=options.purchase_dim + 2
    )
    bought, was_bought = bought[:, :-2], popularity[:, 2:]
    # Products that nobody bought came out up to 2e-5 long, where the longest are 1.
    bought = torch.where((was_bought > 0) & (bought.norm(dim=1, keepdim=True) > 1e-4), bought, 0)
    generator = torch.Generator().manual_seed(options.exposure_seed)

    def told_apart(codes: Tensor, dim: int) -> Tensor:
        return normalize(torch.randn(int(codes.max()) + 1, dim, generator=generator), dim=1)[codes]

    return torch.cat(
        [
            normalize(bought, dim=1),
            told_apart(category, options.product_category_dim),
            told_apart(kind, options.product_type_dim),
            1.5 * told_apart(torch.arange(len(promotions.products)), options.product_identity_dim),
        ],
        1,
    )


def _user_embedding(histories: Timelines, promotions: Promotions, users: Tensor, times: Tensor) -> Tensor:
    """(R, E) of a model that was trained before the training weeks' first day, made a day before each request's."""
    return journey_embeddings(
        histories,
        promotions.product_text,
        users,
        times,
        start=_first_time(promotions) // DAY * DAY,
        num_surfaces=int(promotions.requests["surface"].max()) + 1,
    )


def _first_time(promotions: Promotions) -> int:
    """When the training weeks begin."""
    return int(promotions.requests["time"][promotions.requests["week"] == WEEKS["train"][0]].min())


def _text_bags(text: dict[str, list[str]], *fields: str) -> Bags:
    """What some fields say of a product, as raw ids; what is unknown is left out."""
    ids = torch.stack([text_ids([f"{field}: {value}" for value in text[field]]) for field in fields], 1)
    return Bags.where(torch.tensor([[value != "" for value in text[field]] for field in fields]).T, ids)


def _codes(values: list[str]) -> Tensor:
    return torch.from_numpy(np.unique(values, return_inverse=True)[1])
