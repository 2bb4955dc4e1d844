import modules
import parallel
import pytest
import torch

ENTRIES = [entry.name for entry in modules.ENTRIES if list(entry.build("meta", torch.float32).parameters())]
WRAPPED = [(name, "ddp") for name in ENTRIES] + [(name, "fsdp") for name in ENTRIES if name not in parallel.NOT_FSDP]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(parallel.run, args=(str(folder),), nprocs=parallel.RANKS)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize(("name", "wrapper"), WRAPPED)
def test_two_ranks_train_on_the_mean_of_their_gradients(results, name, wrapper):
    for got, want in results[name][wrapper].values():
        # The mean of two float32 numbers rounds once; what else may differ is a few roundings of re-ordered sums.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
