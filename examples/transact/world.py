"""Simulated feeds as exposures: a request's chunk are the candidates, with everything that came of them known."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

import recblocks
from examples.transact.data import Bags, Candidates, RankingData, Requests, impressions_before, newest_before
from recblocks import Timelines

DAY = 86_400_000
HEADS = ("save", "closeup", "click", "hide")


@dataclasses.dataclass(frozen=True)
class WorldOptions:
    """Which simulated feed."""

    world: Literal["responsive", "indifferent"] = "responsive"
    """A world whose users answer to what they just did, or one whose do not."""
    world_users: int | None = 800
    """Users, fewer than the world's own 2,000, which `claims` takes, so that the demo takes two minutes; None: all."""
    world_seed: int = 0


def load(options: WorldOptions) -> RankingData:
    """Simulate; train on all days but the last seven and choose on the two before these."""
    world = {"responsive": recblocks.RESPONSIVE, "indifferent": recblocks.INDIFFERENT}[options.world]
    if options.world_users is not None:
        world = dataclasses.replace(world, num_users=options.world_users)
    seen = recblocks.simulate(world, seed=options.world_seed)
    names = ("user", "time", "item", "action_type")
    histories = Timelines.from_arrays(unit=seen.unit, **{name: seen.actions[name] for name in names})
    histories = histories.with_columns(row=histories.columns["item"])
    time, shown = seen.requests["time"], seen.impressions
    day = (time - int(time.min())) // DAY
    user = histories.rows_of(seen.requests["user"])
    known = user >= 0  # who never does anything has no history, and no row in it
    place = known.cumsum(0) - 1
    kept = known[shown["request"]]
    kinds, shown_on = torch.arange(len(HEADS)), day[shown["request"][kept]]
    return RankingData(
        name=f"the world {options.world}",
        heads=HEADS,
        utilities=(1.0, 0.3, 0.3, -1.0),
        primary="save",
        histories=histories,
        num_action_types=len(HEADS),
        positive_types=(0, 1, 2),
        items=torch.arange(world.num_items),
        vectors=seen.items.embedding,
        item_categorical={},
        topics=seen.items.topic,
        top_level=seen.items.topic,
        requests=Requests(
            user=user[known],
            newest=newest_before(histories, user[known], time[known]),
            day=day[known],
            time=time[known],
            categorical={"hour": (time[known] // 3_600_000) % 24},
        ),
        candidates=Candidates(
            request=place[shown["request"][kept]],
            item=shown["item"][kept],
            labels=(shown["action_type"][kept, None] == kinds).float(),
            label_names=HEADS,
            categorical={},
            numeric=impressions_before(shown["item"][kept], shown_on, shown_on),
        ),
        parts={
            "train": (day < world.days - 9)[known],
            "choose": ((day >= world.days - 9) & (day < world.days - 7))[known],
            "report": (day >= world.days - 7)[known],
        },
        label_weights={  # the paper's, whose repins are saves; closeups as clicks
            "save": {"save": 100.0, "closeup": 0.0, "click": 0.0, "hide": 100.0},
            "closeup": {"save": 0.0, "closeup": 100.0, "click": 0.0, "hide": 100.0},
            "click": {"save": 0.0, "closeup": 0.0, "click": 100.0, "hide": 100.0},
            "hide": {"save": 5.0, "closeup": 1.0, "click": 1.0, "hide": 10.0},
        },
        epochs=1,
        batch_size=1024,
        negative_share=0.25,
        window_hours=0.1,
        notes=(
            f"{int((~known).sum())} requests of users who never do anything are left out. No user embedding: training "
            "begins on the first day, before which there is nothing to learn one from.",
        ),
        item_ids={"tag": Bags(seen.items.topic.long(), torch.arange(world.num_items + 1))},
    )
