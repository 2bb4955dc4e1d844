"""torchrec's jagged tensors and collections beside ours: packed sequences, keyed lookups, weights to and fro."""

import copy
import importlib.util
import io
import warnings

import pytest
import sharded
import torch
from hypothesis import given
from hypothesis import strategies as st

import recblocks
from recblocks import (
    EmbeddingTable,
    FusedEmbeddingLookup,
    IdFeature,
    KeyedLookup,
    ServingLookup,
    ShardableLookup,
    copy_to_collections,
    lookup_from_collections,
)
from recblocks.embedding import _collections

if importlib.util.find_spec("torchrec") is None:
    pytest.skip("torchrec is not installed; the README says how", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fbgemm's own deprecations while it is imported
    from torchrec import (
        EmbeddingBagCollection,
        EmbeddingBagConfig,
        EmbeddingCollection,
        EmbeddingConfig,
        KeyedJaggedTensor,
        PoolingType,
    )

ROWS = {"users": 7, "things": 9}
SIZES = st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=2, max_size=2)


def bag_collection():
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name="users", embedding_dim=4, num_embeddings=7, feature_names=["u"]),
            EmbeddingBagConfig(
                name="things",
                embedding_dim=8,
                num_embeddings=9,
                feature_names=["t", "v"],
                pooling=PoolingType.MEAN,
            ),
        ]
    )


def each_collection():
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(name="users", embedding_dim=4, num_embeddings=7, feature_names=["u"]),
            EmbeddingConfig(name="things", embedding_dim=4, num_embeddings=9, feature_names=["t", "v"]),
        ]
    )


def keyed(bags, dtype=torch.int64):
    """Of each key the bags of each row."""
    values = [one for rows in bags.values() for bag in rows for one in bag]
    lengths = [len(bag) for rows in bags.values() for bag in rows]
    return KeyedJaggedTensor(list(bags), torch.tensor(values, dtype=dtype), lengths=torch.tensor(lengths))


BAGS = {"v": [[3], [], [8, 8]], "x": [[1], [2], [3]], "u": [[6, 0], [1], []], "t": [[], [0, 1, 2], [5]]}


def test_a_keyed_jagged_tensor_feeds_the_packed_encoder():
    lengths = torch.tensor([2, 0, 3])
    jagged = KeyedJaggedTensor(keys=["items"], values=torch.tensor([4, 1, 3, 3, 0]), lengths=lengths)["items"]
    table = torch.randn(5, 8)
    encoder = recblocks.CausalSequenceEncoder(
        8, 4, hidden_dim=8, num_layers=1, num_heads=2, max_len=3, dropout=0.0
    ).double()
    features = table[jagged.values()].double()
    packed = encoder(features, offsets=jagged.offsets().long(), max_length=3)

    alone = [encoder(rows[None])[0] for rows in features.split(lengths.tolist()) if len(rows)]
    # float64 sums in another order: a few units of 2^-53 over some hundred terms of size 1
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-13)


@given(u=SIZES, t=SIZES, v=SIZES)
def test_a_keyed_lookup_stands_where_a_bag_collection_stood(u, t, v):
    collection = bag_collection()
    lookup = KeyedLookup(lookup_from_collections([collection]))
    batch = keyed({"v": v, "other": v, "u": u, "t": t})
    got, want = lookup(batch), collection(batch)
    assert got.keys() == want.keys()
    assert got.length_per_key() == want.length_per_key()
    # A bag's sum in another order: a few roundings of numbers up to 1.
    torch.testing.assert_close(got.values(), want.values(), rtol=0, atol=1e-6)


@given(u=SIZES, t=SIZES, v=SIZES)
def test_a_keyed_lookup_stands_where_a_collection_of_each_id_stood(u, t, v):
    collection = each_collection()
    lookup = KeyedLookup(lookup_from_collections([collection]))
    batch = keyed({"t": t, "u": u, "v": v})
    got, want = lookup(batch), collection(batch)
    assert got.keys() == want.keys()
    for name, jagged in want.items():
        assert torch.equal(got[name].values(), jagged.values())
        assert got[name].lengths().tolist() == jagged.lengths().tolist()


def test_gradients_are_the_collection_s():
    collection = bag_collection()
    lookup = lookup_from_collections([collection])
    for module in (collection, KeyedLookup(lookup)):
        out = module(keyed(BAGS)).values()
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    for name, rows in ROWS.items():
        want = collection.embedding_bags[name].weight.grad
        got = lookup.weights[str(want.shape[1])].grad[-rows:]  # behind the rows for unseen ids
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_rows_are_of_the_ids_that_are_named():
    collection, ids = bag_collection(), {"users": torch.tensor([-(2**63), 5, 0, 2**62, -1, 7, 8])}
    lookup = KeyedLookup(lookup_from_collections([collection], ids=ids))
    renamed = {**BAGS, "u": [[8, -(2**63)], [5], []]}
    torch.testing.assert_close(lookup(keyed(renamed)).values(), collection(keyed(BAGS)).values(), rtol=0, atol=1e-6)
    unseen = {**BAGS, "u": [[6], [1], [77]], "t": [[9], [-1], [100]]}
    got = lookup(keyed(unseen)).to_dict()
    assert not got["u"].any()
    assert not got["t"].any()


@pytest.mark.parametrize("kind", [FusedEmbeddingLookup, ServingLookup, ShardableLookup])
def test_every_lookup_can_be_keyed(kind):
    features = {"u": IdFeature("users"), "t": IdFeature("things", pooling="mean")}
    tables = {"users": EmbeddingTable(50, dim=4), "things": EmbeddingTable(50, dim=3)}
    fused = FusedEmbeddingLookup(tables, features)
    KeyedLookup(fused).insert(keyed(BAGS))
    lookup = fused
    if kind is ServingLookup:
        lookup = ServingLookup(fused, dtype=torch.float32)
        with pytest.raises(TypeError, match="lookup must be one that is written, got a ServingLookup"):
            KeyedLookup(lookup).insert(keyed(BAGS))
    if kind is ShardableLookup:
        lookup = ShardableLookup(tables, features)
        KeyedLookup(lookup).insert(keyed(BAGS))
        lookup.load_fused(fused)
    given = {name: (keyed(BAGS)[name].values(), keyed(BAGS)[name].offsets()) for name in features}
    out = KeyedLookup(lookup)(keyed(BAGS))
    assert out.keys() == ["u", "t"]
    torch.testing.assert_close(out.values(), fused(given).pooled, rtol=0, atol=1e-6)


def test_vectors_go_to_a_collection_and_back():
    lookup = lookup_from_collections([bag_collection()])
    for weight in lookup.weights.values():
        weight.data.normal_()
    lookup.erase("users", torch.tensor([2, 5]))
    other = bag_collection()
    kept = copy.deepcopy(other.embedding_bags["users"].weight)
    assert copy_to_collections(lookup, [other]) == {"users": 5, "things": 9}
    for row in (2, 5):
        assert torch.equal(other.embedding_bags["users"].weight[row], kept[row])
    bags = {**BAGS, "u": [[6, 0], [1], []]}
    torch.testing.assert_close(
        KeyedLookup(lookup)(keyed(bags)).values(), other(keyed(bags)).values(), rtol=0, atol=1e-6
    )


def test_vectors_go_to_rows_of_named_ids():
    lookup = lookup_from_collections([each_collection()])
    other, ids = each_collection(), torch.tensor([8, 7, 6, 5, 4, 3, 2, 1, -9])
    assert copy_to_collections(lookup, [other], ids={"things": ids}) == {"users": 7, "things": 8}
    got = lookup({"u": torch.arange(7), "t": torch.arange(1, 9), "v": torch.arange(1)}).unpooled
    assert torch.equal(other.embeddings["users"].weight, got["u"])
    assert torch.equal(other.embeddings["things"].weight[:8], got["t"].flip(0))


def test_what_a_keyed_lookup_cannot_take_is_named():
    lookup = KeyedLookup(lookup_from_collections([bag_collection()]))
    missing = keyed({"u": BAGS["u"], "t": BAGS["t"]})
    with pytest.raises(ValueError, match=r"features must have the keys of the lookup, got none of \['v'\]"):
        lookup(missing)
    with pytest.raises(TypeError, match=r"features must be a KeyedJaggedTensor, got"):
        lookup({"u": torch.tensor([1])})
    with pytest.raises(TypeError, match=r"features.values\(\) must"):
        lookup(keyed(BAGS, torch.int32))
    weighted = keyed(BAGS)
    weighted = KeyedJaggedTensor(
        weighted.keys(), weighted.values(), lengths=weighted.lengths(), weights=torch.rand(len(weighted.values()))
    )
    with pytest.raises(ValueError, match="features must be without weights"):
        lookup(weighted)
    keys = ["u", "t", "v"]
    ragged = KeyedJaggedTensor(
        keys, torch.arange(6), lengths=torch.ones(6, dtype=torch.int64), stride_per_key_per_rank=[[1], [2], [3]]
    )
    with pytest.raises(ValueError, match=r"features must have as many bags for each key, got \[1, 2, 3\]"):
        lookup(ragged)
    for lengths in ([1, 1, 2], [1, 3, -1], [0, 0, 2]):
        wrong = KeyedJaggedTensor(keys, torch.arange(3), lengths=torch.tensor(lengths))
        with pytest.raises(ValueError, match="features must have lengths of at least 0 that add up to 3, got"):
            lookup(wrong)
    assert lookup.insert(keyed(BAGS)) == {"users": 0, "things": 0}


def test_what_cannot_be_keyed_or_converted_is_named():
    mixed = FusedEmbeddingLookup(
        {"a": EmbeddingTable(3, dim=2)}, {"f": IdFeature("a"), "g": IdFeature("a", pooling=None)}
    )
    with pytest.raises(ValueError, match=r"lookup must pool all features or none, got \['f'\] beside \['g'\]"):
        KeyedLookup(mixed)
    with pytest.raises(TypeError, match="lookup must be one of FusedEmbeddingLookup"):
        KeyedLookup(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="collections must be of EmbeddingBagCollections"):
        lookup_from_collections([torch.nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="tables of different names, got 'users' twice"):
        lookup_from_collections([bag_collection(), each_collection()])
    twice = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=name, embedding_dim=4, num_embeddings=7, feature_names=["u"]) for name in ("a", "b")
        ]
    )
    with pytest.raises(ValueError, match="look each feature up in one table, got 'u' in two"):
        lookup_from_collections([twice])
    for ids, message in (
        ({"none": torch.arange(7)}, "ids must be of the tables"),
        ({"users": torch.arange(6)}, r"ids\['users'\] must have shape \(7\)"),
        ({"users": torch.zeros(7, dtype=torch.int64)}, r"ids\['users'\] must be different ids"),
    ):
        with pytest.raises(ValueError, match=message):
            lookup_from_collections([bag_collection()], ids=ids)
    lookup = lookup_from_collections([bag_collection()])
    other = each_collection()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"collections must have tables of the lookup, .* got 'things' of width 4"):
        copy_to_collections(lookup, [other])
    assert all(torch.equal(one, before[name]) for name, one in other.state_dict().items())


def shardable(**options):
    lookup = ShardableLookup(sharded.TABLES, sharded.FEATURES, **options)
    lookup.reset_parameters(generator=torch.Generator().manual_seed(1))
    lookup.insert(sharded.whole(0), generator=torch.Generator().manual_seed(2))
    return lookup


def every(vectors):
    return torch.cat([vectors.pooled.flatten(), *(one.flatten() for one in vectors.unpooled.values())])


def test_an_unsharded_lookup_is_a_fused_one_forward_and_backward():
    lookup, fused = shardable(), FusedEmbeddingLookup(sharded.TABLES, sharded.FEATURES)
    fused.reset_parameters(generator=torch.Generator().manual_seed(1))
    fused.insert(sharded.whole(0), generator=torch.Generator().manual_seed(2))
    assert lookup.num_ids == fused.num_ids
    assert lookup.columns == fused.columns
    batch = sharded.whole(0, offset=1)
    got, want = every(lookup(batch)), every(fused(lookup.pack(batch)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert list(lookup(batch).unpooled) == list(fused(batch).unpooled)
    factors = torch.linspace(-1, 1, len(got))
    (got * factors).sum().backward()
    (want * factors).sum().backward()
    again = lookup.to_fused()
    for table in lookup.collections:
        for parameter in table.parameters():
            parameter.data.copy_(parameter.grad)
    gradients = lookup.to_fused()
    for dim, weight in fused.weights.items():
        assert torch.equal(again.weights[dim], weight)
        torch.testing.assert_close(gradients.weights[dim], weight.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fails_at", range(3))
def test_an_insert_that_fails_while_vectors_are_written_changes_nothing(fails_at, monkeypatch):
    lookup = shardable()
    before = copy.deepcopy(lookup.state_dict())
    written, write_rows = [], _collections.write_rows

    def fail(*args):
        written.append(args)
        write_rows(*args)
        if len(written) == fails_at + 1:
            raise MemoryError("no more")

    monkeypatch.setattr(_collections, "write_rows", fail)
    with pytest.raises(MemoryError):
        lookup.insert(sharded.whole(2))
    assert len(written) == fails_at + 1
    for name, tensor in lookup.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    monkeypatch.setattr(_collections, "write_rows", write_rows)
    assert min(lookup.insert(sharded.whole(2)).values()) > 0


def test_a_shardable_lookup_takes_a_fused_one_s_place_and_gives_it_back():
    fused = FusedEmbeddingLookup(sharded.TABLES, sharded.FEATURES)
    fused.insert(sharded.whole(3))
    lookup = ShardableLookup(sharded.TABLES, sharded.FEATURES, seed=5)
    lookup.load_fused(fused)
    again = lookup.to_fused(gradient="rowwise_adagrad", learning_rate=0.5)
    assert (again.gradient, float(again.learning_rate)) == ("rowwise_adagrad", 0.5)
    for dim, weight in fused.weights.items():
        assert torch.equal(again.weights[dim], weight)
    for mine, theirs in zip(again.table.entries(), fused.table.entries(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_shardable_lookup_is_saved_copied_and_made_on_meta():
    lookup, batch = shardable(), sharded.whole(0, offset=1)
    want = every(lookup(batch))
    assert torch.equal(every(copy.deepcopy(lookup)(batch)), want)
    file = io.BytesIO()
    torch.save(lookup.state_dict(), file)
    file.seek(0)
    other = ShardableLookup(sharded.TABLES, sharded.FEATURES, seed=9)
    other.load_state_dict(torch.load(file))
    assert torch.equal(every(other(batch)), want)
    meta = ShardableLookup(sharded.TABLES, sharded.FEATURES, device="meta")
    assert all(weight.is_meta for weight in meta.table_weights())
    meta.bags.to_empty(device="cpu")
    meta.each.to_empty(device="cpu")
    meta.load_fused(lookup.to_fused())
    assert torch.equal(every(meta(batch)), want)
    with torch.no_grad():
        assert torch.equal(every(lookup.eval()(batch)), want)


def test_what_a_shardable_lookup_cannot_be_is_named():
    table = {"a": EmbeddingTable(3, dim=2)}
    with pytest.raises(ValueError, match="features of table 'a' must pool alike, got 'sum' and, for 'g', None"):
        ShardableLookup(table, {"f": IdFeature("a"), "g": IdFeature("a", pooling=None)})
    for name in ("items", "a.b", ""):
        with pytest.raises(ValueError, match="tables must have names that torchrec can take in a ModuleDict"):
            ShardableLookup({name: EmbeddingTable(3, dim=2)}, {"f": IdFeature(name)})
    with pytest.raises(ValueError, match="tables must be those that features look into, got 'b' without any"):
        ShardableLookup({**table, "b": EmbeddingTable(3, dim=2)}, {"f": IdFeature("a")})
    lookup = ShardableLookup(table, {"f": IdFeature("a")})
    with pytest.raises(TypeError, match="lookup must be a FusedEmbeddingLookup, got"):
        lookup.load_fused(lookup)
    with pytest.raises(ValueError, match="must be of a lookup with features"):
        lookup.load_fused(FusedEmbeddingLookup(table, {"f": IdFeature("a", num_unseen=2)}))
    with pytest.raises(ValueError, match=r"lookup must have capacities \[3\], got \[4\]"):
        lookup.load_fused(FusedEmbeddingLookup({"a": EmbeddingTable(4, dim=2)}, {"f": IdFeature("a")}))
    with pytest.raises(ValueError, match="features must be those of the lookup"):
        lookup.insert({})
    with pytest.raises(recblocks.TableFull, match="ids of 'a' must be at most 3 new ones"):
        lookup.insert({"f": torch.arange(4)})
    assert lookup.num_ids == {"a": 0}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_keyed_lookup_and_a_shardable_one_compile_into_one_graph(backend):
    torch.compiler.reset()
    lookup, batch = KeyedLookup(lookup_from_collections([bag_collection()])), keyed(BAGS)
    compiled = torch.compile(lookup, fullgraph=True, backend=backend)
    out, want = compiled(batch).values(), lookup(batch).values()
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    weights = list(lookup.parameters())
    for got, wanted in zip(*(torch.autograd.grad(one.square().sum(), weights) for one in (out, want)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)

    lookup, batch = shardable(), sharded.whole(0, offset=1)
    compiled = torch.compile(lookup, fullgraph=True, backend=backend)
    out, want = every(compiled(batch)), every(lookup(batch))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    weights = lookup.table_weights()
    for got, wanted in zip(*(torch.autograd.grad(one.square().sum(), weights) for one in (out, want)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
