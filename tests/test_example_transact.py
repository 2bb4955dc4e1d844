"""The TransAct example end to end on a tiny simulated feed, and the leaks that its data could have."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
import torch
import tyro
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

import recblocks
from examples.transact import __main__ as command
from examples.transact import checkpoint, claims, journey, world
from examples.transact.data import (
    Bags,
    Candidates,
    RankingData,
    Requests,
    count_earlier,
    hand_made_counts,
    newest_before,
    text_ids,
)
from examples.transact.evaluate import Jury
from examples.transact.model import (
    GlobalBatchNorm,
    Inputs,
    ModelOptions,
    Ranker,
    Sequence,
    lookup_of,
    start_from_matches,
)
from examples.transact.train import TrainOptions, corrected, predict, scoring, start_from_rates, train
from recblocks import FusedEmbeddingLookup, Timelines

TINY = ["--data", "simulator", "--world-users", "60", "--epochs", "1", "--length", "8", "--num-slots", "3"]
READ = ("row", "action_type", "time")
SMALL = ModelOptions(length=8, num_slots=3, type_dim=4, mlp=(8,))
WITH_IDS = dataclasses.replace(SMALL, raw_ids=4, raw_id_capacity=5000)


@pytest.fixture(scope="module")
def data() -> RankingData:
    return world.load(world.WorldOptions(world_users=60))


def test_the_command_trains_judges_and_reports(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(tyro.cli(command.Options, args=[*TINY, "--models", "transact", "none", "--out", str(tmp_path)]))
    printed = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for name in ("transact", "none", "random", "popularity (save)"):
        assert f"<td>{name}</td>" in page
        assert name in printed
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page must load nothing"
    scores = pq.read_table(tmp_path / "scores.parquet")
    assert {"user", "request", "label_hide", "transact_save", "none_hide"} <= set(scores.column_names)
    probability = torch.tensor(scores["transact_save"].to_pylist())
    assert bool(((probability >= 0) & (probability <= 1)).all())


TIMES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=12)


@given(TIMES, st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 11), st.integers(0, 2)), min_size=1, max_size=6))
def test_what_is_known_is_strictly_earlier(
    actions: list[tuple[int, int, int]], asked: list[tuple[int, int, int]]
) -> None:
    user, time, value = (torch.tensor(column) for column in zip(*actions, strict=True))
    histories = Timelines.from_arrays(user=user, time=time, item=value, unit="s")
    asked = [one for one in asked if one[0] in user.tolist()]
    if not asked:
        return
    rows = histories.rows_of(torch.tensor([one[0] for one in asked]))
    times, wanted = torch.tensor([one[1] for one in asked]), torch.tensor([one[2] for one in asked])
    newest = newest_before(histories, rows, times)
    values = histories.columns["item"]
    ever = count_earlier(histories, values, rows, wanted, newest)
    lately = count_earlier(histories, values, rows, wanted, newest, length=2)
    for place, (who, now, what) in enumerate(asked):
        earlier = sorted((-at for owner, at, _ in actions if owner == who and at < now))
        start, end = int(newest[place]), int(histories.ends[rows[place]])
        known = histories.columns["time"][start:end].tolist()
        assert [-at for at in known] == earlier
        assert int(ever[place]) == sum(owner == who and at < now and kind == what for owner, at, kind in actions)
        assert int(lately[place]) == sum(kind == what for kind in values[start:end][:2].tolist())


def with_other_future(data: RankingData, time: int) -> RankingData:
    """The same data, but for everything that happened at or after a time."""
    columns = data.histories.columns
    later = columns["time"] >= time
    other = {name: torch.where(later, columns[name].flip(0), columns[name]) for name in ("row", "action_type")}
    return dataclasses.replace(data, histories=data.histories.with_columns(**other))


def test_nothing_that_happens_from_the_request_on_reaches_its_features(data: RankingData) -> None:
    cut = int(data.requests.time.median())
    request = data.candidates.request
    rows = torch.nonzero(data.requests.time[request] <= cut).squeeze(1)
    other = with_other_future(data, cut)
    assert not torch.equal(data.histories.columns["row"], other.histories.columns["row"])
    for one, two in zip(
        *(tree_leaves(Inputs(each, WITH_IDS, "transact_counts")(rows)) for each in (data, other)), strict=True
    ):
        assert torch.equal(one, two)
    # The check can fail: let a request count its own outcome, as a sequence that is not frozen does.
    late = dataclasses.replace(data.requests, newest=(data.requests.newest - 1).clamp(min=0))
    leaking = dataclasses.replace(data, requests=late), dataclasses.replace(other, requests=late)
    seen = [Inputs(each, SMALL, "transact_counts") for each in leaking]
    assert not torch.equal(seen[0].numeric, seen[1].numeric)
    with pytest.raises(ValueError, match="actions must be before their request, got"):
        seen[0](rows)


@pytest.mark.parametrize("sequence", ["bst", "bst_positive"])
def test_the_newest_actions_are_read_of_the_types_wanted(data: RankingData, sequence: Sequence) -> None:
    batch = Inputs(data, SMALL, sequence)(torch.arange(0, len(data.candidates.item), 101))
    histories, wanted = data.histories, data.positive_types if sequence == "bst_positive" else range(4)
    some = 0
    for place, request in enumerate(torch.unique(data.candidates.request[::101]).tolist()):
        start, end = int(data.requests.newest[request]), int(histories.ends[data.requests.user[request]])
        actions = [
            (int(item), int(kind), int(time))
            for item, kind, time in zip(*(histories.columns[name][start:end] for name in READ), strict=True)
            if int(kind) in wanted
        ]
        known = batch.valid[place]
        read = [column[place][known].tolist() for column in (batch.items, batch.types, batch.times)]
        assert list(zip(*read, strict=True)) == actions[:8]
        assert known.tolist() == sorted(known.tolist(), reverse=True)
        some += len(actions) > 8
    assert some


def test_histories_without_any_action_that_could_be_read_are_named(data: RankingData) -> None:
    hides = data.histories.with_columns(action_type=torch.full_like(data.histories.columns["action_type"], 3))
    with pytest.raises(ValueError, match=r"histories must hold actions of types \(0, 1, 2\), got none"):
        Inputs(dataclasses.replace(data, histories=hides), SMALL, "bst_positive")


def test_labels_reach_no_feature(data: RankingData) -> None:
    flipped = dataclasses.replace(data.candidates, labels=1 - data.candidates.labels)
    rows = torch.arange(200)
    other = dataclasses.replace(data, candidates=flipped)
    for one, two in zip(
        *(tree_leaves(Inputs(each, WITH_IDS, "transact_counts")(rows)) for each in (data, other)), strict=True
    ):
        assert torch.equal(one, two)


def test_parts_do_not_overlap_in_time(data: RankingData) -> None:
    days = {name: data.requests.day[mask] for name, mask in data.parts.items()}
    assert int(days["train"].max()) < int(days["choose"].min())
    assert int(days["choose"].max()) < int(days["report"].min())


@pytest.mark.parametrize("sequence", get_args(Sequence))
def test_every_way_to_read_a_sequence_ignores_padding_and_answers_without_any_action(
    data: RankingData, sequence: Sequence
) -> None:
    inputs = Inputs(data, SMALL, sequence)
    torch.manual_seed(0)
    ranker = Ranker(data, inputs, sequence, SMALL).eval()
    batch = inputs(torch.arange(0, 400, 7))
    some = batch.valid & (torch.rand(batch.valid.shape, generator=torch.Generator().manual_seed(1)) < 0.6)
    some[:5] = False
    with torch.no_grad():
        logits = ranker(batch._replace(valid=some))
        garbage = batch._replace(
            valid=some,
            items=torch.where(some, batch.items, 3),
            types=torch.where(some, batch.types, 0),
            times=torch.where(some, batch.times, 0),
        )
        assert logits.isfinite().all()
        assert torch.equal(logits, ranker(garbage))
        alone = ranker(tree_map(lambda part: part[:1], garbage))
    # a product of one row sums in another order than one of many: float32 rounding of sums of a few hundred numbers
    torch.testing.assert_close(alone, logits[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sequence", ["transact", "transact_untyped", "transact_counts"])
def test_a_request_whose_every_action_is_masked_is_trained_on_as_one_without_any(
    data: RankingData, sequence: Sequence
) -> None:
    options = dataclasses.replace(SMALL, window_hours=24.0 * 365 * 1000)  # T is almost surely older
    inputs = Inputs(data, options, sequence)
    torch.manual_seed(0)
    ranker = Ranker(data, inputs, sequence, options)
    batch = inputs(torch.arange(0, 400, 7))
    logits = [ranker(each) for each in (batch, batch._replace(valid=torch.zeros_like(batch.valid)))]
    assert bool(batch.valid.any())
    assert torch.equal(*logits)
    logits[0].square().sum().backward()
    for parameter in ranker.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("earlier", [0, 1])
def test_an_action_that_is_not_before_its_request_is_an_error(data: RankingData, earlier: int) -> None:
    newest = data.requests.newest
    some = newest < data.histories.ends[data.requests.user]
    time = torch.where(
        some, data.histories.columns["time"][newest.clamp(max=len(data.histories.columns["time"]) - 1)], 0
    )
    late = dataclasses.replace(data.requests, time=torch.where(some, time - earlier, data.requests.time))
    inputs = Inputs(dataclasses.replace(data, requests=late), SMALL, "transact")
    with pytest.raises(ValueError, match="actions must be before their request, got"):
        inputs(torch.arange(400))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: {"heads": data.heads[::-1]}, r"heads must be the labels' names in their order, .* got \('hide'"),
        (
            lambda data: {"candidates": with_labels(data, data.candidates.labels[:, :3])},
            r"labels must have shape \(\d+, 4\), a column for each of save, .* got",
        ),
        (lambda data: {"candidates": with_items(data, -1)}, r"item must be in \[0, 5000\), got -1 to"),
        (lambda data: {"vectors": data.vectors[:40]}, r"item must be in \[0, 40\), got 0 to"),
        (lambda data: {"candidates": with_labels(data, data.candidates.labels[1:])}, "labels must have shape"),
        (lambda data: {"candidates": with_labels(data, -data.candidates.labels)}, r"labels must be 0 or 1, got -1\.0"),
        (lambda data: {"candidates": with_labels(data, data.candidates.labels / 0)}, "labels must be 0 or 1, got nan"),
        (lambda data: {"utilities": data.utilities[:3]}, "utilities and primary must be of .*, got"),
        (
            lambda data: {"parts": {**data.parts, "choose": data.parts["train"]}},
            "a request must be in at most one of the parts train, choose, report, got one in several",
        ),
        (lambda _: {"primary": "buy"}, "utilities and primary must be of .* and buy"),
        (lambda data: {"num_action_types": data.num_action_types - 1}, r"action_type must be in \[0, 3\), got 0 to 3"),
        (lambda data: {"requests": with_user(data, -1)}, r"user must be in \[0, 60\), got -1 to 59"),
        (lambda data: {"requests": with_user(data, len(data.histories))}, r"user must be in \[0, 60\), got 0 to 60"),
    ],
)
def test_bad_data_are_named(data: RankingData, change: Callable[[RankingData], dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(data, **change(data))


def with_labels(data: RankingData, labels: torch.Tensor) -> Candidates:
    return dataclasses.replace(data.candidates, labels=labels)


def with_items(data: RankingData, item: int) -> Candidates:
    items = data.candidates.item.clone()
    items[3] = item
    return dataclasses.replace(data.candidates, item=items)


def with_user(data: RankingData, user: int) -> Requests:
    users = data.requests.user.clone()
    users[5] = user
    return dataclasses.replace(data.requests, user=users)


@pytest.mark.parametrize("sequence", ["transact", "transact_untyped"])
def test_a_sequence_encoded_once_for_all_candidates_scores_as_one_encoded_for_each(
    data: RankingData, sequence: Sequence
) -> None:
    options = dataclasses.replace(SMALL, window_hours=0.0)
    inputs = Inputs(data, options, sequence)
    torch.manual_seed(0)
    ranker = Ranker(data, inputs, sequence, options).eval()
    batch = inputs(torch.randperm(300, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        once = ranker(batch)
        assert ranker.sequence is not None
        candidate = ranker.vectors[batch.candidate]
        one = ranker._read(batch, ranker.vectors[batch.items], candidate, None, None)
        ranker.training = True  # the path of training, while batch norm and dropout stay as they serve
        each = ranker._read(batch, ranker.vectors[batch.items], candidate, None, None)
        assert not torch.equal(one, each), "both took the same path"
        torch.testing.assert_close(ranker(batch), once, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, each, rtol=1e-4, atol=1e-5)


def test_scores_stand_in_the_order_of_the_rows_asked_for(data: RankingData) -> None:
    trained = train(data, "transact", SMALL, TrainOptions(epochs=1, batch_size=512))
    rows = torch.randperm(500, generator=torch.Generator().manual_seed(3))
    whole = predict(trained, torch.arange(500), batch_size=64)
    torch.testing.assert_close(predict(trained, rows), whole[rows], rtol=1e-4, atol=1e-6)


def test_scoring_can_be_stopped_after_the_last_step_too(data: RankingData) -> None:
    steps: list[int] = []

    def stop(step: int, steps_in_all: int, _: float) -> None:
        if step == steps_in_all and steps[-1:] == [step]:
            raise KeyboardInterrupt
        steps.append(step)

    score = scoring(data, "none", SMALL, TrainOptions(batch_size=8192), torch.arange(500))
    with pytest.raises(KeyboardInterrupt):
        score(stop)
    assert steps == list(range(1, len(steps) + 1))


def test_an_untrained_transformer_finds_the_candidate_among_the_actions() -> None:
    torch.manual_seed(0)
    transformer = recblocks.ActionTransformer(item_dim=32, num_action_types=3, type_dim=4)
    start_from_matches(transformer, 32)
    items, others = torch.randn(64, 20, 32), torch.randn(64, 32)
    layer = transformer.layers[0]
    shares = []
    for candidate in (items[:, 7], others):
        tokens = torch.cat([torch.zeros(64, 20, 4), items, candidate[:, None].expand(-1, 20, -1)], 2)
        queries, keys, _ = layer.heads(tokens)
        shares.append((queries @ keys.mT / layer.head_dim**0.5).softmax(-1)[:, 0].mean(1).detach())
    # score 1.96 · 32 / √68 = 7.6 against a spread of 1.96 · √32 / √68 = 1.3 among the other 19: a share of about .9
    assert float(shares[0][:, 7].median()) > 0.9
    assert float(shares[1].amax(1).median()) < 0.5


def test_heads_begin_at_the_rates_that_training_sees(data: RankingData) -> None:
    ranker = Ranker(data, Inputs(data, SMALL, "none"), "none", SMALL)
    labels = torch.tensor([[1.0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]])
    weights = torch.tensor([[1.0, 1, 1, 1, 1], [0.5] * 5, [0.5] * 5, [1, 4, 1, 1, 1]])
    start_from_rates(ranker, labels, weights)
    expected = torch.tensor([1 / 3, 4 / 6, 1e-6, 1e-6, 2 / 3])
    torch.testing.assert_close(ranker.mlp[-1].bias.sigmoid(), expected)


@pytest.mark.parametrize("share", [1.0, 0.25, 0.01])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (11.0, 2.0)])
def test_probabilities_are_corrected_for_the_negatives_left_out_and_own_weights(
    share: float, weights: tuple[float, float]
) -> None:
    # Of 1,000 rows 100 have an action: 30 a save, 20 of these and 70 others a click. A share of the other 900 is kept,
    # and in a head the rows with its action weigh w.
    kept = 100 + 900 * share
    seen = [weight * count / (weight * count + kept - count) for weight, count in zip(weights, (30, 90), strict=True)]
    sampled = torch.tensor([[*seen, 100 / kept]], dtype=torch.float64)
    expected = torch.tensor([[0.03, 0.09]], dtype=torch.float64)
    torch.testing.assert_close(corrected(sampled, share, torch.tensor(weights)), expected)


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_under_the_matrix_fewer_saves_are_predicted_where_hides_are_whatever_share_of_negatives_is_read(
    share: float,
) -> None:
    # Nothing tells the rows apart: of 4,000 a tenth each are saved and hidden. The matrix weighs a hide 101 times
    # in the save head: .1 / (.1 + 101 · .1 + .8) = .0091, and a save six times in the hide head: .1 / (.1 + .6 + .8).
    labels = torch.zeros(4_000, 4)
    labels[::10, 0] = labels[1::10, 3] = 1
    trained = train(
        alike(labels),
        "none",
        SMALL,
        TrainOptions(epochs=60, batch_size=512, learning_rate=0.02, negative_share=share, label_weights="matrix"),
    )
    assert trained.own_weights.tolist() == [101, 101, 101, 11]
    found = predict(trained, torch.arange(4_000)).mean(0)
    assert float(found[0]) == pytest.approx(0.1 / 11, rel=0.1)
    assert float(found[3]) == pytest.approx(0.1 / 1.5, rel=0.1)


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_under_the_matrix_heads_begin_at_the_rates_that_it_weighs(share: float) -> None:
    labels = torch.zeros(4_000, 4)
    labels[::10, 0] = labels[1::10, 3] = 1
    options = TrainOptions(epochs=1, learning_rate=0, negative_share=share, label_weights="matrix")
    begun = train(alike(labels), "none", SMALL, options).ranker.mlp[-1].bias.sigmoid()
    # Per ten rows: a save and a hide weigh 101 each in the save head; in the hide head 6 and 11; any action 1.
    expected = torch.tensor([101 / (101 + 101 + 8), 1e-6, 1e-6, 11 / (6 + 11 + 8), 2 / 10])
    torch.testing.assert_close(begun, expected)


def alike(labels: torch.Tensor) -> RankingData:
    """A tenth as many requests as candidates, of which nothing but their labels differs; all of them are trained on."""
    num, one = len(labels) // 10, torch.zeros(len(labels), dtype=torch.int64)
    histories = Timelines.from_arrays(user=one[:1], time=one[:1], item=one[:1], action_type=one[:1], unit="s")
    data = world.load(world.WorldOptions(world_users=20))
    return dataclasses.replace(
        data,
        histories=histories.with_columns(row=histories.columns["item"]),
        requests=Requests(
            user=one[:num], newest=one[:num], day=one[:num], time=one[:num] + 9, categorical={"hour": one[:num]}
        ),
        candidates=Candidates(
            request=torch.arange(num).repeat_interleave(10),
            item=one,
            labels=labels,
            label_names=data.heads,
            categorical={},
            numeric=torch.zeros(len(labels), 1),
        ),
        parts={"train": torch.ones(num, dtype=torch.bool)},
    )


def test_training_takes_what_suits_the_data_unless_it_is_told(data: RankingData) -> None:
    data = dataclasses.replace(data, epochs=1, batch_size=1000, negative_share=1.0, window_hours=2.0)
    steps = math.ceil(len(data.rows_of("train")) / 1000)
    trained = train(data, "transact", SMALL, TrainOptions())
    assert len(trained.loss) == steps
    assert trained.negative_share == 1
    assert trained.ranker.window is not None
    assert trained.ranker.window.max_window == 2 * 3_600_000
    told = train(data, "none", SMALL, TrainOptions(epochs=2, batch_size=2000, negative_share=0.5))
    assert told.negative_share == 0.5
    chance = torch.where(data.candidates.labels[data.rows_of("train")].any(1), 1.0, 0.5)
    assert len(told.loss) == 2 * math.ceil(float(chance.sum()) / 2000)
    other = dataclasses.replace(SMALL, window_hours=0.0)
    assert Ranker(data, Inputs(data, other, "transact"), "transact", other).window is None


def test_a_training_of_no_epoch_is_refused(data: RankingData) -> None:
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        train(data, "none", SMALL, TrainOptions(epochs=0))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_of_negatives_that_is_none_is_named(data: RankingData, share: float) -> None:
    with pytest.raises(ValueError, match=r"negative_share must be above 0 and at most 1, got"):
        train(data, "none", SMALL, TrainOptions(negative_share=share))


def test_training_repeats_itself(data: RankingData) -> None:
    options = TrainOptions(epochs=3, batch_size=256)
    one, two = (train(data, "transact", SMALL, options) for _ in range(2))
    assert one.loss == two.loss
    epoch = len(one.loss) // 3
    assert sum(one.loss[-epoch:]) < sum(one.loss[:epoch])
    rows = data.rows_of("report")[:50]
    assert torch.equal(predict(one, rows), predict(two, rows))


@pytest.mark.parametrize("rows", [range(0, 300, 7), [5]])
def test_raw_ids_are_those_of_what_the_batch_shows(data: RankingData, rows: list[int]) -> None:
    batch = Inputs(data, WITH_IDS, "transact")(torch.tensor(list(rows)))
    candidates = data.candidates
    items = [int(candidates.item[row]) for row in rows]
    requests = sorted({int(candidates.request[row]) for row in rows})
    assert batch.ids["item"].tolist() == [int(data.items[item]) for item in items]
    assert batch.ids["user"].tolist() == [int(data.histories.users[data.requests.user[one]]) for one in requests]
    seen = [
        int(data.items[item]) for item, valid in zip(batch.items.flatten(), batch.valid.flatten(), strict=True) if valid
    ]
    assert batch.ids["seen"].tolist() == seen
    ids, offsets = batch.ids["tag"]
    assert ids.tolist() == [int(data.topics[item]) for item in items]
    assert offsets.tolist() == list(range(len(items) + 1))


def test_bags_of_some_items_are_those_of_a_loop() -> None:
    bags = Bags.where(
        torch.tensor([[True, False], [False, False], [True, True]]), torch.tensor([[-1, 2], [3, 4], [5, 6]])
    )
    assert (bags.ids.tolist(), bags.offsets.tolist()) == ([-1, 5, 6], [0, 1, 1, 3])
    got = bags.of(torch.tensor([2, 1, 0, 2]))
    assert (got.ids.tolist(), got.offsets.tolist()) == ([5, 6, -1, 5, 6], [0, 2, 2, 3, 5])
    none = bags.of(torch.tensor([], dtype=torch.int64))
    assert (none.ids.tolist(), none.offsets.tolist()) == ([], [0])


def test_unknown_text_is_no_id() -> None:
    bags = journey._text_bags({"a": ["x", "", "y"], "b": ["x", "", ""]}, "a", "b")
    assert bags.offsets.tolist() == [0, 2, 2, 3]
    assert torch.equal(bags.ids, text_ids(["a: x", "b: x", "a: y"]))


def test_text_is_the_same_id_everywhere() -> None:
    ids = text_ids(["brand: a", "", "brand: a", "brand: b"])
    # the first eight bytes of BLAKE2b with a digest of eight bytes, as int64 in little-endian order
    expected = int.from_bytes(hashlib.blake2b(b"brand: a", digest_size=8).digest(), "little", signed=True)
    assert ids[0] == ids[2] == expected
    assert len(set(ids.tolist())) == 3


def test_vectors_of_raw_ids_are_trained_and_only_those_that_training_saw(data: RankingData) -> None:
    trained = train(data, "transact", WITH_IDS, TrainOptions(epochs=1, batch_size=512))
    lookup = trained.ranker.lookup
    assert isinstance(lookup, FusedEmbeddingLookup)
    rows = data.rows_of("train")
    seen = set(data.histories.users[data.requests.user[data.candidates.request[rows]]].tolist())
    part = lookup.layout.order.index("user")
    ids, where = lookup.table.entries()
    users = ids[(where >= lookup.table.begins[part]) & (where < lookup.table.begins[part + 1])]
    assert len(users) > 0
    assert set(users.tolist()) <= seen
    moment = lookup.get_buffer("moment_4")
    assert int((moment > 0).sum()) > 0.9 * sum(lookup.num_ids.values())
    # What no batch could have shown stays as it was drawn: zeros.
    assert int((lookup.weights["4"] != 0).any(1).sum()) == sum(lookup.num_ids.values()) + len(lookup.layout.features)


@pytest.mark.parametrize("options", [SMALL, WITH_IDS])
def test_a_training_that_stops_goes_on_from_its_checkpoint(
    data: RankingData, options: ModelOptions, tmp_path: pathlib.Path
) -> None:
    settings = TrainOptions(epochs=1, batch_size=512, checkpoint=tmp_path, checkpoint_every=4)

    def stop(step: int, *_: float) -> None:
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, "transact", options, settings, on_step=stop)
    assert [path.name for path in (tmp_path / "transact").iterdir()] == ["step-8"]
    done: list[int] = []
    trained = train(data, "transact", options, settings, on_step=lambda step, *_: done.append(step))
    whole = train(data, "transact", options, dataclasses.replace(settings, checkpoint=None))
    assert done[0] == 9
    assert trained.loss == whole.loss
    for name, tensor in whole.ranker.state_dict().items():
        assert torch.equal(trained.ranker.state_dict()[name], tensor), name
    wider = dataclasses.replace(options, type_dim=5)
    other = dataclasses.replace(data, vectors=data.vectors.flip(0))
    for of_data, of_model, of_training in (
        (data, options, dataclasses.replace(settings, seed=1)),
        (data, wider, settings),
        (other, options, settings),
    ):
        with pytest.raises(ValueError, match="checkpoint must be of"):
            train(of_data, "transact", of_model, of_training)


def test_a_training_with_dropout_goes_on_as_it_would_have(data: RankingData, tmp_path: pathlib.Path) -> None:
    options = dataclasses.replace(SMALL, dropout=0.3)
    settings = TrainOptions(epochs=1, batch_size=1024, checkpoint=tmp_path, checkpoint_every=3)

    def stop(step: int, *_: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train(data, "transact", options, settings, on_step=stop)
    again = train(data, "transact", options, settings)
    assert again.loss == train(data, "transact", options, dataclasses.replace(settings, checkpoint=None)).loss


def test_the_newest_checkpoint_is_read_and_an_older_one_stays_until_it_is_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 9, {"done": 9}, None)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 10, {"done": 10}, None)
    assert checkpoint.last(tmp_path) == tmp_path / "step-9"
    remove = shutil.rmtree
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path, **how: stop() if path.name == "step-9" else remove(path, **how))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 10, {"done": 10}, None)
    assert checkpoint.last(tmp_path) == tmp_path / "step-10"
    checkpoint.save(tmp_path, 11, {"done": 11}, None)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-11"]
    assert torch.load(tmp_path / "step-11" / "rest.pt") == {"done": 11}


def test_a_cadence_of_no_steps_is_named(data: RankingData) -> None:
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        train(data, "none", SMALL, TrainOptions(checkpoint_every=0))


def test_every_raw_id_is_looked_up_for_what_it_is_of(data: RankingData) -> None:
    inputs = Inputs(data, WITH_IDS, "transact")
    tables, features = lookup_of(data, WITH_IDS)
    lookup = FusedEmbeddingLookup(tables, features)
    ranker = Ranker(data, inputs, "transact", WITH_IDS, lookup).eval()
    batch = inputs(torch.arange(40))
    lookup.insert(batch.ids)
    with torch.no_grad():
        for weight in lookup.weights.values():
            weight.normal_()
        said = ranker(batch)
        ids, offsets = batch.ids["tag"]
        changed = {"user": batch.ids["user"] + 1, "item": batch.ids["item"] + 1, "seen": batch.ids["seen"] + 1}
        for name, other in {**changed, "tag": (ids + 1, offsets)}.items():
            assert not torch.equal(said, ranker(batch._replace(ids={**batch.ids, name: other}))), name
        # One request's user moves that request's candidates alone.
        user = batch.ids["user"].clone()
        user[0] += 1
        moved = (said != ranker(batch._replace(ids={**batch.ids, "user": user}))).any(1)
    assert torch.equal(moved, batch.request == 0)


@pytest.mark.parametrize("name", ["item", "tag"])
def test_raw_ids_that_do_not_fit_are_named(data: RankingData, name: str) -> None:
    offsets = torch.arange(len(data.items) + (1 if name == "item" else 2))
    with pytest.raises(ValueError, match="item_ids must be named other than user, item and seen, with"):
        dataclasses.replace(data, item_ids={name: Bags(torch.arange(len(data.items)), offsets)})


def test_tables_are_sharded_only_where_there_are_some(data: RankingData) -> None:
    with pytest.raises(ValueError, match="sharded must come with raw_ids above 0"):
        train(data, "none", SMALL, TrainOptions(sharded=True))


def test_batch_norm_without_ranks_is_torch_s() -> None:
    norm, torch_s = GlobalBatchNorm(3), torch.nn.BatchNorm1d(3)
    for _ in range(3):
        x = torch.randn(5, 3)
        assert torch.equal(norm(x), torch_s(x))
    assert all(torch.equal(one, two) for one, two in zip(norm.buffers(), torch_s.buffers(), strict=True))


def test_counts_are_those_of_a_loop(data: RankingData) -> None:
    counts = hand_made_counts(data, length=8)
    histories, candidates = data.histories, data.candidates
    for row in range(0, len(candidates.item), 997):
        request = int(candidates.request[row])
        start, end = int(data.requests.newest[request]), int(histories.ends[data.requests.user[request]])
        items = histories.columns["row"][start:end][:8].tolist()
        types = histories.columns["action_type"][start:end][:8].tolist()
        item = int(candidates.item[row])
        same = [int(data.topics[one]) == int(data.topics[item]) for one in items]
        expected = [items.count(item), sum(same)]
        for kind in range(data.num_action_types):
            expected.append(types.count(kind))
            expected.append(sum(which and each == kind for which, each in zip(same, types, strict=True)))
            expected.append(sum(one == item and each == kind for one, each in zip(items, types, strict=True)))
        torch.testing.assert_close(counts[row], torch.tensor(expected).float().log1p())


def test_a_user_who_never_acts_is_counted(data: RankingData) -> None:
    seen = recblocks.simulate(dataclasses.replace(recblocks.RESPONSIVE, num_users=60), seed=0)
    silent = ~torch.isin(seen.requests["user"], seen.actions["user"])
    assert data.notes[0].startswith(f"{int(silent.sum())} requests")
    assert len(data.requests.user) == int((~silent).sum())


def test_the_oracle_is_the_bound_of_every_head(data: RankingData) -> None:
    jury = Jury(data, "report")
    requests: dict[int, list[list[float]]] = {}
    for request, labels in zip(jury.request.tolist(), jury.labels.tolist(), strict=True):
        requests.setdefault(request, []).append(labels)
    most = [0.0] * 4
    for rows in requests.values():
        for head, utility in enumerate(data.utilities):
            of_head = sorted((row[head] for row in rows), reverse=utility >= 0)
            most[head] += sum(of_head[:3])
    assert jury.oracle().hits.sum(0).tolist() == most
    assert most[0] > 0


def test_claims_are_judged_on_every_seed(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--data", "indifferent", "--world-users", "40", "--seeds", "2", "--length", "4", "--num-slots", "2"]
    claims.main(tyro.cli(claims.Options, args=args))
    printed = capsys.readouterr().out
    for seed in range(2):
        assert f"the world indifferent, report, seed {seed}" in printed
    figures, _, verdicts = printed.partition("expected, and what came out")
    for name in ("TransAct, no window mask", "TransAct, no types", "TransAct, label matrix", "BST", "average"):
        assert figures.count(f"│ {name} ") == 2
    assert "verdict" in verdicts
    assert printed.count("HIT@3 of save: TransAct = BST: ") == 2
    assert figures.count("│ TransAct, label matrix, by positive heads ") == 2
    assert figures.count("HIT@3 of hide: TransAct, label matrix = TransAct, ranked by the positive heads: ") == 2


@pytest.mark.parametrize(
    ("expected", "bar", "intervals", "holds"),
    [
        ("more", 0.0, [(0.1, 0.2), (0.2, 0.4)], True),
        ("more", 0.25, [(0.1, 0.2), (0.2, 0.4)], False),  # mean 0.225
        ("more", 0.0, [(-0.1, 0.2), (0.2, 0.4)], False),
        ("less", 0.0, [(-0.3, -0.1), (-0.2, -0.1)], True),
        ("less", 0.0, [(-0.3, -0.1), (-0.2, 0.1)], False),
        ("same", 0.0, [(-0.3, 0.1), (-0.2, 0.1)], True),
        ("same", 0.0, [(-0.3, 0.1), (0.1, 0.2)], True),  # one of two beside 0 is no effect: mean 0.025
        ("same", 0.0, [(-0.4, 0.0), (-0.5, 0.12)], False),  # means of -0.2 and -0.19: half a width of 12.7 * 0.005
        ("same", 0.0, [(0.1, 0.2), (0.01, 0.02)], True),  # means of 0.15 and 0.015: trainings differ by more than 0
        ("within", 0.01, [(-0.1, 0.1), (-0.1, 0.09)], True),  # mean -0.0025
        ("within", 0.01, [(-0.1, 0.1), (-0.1, 0.04)], False),  # mean -0.015
        ("not less", 0.0, [(-0.3, 0.1), (0.1, 0.2)], True),
        ("not less", 0.0, [(-0.3, -0.1), (0.1, 0.2)], False),
    ],
)
def test_a_claim_comes_out_by_its_rule(
    expected: str, bar: float, intervals: list[tuple[float, float]], *, holds: bool
) -> None:
    claim = claims.Claim("one", "other", "AUC", "save", expected, bar)  # type: ignore[arg-type]
    found = [recblocks.Interval(mean=(low + high) / 2, low=low, high=high) for low, high in intervals]
    verdict = claims._row(claim, found, same_users=False)[-1]
    assert verdict.startswith(("comes out", "no difference told from 0:")) is holds


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.1, 0.2), (0.1, 0.2)], "one has more"),
        ([(-0.2, -0.1), (-0.2, -0.1)], "other has more"),
        ([(-0.1, 0.2), (0.1, 0.2)], "not told apart"),
        ([(-0.2, -0.1), (0.1, 0.2)], "not told apart"),
    ],
)
def test_an_open_question_is_settled_only_if_every_seed_says_so(
    intervals: list[tuple[float, float]], verdict: str
) -> None:
    found = [recblocks.Interval(mean=(low + high) / 2, low=low, high=high) for low, high in intervals]
    assert claims._row(claims.Claim("one", "other", "AUC", "save", "open"), found, same_users=True)[-1] == verdict


def test_the_mean_of_the_seeds_has_the_interval_of_their_users_or_of_themselves() -> None:
    found = [recblocks.Interval(mean=0.2, low=0.1, high=0.3), recblocks.Interval(mean=0.4, low=0.1, high=0.7)]
    same, others = (claims._mean(found, same_users=each) for each in (True, False))
    assert same == pytest.approx((0.3, 0.1, 0.5))
    half = 12.7062 * 0.1  # Student's t of one degree of freedom, and a standard error of 0.1
    assert others == pytest.approx((0.3, 0.3 - half, 0.3 + half), rel=1e-5)
    assert claims._mean(found[:1], same_users=False) == pytest.approx(found[0])


def test_a_claim_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="AUC is of one head, whichever heads rank"):
        claims.Claim("one", "other", "AUC", "save", heads="positive")
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        claims.main(tyro.cli(claims.Options, args=["--data", "indifferent", "--seeds", "0"]))
