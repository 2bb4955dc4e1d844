"""Training batches: every user once an epoch, disjoint by rank and worker, and resumed where they stopped."""

from __future__ import annotations

import functools
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from recblocks import Examples, Timelines, TrainingBatches, dense_all_action
from recblocks.timelines._hashing import permute

OBJECTIVE = functools.partial(dense_all_action, max_len=4, positive=lambda action: action["item"] % 7 > 0, max_labels=2)


def build(users: int) -> Timelines:
    actions = torch.arange(users * 5)
    return Timelines.from_arrays(user=actions % users * 11 - 20, time=actions, item=actions, unit="s")


def batches(timelines: Timelines, **options: int) -> TrainingBatches:
    settings = {"users_per_batch": 4, "fraction": 1.0, "max_sequences": 2} | options
    return TrainingBatches(timelines, OBJECTIVE, **settings)  # type: ignore[arg-type]


def same(one: Examples, other: Examples) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@given(count=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(count: int, key: int) -> None:
    assert sorted(permute(np.arange(count, dtype=np.uint64), count, key=key).tolist()) == list(range(count))


def test_permute_sends_every_index_everywhere_equally_often() -> None:
    count, keys = 5, 4000
    table = np.stack([permute(np.arange(count, dtype=np.uint64), count, key=key) for key in range(keys)])
    for place in table.T:
        counts = np.bincount(place.astype(np.int64), minlength=count)
        # Each count is binomial (n = 4000, p = 1/5); five deviations.
        assert (np.abs(counts - keys / count) <= 5 * (keys / count * (1 - 1 / count)) ** 0.5).all()
    neighbours = (table[:, 0] + 1) % count == table[:, 1]
    assert abs(neighbours.sum() - keys / 4) <= 5 * (keys / 4 * 0.75) ** 0.5  # 4 places are left for the second


def test_permute_at_the_size_of_the_world() -> None:
    index = np.arange(1000, dtype=np.uint64) * np.uint64(7_000_000)
    out = permute(index, 8_000_000_000, key=3)
    assert len(set(out.tolist())) == 1000
    assert out.max() < 8_000_000_000


@given(
    users=st.integers(1, 40), per_batch=st.integers(1, 7), world_size=st.integers(1, 5), epochs=st.integers(1, 3),
    seed=st.integers(0, 3),
)  # fmt: skip
def test_an_epoch_visits_every_user_once(users: int, per_batch: int, world_size: int, epochs: int, seed: int) -> None:
    timelines = build(users)
    ranks = [
        batches(timelines, users_per_batch=per_batch, epochs=epochs, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = ranks[0].steps_per_epoch
    assert {len(one) for one in ranks} == {steps * epochs}
    for epoch in range(epochs):
        seen = [one.user_rows(epoch * steps + step) for one in ranks for step in range(steps)]
        assert sorted(torch.cat(seen).tolist()) == list(range(users))
        assert max(len(rows) for rows in seen) <= per_batch


def test_epochs_and_seeds_differ_and_a_batch_repeats_exactly() -> None:
    timelines = build(40)
    one = batches(timelines, epochs=2)
    order = [torch.cat([one.user_rows(epoch * 10 + step) for step in range(10)]) for epoch in range(2)]
    assert not torch.equal(order[0], order[1])
    assert not torch.equal(one.user_rows(0), batches(timelines, seed=1).user_rows(0))
    assert same(one[3], batches(timelines, epochs=2)[3])
    whole_batch = batches(timelines, users_per_batch=40, epochs=2, max_sequences=1)
    assert not same(whole_batch[0], whole_batch[1])


def test_a_user_is_drawn_anew_in_every_epoch() -> None:
    one = batches(build(1), epochs=20, max_sequences=1)
    assert len({int(one[step].actions[0, 0]) for step in range(20)}) > 1


def test_batches_hold_their_users_and_no_row_without_a_pair() -> None:
    timelines = build(30)
    one = batches(timelines)
    # A user's items are all even or all odd, so every other user has no positive.
    one.objective = functools.partial(dense_all_action, max_len=4, positive=lambda action: action["item"] % 2 > 0)
    seen = [one[step] for step in range(len(one))]
    assert sum(examples.users.unique().numel() for examples in seen) == 15
    for step, examples in enumerate(seen):
        assert set(examples.users.tolist()) <= set(timelines.users[one.user_rows(step)].tolist())
        assert examples.pair_row.unique().tolist() == list(range(len(examples.users)))


def test_a_subset_of_users_and_labels_up_to_until() -> None:
    timelines = build(30)
    subset = timelines.select(torch.arange(1, 30, 3))
    one = batches(subset, until=99)
    seen = [one[step] for step in range(len(one))]
    assert {user for examples in seen for user in examples.users.tolist()} == set(subset.users.tolist())
    labels = timelines.columns["time"][torch.cat([examples.pair_label for examples in seen])]
    assert labels.max() <= 99


@pytest.mark.parametrize("on_disk", [True, False])
def test_workers_give_the_same_batches_and_resume_where_they_stopped(tmp_path: pathlib.Path, on_disk: bool) -> None:
    timelines = build(30).save(tmp_path) if on_disk else build(30)
    one = batches(timelines, epochs=2)
    expected = [one[step] for step in range(len(one))]
    stopped = 5

    def load(first: int) -> list[Examples]:
        return list(DataLoader(one, batch_size=None, sampler=range(first, len(one)), num_workers=2))

    uninterrupted = load(0)
    assert len(uninterrupted) == len(expected) == 16
    assert all(same(a, b) for a, b in zip(uninterrupted, expected, strict=True))
    assert all(same(a, b) for a, b in zip(load(stopped), expected[stopped:], strict=True))


def test_workers_see_disjoint_users_and_miss_none() -> None:
    one = batches(build(30))

    def with_worker(examples: Examples) -> tuple[int, list[int]]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        return worker.id, examples.users.tolist()

    seen: dict[int, set[int]] = {0: set(), 1: set()}
    loader = DataLoader(one, batch_size=None, sampler=range(len(one)), num_workers=2, collate_fn=with_worker)
    for worker, users in loader:
        seen[worker] |= set(users)
    assert not seen[0] & seen[1]
    assert seen[0]
    assert seen[0] | seen[1] == set(one.timelines.users.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users_per_batch": 0}, "users_per_batch must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"world_size": 2, "rank": 2}, "rank must be from 0 to 1, got 2"),
        ({"world_size": 4096, "rank": 5000}, "rank must be from 0 to 4095, got 5000"),
        ({"rank": -1}, "rank must be from 0 to 0, got -1"),
        ({"seed": 2**64}, f"seed must be from .* got {2**64}"),
        ({"fraction": 0.0}, "fraction must be"),
        ({"max_sequences": 0}, "max_sequences must be at least 1"),
    ],
)
def test_bad_input(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(build(3), **change)


@pytest.mark.parametrize("name", ["seed", "rank"])
@pytest.mark.parametrize("value", [True, 0.0, None])
def test_seed_and_rank_must_be_integers(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an int, got"):
        batches(build(3), **{name: value})  # type: ignore[arg-type]


def test_integers_of_numpy_are_as_good() -> None:
    one = batches(build(30), seed=-3, rank=1, world_size=2)
    other = batches(build(30), seed=np.int64(-3), rank=np.int64(1), world_size=2)  # type: ignore[arg-type]
    assert same(one[1], other[np.int64(1)])  # type: ignore[index]
    assert same(one[1], one[torch.tensor(1)])  # type: ignore[index]
    with pytest.raises(TypeError, match=r"step must be an int, got 1\.0"):
        one[1.0]  # type: ignore[index]


def test_ranks_draw_apart_from_each_other() -> None:
    """One user in every step, so that the users of a step do not tell the ranks apart: only their draws may."""
    timelines = build(2)
    steps = 40
    ranks = [
        batches(timelines, users_per_batch=1, epochs=steps, rank=rank, world_size=2, max_sequences=1)
        for rank in range(2)
    ]
    places: dict[tuple[int, int], int] = {}
    for rank, one in enumerate(ranks):
        for step in range(steps):
            anchors = one.timelines.ends[one.user_rows(step)] - 1 - one[step].actions[:, 0]
            places[step, rank] = int(anchors[0]) if len(anchors) else -1
    agree = sum(places[step, 0] == places[step, 1] for step in range(steps))
    # Of 4 possible sequences two ranks draw the same one time in four: binomial (n = 40, p = 1/4), five deviations.
    assert agree <= 10 + 5 * (40 * 0.25 * 0.75) ** 0.5


def test_until_must_be_an_integer() -> None:
    with pytest.raises(TypeError, match=r"until must be an int, got 5.0 \(float\)"):
        batches(build(3), until=5.0)  # type: ignore[arg-type]


def test_there_is_no_batch_after_the_last() -> None:
    one = batches(build(9))
    for step in (3, -1):
        with pytest.raises(IndexError, match=r"step must be in \[0, 3\)"):
            _ = one[step]
