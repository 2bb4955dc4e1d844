"""The PinnerFormer example end to end on a tiny simulated world."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import tyro

import recblocks
from examples.pinnerformer import __main__ as command
from examples.pinnerformer import baselines, checkpoint, evaluate, infer
from examples.pinnerformer.data import DataOptions, Dataset, load
from examples.pinnerformer.infer import Histories, embed_items, embed_users
from examples.pinnerformer.model import ModelOptions, build_model
from examples.pinnerformer.train import TrainOptions, train

SIZES = ["--dim", "40", "--hidden-dim", "40", "--num-heads", "2", "--num-layers", "1", "--max-len", "24"]
TINY = ["--data", "uniform", "--world-users", "80", *SIZES, "--steps", "4", "--num-random", "32", "--max-labels", "8"]
METHODS = [
    "PinnerFormer", "SASRec, softmax", "SASRec, BCE", "popularity, 28 days", "own most recent", "own most frequent",
    "own frequency + popularity", "PinnerSage 5, oracle", "PinnerSage 5, round robin", "PinnerSage 20, oracle",
    "PinnerSage 20, round robin",
]  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load(DataOptions(data="uniform", world_users=80))


@pytest.fixture(scope="module")
def sizes() -> ModelOptions:
    return ModelOptions(dim=40, hidden_dim=40, num_layers=1, num_heads=2, max_len=24, item_hidden_dim=80)


OPTIONS = TrainOptions(steps=6, num_random=32, max_labels=8)


def test_the_command_trains_judges_and_reports(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(tyro.cli(command.Options, args=[*TINY, "--protocols", "--out", str(tmp_path)]))
    page = (tmp_path / "report.html").read_text()
    for method in METHODS:
        assert f"<td>{method}</td>" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page must load nothing"
    assert "://" not in page
    assert page.count("data:image/png;base64,") == 4
    assert "PinnerSage 20, oracle" in capsys.readouterr().out.replace("\n", " ")
    assert "daily minus once" in page
    assert "realtime minus daily" in page
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "pinnerformer.pt",
        "sasrec-bce.pt",
        "sasrec-softmax.pt",
    ]


def test_inference_writes_what_the_model_answers(data: Dataset, sizes: ModelOptions, tmp_path: pathlib.Path) -> None:
    trained = train(data, sizes, dataclasses.replace(OPTIONS, steps=2), path=tmp_path / "model.pt").model
    time = data.cut + 7 * data.day
    where = ["--checkpoint", str(tmp_path / "model.pt"), "--out", str(tmp_path), "--time", str(time)]
    infer.main(tyro.cli(infer.InferOptions, args=["--data", "uniform", "--world-users", "80", *where]))
    users, items = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("users", "items"))
    torch.testing.assert_close(torch.tensor(items["embedding"].to_pylist()), embed_items(trained, data.corpus))
    assert items["item"].to_pylist() == data.items[data.corpus].tolist()
    written = dict(zip(users["user"].to_pylist(), users["embedding"].to_pylist(), strict=True))
    whole = recblocks.simulate(dataclasses.replace(recblocks.UNIFORM, num_users=80), seed=0).actions
    assert set(written) == set(whole["user"][whole["time"] <= time].tolist())
    assert bool(((whole["time"] > data.cut) & (whole["time"] <= time)).any())
    with pytest.raises(ValueError, match="time must be at least"):
        infer.main(infer.InferOptions(DataOptions(data="uniform", world_users=80), tmp_path / "model.pt", time=1))
    for other in (
        DataOptions(data="uniform", world_users=80, world_seed=1),
        DataOptions(data="markov", world_users=80),
    ):
        with pytest.raises(ValueError, match=r"model\.pt was trained on .*'uniform'.*, got"):
            infer.load_model(tmp_path / "model.pt", load(other))
        with pytest.raises(ValueError, match="was trained with"):
            train(load(other), sizes, OPTIONS, path=tmp_path / "model.pt", resume=True)
    rows = torch.arange(len(data.judged))
    expected = embed_users(
        trained, Histories(data.judged), rows, torch.full_like(rows, time), max_len=sizes.max_len, batch_size=1
    )
    for user, embedded in zip(data.judged.users.tolist(), expected, strict=True):
        # the batch is another one: float32 sums in another order
        torch.testing.assert_close(torch.tensor(written.get(user, [0.0] * sizes.dim)), embedded, atol=1e-5, rtol=1e-4)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


class Killed(Exception):
    pass


def kill_after(step: int) -> Any:
    def on_step(done: int, _: float) -> None:
        if done == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("killed_after", [3, 4, 5])
def test_resuming_equals_never_having_stopped(
    tmp_path: pathlib.Path, data: Dataset, sizes: ModelOptions, killed_after: int
) -> None:
    whole = train(data, sizes, OPTIONS, path=tmp_path / "whole.pt", save_every=2)
    with pytest.raises(Killed):
        train(data, sizes, OPTIONS, path=tmp_path / "parts.pt", save_every=2, on_step=kill_after(killed_after))
    torch.manual_seed(99)
    resumed = train(data, sizes, OPTIONS, path=tmp_path / "parts.pt", save_every=2, resume=True)
    assert resumed.loss == whole.loss
    assert resumed.temperature == whole.temperature
    assert same(checkpoint.load(tmp_path / "parts.pt"), checkpoint.load(tmp_path / "whole.pt"))


def test_a_half_written_checkpoint_is_never_resumed_from(
    tmp_path: pathlib.Path, data: Dataset, sizes: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(data, sizes, OPTIONS)
    path, real = tmp_path / "model.pt", torch.save
    writes = []

    def dies_in_the_second(state: Any, file: Any) -> None:
        writes.append(state["step"])
        if len(writes) == 2:
            file.write(b"half")
            raise Killed
        real(state, file)

    monkeypatch.setattr(torch, "save", dies_in_the_second)
    with pytest.raises(Killed):
        train(data, sizes, OPTIONS, path=path, save_every=2)
    assert checkpoint.load(path)["step"] == 2
    monkeypatch.setattr(torch, "save", real)
    resumed = train(data, sizes, OPTIONS, path=path, save_every=2, resume=True)
    assert resumed.loss == whole.loss
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_a_damaged_checkpoint_and_one_of_other_options_are_refused(
    tmp_path: pathlib.Path, data: Dataset, sizes: ModelOptions
) -> None:
    path = tmp_path / "model.pt"
    short = dataclasses.replace(OPTIONS, steps=2)
    train(data, sizes, short, path=path)
    with pytest.raises(ValueError, match="was trained with"):
        train(data, sizes, dataclasses.replace(short, seed=1), path=path, resume=True)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no whole checkpoint"):
            train(data, sizes, short, path=path, resume=True)


def test_the_content_start_passes_item_content_through(data: Dataset, sizes: ModelOptions) -> None:
    model = build_model(data, sizes)
    width = data.identity_dim
    items = model.items(data.content)
    torch.testing.assert_close(items[:, :width], data.content)  # unit vectors already; float32 rounding alone
    assert not items[:, width:].any()


def test_the_content_start_takes_a_user_for_the_mean_of_their_items(data: Dataset, sizes: ModelOptions) -> None:
    model, histories = build_model(data, sizes), Histories(data.judged)
    rows = torch.arange(len(data.judged))
    newest = histories.newest(rows, torch.full_like(rows, data.cut))
    users = embed_users(model, histories, rows, torch.full_like(rows, data.cut), max_len=sizes.max_len)
    for row in rows.tolist():
        items = data.judged.columns["row"][newest[row] : data.judged.ends[row]][: sizes.max_len]
        if len(items) > 5:
            blend = torch.zeros(sizes.hidden_dim)
            blend[: data.identity_dim] = 10 * data.content[items].mean(0) + data.content[items[0]]
            blend, user = (blend - blend.mean())[: data.identity_dim - 2], users[row, : data.identity_dim - 2]
            # not 1: the first layer norm has scaled what is averaged, and the learned positions add their 0.02
            assert torch.cosine_similarity(blend, user, dim=0) > 0.97


def test_repeats_are_counted_by_user(data: Dataset) -> None:
    windows = evaluate.windows(data)
    repeats = []
    for user, place in zip(*(ids.tolist() for ids in windows[0].positives), strict=True):
        mine = slice(int(data.judged.starts[user]), int(data.judged.ends[user]))
        rows, times = (data.judged.columns[name][mine].tolist() for name in ("row", "time"))
        earlier = {row for row, time in zip(rows, times, strict=True) if time <= windows[0].start}
        repeats.append(int(data.corpus[place]) in earlier)
    assert 0 < sum(repeats) < len(repeats)
    assert evaluate.repeat_share(data, windows) == sum(repeats) / len(repeats)


def test_histories_find_the_newest_action_of_any_moment(data: Dataset) -> None:
    histories, time = Histories(data.judged), data.judged.columns["time"]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(data.judged), (200,), generator=generator)
    exact = time[data.judged.starts[rows]]
    low, high = int(time.min()) - 5, int(time.max()) + 5
    for cuts in (torch.randint(low, high, (200,), generator=generator), exact, exact - 1, torch.full((200,), low)):
        found = histories.newest(rows, cuts)
        for row, cut, at in zip(rows.tolist(), cuts.tolist(), found.tolist(), strict=True):
            start, end = int(data.judged.starts[row]), int(data.judged.ends[row])
            assert at == next((index for index in range(start, end) if time[index] <= cut), end)


def tiny(judged: recblocks.Timelines) -> Dataset:
    content = torch.eye(4)
    return Dataset(
        name="tiny", options={}, train=judged, judged=judged, content=content, identity_dim=4, items=torch.arange(4),
        topics=torch.arange(4), corpus=torch.tensor([0, 1, 2]), positive=lambda action: action["row"] >= 0,
        num_action_types=1, num_surfaces=1, cut=1000 * 86400, num_windows=1,
    )  # fmt: skip


def test_baselines_score_a_worked_example() -> None:
    day = 86400
    times = torch.tensor([910, 1000, 1000, 990, 1001]) * day
    items = torch.tensor([0, 1, 3, 0, 2])
    timelines = recblocks.Timelines.from_arrays(
        user=torch.zeros(5, dtype=torch.int64), time=times, item=items, row=items, unit="s"
    )
    data = tiny(timelines)
    window = evaluate.Window(data.cut, (torch.tensor([0]), torch.tensor([0])), 0)
    # Item 0 twice, 90 and 10 days ago; item 1 today; item 2 is bought tomorrow, item 3 is not in the corpus.
    frequent = baselines.own_most_frequent(data)(window)[0]
    torch.testing.assert_close(
        frequent, torch.tensor([0.5 + 0.5 ** (10 / 90), 1.0, 0.0]).double(), atol=1e-5, rtol=0
    )  # ties are broken by less than 1e-6 a place
    recent = baselines.own_most_recent(data)(window)[0]
    bought_last = torch.tensor([1 / 3, 1.0, 0.0])  # 1 / place; items 1 and 3 share a time and stand as they came
    torch.testing.assert_close(recent, bought_last)
    assert baselines.popularity(data)(window)[0].tolist() == [1.0, 1.0, 0.0]
    assert [(user.tolist(), item.tolist()) for user, item in [evaluate.windows(data)[0].positives]] == [([0], [2])]


@pytest.mark.slow
def test_two_ranks_under_torchrun(tmp_path: pathlib.Path) -> None:
    root = pathlib.Path(__file__).parents[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call = [*launch, "-m", "examples.pinnerformer", *TINY, "--users-per-batch", "4", "--out", str(tmp_path)]
    done = subprocess.run(
        call,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "<td>own most frequent</td>" in (tmp_path / "report.html").read_text()
    loss = checkpoint.load(tmp_path / "pinnerformer.pt")["loss"]
    assert len(loss) == 4
