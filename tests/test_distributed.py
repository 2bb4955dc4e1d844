"""Training on 1, 2, 3 and 4 ranks is training in one process on the whole batch."""

import pytest
import ranks
import torch
from torch import multiprocessing


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of four gloo processes found, in groups of 1, 2, 3 and 4 of them: one start pays for all."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(ranks.run, args=(str(folder),), nprocs=4)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.fixture(scope="module")
def one_process():
    whole = ranks.share(0, len(ranks.USERS))
    return {backend: ranks.train(whole, backend) for backend in ranks.BACKENDS}


def relative_error(got, wanted):
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("backend", ranks.BACKENDS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_loss_and_gradients_are_the_whole_batch_s(results, one_process, world, backend):
    wanted = one_process[backend]
    assert all(gradient.abs().max() > 1e-6 for gradient in wanted["gradients"].values())
    for rank in range(world):
        got = results[rank][world][backend]
        assert got["loss"].dtype == torch.float64
        assert relative_error(got["loss"], wanted["loss"]) < 1e-10
        assert got["gradients"].keys() == wanted["gradients"].keys()
        for name, gradient in got["gradients"].items():
            assert relative_error(gradient, wanted["gradients"][name]) < 1e-10, name


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_s_sketch_is_the_whole_stream_s_bit_by_bit(results, one_process, world):
    wanted = one_process["reference"]["sketch"]
    for rank in range(world):
        got = results[rank][world]["reference"]["sketch"]
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_sketch_inside_ddp_without_broadcast_buffers_counts_every_rank_s_steps(results, world):
    for rank in range(world):
        assert results[rank][world]["counted"].tolist() == [3] * world + [0] * (4 - world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gathered_rows_and_the_sum_of_their_gradients(results, world):
    # Rank r has r rows of the number r; row j of all is used j times by rank 0, 2j times by rank 1, ...
    rows = torch.tensor([float(rank) for rank in range(world) for _ in range(rank)], dtype=torch.float64)
    times = world * (world + 1) / 2
    for rank in range(world):
        got = results[rank][world]["gathered"]
        assert torch.equal(got["rows"], rows[:, None].expand(-1, 2))
        first = sum(range(rank))
        own = torch.arange(first, first + rank, dtype=torch.float64)
        assert torch.equal(got["gradient"], (own * times)[:, None].expand(-1, 2))
        assert not got["needs_grad"]
