"""Five simulated worlds, written down before any model was trained on them, each true to one claim."""

from __future__ import annotations

import dataclasses

from recblocks import _checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """The parameters of a simulated feed; `simulate` turns a world and a seed into data.

    A user opens the feed in sessions, a session makes requests, and each request shows one chunk of items. A slot of
    the chunk is randomised (any item of the corpus) or organic: its topic comes from the user or from the crowd, and
    its item from the popularity inside that topic. The user then engages (save, closeup, click), hides, or passes on.

    Attributes:
        num_users: Users; every one has at least one session.
        num_topics: Topics; each has ``num_items / num_topics`` items.
        num_items: Items in the corpus, a multiple of ``num_topics``.
        embedding_dim: Size of the items' unit embeddings.
        days: Length of the simulated time.
        item_spread: Norm of an item's own part of its embedding, before normalisation; its topic's centre has norm 1.
        popularity_exponent: An active item's chance inside its topic is rank^-exponent; 0 = all alike.
        topic_exponent: A topic's chance to be somebody's interest or intent is rank^-exponent; 0 = all alike.
        popularity_visible: How far one standard deviation of log popularity moves an embedding along one direction.
        dormant_share: Share of each topic's items that no organic slot shows.
        dormant_shift: How far dormant items stand apart along another direction.
        interest_weights: A user has this many interests (topics), met with these chances; they sum to 1.
        interest_days: Mean life of one interest, after which its topic is drawn anew, perhaps the same again.
        intent_hours: Mean life of an intent: one topic, independent of the interests, drawn anew between sessions,
            perhaps the same again.
        interest_share: Share of organic home slots whose topic is one of the interests.
        intent_share: Share of organic home slots whose topic is the intent.
        chain_share: Share of organic home slots whose topic is the successor of the latest engagement's topic. What
            these three shares leave is the crowd's: a topic by its popularity.
        taste: Weight in an engagement's log odds of the cosine between the item and a direction of the user's own.
        sessions_per_day: Mean over users; a user's own rate is lognormal around it.
        activity_spread: Standard deviation of the log of a user's rate.
        requests_per_session: Mean of a geometric distribution from 1 up.
        chunk: Slots of a request; an item drawn twice is shown once, so a chunk may be shorter.
        random_share: Share of slots that are randomised.
        surface_shares: Chances of home, search (organic slots follow the intent) and related (they follow the
            topic of the latest engagement) for a request; they sum to 1.
        engage_relevant: Chance to engage with an item of a relevant topic, where the taste is neutral. Relevant are
            what the slot follows; the user's interests, if ``interest_share`` is above 0; and the intent, if
            ``intent_share`` or search's share of the surfaces is.
        engage_other: The same for any other item.
        hide_relevant: Chance to hide a relevant item that the user does not engage with.
        hide_other: The same for any other item.
        num_dislikes: A user dislikes this many topics at a time, drawn from all alike; an item of one is never relevant
            unless it follows an engagement.
        dislike_days: Mean life of one dislike, after which its topic is drawn anew, perhaps the same again.
        hide_disliked: Chance to hide an item of a disliked topic that the user does not engage with.
        type_shares: Chances of save, closeup and click for an engagement; they sum to 1.
        intent_type_shares: The same for an engagement with an item of the intent's topic.
        duration_medians: Seconds for each of save, closeup, click and hide.
        duration_spread: Standard deviation of the log of a duration.
    """

    num_users: int
    num_topics: int
    num_items: int
    embedding_dim: int
    days: int
    item_spread: float
    popularity_exponent: float
    topic_exponent: float
    popularity_visible: float
    dormant_share: float
    dormant_shift: float
    interest_weights: tuple[float, ...]
    interest_days: float
    intent_hours: float
    interest_share: float
    intent_share: float
    chain_share: float
    taste: float
    sessions_per_day: float
    activity_spread: float
    requests_per_session: float
    chunk: int
    random_share: float
    surface_shares: tuple[float, float, float]
    engage_relevant: float
    engage_other: float
    hide_relevant: float
    hide_other: float
    num_dislikes: int
    dislike_days: float
    hide_disliked: float
    type_shares: tuple[float, float, float]
    intent_type_shares: tuple[float, float, float]
    duration_medians: tuple[float, float, float, float]
    duration_spread: float

    def __post_init__(self) -> None:
        for name in ("num_users", "num_topics", "num_items", "embedding_dim", "days", "chunk"):
            _checks.positive_int(name, getattr(self, name))
        if self.num_items % self.num_topics:
            raise ValueError(f"num_items must be a multiple of num_topics={self.num_topics}, got {self.num_items}")
        for name in ("item_spread", "popularity_exponent", "topic_exponent", "activity_spread", "duration_spread"):
            _checks.number(name, getattr(self, name), at_least=0)
        for name in ("popularity_visible", "dormant_shift", "taste"):
            _checks.number(name, getattr(self, name))
        _checks.integer("num_dislikes", self.num_dislikes, at_least=0)
        for name in ("dormant_share", "random_share", "hide_relevant", "hide_other", "hide_disliked"):
            _checks.number(name, getattr(self, name), at_least=0, at_most=1)
        for name in ("engage_relevant", "engage_other"):
            _checks.number(name, getattr(self, name), above=0, below=1)
        for name in ("interest_days", "intent_hours", "dislike_days", "sessions_per_day"):
            _checks.number(name, getattr(self, name), above=0)
        _checks.number("requests_per_session", self.requests_per_session, at_least=1)
        _check_shares("interest_weights", self.interest_weights, None)
        _check_shares("surface_shares", self.surface_shares, 3)
        _check_shares("type_shares", self.type_shares, 3)
        _check_shares("intent_type_shares", self.intent_type_shares, 3)
        _check_shares(
            "(interest_share, intent_share, chain_share)",
            (self.interest_share, self.intent_share, self.chain_share),
            3,
            whole=False,
        )
        if len(self.duration_medians) != 4:
            raise ValueError(f"duration_medians must have 4 entries, got {self.duration_medians!r}")
        for median in self.duration_medians:
            _checks.number("duration_medians", median, above=0)
        if self.active_per_topic < 1:
            raise ValueError(f"dormant_share must leave an item of each topic active, got {self.dormant_share}")

    @property
    def items_per_topic(self) -> int:
        """Items of one topic, dormant ones included."""
        return self.num_items // self.num_topics

    @property
    def active_per_topic(self) -> int:
        """Items of one topic that organic slots show."""
        return self.items_per_topic - round(self.items_per_topic * self.dormant_share)


def _check_shares(name: str, shares: tuple[float, ...], length: int | None, *, whole: bool = True) -> None:
    if length is not None and len(shares) != length:
        raise ValueError(f"{name} must have {length} entries, got {shares!r}")
    for share in shares:
        _checks.number(name, share, at_least=0, at_most=1)
    total = sum(shares)
    if total > 1 + 1e-9 or (whole and total < 1 - 1e-9):
        raise ValueError(f"{name} must sum to {'1' if whole else 'at most 1'}, got {shares!r}")


INTERESTS = World(
    # Enough held-out users for intervals of a few thousandths, small enough to train on in a minute.
    num_users=6_000,
    num_topics=50,
    num_items=20_000,
    embedding_dim=32,
    # Ten weeks to train on and two to judge.
    days=84,
    # Topics are plain to see, and an item is more than its topic.
    item_spread=0.6,
    # Power laws over items and over topics: engagement falls about as rank^-0.9.
    popularity_exponent=1.0,
    topic_exponent=0.6,
    # Content such as PinSage knows something of an item's engagement (PF 3): here, the head stands out of the noise.
    popularity_visible=0.15,
    # Half of the corpus is hardly ever engaged with and looks a little different, so that in-batch negatives alone
    # leave it unlearned: "the distribution of negative examples is different from the true underlying distribution of
    # Pins used for retrieval" (PF 3.3.1). Compare pools at about the share of the index that the paper's have, 1 %.
    dormant_share=0.5,
    dormant_shift=0.5,
    # Three interests that outlive the 14-day window several times over, and change just enough for freshness to count.
    interest_weights=(0.5, 0.3, 0.2),
    interest_days=60.0,
    # An intent holds through its session, where the next action mostly falls, survives one and a half days (the daily
    # protocol's lag) one time in five, and says nothing of the next two weeks.
    intent_hours=24.0,
    # Most of home is long-term interest, a third intent, the rest the crowd.
    interest_share=0.55,
    intent_share=0.35,
    chain_share=0.0,
    # Log odds of ± 0.7 for one standard deviation of the cosine (1 / sqrt 32): a lasting preference inside a topic.
    taste=4.0,
    # About 50 sessions of 3 requests and 5 actions: 120 positives a user, 20 of them in the last two weeks.
    sessions_per_day=0.6,
    activity_spread=0.5,
    requests_per_session=3.0,
    chunk=6,
    random_share=0.1,
    # Search and related carry their own context (PF 3); only home counts as positive.
    surface_shares=(0.7, 0.15, 0.15),
    engage_relevant=0.3,
    engage_other=0.04,
    hide_relevant=0.003,
    hide_other=0.03,
    # A hide says only that an item was not relevant.
    num_dislikes=0,
    dislike_days=1.0,
    hide_disliked=0.0,
    type_shares=(0.25, 0.5, 0.25),
    intent_type_shares=(0.25, 0.5, 0.25),
    # A little over half of the closeups and three quarters of the clicks last the 10 s that make them positive.
    duration_medians=(5.0, 12.0, 20.0, 1.5),
    duration_spread=1.0,
)
"""Long-term interests matter: the next two weeks follow them, the next action mostly the intent of the hour."""

MARKOV = dataclasses.replace(
    INTERESTS,
    # Many small topics without popularity: the ten best items for the next action all lie in the successor's topic.
    num_topics=128,
    num_items=5_120,
    popularity_exponent=0.0,
    topic_exponent=0.0,
    dormant_share=0.0,
    # Nothing lasts: no interests, no intents, no taste; every action is drawn given the latest engagement alone.
    interest_share=0.0,
    intent_share=0.0,
    taste=0.0,
    # One item a request, so that each action sees the one before it, and home alone, as the other surfaces would carry
    # a topic on. 56 % of organic slots are the successor's, 60 % of actions: sharp for the next action (0.6), worn off
    # within a few (0.36, 0.22, 0.13, ...), so that a label from anywhere in a window says next to nothing.
    chain_share=0.56,
    surface_shares=(1.0, 0.0, 0.0),
    chunk=1,
    requests_per_session=6.0,
    engage_relevant=0.6,
    engage_other=0.4,
)
"""Only the last action matters: its topic has one successor, and the next action probably lies there."""

UNIFORM = dataclasses.replace(
    INTERESTS,
    # No item or topic is likelier than another, none is dormant, and tastes point everywhere alike, so that every item
    # is engaged with equally often. Fewer items: 150 positives each, so that counting noise is small as well.
    num_items=5_000,
    popularity_exponent=0.0,
    topic_exponent=0.0,
    dormant_share=0.0,
)
"""`INTERESTS` without popularity: the sampling probability of every item is the same, so correcting for it is idle."""

RESPONSIVE = dataclasses.replace(
    INTERESTS,
    # 930 thousand impressions, a third of them to judge: what a small ranker reads in minutes.
    num_users=2_000,
    days=21,
    sessions_per_day=0.75,
    # Few topics, all about as popular and without a dormant half: what a candidate is worth is a matter of the user.
    num_topics=25,
    num_items=5_000,
    popularity_exponent=0.5,
    topic_exponent=0.2,
    dormant_share=0.0,
    taste=0.0,
    # Ten candidates a request, so that three are a choice; most of them are the crowd's, as after retrieval.
    chunk=10,
    interest_share=0.15,
    intent_share=0.2,
    random_share=0.15,
    surface_shares=(1.0, 0.0, 0.0),
    # Short-term intent: it holds for the session and is mostly gone the next day, so only the newest actions tell it.
    intent_hours=8.0,
    # What is wanted now is saved; what is merely of interest is looked at. Only the type tells one from the other.
    type_shares=(0.1, 0.6, 0.3),
    intent_type_shares=(0.7, 0.2, 0.1),
    # What somebody hid is of a topic that they will hide again for days: an action like any other but for its type.
    num_dislikes=3,
    dislike_days=10.0,
    hide_disliked=0.35,
    hide_relevant=0.003,
    hide_other=0.01,
    engage_other=0.03,
)
"""What a candidate is worth depends on the newest actions and on their types: intents are saved, dislikes hidden."""

INDIFFERENT = dataclasses.replace(
    RESPONSIVE,
    # Nobody has interests, intents or dislikes: whatever is shown is engaged with or hidden as often as anything else,
    # about as often as in `RESPONSIVE`. No sequence says anything about any candidate.
    interest_share=0.0,
    intent_share=0.0,
    num_dislikes=0,
    hide_disliked=0.0,
    engage_other=0.12,
    hide_other=0.03,
    type_shares=(0.3, 0.45, 0.25),
    intent_type_shares=(0.3, 0.45, 0.25),
)
"""`RESPONSIVE` without any effect of the sequence: no model of it can win anything."""
