"""What ranks of a process group do with a lookup that torchrec shards; test_sharded.py runs it in their processes."""

import datetime as dt
import warnings

import torch
from torch import distributed as dist
from torch import nn

from examples.transact.model import GlobalBatchNorm
from recblocks import EmbeddingTable, FusedEmbeddingLookup, IdFeature, ServingLookup, ShardableLookup, TableFull

TABLES = {"item": EmbeddingTable(60, dim=4), "user": EmbeddingTable(40, dim=8), "tag": EmbeddingTable(30, dim=4)}
FEATURES = {
    "candidate": IdFeature("item", pooling=None),
    "user": IdFeature("user", num_unseen=3),
    "tags": IdFeature("tag", pooling="mean", num_unseen=2),
    "history": IdFeature("item", pooling=None, num_unseen=2),
    "liked": IdFeature("user"),
}
TOTAL = 12
# torchrec takes batches that differ between ranks where tables are whole, and none that do where bags are cut by row.
SHARES = {
    "by table": {1: [12], 2: [7, 5], 4: [4, 1, 5, 2]},
    "by row": {1: [12], 2: [6, 6], 4: [3, 3, 3, 3]},
}
STEPS = 6
PLANS = {"by table": "table_wise", "by row": "row_wise"}
COLUMNS = {"item": EmbeddingTable(60, dim=8), "user": EmbeddingTable(40, dim=8), "tag": EmbeddingTable(30, dim=8)}
RATE = 0.1


class Model(nn.Module):
    """A score that sees every feature."""

    def __init__(self, lookup):
        super().__init__()
        self.lookup = lookup
        self.score = nn.Linear(20 + 4, 1)

    def forward(self, features):
        vectors = self.lookup(features)
        seen = vectors.unpooled["history"].mean(1) * vectors.unpooled["candidate"]
        return self.score(torch.cat([vectors.pooled, seen], 1)).squeeze(1)


def batch(step, begin, end, *, offset=0):
    """Rows of the batch of a step, the same whoever has them; ids come up that no step before had."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape, high=6):
        ids = torch.randint(high, shape, generator=generator) + 3 * step + offset
        return torch.where(ids % 4 == 0, ids - 2**62, ids)

    sizes = torch.randint(4, (TOTAL,), generator=generator)
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    tags, cut = draw(int(sizes.sum())), slice(int(starts[begin]), int(starts[end]))
    return {
        "candidate": draw(TOTAL)[begin:end],
        "user": draw(TOTAL)[begin:end],
        "tags": (tags[cut], starts[begin : end + 1] - starts[begin]),
        "history": draw(TOTAL, 3)[begin:end],
        "liked": draw(TOTAL, 2)[begin:end],
    }


def whole(step, **options):
    return batch(step, 0, TOTAL, **options)


def built(lookup):
    torch.manual_seed(0)
    return Model(lookup)


def wanted():
    """What one process makes of all steps."""
    generator = torch.Generator().manual_seed(7)
    lookup = FusedEmbeddingLookup(TABLES, FEATURES, gradient="rowwise_adagrad", learning_rate=RATE, generator=generator)
    model = built(lookup)
    optimizer = torch.optim.SGD(model.score.parameters(), lr=RATE)
    for step in range(STEPS):
        lookup.insert(whole(step), generator=generator)
        optimizer.zero_grad()
        (model(whole(step)) - 1).square().mean().backward()
        optimizer.step()
    return outcome(model, lookup, generator)


def outcome(model, lookup, generator):
    """Weights by id, and what the model says of a batch of which some ids are unseen; all of a fused lookup."""
    alone = Model(lookup)
    alone.score.load_state_dict(model.score.state_dict())
    served = Model(ServingLookup(lookup, dtype=torch.float32))
    served.score.load_state_dict(model.score.state_dict())
    asked = whole(STEPS, offset=-2)
    return {
        "weights": {name: weight.detach() for name, weight in lookup.weights.items()},
        "entries": lookup.table.entries(),
        "score": {name: one.detach() for name, one in model.score.state_dict().items()},
        "scores": alone(asked).detach(),
        "served": served(asked).detach(),
        "next draw": torch.rand(2, generator=generator),
    }


def sharders():
    """torchrec cuts bags by row on GPUs alone, unless it is told that it may."""
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    class Rows(EmbeddingBagCollectionSharder):
        def sharding_types(self, compute_device_type):
            return [*super().sharding_types(compute_device_type), "row_wise"]

    return [Rows(), EmbeddingCollectionSharder()]


def spread(model, lookup, constraint):
    """The model with its tables on the ranks."""
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    world = dist.get_world_size()
    apply_optimizer_in_backward(RowWiseAdagrad, lookup.table_weights(), {"lr": RATE, "eps": 1e-8})
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world, local_world_size=world, compute_device="cpu"),
        constraints=dict.fromkeys(lookup.layout.tables, constraint),
    )
    made = planner.collective_plan(model, sharders(), dist.group.WORLD)
    return DistributedModelParallel(model, plan=made, sharders=sharders(), device=torch.device("cpu"))


def by_column(rank):
    """Whether vectors of tables cut by columns are those of one lookup, with and without a generator, and gathered."""
    from torchrec.distributed.planner import ParameterConstraints

    cut = ParameterConstraints(sharding_types=["column_wise"], min_partition=4)
    lookup = ShardableLookup(COLUMNS, FEATURES, device="meta")
    spread(nn.ModuleList([lookup]), lookup, cut)
    generator, found = torch.Generator().manual_seed(5), {}
    lookup.reset_parameters(generator=generator)
    lookup.insert(whole(0), generator=generator)
    torch.manual_seed(100 + rank)
    lookup.insert(whole(1))  # from a seed that the ranks agree on, the first one's
    vectors = lookup(whole(1))
    fused = lookup.to_fused()
    found["widths"] = sorted({shard.tensor.shape[1] for one in shards(lookup).values() for shard in one.local_shards()})
    found["drawn"] = [vectors.pooled, *vectors.unpooled.values()]
    if fused is not None:
        alone = FusedEmbeddingLookup(COLUMNS, FEATURES)
        generator = torch.Generator().manual_seed(5)
        alone.reset_parameters(generator=generator)
        alone.insert(whole(0), generator=generator)
        torch.manual_seed(100)
        alone.insert(whole(1), generator=torch.Generator().manual_seed(int(torch.randint(1 << 62, ()))))
        batch_of_both = {**whole(1), "user": whole(0)["user"]}
        found["alone"], found["sharded"] = (each(batch_of_both).pooled.detach() for each in (alone, fused))
        gathered = fused(whole(1))
        found["gathered"] = [gathered.pooled.detach(), *(one.detach() for one in gathered.unpooled.values())]
    found["drawn"] = [one.detach() for one in found["drawn"]]
    found["errors"] = errors(lookup, rank)
    return found


def errors(lookup, rank):
    """What every rank is told where one has bad features, and where one holds other ids."""
    said = []
    for given in (whole(2) if rank == 0 else {}, whole(2)):
        if len(said):
            lookup.table.erase(torch.arange(3), torch.zeros(3, dtype=torch.int64)) if rank else None
        try:
            lookup.insert(given)
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def normed(rank):
    """Batch norm over both ranks, of columns far from 0 and of one that is constant, and the whole batch's by torch."""
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = x * torch.tensor([1.0, 1e-2, 10.0, 0.0]) + torch.tensor([0.0, 1e3, -1e4, 1_000_997.25])
    ours, whole_batch = GlobalBatchNorm(4, dtype=torch.float64), nn.BatchNorm1d(4, dtype=torch.float64)
    mine = slice(0, 6) if rank == 0 else slice(6, 9)
    return [ours(x[mine]).detach(), *ours.buffers()], [whole_batch(x).detach()[mine], *whole_batch.buffers()]


def trained(rank, world, plan):
    """What the ranks make of all steps, each of its share."""
    from torchrec.distributed.planner import ParameterConstraints

    lookup = ShardableLookup(TABLES, FEATURES, device="meta")
    parallel = spread(built(lookup), lookup, ParameterConstraints(sharding_types=[PLANS[plan]]))
    generator = torch.Generator().manual_seed(7)
    lookup.reset_parameters(generator=generator)
    optimizer = torch.optim.SGD(parallel.module.score.parameters(), lr=RATE)
    begin = sum(SHARES[plan][world][:rank])
    end, counts = begin + SHARES[plan][world][rank], []
    for step in range(STEPS):
        mine = batch(step, begin, end)
        counts.append(lookup.insert(mine, generator=generator))
        optimizer.zero_grad()
        (world / TOTAL * (parallel(mine) - 1).square().sum()).backward()
        optimizer.step()
    say = parallel(batch(STEPS, begin, end, offset=-2)).detach()
    pieces = {name: [tuple(shard.tensor.shape) for shard in one.local_shards()] for name, one in shards(lookup).items()}
    fused = lookup.to_fused()
    found = {"say": say, "pieces": pieces, "counts": counts}
    if rank == 0:
        found |= outcome(parallel.module, fused, generator)
    return found | {"full": too_many(lookup, rank, world)}


def shards(lookup):
    from recblocks.embedding import _collections

    return _collections.weights_of(lookup.collections)


def too_many(lookup, rank, world):
    """What is said of more ids than there are rows for, all of them on the last rank, and whether any was given one."""
    had = lookup.num_ids
    ids = torch.arange(100) + 10_000 if rank == world - 1 else torch.arange(1)
    given = {"candidate": ids, "user": ids, "tags": ids, "history": ids[:, None], "liked": ids}
    try:
        lookup.insert(given)
    except TableFull as error:
        return str(error), lookup.num_ids == had
    return None


def run(rank, world, folder):
    warnings.simplefilter("ignore")  # torchrec's own deprecations
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=dt.timedelta(seconds=60))
    results = {plan: trained(rank, world, plan) for plan in PLANS}
    if world == 2:
        results["by column"] = by_column(rank)
        results["normed"] = normed(rank)
    torch.save(results, f"{folder}/{rank} of {world}.pt")
    dist.barrier()
    dist.destroy_process_group()
