"""Timelines whose truth is known: users with interests and intents on a feed, simulated from a `World`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from recblocks import _checks
from recblocks.timelines.worlds import World

ACTION_TYPES = ("save", "closeup", "click", "hide")
SAVE, CLOSEUP, CLICK, HIDE = range(4)
NO_ACTION = -1
SURFACES = ("home", "search", "related")
HOME, SEARCH, RELATED = range(3)

_DAY = 86_400_000
_START = 1_700_006_400_000  # 15 Nov 2023, 00:00 UTC, in ms
_DRAWN, _SAME, _SUCCESSOR = range(3)  # a slot's topic: drawn beforehand, the latest engagement's, or the one after that


class Items(NamedTuple):
    """The corpus; row i is the item with id i."""

    embedding: Tensor
    """(N, D) float32, unit length."""
    topic: Tensor
    """(N,) int64."""
    popularity: Tensor
    """(N,) float32: chance inside its topic, 0 where dormant."""


class Truth(NamedTuple):
    """What a model has to find out; S sessions, by user and time."""

    session_user: Tensor
    """(S,) int64."""
    session_time: Tensor
    """(S,) int64: start, in the simulation's unit."""
    interests: Tensor
    """(S, number of interests) int64 topics, in the order of `World.interest_weights`."""
    intents: Tensor
    """(S,) int64 topics."""
    dislikes: Tensor
    """(S, number of dislikes) int64 topics."""
    taste: Tensor
    """(U, D) float32 unit vectors."""
    successor: Tensor
    """(K,) int64: the topic after each topic; one cycle goes through all."""
    topic_popularity: Tensor
    """(K,) float32, sums to 1."""


class Simulation(NamedTuple):
    """Everything that happened, and why."""

    unit: str
    """Of every time: "s" or "ms"."""
    actions: dict[str, Tensor]
    """Columns user, time, item, action_type, surface, duration (float32, seconds), request, randomised (bool); others
    int64. By user, then oldest first."""
    impressions: dict[str, Tensor]
    """Columns request, position, item, action_type (-1 = none), randomised. By request, then position from 0."""
    requests: dict[str, Tensor]
    """Columns user, time, surface, session (a row of `Truth`); row i is request i. By user, then oldest first."""
    items: Items
    truth: Truth


def positive_engagement(columns: Mapping[str, Tensor]) -> Tensor:
    """Which actions are positive engagement: on home, a save, or a closeup or click of more than 10 s (PF 3).

    Args:
        columns: At least action_type, surface and duration (seconds), all of one shape.

    Returns:
        A bool tensor of that shape.

    Example:
        >>> kinds = torch.tensor([0, 2, 2])  # a save and two clicks
        >>> surfaces = torch.tensor([0, 0, 1])  # on home, home and search
        >>> positive_engagement({"action_type": kinds, "surface": surfaces, "duration": torch.tensor([1.0, 9.0, 99.0])})
        tensor([ True, False, False])
    """
    kind = columns["action_type"]
    long = ((kind == CLOSEUP) | (kind == CLICK)) & (columns["duration"] > 10)
    return (columns["surface"] == HOME) & ((kind == SAVE) | long)


def simulate(world: World, *, seed: int = 0, unit: str = "ms") -> Simulation:
    """Let a world's users use its feed.

    The same world, seed and unit give the same numbers on one machine and torch version. A world with any other
    parameter, the number of users included, is another world, and none of its users need agree.

    Args:
        world: The parameters: `INTERESTS`, `MARKOV`, `UNIFORM`, `RESPONSIVE`, `INDIFFERENT`, or a `dataclasses.replace`
            of one.
        seed: Of the generator that every draw comes from.
        unit: "s" or "ms"; seconds are cut off, not rounded.

    Returns:
        Actions ready for `write_timelines`, the impressions behind them, and the truth.

    Raises:
        TypeError, ValueError: If unit is neither, or seed no int64.

    Example:
        >>> import dataclasses
        >>> from recblocks.timelines.worlds import INTERESTS
        >>> seen = simulate(dataclasses.replace(INTERESTS, num_users=20, num_items=1000), seed=1)
        >>> seen.items.embedding.shape, len(seen.actions["time"]) < len(seen.impressions["item"])
        (torch.Size([1000, 32]), True)
    """
    _checks.choice("unit", unit, ("s", "ms"))
    seed = _checks.integer("seed", seed)
    g = Generator().manual_seed(seed)
    item_of, items = _make_items(world, g)
    truth = _make_sessions(world, g)
    session = _repeat_geometric(truth.session_user.shape[0], world.requests_per_session, g)
    surface = _categorical(world.surface_shares, session.shape, g)
    slots = _plan_slots(world, truth, session, surface, g)
    item, engaged, shown = _walk(world, truth, item_of, items, session, slots, g)
    kind, duration = _react(world, truth, session, items.topic[item], engaged, shown, slots.relevant, g)
    request_time, session_time, tap = _clock(truth, session, shown, duration, g)

    divisor = 1000 if unit == "s" else 1
    user = truth.session_user[session]
    requests = {"user": user, "time": request_time // divisor, "surface": surface, "session": session}
    seen = shown.flatten().nonzero()[:, 0]
    impressions = {
        "request": seen // world.chunk,
        "position": (shown.cumsum(1) - 1).flatten()[seen],
        "item": item.flatten()[seen],
        "action_type": kind.flatten()[seen],
        "randomised": slots.randomised.flatten()[seen],
    }
    acted = (kind != NO_ACTION).flatten().nonzero()[:, 0]
    request = acted // world.chunk
    actions = {
        "user": user[request],
        "time": (request_time[request] + tap.flatten()[acted]) // divisor,
        "item": item.flatten()[acted],
        "action_type": kind.flatten()[acted],
        "surface": surface[request],
        "duration": duration.flatten()[acted],
        "request": request,
        "randomised": slots.randomised.flatten()[acted],
    }
    truth = truth._replace(session_time=session_time // divisor)
    return Simulation(unit, actions, impressions, requests, items, truth)


def _make_items(world: World, g: Generator) -> tuple[Tensor, Items]:
    """The corpus, and the (topic, rank) -> item table; ids are shuffled, so that a tie broken by id favours nobody."""
    topics, each, active, dim = world.num_topics, world.items_per_topic, world.active_per_topic, world.embedding_dim
    item_of = torch.randperm(world.num_items, generator=g).view(topics, each)
    centre = _unit(torch.randn(topics, dim, generator=g))
    direction = _unit(torch.randn(2, dim, generator=g))
    own = _unit(torch.randn(topics, each, dim, generator=g))
    chance = _power_law(active, world.popularity_exponent)
    visible, shift = torch.zeros(each), torch.zeros(each)
    if active > 1 and world.popularity_exponent > 0:
        visible[:active] = (chance.log() - chance.log().mean()) / chance.log().std() * world.popularity_visible
    shift[active:] = world.dormant_shift
    content = visible[:, None] * direction[0] + shift[:, None] * direction[1]
    embedding = _unit(centre[:, None] + world.item_spread * own + content)
    popularity = torch.cat([chance, torch.zeros(each - active)])
    place = item_of.flatten().argsort()
    items = Items(embedding.flatten(0, 1)[place], place // each, popularity[place % each])
    return item_of, items


def _make_sessions(world: World, g: Generator) -> Truth:
    """When each user means to come, and what they care about by then."""
    spread = world.activity_spread
    # E[exp(spread z - spread^2 / 2)] = 1, so the mean rate stays sessions_per_day.
    rate = world.sessions_per_day * torch.exp(spread * torch.randn(world.num_users, generator=g) - spread**2 / 2)
    count = torch.poisson(rate * world.days, generator=g).to(torch.int64).clamp_(min=1)
    user = torch.arange(world.num_users).repeat_interleave(count)
    span = world.days * _DAY
    start = (user * span + torch.randint(span, user.shape, generator=g)).sort().values - user * span
    gap = start.diff(prepend=start[:1]).double() / _DAY
    chance = _power_law(world.num_topics, world.topic_exponent)
    first = _starts(user)
    interests = [_switching(first, gap, world.interest_days, chance, g) for _ in world.interest_weights]
    return Truth(
        session_user=user,
        session_time=start + _START,
        interests=torch.stack(interests, 1),
        intents=_switching(first, gap, world.intent_hours / 24, chance, g),
        dislikes=_dislikes(world, first, gap, g),
        taste=_unit(torch.randn(world.num_users, world.embedding_dim, generator=g)),
        successor=_cycle(world.num_topics, g),
        topic_popularity=chance,
    )


def _switching(first: Tensor, gap: Tensor, life: float, chance: Tensor, g: Generator) -> Tensor:
    """A topic per session that survives a gap with probability exp(-gap / life), and else is drawn anew."""
    fresh = first | (torch.rand(gap.shape, generator=g, dtype=torch.float64) >= torch.exp(-gap / life))
    which = fresh.cumsum(0) - 1
    return _draw(chance, (int(which[-1]) + 1,), g)[which]


def _dislikes(world: World, first: Tensor, gap: Tensor, g: Generator) -> Tensor:
    alike = _power_law(world.num_topics, 0.0)
    columns = [_switching(first, gap, world.dislike_days, alike, g) for _ in range(world.num_dislikes)]
    return torch.stack(columns, 1) if columns else torch.empty(len(first), 0, dtype=torch.int64)


class _Slots(NamedTuple):
    """Every slot before anybody has looked at it, (R, chunk)."""

    topic: Tensor
    rank: Tensor
    follows: Tensor
    randomised: Tensor
    relevant: Tensor


def _plan_slots(world: World, truth: Truth, session: Tensor, surface: Tensor, g: Generator) -> _Slots:
    """The logging policy, all but the topics that follow an engagement nobody knows yet."""
    shape = (session.shape[0], world.chunk)
    shares = (world.interest_share, world.intent_share, world.chain_share)
    interest, intent, chain = torch.tensor(shares, dtype=torch.float64).cumsum(0).tolist()
    source = torch.rand(shape, generator=g)
    searches, related = (surface == SEARCH)[:, None], (surface == RELATED)[:, None]
    randomised = torch.rand(shape, generator=g) < world.random_share

    topic = truth.interests[session].gather(1, _categorical(world.interest_weights, shape, g))
    topic = torch.where((source >= interest) & (source < intent) | searches, truth.intents[session][:, None], topic)
    crowd = ((source >= chain) & ~searches).flatten().nonzero()[:, 0]
    topic.view(-1)[crowd] = _draw(truth.topic_popularity, crowd.shape, g)
    rank = _draw(_power_law(world.active_per_topic, world.popularity_exponent), shape, g)
    anywhere = randomised.flatten().nonzero()[:, 0]
    topic.view(-1)[anywhere] = torch.randint(world.num_topics, anywhere.shape, generator=g)
    rank.view(-1)[anywhere] = torch.randint(world.items_per_topic, anywhere.shape, generator=g)

    follows = ((source >= intent) & (source < chain) & ~searches).to(torch.uint8) * _SUCCESSOR
    follows = follows.masked_fill_(related, _SAME).masked_fill_(randomised, _DRAWN)
    relevant = follows != _DRAWN
    wanted = list(truth.interests.unbind(1)) if world.interest_share else []
    if world.intent_share or world.surface_shares[SEARCH]:
        wanted.append(truth.intents)
    relevant |= _any_of(topic, wanted, session)
    relevant &= (follows != _DRAWN) | ~_any_of(topic, truth.dislikes.unbind(1), session)
    return _Slots(topic, rank, follows, randomised, relevant)


def _any_of(topic: Tensor, topics: Iterable[Tensor], session: Tensor) -> Tensor:
    """Which slots (R, chunk) are of one of their session's topics, each (S,)."""
    found = torch.zeros_like(topic, dtype=torch.bool)
    for column in topics:
        found |= topic == column[session][:, None]
    return found


def _walk(
    world: World, truth: Truth, item_of: Tensor, items: Items, session: Tensor, slots: _Slots, g: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Request by request, all users at once: the item, whether it is engaged with, and whether it is shown at all.

    Step k takes the k-th request of every user who has one. The state is one topic a user: the latest engagement's.
    An item that stands earlier in its chunk is not shown again.
    """
    other, relevant = (math.log(p / (1 - p)) for p in (world.engage_other, world.engage_relevant))
    threshold = torch.rand(slots.topic.shape, generator=g).logit_() - torch.where(slots.relevant, relevant, other)
    item = torch.empty_like(slots.topic)
    engaged, shown = torch.empty_like(slots.relevant), torch.empty_like(slots.relevant)
    latest = torch.randint(world.num_topics, (world.num_users,), generator=g)

    count = torch.bincount(truth.session_user[session], minlength=world.num_users)
    order = count.argsort(descending=True, stable=True)  # users who still have a request are a prefix, always
    start, taste = (count.cumsum(0) - count)[order], truth.taste[order]
    still = torch.bincount(count).flip(0).cumsum(0).flip(0)[1:].tolist()  # how many users have more than k requests
    target = torch.cat([torch.arange(world.num_topics), truth.successor])
    planned = (slots.follows, slots.topic, slots.rank, threshold)
    table, place = item_of.flatten(), torch.arange(1, world.chunk + 1)
    for step, active in enumerate(still):
        rows = start[:active] + step
        # index_select, take and index_copy_ are three to ten times as fast as indexing.
        follows, topic, rank, needed = (part.index_select(0, rows) for part in planned)
        before = latest[:active, None]
        followed = target.take(before + world.num_topics * (follows == _SUCCESSOR))
        topic = torch.where(follows == _DRAWN, topic, followed)
        shows = table.take(topic * world.items_per_topic + rank)
        new = torch.ones_like(shows, dtype=torch.bool)
        for distance in range(1, world.chunk):
            new[:, distance:] &= shows[:, distance:] != shows[:, :-distance]
        if world.taste:
            vectors = items.embedding.index_select(0, shows.flatten())
            needed -= world.taste * torch.bmm(vectors.view(*shows.shape, -1), taste[:active, :, None])[:, :, 0]
        takes = (needed < 0) & new
        newest = (takes * place).amax(1, keepdim=True)
        latest[:active] = torch.where(newest > 0, topic.gather(1, (newest - 1).clamp_(min=0)), before)[:, 0]
        for column, values in ((item, shows), (engaged, takes), (shown, new)):
            column.index_copy_(0, rows, values)
    return item, engaged, shown


def _react(
    world: World,
    truth: Truth,
    session: Tensor,
    topic: Tensor,
    engaged: Tensor,
    shown: Tensor,
    relevant: Tensor,
    g: Generator,
) -> tuple[Tensor, Tensor]:
    """(R, chunk) action types, -1 = none, and durations in seconds, 0 where none."""
    chance = torch.where(relevant, world.hide_relevant, world.hide_other)
    if world.num_dislikes:
        chance = chance.masked_fill_(_any_of(topic, truth.dislikes.unbind(1), session), world.hide_disliked)
    hides = torch.rand(engaged.shape, generator=g) < chance
    kind = torch.where(hides & shown, HIDE, NO_ACTION)
    acted = engaged.flatten().nonzero()[:, 0]
    uniform = torch.rand(acted.shape, generator=g)
    meant = topic.flatten()[acted] == truth.intents[session[acted // world.chunk]]
    kind.view(-1)[acted] = torch.where(
        meant,
        _invert(torch.tensor(world.intent_type_shares), uniform),
        _invert(torch.tensor(world.type_shares), uniform),
    )
    acted = (kind != NO_ACTION).flatten().nonzero()[:, 0]
    spread = torch.exp(world.duration_spread * torch.randn(acted.shape, generator=g))
    duration = torch.zeros(engaged.shape)
    duration.view(-1)[acted] = torch.tensor(world.duration_medians)[kind.flatten()[acted]] * spread
    return kind, duration


def _clock(
    truth: Truth, session: Tensor, shown: Tensor, duration: Tensor, g: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Milliseconds of the requests (R,), the sessions (S,), and of taps after their request (R, chunk).

    Nobody does two things at once: 2 s to look at a slot, then what was done there takes its time; half a minute on
    average between two requests; a session starts as it was meant to, or 10 min after the one before has ended.
    """
    scroll, pause, rest = 2_000, 30_000.0, 600_000
    milliseconds = (duration * 1000).round_().to(torch.int64)
    done = (scroll * shown + milliseconds).cumsum(1)
    think = torch.empty(session.shape).exponential_(1 / pause, generator=g).to(torch.int64)
    request_length = done[:, -1] + think
    within = _since_start(session, request_length)
    session_length = torch.zeros_like(truth.session_time).index_add_(0, session, request_length) + rest

    # start'[j] = max(start[j], start'[j-1] + length[j-1]) is a running maximum once the earlier lengths are taken off.
    # 2^43 ms are longer than anybody's time, so that it starts afresh with each user.
    earlier = _since_start(truth.session_user, session_length)
    apart = truth.session_user << 43
    start = (truth.session_time - earlier + apart).cummax(0).values - apart + earlier
    return start[session] + within, start, done - milliseconds


def _starts(group: Tensor) -> Tensor:
    """True at the first row of each run of equal values."""
    return torch.cat([group.new_ones(1, dtype=torch.bool), group[1:] != group[:-1]])


def _since_start(group: Tensor, length: Tensor) -> Tensor:
    """Sum of the lengths before each row within its run."""
    before = length.cumsum(0) - length
    first = _starts(group)
    return before - before[first][first.cumsum(0) - 1]


def _power_law(count: int, exponent: float) -> Tensor:
    weight = torch.arange(1, count + 1, dtype=torch.float64) ** -exponent
    return (weight / weight.sum()).float()


def _draw(chance: Tensor, shape: tuple[int, ...], g: Generator) -> Tensor:
    """Independent indices with the given chances."""
    return _invert(chance, torch.rand(shape, generator=g))


def _invert(chance: Tensor, uniform: Tensor) -> Tensor:
    """The index whose share of [0, 1) a uniform number falls into."""
    return torch.searchsorted(chance.double().cumsum(0)[:-1].float(), uniform, right=True)


def _categorical(shares: tuple[float, ...], shape: tuple[int, ...], g: Generator) -> Tensor:
    return _draw(torch.tensor(shares), shape, g)


def _repeat_geometric(count: int, mean: float, g: Generator) -> Tensor:
    """Indices 0 to count - 1, each repeated a geometric number of times from 1 up."""
    times = torch.ones(count, dtype=torch.int64)
    if mean > 1:
        times += torch.empty(count).geometric_(1 / mean, generator=g).to(torch.int64) - 1
    return torch.arange(count).repeat_interleave(times)


def _cycle(count: int, g: Generator) -> Tensor:
    order = torch.randperm(count, generator=g)
    successor = torch.empty_like(order)
    successor[order] = order.roll(-1)
    return successor


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)
