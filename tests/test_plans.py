"""torchrec's plans of large tables are made without a GPU, and hold every row."""

import importlib.util

import pytest

if importlib.util.find_spec("torchrec") is None:
    pytest.skip("torchrec is not installed; the README says how", allow_module_level=True)

from examples.transact import plans


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchrec's own use of torch.jit
@pytest.mark.parametrize("gpus", [1, 8])
def test_a_plan_holds_every_table_and_fits(gpus, capsys):
    options = plans.Options(gpus=(gpus,))
    planned = plans.plan(options, gpus)
    rows = {"user": options.users, "item": options.items, "author": options.authors, "tag": options.tags}
    assert {one.table: one.rows for one in planned} == rows
    for one in planned:
        dim = options.raw_ids if one.table in ("user", "item") else options.bag_dim
        assert sum(gpu + host for _, gpu, host in one.shards) >= 4 * one.rows * dim / plans.GIB
        assert all(0 <= rank < gpus for rank, _, _ in one.shards)
    held = [sum(gpu for one in planned for rank, gpu, _ in one.shards if rank == at) for at in range(gpus)]
    assert max(held) <= options.memory_gib
    plans.main(options)
    assert f"The fullest of {gpus}: {max(held):.1f} of 80 GiB" in capsys.readouterr().out
