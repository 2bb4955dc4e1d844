"""A training step on one rank's share of a batch; test_distributed.py runs it in processes of its own."""

import datetime as dt
from typing import NamedTuple

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recblocks import (
    CausalSequenceEncoder,
    CountMinSketch,
    ItemEncoder,
    LearnedTemperature,
    dense_all_action_loss,
    equal_user_weights,
    gather_rows,
    mixed_log_q,
    mixed_negative_pool,
    positives_in_window,
    rank_weights,
    sampled_softmax_loss,
)

ACTIONS, DIM = 4, 5
BACKENDS = "reference", "chunked", "pairless"
# How many of the nine queries each rank of 1, 2, 3 and 4 has. User 9 is cut in two by every split, and rank 1 is empty
# where there are three or more.
SHARES = {1: [9], 2: [6, 3], 3: [5, 0, 4], 4: [4, 0, 2, 3]}
USERS = torch.tensor([7, 7, -3, 9, 9, 9, 9, 2**62, 0])
PAIR_QUERIES = torch.tensor([0, 0, 2, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8])  # query 1 has no positive
PAIR_CANDIDATES = torch.tensor([0, 1, 0, 4, 5, 1, 6, 6, 11, 3, 1, 0, 9])
QUERY_TIMES = torch.tensor([0, 5, 3, 1, 2, 9, 0, 4, 4])
PAIR_TIMES = torch.tensor([6, 1, 3, 4, 8, 2, 3, 9, 11, 3, 1, 5, 6])
CANDIDATES = torch.arange(12) * -(2**40) + 5


class Share(NamedTuple):
    sequences: torch.Tensor
    lengths: torch.Tensor
    users: torch.Tensor
    times: torch.Tensor
    pair_queries: torch.Tensor
    pair_candidates: torch.Tensor
    pair_times: torch.Tensor


def share(begin, end):
    """The queries from begin to end, with their pairs."""
    generator = torch.Generator().manual_seed(11)
    sequences = torch.randn(len(USERS), ACTIONS, DIM, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([4, 2, 3, 1, 4, 4, 2, 3, 4])
    pairs = (begin <= PAIR_QUERIES) & (end > PAIR_QUERIES)
    rows = slice(begin, end)
    of_pairs = PAIR_QUERIES[pairs] - begin, PAIR_CANDIDATES[pairs], PAIR_TIMES[pairs]
    return Share(sequences[rows], lengths[rows], USERS[rows], QUERY_TIMES[rows], *of_pairs)


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = CausalSequenceEncoder(DIM, 6, hidden_dim=8, num_layers=2, num_heads=2, max_len=ACTIONS)
        self.item_encoder = ItemEncoder(3, 6, hidden_dim=7)
        self.temperature = LearnedTemperature(0.3)

    def forward(self, share, content, sketch, backend, seed, group):
        rank, world = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
        queries = self.encoder(share.sequences, lengths=share.lengths)[:, 0]
        positives = self.item_encoder(content[share.pair_candidates])
        items, users = CANDIDATES[share.pair_candidates], share.users[share.pair_queries]
        all_positives = gather_rows(positives, group=group)
        all_items, all_users = gather_rows(items, group=group), gather_rows(users, group=group)

        generator = torch.Generator().manual_seed(seed + rank)  # what the other ranks draw must not matter
        sizes = {"max_in_batch": 8, "num_random": 9}
        pool = mixed_negative_pool(len(all_items), len(CANDIDATES), **sizes, generator=generator, group=group)
        own_draws = pool.random.tensor_split(world)[rank]
        random = gather_rows(self.item_encoder(content[own_draws]), group=group)
        negatives = torch.cat([all_positives[pool.in_batch], random])
        column_items = torch.cat([all_items[pool.in_batch], CANDIDATES[pool.random]])

        sketch.update(items)
        sketch.all_reduce(group)
        sketch.all_reduce(group)
        log_q = [
            mixed_log_q(
                sketch.query(ids),
                sketch.total,
                num_in_batch=pool.num_in_batch,
                num_random=pool.num_random,
                num_candidates=len(CANDIDATES),
            )
            for ids in (items, column_items)
        ]
        if backend == "pairless":
            return self.pairless(share, queries, positives, random, log_q[0], pool, group)
        # In float64 before the division by the sum over ranks, whose float32 rounding would depend on their number.
        weights = rank_weights(equal_user_weights(users, group=group).double(), group=group)
        return sampled_softmax_loss(
            queries,
            positives,
            negatives,
            log_q_positives=log_q[0],
            log_q_negatives=log_q[1],
            own=(share.users, column_items, all_users, all_items),
            temperature=self.temperature(),
            weights=weights,
            pair_queries=share.pair_queries,
            reduction="sum",
            backend=backend,
        )

    def pairless(self, share, queries, positives, random, log_q, pool, group):
        """Every positive is a column, and every query of its user meets it, whichever ranks they are on."""
        mine = share.users[share.pair_queries], share.pair_times, CANDIDATES[share.pair_candidates]
        users, times, items = (gather_rows(one, group=group) for one in mine)
        counts = positives_in_window(share.users, share.times, users, times, window=5)
        weights = equal_user_weights(share.users, counts=counts, group=group).double()
        return dense_all_action_loss(
            queries,
            gather_rows(positives, group=group),
            random,
            query_users=share.users,
            query_times=share.times,
            positive_users=users,
            positive_times=times,
            positive_items=items,
            negative_items=CANDIDATES[pool.random],
            window=5,
            log_q_positives=gather_rows(log_q, group=group),
            log_q_negatives=torch.linspace(-1, -2, len(random), dtype=log_q.dtype),
            temperature=self.temperature(),
            weights=rank_weights(weights, counts=counts, group=group),
            reduction="sum",
        )


def train(share, backend, group=None, distributed=False):
    """Two steps; what they leave: loss and gradients of the second, and the sketch."""
    torch.manual_seed(0)
    step = Step().double()  # ρ too: LearnedTemperature computes in its parameter's precision, at least float32
    content = torch.randn(len(CANDIDATES), 3, dtype=torch.float64)
    model = DistributedDataParallel(step, process_group=group) if distributed else step
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    sketch = CountMinSketch(20, 3)
    for seed in (100, 200):
        optimizer.zero_grad()
        loss = model(share, content, sketch, backend, seed, group)
        loss.backward()
        if seed == 100:
            optimizer.step()
            sketch.decay(0.9)
    mean_loss = loss.detach()
    if distributed:
        dist.all_reduce(mean_loss, group=group)
        mean_loss /= dist.get_world_size(group)
    gradients = {name: parameter.grad for name, parameter in step.named_parameters()}
    return {"loss": mean_loss, "gradients": gradients, "sketch": sketch.state_dict()}


def gathered_gradient(rank, group):
    """Rank r uses all rows r + 1 times, row j with factor j: the gradient of row j is j (1 + ... + W)."""
    x = torch.full((rank, 2), float(rank), dtype=torch.float64, requires_grad=True)  # rank 0 has no row
    y = gather_rows(x, group=group)
    factors = torch.arange(len(y), dtype=torch.float64)
    ((rank + 1) * factors * y.sum(1)).sum().backward()
    return {"rows": y.detach(), "gradient": x.grad, "needs_grad": gather_rows(x.detach(), group=group).requires_grad}


class Counting(nn.Module):
    """A model that counts inside its forward: what DDP's broadcast of buffers would undo."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.sketch = CountMinSketch(1000, 4)

    def forward(self, ids):
        self.sketch.update(ids)
        return self.linear(torch.ones(1, 1)).sum()


def counted_inside_ddp(rank, group):
    """Three steps in which rank r sees id r; shared once, at the end."""
    model = Counting()
    wrapped = DistributedDataParallel(model, process_group=group, broadcast_buffers=False)
    for _ in range(3):
        wrapped(torch.tensor([rank])).backward()
    model.sketch.all_reduce(group)
    return model.sketch.query(torch.arange(4))


def run(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=4, timeout=dt.timedelta(seconds=100))
    results = {}
    for world, sizes in SHARES.items():
        group = dist.new_group(list(range(world)))
        if rank < world:
            begin = sum(sizes[:rank])
            mine = share(begin, begin + sizes[rank])
            results[world] = {backend: train(mine, backend, group, True) for backend in BACKENDS}
            results[world]["counted"] = counted_inside_ddp(rank, group)
            results[world]["gathered"] = gathered_gradient(rank, group)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
