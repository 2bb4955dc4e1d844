"""Weights in one process and on three ranks; the loss and its gradients on several ranks are in test_distributed.py."""

import collections
import math

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist

from recblocks import equal_user_weights, rank_weights
from recblocks._distributed import all_gather_ragged, group_size

IDS = st.sampled_from([0, 7, -7, 2**63 - 1, -(2**63)])
USERS = [[5, 5, -3], [], [5, 2**63 - 1]]  # of three ranks: user 5 on two of them, one rank empty


@given(users=st.lists(IDS, max_size=12))
def test_every_user_weighs_1_in_all_and_equally_row_by_row(users):
    weights = equal_user_weights(torch.tensor(users, dtype=torch.int64)).tolist()
    count = collections.Counter(users)
    assert weights == pytest.approx([1 / count[user] for user in users], rel=1e-7)


@given(weights=st.lists(st.floats(0, 100), max_size=12))
def test_alone_a_rank_s_weights_are_those_of_a_mean(weights):
    got = rank_weights(torch.tensor(weights, dtype=torch.float64)).tolist()
    total = math.fsum(weights)
    assert got == pytest.approx([w / total if total else 0 for w in weights], rel=1e-13)


def test_small_half_precision_weights_do_not_overflow_on_the_way():
    # Their sum is 4 * 2**-19: a scale of 2**17 is beyond float16, the weights are not.
    assert rank_weights(torch.full((4,), 2.0**-19, dtype=torch.float16)).tolist() == [0.25] * 4


def test_weights_keep_their_dtype_and_gradient():
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    rank_weights(weights)[0].backward()
    torch.testing.assert_close(weights.grad, torch.eye(5, dtype=torch.float64)[0] / weights.detach().sum())
    assert rank_weights(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_alone_gathering_returns_the_rows_without_gradient():
    x = torch.rand(3, 2, requires_grad=True)
    gathered, sizes = all_gather_ragged(x)
    assert torch.equal(gathered, x)
    assert not gathered.requires_grad
    assert sizes == [3]
    assert group_size() == 1


def test_compiles_to_one_graph():
    def both(users):
        return rank_weights(equal_user_weights(users))

    users = torch.tensor([1, 1, 2])
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(users), both(users))


def _rank(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=len(USERS))
    try:
        users = torch.tensor(USERS[rank], dtype=torch.int64)
        everyone = [user for one in USERS for user in one]
        for extra, dtype in [((), torch.int64), ((2,), torch.float32), ((1, 2), torch.bool)]:
            rows = users.view(-1, *[1] * len(extra)).expand(-1, *extra).to(dtype)
            gathered, sizes = all_gather_ragged(rows)
            assert sizes == [3, 0, 2]
            want = torch.tensor(everyone).view(-1, *[1] * len(extra)).expand(-1, *extra).to(dtype)
            assert torch.equal(gathered, want)
        assert all_gather_ragged(users[:0])[1] == [0, 0, 0]
        assert all_gather_ragged(users.double().requires_grad_())[0].requires_grad is False
        assert group_size() == 3
        for different in (torch.zeros(2, rank), torch.zeros(0, 1 + (rank == 2)), torch.zeros([2] * (rank + 1))):
            with pytest.raises(ValueError, match=r"one dtype and shape\[1:\] on all ranks"):
                all_gather_ragged(different)
        with pytest.raises(ValueError, match="one dtype"):
            all_gather_ragged(users.int() if rank == 1 else users)

        weights = equal_user_weights(users)
        assert weights.tolist() == pytest.approx([1 / everyone.count(user) for user in USERS[rank]], rel=1e-7)
        # Three users weigh 1 each: DDP's mean over 3 ranks of the sums is the weighted mean of the batch.
        torch.testing.assert_close(rank_weights(weights), weights * len(USERS) / 3)
        assert rank_weights(torch.zeros(2)).tolist() == [0, 0]

        pair = dist.new_group([0, 2])
        if rank != 1:
            both = USERS[0] + USERS[2]
            weights = equal_user_weights(users[:2], group=pair)
            assert weights.tolist() == pytest.approx([1 / (both[:2] + both[3:]).count(u) for u in USERS[rank][:2]])
            torch.testing.assert_close(rank_weights(weights, group=pair), weights * 2 / 2)
    finally:
        dist.destroy_process_group()


def test_three_ranks_one_of_them_empty(tmp_path):
    mp.spawn(_rank, (f"{tmp_path}/store",), nprocs=len(USERS))


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="row_users"):
        equal_user_weights(torch.ones(3))
    with pytest.raises(ValueError, match="row_users"):
        equal_user_weights(torch.ones(3, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="weights"):
        rank_weights(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="weights"):
        rank_weights(torch.ones(()))
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"weights must be finite and at least 0, got {bad}"):
            rank_weights(torch.tensor([1.0, bad]))
