"""Raw ids of 300 features to vectors: in one go, and as one would do it without. No gradient, whole batches in turn.

"fused" is given a tensor a feature, like the others; "packed before" what `pack` made of them, as in a data loader.

The ids are 64 random bits, of a Zipf distribution in each feature, one in a hundred unseen; 300 tables of 50,000 ids,
all of one width, and at last of three widths in turn, where a third of each width has bags and the others one id each.
Vectors must be right bit by bit, bags but for the order of their sums.
fbgemm, where it is installed, is given rows instead of ids: what a lookup costs without hashing.
Memory is what torch's profiler sees; under it features are laid side by side, which they are not when they are timed.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks._comparison import Comparison
from recblocks import EmbeddingTable, FusedEmbeddingLookup, IdFeature, PackedIds

NUM_FEATURES, NUM_IDS, NUM_ROWS, UNSEEN, EXPONENT = 300, 50_000, 256, 0.01, 1.05
DIM, DIMS = 32, (16, 32, 48)
LONGEST = 2, 8  # bags have 0 to so many ids: as many in all as without bags, and four times as many
NUM_BATCHES = 5
LARGEST = 2**63 - 1  # behind every sorted vocabulary, so that what is beyond its ids needs no clamp
TOLERANCE = 1e-6
NAMES = [f"feature {number}" for number in range(NUM_FEATURES)]
BAG_AN_ID = torch.arange(NUM_FEATURES * NUM_ROWS + 1)  # where bags of one id each begin

Batch = dict[str, Tensor | tuple[Tensor, Tensor]]
Form = Callable[[Batch], Tensor]


def random_ids(*shape: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape)


def draw(known: Tensor, num: int) -> Tensor:
    """(F, num) ids of each feature."""
    shares = 1 / torch.arange(1, NUM_IDS + 1) ** EXPONENT
    ranks = torch.multinomial(shares, NUM_FEATURES * num, replacement=True).view(NUM_FEATURES, num)
    unseen = torch.rand(NUM_FEATURES, num) < UNSEEN
    return torch.where(unseen, random_ids(NUM_FEATURES, num), known.gather(1, ranks))


def one_each(known: Tensor) -> Batch:
    return dict(zip(NAMES, draw(known, NUM_ROWS), strict=True))


def bags(known: Tensor, longest: int) -> Batch:
    lengths = torch.randint(longest + 1, (NUM_FEATURES, NUM_ROWS))
    ids = draw(known, NUM_ROWS * longest)
    offsets = functional.pad(lengths.cumsum(1), (1, 0))
    return {name: (ids[at, : offsets[at, -1]], offsets[at]) for at, name in enumerate(NAMES)}


def mixed(known: Tensor) -> Batch:
    """A third of the features of each width in bags, the others one id each."""
    some, others = bags(known, LONGEST[0]), one_each(known)
    return {name: (others if at // 3 % 3 else some)[name] for at, name in enumerate(NAMES)}


def split(batch: Batch) -> tuple[list[Tensor], list[Tensor | None]]:
    """The ids of each feature, and where its bags begin."""
    pairs = [(one, None) if isinstance(one, Tensor) else one for one in batch.values()]
    return [ids for ids, _ in pairs], [offsets for _, offsets in pairs]


def side_by_side(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """All ids, the feature of each, and where the bags begin, those of a feature behind those of the one before."""
    ids, offsets = split(batch)
    numbers = torch.arange(NUM_FEATURES)
    if offsets[0] is None:
        return torch.cat(ids), numbers.repeat_interleave(NUM_ROWS), None
    begins = torch.stack([BAG_AN_ID[: NUM_ROWS + 1] if one is None else one for one in offsets])
    sizes = begins[:, -1]
    ends = sizes.cumsum(0)
    whole = functional.pad((begins[:, :-1] + (ends - sizes)[:, None]).flatten(), (0, 1))
    whole[-1] = ends[-1]
    return torch.cat(ids), numbers.repeat_interleave(sizes), whole


def columns(vectors: Tensor) -> Tensor:
    """(B, F D) of (F B, D)."""
    return vectors.view(NUM_FEATURES, NUM_ROWS, DIM).transpose(0, 1).reshape(NUM_ROWS, -1)


def a_feature_at_a_time(known: Tensor, weights: list[Tensor]) -> Callable[..., Tensor]:
    """Of each feature a sorted vocabulary and an embedding, its last row for unseen ids; ``exact``: in float64."""
    vocabularies, order = known.sort()
    vocabularies = torch.cat([vocabularies, vocabularies.new_full((NUM_FEATURES, 1), LARGEST)], 1)
    weights = [torch.cat([one[at], one[-1:]]) for one, at in zip(weights, order, strict=True)]

    def rows(vocabulary: Tensor, ids: Tensor) -> Tensor:
        found = torch.searchsorted(vocabulary, ids)
        return torch.where(vocabulary[found] == ids, found, NUM_IDS)

    def vectors(found: Tensor, weight: Tensor, offsets: Tensor | None, exact: bool) -> Tensor:
        if exact:
            found, weight = torch.arange(len(found)), functional.embedding(found, weight).double()
        if offsets is None:
            return functional.embedding(found, weight)
        return functional.embedding_bag(found, weight, offsets, mode="sum", include_last_offset=True)

    def form(batch: Batch, exact: bool = False) -> Tensor:
        ids, offsets = split(batch)
        found = [rows(vocabulary, one) for vocabulary, one in zip(vocabularies, ids, strict=True)]
        return torch.cat([vectors(*one, exact) for one in zip(found, weights, offsets, strict=True)], 1)

    return form


def all_at_once(known: Tensor, weights: list[Tensor]) -> Form:
    """One sorted vocabulary, for which no two features may have an id in common, and one embedding."""
    vocabulary, order = known.flatten().sort()
    own, unseen = (torch.cat(some) for some in ([one[:-1] for one in weights], [one[-1:] for one in weights]))
    whole, num_ids = torch.cat([own[order], unseen]), len(vocabulary)
    vocabulary = torch.cat([vocabulary, vocabulary.new_full((1,), LARGEST)])

    def form(batch: Batch) -> Tensor:
        ids, feature, offsets = side_by_side(batch)
        found = torch.searchsorted(vocabulary, ids)
        rows = torch.where(vocabulary[found] == ids, found, num_ids + feature)
        if offsets is None:  # a bag an id, for torch reads ahead in bags
            rows = rows.view(NUM_FEATURES, NUM_ROWS).t().flatten()
            found = functional.embedding_bag(rows, whole, BAG_AN_ID, mode="sum", include_last_offset=True)
            return found.view(NUM_ROWS, -1)
        return columns(functional.embedding_bag(rows, whole, offsets, mode="sum", include_last_offset=True))

    return form


def fbgemm(known: Tensor, weights: list[Tensor], batches: list[Batch]) -> Form:
    """fbgemm's tables of all features, given rows."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    specs = [(NUM_IDS + 1, one.shape[1], EmbeddingLocation.HOST, ComputeDevice.CPU) for one in weights]
    tables = SplitTableBatchedEmbeddingBagsCodegen(specs, pooling_mode=PoolingMode.SUM)
    for own, one in zip(tables.split_embedding_weights(), weights, strict=True):
        own.copy_(one)
    vocabularies, order = known.sort()
    given = {}
    for batch in batches:
        ids, feature, offsets = side_by_side(batch)
        rows = torch.full_like(ids, NUM_IDS)
        for at in range(NUM_FEATURES):
            of = feature == at
            place = torch.searchsorted(vocabularies[at], ids[of]).clamp(max=NUM_IDS - 1)
            rows[of] = torch.where(vocabularies[at][place] == ids[of], order[at][place], NUM_IDS)
        given[id(batch)] = rows, BAG_AN_ID if offsets is None else offsets
    return lambda batch: tables(*given[id(batch)])


@torch.no_grad()
def made(dims: Sequence[int], known: Tensor) -> tuple[FusedEmbeddingLookup, list[Tensor]]:
    """A lookup of features of these widths in turn, and of each feature the vectors of its ids, and of unseen ones."""
    widths = dict(zip(NAMES, itertools.cycle(dims), strict=False))
    lookup = FusedEmbeddingLookup(
        {name: EmbeddingTable(NUM_IDS, dim) for name, dim in widths.items()}, {name: IdFeature(name) for name in NAMES}
    )
    weights = [torch.empty(NUM_IDS + 1, dim) for dim in widths.values()]
    begin = 0
    for some in (*known.split(5_000, 1), random_ids(NUM_FEATURES, 1)):
        batch = dict(zip(NAMES, some, strict=True))
        if begin < NUM_IDS:
            lookup.insert(batch)
        pooled, end = lookup(batch).pooled, begin + some.shape[1]
        for weight, columns in zip(weights, lookup.columns.values(), strict=True):
            weight[begin:end] = pooled[:, columns]
        begin = end
    return lookup, weights


def compared(dims: Sequence[int], kinds: list[tuple[str, Callable[[Tensor], Batch], float]]) -> Iterator[Comparison]:
    """Batches of several kinds, on features of these widths in turn."""
    known = random_ids(NUM_FEATURES, NUM_IDS)
    lookup, weights = made(dims, known)
    plain = copy.copy(lookup)
    plain.backend = "reference"
    torch.compiler.reset()
    compiled = torch.compile(plain, fullgraph=True)
    packed: dict[int, PackedIds] = {}
    one_by_one = a_feature_at_a_time(known, weights)
    forms: dict[str, Form] = {
        "fused": lambda batch: lookup(batch).pooled,
        "fused, packed before": lambda batch: lookup(packed[id(batch)]).pooled,
        "fused, plain torch": lambda batch: plain(batch).pooled,
        "fused, plain torch compiled": lambda batch: compiled(plain.pack(batch)).pooled,
        "searchsorted, a feature at a time": one_by_one,
    }
    if len(dims) == 1:
        forms["searchsorted, all at once"] = all_at_once(known, weights)
    has_fbgemm = importlib.util.find_spec("fbgemm_gpu") is not None
    for what, draw_batch, allowed in kinds:
        batches = [draw_batch(known) for _ in range(NUM_BATCHES)]
        packed |= {id(batch): lookup.pack(batch) for batch in batches}
        if has_fbgemm:
            forms["fbgemm, given rows"] = fbgemm(known, weights, batches)
        yield Comparison(
            op=f"fused lookup, {what}, {' and '.join(map(str, dims))} wide, {UNSEEN:.0%} unseen",
            sizes={"features": NUM_FEATURES, "rows": NUM_ROWS, "stored": NUM_FEATURES * NUM_IDS},
            dtype="int64 to float32",
            batches=batches,
            exact=functools.partial(alone, functools.partial(one_by_one, exact=True)),
            forms={name: functools.partial(alone, form) for name, form in forms.items()},
            allowed=allowed,
            moved=4 * NUM_ROWS * sum(weight.shape[1] for weight in weights),
            bars={"searchsorted, a feature at a time": 5.0},
            absent={} if has_fbgemm else {"fbgemm, given rows": "not installed"},
            rounds=21,
        )


def alone(form: Form, batch: Batch) -> list[Tensor]:
    with torch.no_grad():  # fbgemm has no inference mode
        return [form(batch)]


def comparisons(device: torch.device) -> Iterator[Comparison]:
    if device.type != "cpu":
        raise SystemExit("the lookup is compared on a CPU alone so far")
    in_bags = [(f"0 to {most} ids each", functools.partial(bags, longest=most), TOLERANCE) for most in LONGEST]
    yield from compared([DIM], [("one id each", one_each, 0.0), *in_bags])
    yield from compared(DIMS, [("one id each", one_each, 0.0), ("a third 0 to 2 ids each", mixed, TOLERANCE)])
