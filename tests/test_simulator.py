"""The simulated worlds do what their parameters say, and hold the truths that models are to find in them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recblocks import (
    INDIFFERENT,
    INTERESTS,
    MARKOV,
    RESPONSIVE,
    UNIFORM,
    Simulation,
    Timelines,
    World,
    positive_engagement,
    simulate,
)
from recblocks.timelines import simulator

DAY = 86_400_000
# A share over n independent draws lies within five standard deviations but for 6e-7 of the seeds; seeds are fixed here.
SIGMAS = 5

SMALL = {
    "interests": dataclasses.replace(INTERESTS, num_users=800, num_items=4_000),
    "markov": dataclasses.replace(MARKOV, num_users=800),
    "uniform": dataclasses.replace(UNIFORM, num_users=800, num_items=1_000),
    "responsive": dataclasses.replace(RESPONSIVE, num_users=800),
    "indifferent": dataclasses.replace(INDIFFERENT, num_users=800),
}


@pytest.fixture(scope="module")
def seen() -> dict[str, Simulation]:
    return {name: simulate(world, seed=7) for name, world in SMALL.items()}


def assert_share(share: float, expected: float, count: int) -> None:
    assert abs(share - expected) <= SIGMAS * math.sqrt(expected * (1 - expected) / count), (share, expected, count)


def all_tensors(simulation: Simulation) -> list[Tensor]:
    tables = [*simulation[1:4], simulation.items._asdict(), simulation.truth._asdict()]
    return [column for table in tables for column in table.values()]


def engagements(simulation: Simulation) -> dict[str, Tensor]:
    keep = simulation.actions["action_type"] != simulator.HIDE
    return {name: column[keep] for name, column in simulation.actions.items()}


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_gives_the_same_bytes_and_leaves_torchs_own_generator_alone(name: str) -> None:
    world = dataclasses.replace(SMALL[name], num_users=100)
    before = torch.get_rng_state()
    one, again, other = simulate(world, seed=3), simulate(world, seed=3), simulate(world, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    for first, second in zip(all_tensors(one), all_tensors(again), strict=True):
        assert first.dtype == second.dtype
        assert first.numpy().tobytes() == second.numpy().tobytes()
    assert not torch.equal(one.items.embedding, other.items.embedding)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    num_users=st.integers(1, 12),
    chunk=st.integers(1, 5),
    random_share=st.sampled_from([0.0, 0.3, 1.0]),
    shares=st.sampled_from([(0.5, 0.3, 0.2), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)]),
    taste=st.sampled_from([0.0, 4.0]),
    unit=st.sampled_from(["s", "ms"]),
)
def test_tables_fit_together_in_any_world(
    seed: int,
    num_users: int,
    chunk: int,
    random_share: float,
    shares: tuple[float, float, float],
    taste: float,
    unit: str,
) -> None:
    interest, intent, chain = shares
    world = dataclasses.replace(
        INTERESTS,
        num_users=num_users,
        num_topics=3,
        num_items=9,
        days=10,
        sessions_per_day=2.0,
        chunk=chunk,
        random_share=random_share,
        interest_share=interest,
        intent_share=intent,
        chain_share=chain,
        taste=taste,
    )
    simulation = simulate(world, seed=seed, unit=unit)
    check_tables(world, simulation)


@pytest.mark.parametrize("name", SMALL)
def test_tables_fit_together(seen: dict[str, Simulation], name: str) -> None:
    check_tables(SMALL[name], seen[name])


def check_tables(world: World, simulation: Simulation) -> None:
    actions, impressions, requests = simulation.actions, simulation.impressions, simulation.requests
    num_requests = requests["user"].shape[0]
    size = torch.bincount(impressions["request"], minlength=num_requests)
    assert int(size.min()) >= 1
    assert int(size.max()) <= world.chunk
    first = size.cumsum(0) - size
    assert torch.equal(impressions["position"], torch.arange(int(size.sum())) - first[impressions["request"]])
    pairs = impressions["request"] * world.num_items + impressions["item"]
    assert pairs.unique().numel() == pairs.numel(), "an item twice in one chunk"

    acted = impressions["action_type"] != simulator.NO_ACTION
    for name in ("request", "item", "action_type", "randomised"):
        assert torch.equal(impressions[name][acted], actions[name]), name
    assert torch.equal(actions["user"], requests["user"][actions["request"]])
    assert torch.equal(actions["surface"], requests["surface"][actions["request"]])
    assert bool((actions["duration"] > 0).all())

    truth = simulation.truth
    assert torch.equal(requests["user"], truth.session_user[requests["session"]])
    assert truth.session_user.unique().numel() == world.num_users
    # Requests, and the taps between them, follow each other; whole seconds may coincide only where milliseconds do not.
    second = 1000 if simulation.unit == "ms" else 1
    times = torch.cat([requests["time"], actions["time"]])
    users = torch.cat([requests["user"], actions["user"]])
    order = torch.cat([torch.arange(num_requests), actions["request"] + 0.5]).argsort(stable=True)
    same = users[order].diff() == 0
    assert bool((users[order].diff() >= 0).all())
    assert bool((times[order].diff() >= 0)[same].all())
    within = (actions["request"].diff() == 0) & (actions["user"].diff() == 0)
    assert bool((actions["time"].diff() >= 2 * second)[within].all()), "two seconds for each slot"
    starts = requests["session"].diff(prepend=torch.tensor([-1])) != 0
    assert torch.equal(requests["time"][starts], truth.session_time)
    next_session = starts[1:] & (requests["user"].diff() == 0)
    assert bool((requests["time"].diff() >= 600 * second)[next_session].all()), "ten minutes between sessions"


def test_seconds_are_milliseconds_cut_off(seen: dict[str, Simulation]) -> None:
    seconds = simulate(SMALL["interests"], seed=7, unit="s")
    for table in ("actions", "requests"):
        fine, coarse = getattr(seen["interests"], table), getattr(seconds, table)
        for name in fine:
            expected = fine[name] // 1000 if name == "time" else fine[name]
            assert torch.equal(coarse[name], expected), name
    assert torch.equal(seconds.truth.session_time, seen["interests"].truth.session_time // 1000)


def test_actions_become_timelines(seen: dict[str, Simulation]) -> None:
    actions = seen["interests"].actions
    timelines = Timelines.from_arrays(**actions, unit="ms")
    assert timelines.num_actions == actions["time"].numel()
    newest = actions["user"].diff(append=torch.tensor([-1])) != 0
    assert torch.equal(timelines.columns["request"][timelines.starts], actions["request"][newest])


def test_positive_engagement_is_the_papers() -> None:
    rows = [(k, s, d) for k in range(4) for s in range(3) for d in (5.0, 10.0, 10.5)]
    kind, surface, duration = (torch.tensor(column) for column in zip(*rows, strict=True))
    expected = [s == 0 and (k == 0 or (k in (1, 2) and d > 10)) for k, s, d in rows]
    got = positive_engagement({"action_type": kind, "surface": surface, "duration": duration})
    assert got.tolist() == expected


def test_embeddings_lie_around_their_topics_centre(seen: dict[str, Simulation]) -> None:
    items = seen["interests"].items
    # Unit to float32: a quotient and a root, each rounded to 6e-8.
    torch.testing.assert_close(items.embedding.norm(dim=1), torch.ones(4_000), atol=1e-6, rtol=0)
    centre = torch.zeros(50, 32).index_add_(0, items.topic, items.embedding)
    nearest = (items.embedding @ torch.nn.functional.normalize(centre, dim=1).T).argmax(1)
    # 50 random directions in 32 dimensions are rarely closer than the spread of 0.6 around a centre of norm 1.
    assert (nearest == items.topic).float().mean() > 0.95
    assert bool((items.topic.bincount() == 80).all())


@pytest.mark.parametrize("name", SMALL)
def test_organic_slots_show_items_by_a_power_law_inside_their_topic(seen: dict[str, Simulation], name: str) -> None:
    # One slot a request, so that no repeat is taken out, which would favour the tail.
    world = dataclasses.replace(SMALL[name], chunk=1, requests_per_session=8.0)
    simulation = seen[name] if name == "markov" else simulate(world, seed=2)
    organic = simulation.impressions["item"][~simulation.impressions["randomised"]]
    chance = simulation.items.popularity[organic]
    assert bool((chance > 0).all()), "a dormant item in an organic slot"
    rank = torch.arange(1, world.active_per_topic + 1).double()
    weight = rank**-world.popularity_exponent
    weight /= weight.sum()
    popularity = simulation.items.popularity[simulation.items.popularity > 0]
    torch.testing.assert_close(popularity.unique(), weight.unique().float(), rtol=1e-5, atol=0)
    assert popularity.numel() == world.active_per_topic * world.num_topics
    # The mean log chance is the exponent's sufficient statistic; its standard error is exact.
    log = weight.log()
    mean, variance = (weight * log).sum(), (weight * log**2).sum() - (weight * log).sum() ** 2
    error = SIGMAS * (variance.clamp(min=0) / organic.numel()).sqrt() + 1e-5
    assert (chance.double().log().mean() - mean).abs() <= error


@pytest.mark.parametrize("name", SMALL)
def test_the_share_of_randomised_slots_and_their_items_are_uniform(seen: dict[str, Simulation], name: str) -> None:
    world, impressions = SMALL[name], seen[name].impressions
    slots = seen[name].requests["user"].numel() * world.chunk
    randomised = impressions["item"][impressions["randomised"]]
    lost = 1 - impressions["item"].numel() / slots  # repeats inside a chunk, mostly organic ones
    share = randomised.numel() / slots
    assert share <= world.random_share + SIGMAS * math.sqrt(world.random_share / slots)
    assert share >= world.random_share * (1 - lost) - SIGMAS * math.sqrt(world.random_share / slots)
    count = randomised.bincount(minlength=world.num_items).double()
    # Pearson's statistic over N cells has mean N - 1 and variance 2 N; items that repeats take out lower some a little.
    chi2 = ((count - count.mean()) ** 2 / count.mean()).sum()
    assert (chi2 - world.num_items) / math.sqrt(2 * world.num_items) < SIGMAS + 5 * lost * 100


def test_types_durations_and_surfaces_come_in_their_shares(seen: dict[str, Simulation]) -> None:
    world, simulation = SMALL["interests"], seen["interests"]
    kind = engagements(simulation)["action_type"]
    for index, share in enumerate(world.type_shares):
        assert_share((kind == index).double().mean().item(), share, kind.numel())
    surface = simulation.requests["surface"]
    for index, share in enumerate(world.surface_shares):
        assert_share((surface == index).double().mean().item(), share, surface.numel())
    for index, median in enumerate(world.duration_medians):
        log = simulation.actions["duration"][simulation.actions["action_type"] == index].log()
        assert abs(log.mean() - math.log(median)) <= SIGMAS * world.duration_spread / math.sqrt(log.numel())
        # The standard deviation of n normal numbers has a relative standard error of 1 / sqrt(2 n).
        assert abs(log.std() - world.duration_spread) <= SIGMAS / math.sqrt(2 * log.numel())


def test_sessions_and_requests_come_as_often_as_the_world_says(seen: dict[str, Simulation]) -> None:
    world, simulation = SMALL["interests"], seen["interests"]
    for owner, count, mean in (
        (simulation.truth.session_user, world.num_users, world.sessions_per_day * world.days),
        (simulation.requests["session"], simulation.truth.session_user.numel(), world.requests_per_session),
    ):
        each = owner.bincount(minlength=count).double()
        assert abs(each.mean() - mean) <= SIGMAS * each.std() / math.sqrt(count)


def test_home_slots_follow_interests_and_intent_in_their_shares(seen: dict[str, Simulation]) -> None:
    world, simulation = SMALL["interests"], seen["interests"]
    impressions, truth = simulation.impressions, simulation.truth
    home = simulation.requests["surface"][impressions["request"]] == simulator.HOME
    rows = home & ~impressions["randomised"] & (impressions["position"] == 0)  # a chunk's first item repeats nothing
    session = simulation.requests["session"][impressions["request"][rows]]
    topic = simulation.items.topic[impressions["item"][rows]]
    interests, intents = truth.interests[session], truth.intents[session]
    crowd = 1 - world.interest_share - world.intent_share
    for candidate in (*interests.unbind(1), intents):
        chance = crowd * truth.topic_popularity[candidate].double() + world.intent_share * (intents == candidate)
        for weight, interest in zip(world.interest_weights, interests.unbind(1), strict=True):
            chance += world.interest_share * weight * (interest == candidate)
        error = SIGMAS * (chance * (1 - chance)).sum().sqrt()
        assert abs((topic == candidate).sum() - chance.sum()) <= error


def test_search_follows_the_intent_and_related_the_latest_engagement(seen: dict[str, Simulation]) -> None:
    simulation = seen["interests"]
    impressions, requests = simulation.impressions, simulation.requests
    topic = simulation.items.topic[impressions["item"]]
    organic, request = ~impressions["randomised"], impressions["request"]
    searched = organic & (requests["surface"][request] == simulator.SEARCH)
    assert torch.equal(topic[searched], simulation.truth.intents[requests["session"][request[searched]]])
    rows = engagements(simulation)
    last = torch.searchsorted(rows["request"], request) - 1  # rows run by request, as requests run by user and time
    known = organic & (requests["surface"][request] == simulator.RELATED) & (last >= 0)
    known &= rows["user"][last.clamp(min=0)] == requests["user"][request]
    assert torch.equal(topic[known], simulation.items.topic[rows["item"][last[known]]])


def test_users_hide_what_they_do_not_care_for_and_engage_with_what_they_do(seen: dict[str, Simulation]) -> None:
    simulation = seen["interests"]
    items, truth, impressions = simulation.items, simulation.truth, simulation.impressions
    session = simulation.requests["session"][impressions["request"]]
    wanted = torch.cat([truth.interests, truth.intents[:, None]], 1)[session]
    home = simulation.requests["surface"][impressions["request"]] == simulator.HOME
    relevant = (wanted == items.topic[impressions["item"]][:, None]).any(1)
    kind = impressions["action_type"]
    hides = [(kind == simulator.HIDE)[home & which].double().mean() for which in (relevant, ~relevant)]
    engages = [((kind >= 0) & (kind < 3))[home & which].double().mean() for which in (relevant, ~relevant)]
    assert hides[1] > 5 * hides[0]
    assert engages[0] > 4 * engages[1]
    # The taste is the same for every topic: engaged items lie on its side of the relevant ones shown.
    cosine = (
        items.embedding[impressions["item"]] * truth.taste[simulation.requests["user"][impressions["request"]]]
    ).sum(1)
    took = (kind >= 0) & (kind < 3)
    assert cosine[home & relevant & took].mean() > cosine[home & relevant & ~took].mean() + 0.05


@pytest.mark.parametrize(
    ("name", "column", "life"),
    [
        ("interests", "intents", INTERESTS.intent_hours / 24),
        ("interests", "interests", INTERESTS.interest_days),
        ("responsive", "dislikes", RESPONSIVE.dislike_days),
    ],
)
def test_topics_last_as_long_as_the_world_says(
    seen: dict[str, Simulation], name: str, column: str, life: float
) -> None:
    truth = seen[name].truth
    topic = getattr(truth, column)
    topic = topic[:, 0] if topic.ndim == 2 else topic
    same_user = truth.session_user.diff() == 0
    keep = torch.exp(-truth.session_time.diff().double() / DAY / life)[same_user]
    alike = torch.full_like(truth.topic_popularity, 1 / len(truth.topic_popularity))
    by_chance = ((alike if column == "dislikes" else truth.topic_popularity).double() ** 2).sum()
    expected = keep + (1 - keep) * by_chance
    stays = (topic.diff() == 0)[same_user].double()
    # 1 %: a session that is put off because the one before runs late changes its gap after the draw.
    assert (
        abs(stays.mean() - expected.mean()) <= SIGMAS * (expected * (1 - expected)).sum().sqrt() / stays.numel() + 0.01
    )


def tables_of_responsive(simulation: Simulation) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of every impression: its action type, and whether its topic is liked, meant, disliked; and its session."""
    impressions, truth = simulation.impressions, simulation.truth
    session = simulation.requests["session"][impressions["request"]]
    topic = simulation.items.topic[impressions["item"]][:, None]
    liked = (truth.interests[session] == topic).any(1)
    meant = truth.intents[session] == topic[:, 0]
    disliked = (truth.dislikes[session] == topic).any(1)
    return impressions["action_type"], liked, meant, disliked, session


def test_in_responsive_intents_are_saved_and_dislikes_hidden(seen: dict[str, Simulation]) -> None:
    world, simulation = SMALL["responsive"], seen["responsive"]
    kind, liked, meant, disliked, _ = tables_of_responsive(simulation)
    took = (kind >= 0) & (kind != simulator.HIDE)
    for which, chance in (
        ((liked | meant) & ~disliked, world.engage_relevant),
        (disliked, world.engage_other),  # even where it is an interest as well
        (~liked & ~meant, world.engage_other),
    ):
        assert_share(took[which].double().mean().item(), chance, int(which.sum()))
    for which, shares in ((meant, world.intent_type_shares), (~meant, world.type_shares)):
        for index, share in enumerate(shares):
            assert_share((kind[took & which] == index).double().mean().item(), share, int((took & which).sum()))
    for which, chance in (
        (disliked, world.hide_disliked),
        ((liked | meant) & ~disliked, world.hide_relevant),
        (~liked & ~meant & ~disliked, world.hide_other),
    ):
        left = which & ~took
        assert_share((kind == simulator.HIDE)[left].double().mean().item(), chance, int(left.sum()))


def test_in_responsive_the_newest_actions_and_their_types_tell_what_comes_next(seen: dict[str, Simulation]) -> None:
    """Of a session's first save and first hide: the next one is mostly of their own topic, not of the other's."""
    simulation = seen["responsive"]
    rows, topics = simulation.actions, simulation.items.topic
    session = simulation.requests["session"][rows["request"]]
    for kind, other in ((simulator.SAVE, simulator.HIDE), (simulator.HIDE, simulator.SAVE)):
        mine, theirs = (rows["action_type"] == one for one in (kind, other))
        topic, where = topics[rows["item"][mine]], session[mine]
        again = (topic.diff() == 0)[where.diff() == 0].double().mean()
        crossed = torch.isin(where * 100 + topic, session[theirs] * 100 + topics[rows["item"][theirs]]).double().mean()
        assert again > 0.2
        assert crossed < 0.05


def test_in_indifferent_nothing_about_a_user_says_what_they_do(seen: dict[str, Simulation]) -> None:
    world, simulation = SMALL["indifferent"], seen["indifferent"]
    kind, liked, meant, _, _ = tables_of_responsive(simulation)
    took = (kind >= 0) & (kind != simulator.HIDE)
    assert simulation.truth.dislikes.shape[1] == 0
    for which in (liked, meant, ~liked & ~meant):
        assert_share(took[which].double().mean().item(), world.engage_other, int(which.sum()))
        for index, share in enumerate(world.type_shares):
            assert_share((kind[took & which] == index).double().mean().item(), share, int((took & which).sum()))
        left = which & ~took
        assert_share((kind == simulator.HIDE)[left].double().mean().item(), world.hide_other, int(left.sum()))


def test_in_markov_the_latest_engagement_alone_says_what_comes_next(seen: dict[str, Simulation]) -> None:
    world, simulation = SMALL["markov"], seen["markov"]
    rows = engagements(simulation)
    topic = simulation.items.topic[rows["item"]]
    same = rows["user"].diff() == 0
    follows = topic[1:] == simulation.truth.successor[topic[:-1]]
    chain = world.chain_share * (1 - world.random_share)
    taken = chain * world.engage_relevant
    other = (1 - chain) * world.engage_other
    expected = taken / (taken + other) + other / (taken + other) / world.num_topics
    assert_share(follows[same].double().mean().item(), expected, int(same.sum()))
    # Whether the step before followed the chain changes nothing.
    both = same[1:] & same[:-1]
    for before in (True, False):
        case = both & (follows[:-1] == before)
        assert_share(follows[1:][case].double().mean().item(), expected, int(case.sum()))


def test_topics_follow_each_other_in_one_cycle(seen: dict[str, Simulation]) -> None:
    successor = seen["markov"].truth.successor.tolist()
    topic, visited = 0, []
    for _ in successor:
        topic = successor[topic]
        visited.append(topic)
    assert topic == 0
    assert sorted(visited) == list(range(len(successor)))


def test_in_uniform_every_item_is_engaged_with_equally_often(seen: dict[str, Simulation]) -> None:
    world, rows = SMALL["uniform"], engagements(seen["uniform"])
    count = rows["item"].bincount(minlength=world.num_items).double()
    interests = engagements(seen["interests"])["item"].bincount(minlength=SMALL["interests"].num_items).double()
    # Poisson counts have variance = mean. Users come in clumps (one interest is some 80 engagements on 20 items, four
    # on each), which multiplies the variance by about five; a power law multiplies it by hundreds.
    assert count.var() / count.mean() < 8
    assert interests.var() / interests.mean() > 100


# What a model can know, as scores of topics; an item's score is its topic's times its popularity inside the topic.


def recall(simulation: Simulation, scores: Tensor, rows: Tensor, query: Tensor) -> float:
    """Mean over actions of whether the action's item is among its query's ten best."""
    items = simulation.items
    best = (scores[:, items.topic] * items.popularity).topk(10, dim=1).indices
    return (best[query] == simulation.actions["item"][rows, None]).any(1).double().mean().item()


def last_fortnight(simulation: Simulation, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Positive actions of the last 14 days, their users, and each user's last session before (-1: none)."""
    actions, truth = simulation.actions, simulation.truth
    cut = simulation.truth.session_time.min() // DAY * DAY + (world.days - 14) * DAY
    early = truth.session_time < cut
    last = torch.full((world.num_users,), -1).scatter_reduce_(
        0, truth.session_user[early], early.nonzero()[:, 0], "amax", include_self=True
    )
    rows = (positive_engagement(actions) & (actions["time"] > cut) & (last[actions["user"]] >= 0)).nonzero()[:, 0]
    return rows, actions["user"][rows], last


def blend(world: World, truth: simulator.Truth, session: Tensor, interest: float, intent: float) -> Tensor:
    """Topic scores that give the interests and the intent of a session those shares, and the crowd the rest."""
    scores = (1 - interest - intent) * truth.topic_popularity.expand(session.shape[0], -1)
    weights = torch.tensor(world.interest_weights).expand(session.shape[0], -1)
    scores = scores.scatter_add(1, truth.interests[session], interest * weights)
    return scores.scatter_add(1, truth.intents[session, None], torch.full((session.shape[0], 1), intent))


@pytest.mark.parametrize("name", ["interests", "uniform"])
def test_the_next_fortnight_follows_interests_and_not_the_hour(seen: dict[str, Simulation], name: str) -> None:
    world, simulation = SMALL[name], seen[name]
    rows, user, last = last_fortnight(simulation, world)
    session = last.clamp(min=0)
    long = recall(simulation, blend(world, simulation.truth, session, 0.8, 0.0), rows, user)
    hour = recall(simulation, blend(world, simulation.truth, session, 0.3, 0.6), rows, user)
    only_hour = recall(simulation, blend(world, simulation.truth, session, 0.0, 0.9), rows, user)
    crowd = recall(simulation, blend(world, simulation.truth, session, 0.0, 0.0), rows, user)
    # 16 thousand actions: a recall of 0.2 has a standard error below 0.006 even if a user's actions hit four at a time.
    assert long > 1.15 * hour >= 1.15 * only_hour
    assert long > 1.8 * crowd


def test_the_intent_of_the_hour_pays_at_once_and_its_knowledge_ages(seen: dict[str, Simulation]) -> None:
    world, simulation = SMALL["interests"], seen["interests"]
    rows, user, last = last_fortnight(simulation, world)
    now = simulation.requests["session"][simulation.actions["request"][rows]]
    sessions, query = now.unique(return_inverse=True)
    realtime = recall(simulation, blend(world, simulation.truth, sessions, 0.5, 0.4), rows, query)
    long_realtime = recall(simulation, blend(world, simulation.truth, sessions, 0.8, 0.0), rows, query)
    once = recall(simulation, blend(world, simulation.truth, last.clamp(min=0), 0.5, 0.4), rows, user)
    long_once = recall(simulation, blend(world, simulation.truth, last.clamp(min=0), 0.8, 0.0), rows, user)
    assert realtime > long_realtime > long_once > once
    assert once / realtime < long_once / long_realtime, "who bets on the intent loses more by staleness"


def test_in_markov_the_last_action_beats_the_whole_past_at_the_next_action(seen: dict[str, Simulation]) -> None:
    world, simulation = SMALL["markov"], seen["markov"]
    actions, topics = simulation.actions, world.num_topics
    rows, user, _ = last_fortnight(simulation, world)
    previous = rows - 1
    fine = (actions["user"][previous] == user) & (actions["action_type"][previous] != simulator.HIDE)
    rows, user, previous = rows[fine], user[fine], previous[fine]
    successor = simulation.truth.successor[simulation.items.topic[actions["item"][previous]]]
    by_action = recall(simulation, torch.eye(topics), rows, successor)
    past = actions["time"] < actions["time"].max() - 14 * DAY
    counts = torch.zeros(world.num_users * topics)
    cells = (actions["user"] * topics + simulation.items.topic[actions["item"]])[past]
    by_past = recall(simulation, counts.index_add_(0, cells, torch.ones(cells.shape)).view(-1, topics), rows, user)
    # Ten of a topic's 40 items, and 60 % of actions are the successor's.
    assert_share(by_action, 0.6076 * 0.25, rows.numel())
    assert by_past < by_action / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_users": 0}, "num_users"),
        ({"num_items": 20_001}, "num_items must be a multiple of num_topics=50, got 20001"),
        ({"dormant_share": 1.0}, "dormant_share must leave an item"),
        ({"random_share": 1.5}, "random_share"),
        ({"interest_weights": (0.5, 0.4)}, "interest_weights must sum to 1"),
        ({"surface_shares": (0.5, 0.5)}, "surface_shares must have 3 entries"),
        ({"type_shares": (0.5, 0.5, 0.5)}, "type_shares must sum to 1"),
        ({"intent_share": 0.9}, r"\(interest_share, intent_share, chain_share\) must sum to at most 1"),
        ({"engage_other": 0.0}, "engage_other"),
        ({"intent_hours": 0.0}, "intent_hours"),
        ({"requests_per_session": 0.5}, "requests_per_session"),
        ({"duration_medians": (1.0, 2.0)}, "duration_medians must have 4 entries"),
        ({"duration_medians": (1.0, 2.0, 0.0, 1.0)}, "duration_medians"),
        ({"taste": math.nan}, "taste"),
    ],
)
def test_a_world_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(INTERESTS, **change)


def test_a_wrong_type_or_unit_is_refused() -> None:
    with pytest.raises(TypeError, match="num_users must be an int"):
        dataclasses.replace(INTERESTS, num_users=10.0)
    with pytest.raises(ValueError, match="unit must be one of 's', 'ms'"):
        simulate(SMALL["interests"], unit="h")
