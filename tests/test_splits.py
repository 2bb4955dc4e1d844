"""Splits by time and by user."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recblocks import Timelines, split_by_time, split_by_user, user_shares
from recblocks.timelines._hashing import mix64

ACTIONS = st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 9)), max_size=20)
INT64 = st.integers(-(2**63), 2**63 - 1)


def build(actions: list[tuple[int, int]]) -> Timelines:
    table = torch.tensor(actions, dtype=torch.int64).reshape(-1, 2)
    return Timelines.from_arrays(user=table[:, 0], time=table[:, 1], item=torch.arange(len(actions)), unit="s")


def listed(timelines: Timelines) -> set[tuple[int, int, int]]:
    """(user, time, item) of every action."""
    bounds = [part.tolist() for part in (timelines.users, timelines.starts, timelines.ends)]
    return {
        (user, int(timelines.columns["time"][i]), int(timelines.columns["item"][i]))
        for user, start, end in zip(*bounds, strict=True)
        for i in range(start, end)
    }


@given(actions=ACTIONS, cut=st.integers(-1, 10))
def test_the_cut_belongs_to_the_past(actions: list[tuple[int, int]], cut: int) -> None:
    timelines = build(actions)
    past, future = split_by_time(timelines, cut)
    everything = listed(timelines)
    assert listed(past) == {action for action in everything if action[1] <= cut}
    assert listed(future) == {action for action in everything if action[1] > cut}
    assert torch.equal(past.users, timelines.users)
    assert torch.equal(future.users, timelines.users)
    assert past.columns["item"] is timelines.columns["item"]


@given(users=st.sets(INT64, max_size=20), extra=st.sets(INT64, max_size=5), salt=INT64, held_out=st.floats(0, 1))
def test_a_users_side_depends_on_nobody_else(users: set[int], extra: set[int], salt: int, held_out: float) -> None:
    sides = []
    for group in (users, users | extra):
        timelines = build([(user, 0) for user in group])
        stay, held = split_by_user(timelines, held_out=held_out, salt=salt)
        assert {*stay.users.tolist(), *held.users.tolist()} == group
        assert len(stay) + len(held) == len(group)
        sides.append(set(held.users.tolist()) & users)
    assert sides[0] == sides[1]


def test_the_hash_is_what_it_has_always_been() -> None:
    # splitmix64's first outputs from the states 0 and 1, as published
    words = torch.tensor([0, 1]).numpy().view("uint64")
    assert [hex(word) for word in mix64(words).tolist()] == ["0xe220a8397b1dcdaf", "0x910a2dec89025cc1"]
    users = [0, -1, 2**63 - 1, -(2**63)]
    assert user_shares(torch.tensor(users), salt=3).tolist() == [oracles.user_share(user, 3) for user in users]


def test_shares_are_even_and_salts_independent() -> None:
    users = torch.arange(20_000) * 1_000_003
    one, other = user_shares(users, salt=0), user_shares(users, salt=1)
    tenths = torch.stack([(one * 10).long(), (other * 10).long()])
    # A tenth's count is binomial (n = 20000, p = .1); five deviations, and likewise for both tenths at once (p = .01).
    for counts, chance in ((torch.bincount(tenths[0]), 0.1), (torch.bincount(tenths[0] * 10 + tenths[1]), 0.01)):
        expected = len(users) * chance
        assert counts.shape[0] == round(1 / chance)
        assert ((counts - expected).abs() <= 5 * (expected * (1 - chance)) ** 0.5).all()
    assert one.min() >= 0
    assert one.max() < 1


def test_more_held_out_holds_the_same_and_more() -> None:
    timelines = build([(user, 0) for user in range(200)])
    small, large = (split_by_user(timelines, held_out=share)[1].users for share in (0.2, 0.4))
    assert torch.isin(small, large).all()
    assert len(split_by_user(timelines, held_out=0.0)[1]) == 0
    assert len(split_by_user(timelines, held_out=1.0)[0]) == 0


def test_bad_input() -> None:
    timelines = build([(1, 1)])
    with pytest.raises(ValueError, match=r"held_out must be finite and at least 0 and at most 1, got 1.5"):
        split_by_user(timelines, held_out=1.5)
    with pytest.raises(TypeError, match="users must be int64"):
        user_shares(torch.tensor([1.0]))
    for bad in (1.0, True, None):
        with pytest.raises(TypeError, match="cut must be an int, got"):
            split_by_time(timelines, bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"salt must be an int, got 1\.5"):
        split_by_user(timelines, held_out=0.5, salt=1.5)  # type: ignore[arg-type]


def test_a_cut_and_a_salt_out_of_numpy() -> None:
    timelines = build([(user, user) for user in range(10)])
    assert split_by_time(timelines, np.int64(4))[0].num_actions == 5
    assert torch.equal(user_shares(timelines.users, salt=np.int64(-3)), user_shares(timelines.users, salt=-3))
