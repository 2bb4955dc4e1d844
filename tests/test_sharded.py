"""A lookup that torchrec shards over 1, 2 and 4 ranks is one fused lookup in one process."""

import importlib.util

import pytest
import sharded
import torch
from torch import multiprocessing

if importlib.util.find_spec("torchrec") is None:
    pytest.skip("torchrec is not installed; the README says how", allow_module_level=True)

# Sums over ranks in another order, float32: a few roundings of numbers up to 3, 2^-24 each, over six steps.
SAME = {"rtol": 0, "atol": 3e-6}
each_run = pytest.mark.parametrize(
    ("world", "plan"), [(world, plan) for plan in sharded.PLANS for world in sharded.SHARES[plan]]
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    found = {}
    for world in (1, 2, 4):
        multiprocessing.spawn(sharded.run, args=(world, str(folder)), nprocs=world)
        for rank in range(world):
            for plan, one in torch.load(folder / f"{rank} of {world}.pt", weights_only=True).items():
                found.setdefault((world, plan), []).append(one)
    return found


@pytest.fixture(scope="module")
def wanted():
    return sharded.wanted()


@each_run
def test_every_id_has_the_row_and_the_vector_of_one_process(results, wanted, world, plan):
    got = results[world, plan][0]
    for mine, theirs in zip(got["entries"], wanted["entries"], strict=True):
        assert torch.equal(mine, theirs)
    for dim, weight in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][dim], weight, **SAME)
    for name, one in wanted["score"].items():
        torch.testing.assert_close(got["score"][name], one, **SAME)
    assert torch.equal(got["next draw"], wanted["next draw"])


@each_run
def test_what_is_served_says_what_the_ranks_say(results, wanted, world, plan):
    said = torch.cat([results[world, plan][rank]["say"] for rank in range(world)])
    torch.testing.assert_close(said, wanted["scores"], **SAME)
    torch.testing.assert_close(results[world, plan][0]["served"], said, **SAME)
    torch.testing.assert_close(wanted["served"], wanted["scores"], **SAME)


@each_run
def test_each_rank_has_a_part_of_the_tables(results, world, plan):
    pieces = [results[world, plan][rank]["pieces"] for rank in range(world)]
    for name, table in sharded.TABLES.items():
        num_unseen = sum(one.num_unseen for one in sharded.FEATURES.values() if one.table == name)
        held = [sum(rows for rows, _ in one[name]) for one in pieces]
        assert sum(held) == table.capacity + num_unseen
        assert sum(1 for rows in held if rows) == (world if plan == "by row" else 1)


@each_run
def test_every_rank_knows_how_many_ids_were_new_and_that_a_table_is_full(results, world, plan):
    counts = [results[world, plan][rank]["counts"] for rank in range(world)]
    assert all(one == counts[0] for one in counts)
    assert all(min(step.values()) > 0 for step in counts[0])
    for rank in range(world):
        message, unchanged = results[world, plan][rank]["full"]
        assert "of 'item' must be at most" in message
        assert unchanged


def test_tables_cut_by_columns_have_the_vectors_of_one_lookup(results):
    first, second = results[2, "by column"]
    assert first["widths"] == second["widths"] == [4]
    torch.testing.assert_close(first["sharded"], first["alone"], rtol=0, atol=1e-6)
    for one, other, gathered in zip(first["drawn"], second["drawn"], first["gathered"], strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, gathered, rtol=0, atol=1e-6)


def test_every_rank_hears_of_one_that_has_bad_features_or_other_ids(results):
    first, second = (one["errors"] for one in results[2, "by column"])
    assert first[0] == "ValueError: features must be good on every rank, got an error on rank 1"
    assert second[0].startswith("ValueError: features must be those of the lookup")
    assert first[1] == second[1]
    assert first[1].startswith("RuntimeError: every rank must hold the same ids, got so many of them on the ranks: [")


def test_batch_norm_over_ranks_is_that_of_the_whole_batch(results):
    for ours, whole_batch in results[2, "normed"]:
        for one, other in zip(ours, whole_batch, strict=True):
            # float64: some roundings of 2^-53 of numbers up to 1e6, less their mean, over their spread of 1e-2 and more
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
