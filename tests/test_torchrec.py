"""torchrec's jagged tensors and collections beside ours: packed sequences, keyed lookups, weights to and fro."""

import copy
import importlib.util
import io

import pytest
import sharded
import torch
from hypothesis import example, given
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

from torchrec import (
    DataType,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)

ROWS = {"users": 7, "things": 9}
SIZES = st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=2, max_size=2)
KEYS = st.permutations(["u", "t", "v"]) | st.permutations(["u", "t", "v", "other"])


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


@given(u=SIZES, t=SIZES, v=SIZES, names=KEYS)
@example(u=[[1, 2], []], t=[[3], [4]], v=[[], []], names=["u", "t", "v"])  # as the lookup has them: nothing is moved
def test_a_keyed_lookup_stands_where_a_bag_collection_stood(u, t, v, names):
    collection = bag_collection()
    lookup = KeyedLookup(lookup_from_collections([collection]))
    bags = {"u": u, "t": t, "v": v, "other": v}
    batch = keyed({name: bags[name] for name in names})
    got, want = lookup(batch), collection(batch)
    assert got.keys() == want.keys()
    assert got.length_per_key() == want.length_per_key()
    # A bag's sum in another order: a few roundings of numbers up to 1.
    torch.testing.assert_close(got.values(), want.values(), rtol=0, atol=1e-6)


@given(u=SIZES, t=SIZES, v=SIZES, names=KEYS)
@example(u=[[1, 2], []], t=[[3], [4]], v=[[], []], names=["u", "t", "v"])
def test_a_keyed_lookup_stands_where_a_collection_of_each_id_stood(u, t, v, names):
    collection = each_collection()
    lookup = KeyedLookup(lookup_from_collections([collection]))
    bags = {"u": u, "t": t, "v": v, "other": v}
    batch = keyed({name: bags[name] for name in names})
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
    inverse = keys, torch.tensor([[0, 1, 0]] * 3)
    shared = KeyedJaggedTensor(keys, torch.arange(6), lengths=torch.ones(6, dtype=torch.int64), inverse_indices=inverse)
    for wrong in (ragged, shared):
        with pytest.raises(ValueError, match="features must have one bag a row for each key"):
            lookup(wrong)
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
    with pytest.raises(TypeError, match=r"collections must be EmbeddingBagCollections and .*, got a Linear"):
        lookup_from_collections([torch.nn.Linear(1, 1)])
    with pytest.raises(TypeError, match="collections must be several, as in a list, got a EmbeddingBagCollection"):
        lookup_from_collections(bag_collection())
    with pytest.raises(ValueError, match="collections must be at least one, got none"):
        lookup_from_collections([])
    with pytest.raises(TypeError, match="ids must be a mapping of tables"):
        lookup_from_collections([bag_collection()], ids=[torch.arange(7)])
    weighted = EmbeddingBagCollection(tables=bag_collection().embedding_bag_configs(), is_weighted=True)
    with pytest.raises(ValueError, match="collections must be without is_weighted"):
        lookup_from_collections([weighted])
    on_meta = EmbeddingBagCollection(tables=bag_collection().embedding_bag_configs(), device=torch.device("meta"))
    with pytest.raises(ValueError, match="collections must not be on meta when rows are read or written, got 'users'"):
        copy_to_collections(lookup_from_collections([bag_collection()]), [on_meta])
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


def test_rows_that_an_id_table_gave_are_not_taken_for_ids():
    made = ShardableLookup({"users": EmbeddingTable(6, dim=4)}, {"u": IdFeature("users")})
    with pytest.raises(ValueError, match="collections must not be a ShardableLookup's: its load_fused and to_fused"):
        lookup_from_collections(made.collections)
    with pytest.raises(ValueError, match="collections must not be a ShardableLookup's"):
        copy_to_collections(lookup_from_collections([bag_collection()]), [made.bags])


def test_vectors_that_a_table_cannot_hold_are_not_written():
    lookup = lookup_from_collections([bag_collection()])
    lookup.weights["4"].data.fill_(1e6)
    short = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name, embedding_dim=dim, num_embeddings=rows, feature_names=[name], data_type=DataType.FP16
            )
            for name, dim, rows in (("things", 8, 9), ("users", 4, 7))
        ]
    )
    before = copy.deepcopy(short.state_dict())
    with pytest.raises(ValueError, match=r"lookup must have vectors that torch\.float16 can hold for 'users'"):
        copy_to_collections(lookup, [short])
    assert all(torch.equal(one, before[name]) for name, one in short.state_dict().items())


def test_offsets_and_lengths_of_32_bits_and_batches_of_nothing_are_taken():
    collection = bag_collection()
    lookup, batch = KeyedLookup(lookup_from_collections([collection])), keyed(BAGS)
    want = lookup(batch).values()
    short = KeyedJaggedTensor(batch.keys(), batch.values(), lengths=batch.lengths().int())
    assert torch.equal(lookup(short).values(), want)
    ends = torch.cat([batch.lengths().new_zeros(1), batch.lengths().cumsum(0)])
    assert torch.equal(lookup(KeyedJaggedTensor(batch.keys(), batch.values(), offsets=ends.int())).values(), want)
    none = KeyedJaggedTensor(["u", "t", "v"], torch.arange(0), lengths=torch.arange(0))
    assert lookup(none).values().shape == (0, 20)
    assert lookup.insert(none) == {"users": 0, "things": 0}


def test_features_of_one_id_and_bags_in_any_order_get_their_own_columns():
    tables = {"a": EmbeddingTable(30, dim=2), "b": EmbeddingTable(30, dim=2), "c": EmbeddingTable(30, dim=3)}
    features = {"f": "b", "g": "a", "h": "c", "i": "b", "j": "a"}
    made = [
        kind(tables, {name: IdFeature(table) for name, table in features.items()})
        for kind in (FusedEmbeddingLookup, ShardableLookup)
    ]
    batch = {name: torch.randint(9, (4,)) for name in features}
    batch["i"] = torch.tensor([1, 2, 3]), torch.tensor([0, 0, 2, 3, 3])
    made[0].insert(batch)
    made[1].load_fused(made[0])
    got, want = made[1](batch).pooled, made[0](batch).pooled
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert want.unique().numel() > 20


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


def test_a_checkpoint_of_another_shardable_lookup_is_refused_and_nothing_is_loaded():
    lookup, batch = shardable(), sharded.whole(0)
    want, other = every(lookup(batch)), sharded.TABLES | {"item": EmbeddingTable(61, dim=4)}
    swapped = dict(reversed(sharded.TABLES.items()))
    for tables, features, message in (
        (other, sharded.FEATURES, "state_dict must be of capacities"),
        (swapped, sharded.FEATURES, "state_dict must be of a lookup with dims"),
        (sharded.TABLES, dict(reversed(sharded.FEATURES.items())), "state_dict must be of a lookup with features"),
    ):
        given = ShardableLookup(tables, features)
        given.insert(batch)
        with pytest.raises(ValueError, match=message):
            lookup.load_state_dict(given.state_dict())
        assert torch.equal(every(lookup(batch)), want)
    half = {name: one for name, one in shardable().state_dict().items() if not name.startswith("table.")}
    with pytest.raises(ValueError, match="state_dict must hold all of a lookup"):
        lookup.load_state_dict(half, strict=False)


def test_a_lookup_whose_tables_are_nowhere_gives_no_rows():
    lookup = ShardableLookup(sharded.TABLES, sharded.FEATURES, device="meta")
    with pytest.raises(ValueError, match="collections must not be on meta when rows are read or written"):
        lookup.insert(sharded.whole(0))
    assert set(lookup.num_ids.values()) == {0}


def test_who_looks_up_while_a_shardable_lookup_is_written_gets_an_error(monkeypatch):
    lookup = shardable()
    write_rows = _collections.write_rows

    def look(*args):
        with pytest.raises(RuntimeError, match="a lookup must not run while the table is written"):
            lookup(sharded.whole(0))
        write_rows(*args)

    monkeypatch.setattr(_collections, "write_rows", look)
    assert min(lookup.insert(sharded.whole(2)).values()) > 0


def test_what_a_shardable_lookup_cannot_be_is_named():
    table = {"a": EmbeddingTable(3, dim=2)}
    with pytest.raises(ValueError, match="features of table 'a' must pool alike, got 'sum' and, for 'g', None"):
        ShardableLookup(table, {"f": IdFeature("a"), "g": IdFeature("a", pooling=None)})
    for name in ("items", "training", "_modules", "a.b", "", 7):
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
