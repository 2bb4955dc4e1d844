"""The ranker of examples/transact with its tables sharded over ranks trains what one process trains."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import pytest
import sharded_ranker
import torch
from torch import multiprocessing

if importlib.util.find_spec("torchrec") is None:
    pytest.skip("torchrec is not installed; the README says how", allow_module_level=True)

# With every layer but the tables in float64 a gradient that is 0 but for rounding is far below the 1e-8 that Adam and
# Adagrad divide by at least; in float32 it is not, and they would make steps of full size of it, up or down by chance.
# The tables' own float32 rounds by 2^-24 of what is added, some hundred times.
SAME = {"rtol": 0, "atol": 1e-5}
RUNS = {"2 ranks": 2, "4 ranks": 4, "3 ranks after 4": 3}
each_run = pytest.mark.parametrize("run", RUNS)


def ranks(folder: pathlib.Path, number: int, dtype: torch.dtype, lost: int | None = None) -> Any:
    folder.mkdir(exist_ok=True)
    multiprocessing.spawn(sharded_ranker.run, args=(number, str(folder), dtype, lost), nprocs=number)
    return torch.load(folder / f"{number}.pt", weights_only=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of 2 and of 4 ranks, and of 3 that go on where 4, of which one was lost, left off."""
    folder = tmp_path_factory.mktemp("sharded ranker")
    found = {f"{number} ranks": ranks(folder / f"{number}", number, torch.float64) for number in (2, 4)}
    with pytest.raises(multiprocessing.ProcessExitedException):
        ranks(folder / "lost", 4, torch.float64, lost=2)
    left = [path.name for path in (folder / "lost/checkpoints/transact").iterdir() if "partial" not in path.name]
    return {**found, "3 ranks after 4": ranks(folder / "lost", 3, torch.float64), "left": left}


@pytest.fixture(scope="module")
def wanted() -> dict[str, Any]:
    return sharded_ranker.trained(torch.float64)


@each_run
def test_ranks_train_the_weights_of_one_process(results: dict[str, Any], wanted: dict[str, Any], run: str) -> None:
    got = results[run]
    for name, one in wanted["dense"].items():
        torch.testing.assert_close(got["dense"][name], one, **SAME)
    assert torch.equal(got["rows"], wanted["rows"])
    assert torch.equal(got["keys"], wanted["keys"])
    torch.testing.assert_close(got["vectors"], wanted["vectors"], **SAME)
    torch.testing.assert_close(torch.tensor(got["loss"]), torch.tensor(wanted["loss"]), **SAME)
    assert float(wanted["vectors"].abs().max()) > 0.05, "nothing was learned"


@each_run
def test_what_is_served_scores_as_one_process_and_as_the_tables_in_pieces(
    results: dict[str, Any], wanted: dict[str, Any], run: str
) -> None:
    torch.testing.assert_close(results[run]["scores"], wanted["scores"], **SAME)
    assert results[run]["served apart"] <= SAME["atol"]


def test_ranks_go_on_from_what_more_ranks_left(results: dict[str, Any]) -> None:
    assert results["left"] == ["step-10"]
    assert results["3 ranks after 4"]["steps"][0] == 11
    assert results["2 ranks"]["steps"][0] == results["4 ranks"]["steps"][0] == 1


def test_in_float32_losses_and_scores_are_those_of_one_process(tmp_path: pathlib.Path) -> None:
    got, want = ranks(tmp_path, 2, torch.float32), sharded_ranker.trained(torch.float32)
    torch.testing.assert_close(torch.tensor(got["loss"]), torch.tensor(want["loss"]), **SAME)
    torch.testing.assert_close(got["scores"], want["scores"], **SAME)
