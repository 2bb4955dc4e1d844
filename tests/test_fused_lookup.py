"""The fused lookup: every feature's vectors, gradients and updates against loops, torch's embeddings and each other."""

import copy
import io
import itertools
import pickle
import warnings

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import recblocks
from recblocks import CountMinSketch, EmbeddingTable, FusedEmbeddingLookup, IdFeature
from recblocks.embedding import _buckets, fused_lookup
from recblocks.embedding._gather import lookup_rows
from recblocks.embedding._layout import Layout

LOWEST, HIGHEST = -(2**63), 2**63 - 1
SPECIAL = [0, -1, LOWEST, HIGHEST]
TABLES = {"items": EmbeddingTable(40, dim=4), "users": EmbeddingTable(20, dim=2), "tags": EmbeddingTable(20, dim=4)}
FEATURES = {
    "item": IdFeature("items"),
    "user": IdFeature("users", num_unseen=3),
    "tags": IdFeature("tags", pooling="mean"),
    "liked": IdFeature("items", pooling="sum", num_unseen=2),
    "seen": IdFeature("items", pooling=None),
    "place": IdFeature("users", pooling="mean"),
}
IDS = st.one_of(st.sampled_from(SPECIAL), st.integers(0, 9))


def int64(values):
    return torch.tensor(values, dtype=torch.int64)


def jagged(bags):
    """The ids of all bags, and where each begins."""
    return int64([one for bag in bags for one in bag]), int64([0, *itertools.accumulate(map(len, bags))])


def by_feature(lookup, vectors):
    pooled = {name: vectors.pooled[:, columns] for name, columns in lookup.columns.items()}
    return {name: {**pooled, **vectors.unpooled}[name] for name in [*pooled, *vectors.unpooled]}


def told_apart(lookup):
    """Make every row of a width another vector, with no sum of a few like one of another few."""
    for weight in lookup.weights.values():
        rows = torch.arange(weight.numel(), dtype=torch.float64).view_as(weight)
        weight.data = torch.frac(rows * 0.618033988749895).to(weight.dtype)
    return lookup


def vectors_of(lookup, feature, ids):
    """Each id's vector, asked for alone."""
    table = FEATURES[feature].table
    part, begin = sorted(TABLES, key=lambda name: TABLES[name].dim).index(table), 0
    begin = {"users": 4, "items": 5, "tags": 5 + TABLES["items"].capacity}[table]
    unseen = {"item": 0, "user": 0, "tags": 1, "liked": 2, "seen": 4, "place": 3}[feature]
    weight, first = lookup.weights[str(TABLES[table].dim)].detach(), lookup.table.begins[part]
    found = {}
    for one in ids:
        row = int(lookup.table.find(int64(one), int64(part)))
        at = row - first + begin if row >= 0 else unseen + oracles.unseen_row(one, FEATURES[feature].num_unseen)
        found[one] = weight[at].tolist()
    return found


@st.composite
def batches(draw):
    """A batch as lists; and how the bags of "liked" are given: one id each, two each, or any number."""
    num_rows = draw(st.integers(1, 4))
    shape = draw(st.sampled_from([1, 2, None]))

    def rows_of(least, most):
        return draw(st.lists(st.lists(IDS, min_size=least, max_size=most), min_size=num_rows, max_size=num_rows))

    batch = {name: rows_of(1, 1) for name in ("item", "user", "place")}
    batch["tags"] = rows_of(0, 4)
    batch["liked"] = rows_of(0, 4) if shape is None else rows_of(shape, shape)
    batch["seen"] = draw(st.lists(st.lists(IDS, min_size=3, max_size=3), max_size=3))
    return {name: batch[name] for name in FEATURES}, shape


def tensors(batch, shape):
    liked = jagged(batch["liked"]) if shape is None else int64(batch["liked"])
    return {
        "place": int64(batch["place"]).flatten(),
        "item": int64(batch["item"]).flatten(),
        "user": int64(batch["user"]),
        "tags": jagged(batch["tags"]),
        "liked": liked.flatten() if shape == 1 else liked,
        "seen": int64(batch["seen"]).view(-1, 3),
    }


def make(gradient="dense", **options):
    generator = torch.Generator().manual_seed(0)
    return FusedEmbeddingLookup(TABLES, FEATURES, gradient=gradient, generator=generator, **options)


# --- what it answers ---


@given(
    drawn=batches(),
    known=batches(),
    gradient=st.sampled_from(["dense", "rowwise_adagrad"]),
    backend=st.sampled_from(["auto", "reference"]),
    grad=st.booleans(),
    packed=st.booleans(),
)
def test_any_batch_gives_what_a_loop_over_its_ids_gives(drawn, known, gradient, backend, grad, packed):
    batch, shape = drawn
    lookup = make(gradient, backend=backend)
    lookup.insert(tensors(*known))
    told_apart(lookup)
    with torch.set_grad_enabled(grad):
        vectors = lookup(lookup.pack(tensors(batch, shape)) if packed else tensors(batch, shape))
    assert list(lookup.columns) == [name for name in FEATURES if name != "seen"]
    got = by_feature(lookup, vectors)
    assert vectors.pooled.shape == (len(batch["item"]), 16)
    for name, one in FEATURES.items():
        bags = batch[name]
        every = vectors_of(lookup, name, {0, *(each for bag in bags for each in bag)})
        if one.pooling is None:
            want = torch.tensor([[every[each] for each in row] for row in bags]).view(-1, 3, 4)
        else:
            want = torch.tensor(oracles.pooled_bags(every, bags, one.pooling), dtype=torch.float32)
        # A sum of up to four numbers below 1 rounds three times, a mean once more: four times 2**-24 of at most 4.
        torch.testing.assert_close(got[name], want, rtol=0, atol=1e-6)


def simple(num_features=3, capacity=50, dim=4, num_unseen=1, **options):
    tables = {f"table {number}": EmbeddingTable(capacity, dim) for number in range(num_features)}
    features = {f"id {number}": IdFeature(f"table {number}", num_unseen=num_unseen) for number in range(num_features)}
    return FusedEmbeddingLookup(tables, features, generator=torch.Generator().manual_seed(0), **options)


def columns(ids):
    return {f"id {number}": column for number, column in enumerate(ids.unbind(1))}


def test_the_same_id_of_two_tables_is_two_ids_and_of_one_table_one():
    lookup = make()
    one = int64([7])
    batch = dict.fromkeys(FEATURES, one)
    assert lookup.insert(batch) == {"items": 1, "users": 1, "tags": 1}
    assert lookup.num_ids == {"items": 1, "users": 1, "tags": 1}
    found = by_feature(lookup, lookup(batch))
    assert torch.equal(found["item"], found["liked"])
    assert torch.equal(found["item"], found["seen"])
    assert not torch.equal(found["item"], found["tags"])


def test_unseen_ids_get_rows_of_their_feature_alone_and_the_same_ones_whatever_the_table_does():
    lookup = simple(num_unseen=5)
    ids = torch.randint(LOWEST, HIGHEST, (2000, 3), generator=torch.Generator().manual_seed(1))
    before = lookup(columns(ids))
    before = before._replace(pooled=before.pooled.detach())
    every = list(by_feature(lookup, before).values())
    assert [len(vectors.unique(dim=0)) for vectors in every] == [5, 5, 5]
    assert len(torch.cat(every).unique(dim=0)) == 15
    lookup.insert(columns(torch.arange(150).view(50, 3)))
    lookup.grow("table 1", 400)
    assert torch.equal(lookup(columns(ids)).pooled, before.pooled)


def test_no_row_is_another_id_s():
    lookup = simple(num_features=5, capacity=400)
    ids = torch.randint(LOWEST, HIGHEST, (400, 5), generator=torch.Generator().manual_seed(1))
    assert lookup.insert(columns(ids)) == {f"table {number}": 400 for number in range(5)}
    found = torch.cat(list(by_feature(lookup, lookup(columns(ids))).values()))
    assert len(found.unique(dim=0)) == 2000
    assert torch.equal(lookup(columns(ids.flip(0))).pooled, lookup(columns(ids)).pooled.flip(0))


def test_a_new_id_begins_with_weights_that_no_other_had():
    lookup = simple(num_features=1, capacity=2, gradient="rowwise_adagrad", evict="least_used")
    generator = torch.Generator().manual_seed(5)
    lookup.insert(columns(int64([[1], [2], [2]])))
    old = lookup(columns(int64([[1], [2]]))).pooled
    old.sum().backward()
    old = lookup(columns(int64([[1], [2]]))).pooled.detach()
    assert (lookup.moment_4 > 0).sum() == 2
    assert lookup.insert(columns(int64([[3]])), generator=generator) == {"table 0": 1}
    new = lookup(columns(int64([[3], [2], [1]]))).pooled
    assert not torch.isin(new[0], old).any()
    assert (new[0].abs() <= 2**-0.5).all()
    assert torch.equal(new[1], old[1])
    assert not torch.equal(new[2], old[0])
    assert (lookup.moment_4 > 0).sum() == 1


@pytest.mark.parametrize("packed", [False, True])
def test_new_ids_get_rows_in_ascending_order_however_a_batch_is_laid_out(packed):
    lookup = FusedEmbeddingLookup(TABLES, FEATURES)
    batch = {
        "seen": int64([[50, 9], [1, 1]]),
        "liked": int64([30, LOWEST]),
        "tags": jagged([[8], [3]]),
        "place": jagged([[6], [7]]),
        "item": int64([40, 9]),
        "user": int64([60, -7]),
    }
    lookup.insert(lookup.pack(batch) if packed else batch)
    lookup.insert({**batch, "item": int64([0, HIGHEST])})
    # Widths run upwards: the users come first.
    users, items, tags = [-7, 6, 7, 60], [LOWEST, 1, 9, 30, 40, 50, 0, HIGHEST], [3, 8]
    assert lookup.table.entries()[0].tolist() == users + items + tags


def test_growth_erasure_and_eviction_leave_every_other_vector_where_it_was():
    lookup = make("rowwise_adagrad", evict="least_used")
    batch = {name: torch.arange(12) for name in FEATURES}
    lookup.insert(batch)
    lookup(batch).pooled.sum().backward()
    want, moments = lookup(batch), {dim: lookup.get_buffer(f"moment_{dim}").sum() for dim in (2, 4)}
    assert lookup.capacities == {"items": 40, "users": 20, "tags": 20}
    for table, capacity in (("users", 30), ("items", 90), ("tags", 21), ("items", 90)):
        lookup.grow(table, capacity)
        assert lookup.capacities[table] == capacity
        assert torch.equal(lookup(batch).pooled, want.pooled)
        assert torch.equal(lookup(batch).unpooled["seen"], want.unpooled["seen"])
    for dim, moment in moments.items():
        assert torch.equal(lookup.get_buffer(f"moment_{dim}").sum(), moment)
        assert len(lookup.get_buffer(f"moment_{dim}")) == len(lookup.weights[str(dim)])
    assert lookup.erase("items", int64([3, 3, 99])) == 1
    lookup.insert({name: torch.arange(1, 12) for name in FEATURES if name != "x"} | {"tags": torch.arange(11)})
    assert lookup.evict("users", 1).tolist() == [0]
    kept = torch.tensor([each for each in range(12) if each not in (0, 3, 11)])
    same = {name: torch.where(torch.isin(batch[name], kept), batch[name], 5) for name in FEATURES}
    got = lookup(same).pooled
    assert torch.equal(got[kept], want.pooled[kept])
    assert lookup.num_ids == {"items": 12, "users": 11, "tags": 12}


def test_ids_are_admitted_when_they_were_seen_often_enough():
    lookup = simple(num_features=2, admit_after=2, sketch=CountMinSketch(500, 4))
    once = columns(int64([[1, 2]]))
    assert lookup.insert(once) == {"table 0": 0, "table 1": 0}
    assert lookup.insert(columns(int64([[2, 2]]))) == {"table 0": 0, "table 1": 1}
    assert lookup.insert(once) == {"table 0": 1, "table 1": 0}


# --- how it trains ---


def bags_of_all(num_rows=6):
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(4, (2, num_rows), generator=generator)
    ids = [torch.randint(9, (int(their.sum()),), generator=generator) for their in lengths]
    bags = [(each, functional.pad(their.cumsum(0), (1, 0))) for each, their in zip(ids, lengths, strict=True)]
    rest = torch.randint(9, (4, num_rows), generator=generator)
    return {
        "item": rest[0],
        "user": rest[1],
        "tags": bags[0],
        "liked": bags[1],
        "seen": rest[2:].view(2, -1, 2),
        "place": rest[3],
    }


def loss_of(vectors):
    """A loss that gives every number of every vector a gradient of its own."""
    every = torch.cat([vectors.pooled.flatten(), vectors.unpooled["seen"].flatten()])
    return (every * torch.linspace(-1, 1, len(every))).sum() + every.square().sum()


def apart(lookup, batch):
    """The same vectors from torch's own embeddings, a feature at a time; and copies of the weights that they read."""
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in lookup.weights.items()}
    found = {}
    for number, (name, one) in enumerate(FEATURES.items()):
        weight, given_ = weights[str(TABLES[one.table].dim)], batch[name]
        ids, offsets = given_ if isinstance(given_, tuple) else (given_, None)
        rows = lookup_rows(ids, lookup.table.slots, lookup.places[:, number])
        if one.pooling is None:
            found[name] = functional.embedding(rows, weight)
        else:
            offsets = torch.arange(len(ids) + 1) if offsets is None else offsets
            found[name] = functional.embedding_bag(rows, weight, offsets, mode=one.pooling, include_last_offset=True)
    pooled = torch.cat([found[name] for name in FEATURES if name != "seen"], 1)
    return recblocks.Vectors(pooled, {"seen": found["seen"]}), weights


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
def test_gradients_are_those_of_torch_s_embeddings(gradient):
    lookup, batch = make(gradient), bags_of_all()
    lookup.insert(batch)
    vectors, weights = apart(lookup, batch)
    loss_of(lookup(batch)).backward()
    loss_of(vectors).backward()
    for name, weight in lookup.weights.items():
        assert weight.grad.is_sparse is (gradient == "sparse")
        # Up to twenty places of one row are added in another order: twenty roundings of numbers below 4.
        torch.testing.assert_close(weight.grad.to_dense(), weights[name].grad, rtol=0, atol=5e-6)


@pytest.mark.parametrize("gradient", ["sgd", "rowwise_adagrad"])
def test_a_hundred_steps_are_those_of_a_scalar_oracle(gradient):
    lookup = simple(num_features=2, capacity=6, dim=3, gradient=gradient, learning_rate=0.05)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, (100, 5, 2), generator=generator)  # of eight ids two never get a row
    lookup.insert(columns(torch.arange(6)[:, None].expand(6, 2)))
    weight = lookup.weights["3"].detach().double().tolist()
    targets = torch.randn(100, 5, 6, generator=generator)
    steps = []
    for each, target in zip(ids, targets, strict=True):
        lookup.learning_rate.fill_(0.05)
        (lookup(columns(each)).pooled * target).sum().backward()
        rows = [lookup_rows(each[:, number], lookup.table.slots, lookup.places[:, number]) for number in range(2)]
        pairs = zip(torch.cat(rows).tolist(), torch.cat(target.double().chunk(2, 1)).tolist(), strict=True)
        steps.append(list(pairs))
    want, moment = oracles.train_rows(weight, [0.0] * len(weight), steps, 0.05, gradient == "rowwise_adagrad")
    # A hundred updates of numbers below 4, each rounded to 2**-24 of itself a few times.
    torch.testing.assert_close(lookup.weights["3"].detach().double(), torch.tensor(want).double(), rtol=0, atol=1e-4)
    if gradient == "rowwise_adagrad":
        torch.testing.assert_close(lookup.moment_3.double(), torch.tensor(moment).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gradient", ["sgd", "rowwise_adagrad"])
def test_an_update_touches_the_rows_that_were_seen_and_no_other(gradient):
    lookup, batch = make(gradient, learning_rate=0.5), bags_of_all()
    lookup.insert({name: torch.arange(15) for name in FEATURES})
    before = {name: weight.detach().clone() for name, weight in lookup.weights.items()}
    vectors, weights = apart(lookup, batch)
    loss_of(vectors).backward()
    loss_of(lookup(batch)).backward()
    for name, weight in lookup.weights.items():
        seen = weights[name].grad.any(1)
        assert 0 < seen.sum() < len(seen)
        assert torch.equal((weight != before[name]).any(1), seen)
        assert weight.grad is None
    assert torch.equal(lookup.anchor.grad, torch.zeros(0))


def test_two_lookups_before_a_backward_are_two_updates():
    lookup = simple(num_features=1, gradient="sgd", learning_rate=0.5)
    lookup.insert(columns(int64([[1]])))
    before = lookup(columns(int64([[1]]))).pooled.detach()
    first, second = (lookup(columns(int64([[1]]))).pooled.sum() for _ in range(2))
    (first + 2 * second).backward()
    torch.testing.assert_close(lookup(columns(int64([[1]]))).pooled, before - 1.5)


def test_an_empty_batch_changes_nothing():
    lookup = make("rowwise_adagrad")
    before = copy.deepcopy(lookup.state_dict())
    batch = {name: int64([]) for name in FEATURES}
    assert lookup.insert(batch) == {"items": 0, "users": 0, "tags": 0}
    vectors = lookup(batch)
    assert vectors.pooled.shape == (0, 16)
    vectors.pooled.sum().backward()
    assert all(torch.equal(one, before[name]) for name, one in lookup.state_dict().items() if "numbers" not in name)


def test_a_cast_keeps_sums_and_learning_rate_in_float32():
    lookup = simple(num_features=1, gradient="rowwise_adagrad", learning_rate=0.1).to(torch.bfloat16)
    assert lookup.weights["4"].dtype == torch.bfloat16
    assert lookup.moment_4.dtype == lookup.learning_rate.dtype == torch.float32
    assert lookup.learning_rate == torch.tensor(0.1)


# --- checkpoints ---


def test_a_checkpoint_takes_the_lookup_s_place_whatever_their_capacities():
    lookup, other, batch = make("rowwise_adagrad"), make("rowwise_adagrad"), bags_of_all()
    lookup.grow("items", 100)
    lookup.insert(batch)
    loss_of(lookup(batch)).backward()
    file = io.BytesIO()
    torch.save(lookup.state_dict(), file)
    for assign in (False, True):
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert other.capacities == lookup.capacities
        assert torch.equal(other(batch).pooled, lookup(batch).pooled)
        assert torch.equal(other.moment_4, lookup.moment_4)
        other.insert({name: torch.arange(100, 110) for name in FEATURES})
        other = make("rowwise_adagrad")
    nested = torch.nn.Sequential(make("rowwise_adagrad"))
    nested.load_state_dict(torch.nn.Sequential(lookup).state_dict())
    assert torch.equal(nested[0](batch).pooled, lookup(batch).pooled)


def test_a_checkpoint_of_another_layout_or_width_is_refused_and_nothing_is_loaded():
    lookup, batch = make(), bags_of_all()
    lookup.insert(batch)
    want = lookup(batch).pooled
    wider = {**TABLES, "users": EmbeddingTable(20, dim=3)}
    other_order = {name: FEATURES[name] for name in reversed(FEATURES)}
    others = {
        "a lookup with dims": FusedEmbeddingLookup(wider, FEATURES),
        "a lookup with features": FusedEmbeddingLookup(TABLES, other_order),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            lookup.load_state_dict(other.state_dict())
    state = make().state_dict()
    spoiled = {
        "weights.4": state["weights.4"][:-1],
        "moment_4": torch.zeros(3),
        "places": state["places"] + 1,
        "table.keys": state["table.keys"][:-1],
        "table.begins": state["table.begins"][[0, 3]],
    }
    for name, value in spoiled.items():
        with pytest.raises(ValueError, match="state_dict"):
            lookup.load_state_dict({**state, name: value})
        with pytest.raises(ValueError, match="state_dict must hold all of a lookup, got none of"):
            lookup.load_state_dict({key: value for key, value in state.items() if key != name}, strict=False)
    assert torch.equal(lookup(batch).pooled, want)
    with pytest.raises(RuntimeError, match="Missing key"):
        lookup.load_state_dict({})


# --- what bad input gets ---


def test_bad_arguments_are_named():
    for tables, features, message in (
        ({}, FEATURES, "tables must be a mapping that names at least one, got {}"),
        (TABLES, {}, "features must be a mapping that names at least one, got {}"),
        (None, FEATURES, "tables must be a mapping that names at least one, got None"),
        (TABLES, {"item": IdFeature("item")}, r"features\['item'\]\.table must be one of 'items', 'users', 'tags'"),
        (TABLES, {"item": IdFeature("items", pooling="max")}, r"features\['item'\]\.pooling must be one of"),
        (TABLES, {"item": IdFeature("items", num_unseen=0)}, r"features\['item'\]\.num_unseen must be from 1"),
        ({"items": EmbeddingTable(0, 4)}, FEATURES, r"tables\['items'\]\.capacity must be from 1"),
        ({"items": EmbeddingTable(4, 0)}, FEATURES, r"tables\['items'\]\.dim must be from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedEmbeddingLookup(tables, features)
    with pytest.raises(TypeError, match=r"tables\['items'\] must be an EmbeddingTable, got 5"):
        FusedEmbeddingLookup({"items": 5}, FEATURES)
    with pytest.raises(TypeError, match=r"features\['item'\] must be an IdFeature, got 'items'"):
        FusedEmbeddingLookup(TABLES, {"item": "items"})
    with pytest.raises(ValueError, match="gradient must be one of"):
        FusedEmbeddingLookup(TABLES, FEATURES, gradient="adam")
    with pytest.raises(ValueError, match="learning_rate must be finite and at least 0"):
        FusedEmbeddingLookup(TABLES, FEATURES, learning_rate=-1.0)
    lookup = make()
    for call in (
        lambda: lookup.grow("item", 90),
        lambda: lookup.evict("item", 0),
        lambda: lookup.erase("item", int64([])),
    ):
        with pytest.raises(ValueError, match="table must be one of 'items', 'users', 'tags', got 'item'"):
            call()
    with pytest.raises(TypeError, match="ids must be int64"):
        lookup.erase("items", torch.zeros(1))
    with pytest.raises(TypeError, match="capacity must be an int, got '9'"):
        lookup.grow("items", "9")
    with pytest.raises(ValueError, match="capacity must be from 40 to"):
        lookup.grow("items", 39)
    for call in (lookup, lookup.insert, lookup.pack):
        with pytest.raises(TypeError, match="features must be a mapping of names, or packed, got 5"):
            call(5)


BAD = {
    "a missing feature": ("item", None, ValueError, r"features must be those of the lookup, got none of \['item'\]"),
    "an unknown feature": ("x", int64([1]), ValueError, r"got none of \[\] and unknown \['x'\]"),
    "another dtype": ("item", torch.zeros(6), TypeError, r"features\['item'\] must be int64, got a float32"),
    "a list": ("item", [1] * 6, TypeError, r"features\['item'\] must be"),
    "three dimensions": ("item", int64([[[1]]]), ValueError, r"features\['item'\] must have shape \(B\) or \(B, L\)"),
    "other rows": ("item", int64([1]), ValueError, "same number of rows, got 6 for 'user' and 1 for 'item'"),
    "an offset that runs backwards": (
        "tags",
        (int64([1, 2]), int64([0, 2, 1, 2, 2, 2, 2])),
        ValueError,
        r"features\['tags'\]\[1\] must never descend",
    ),
    "a bag that reaches past its ids": (
        "tags",
        (int64([1, 2]), int64([0, 1, 1, 1, 1, 1, 3])),
        ValueError,
        r"features\['tags'\]\[1\] must run from 0 to 2",
    ),
    "offsets of a feature without bags": (
        "seen",
        (int64([1]), int64([0, 1])),
        ValueError,
        r"features\['seen'\] must be ids alone where they are not pooled",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_features_are_named_where_all_are_alike_too(backend):
    tables, features = {"t": EmbeddingTable(9, 2)}, {name: IdFeature("t") for name in "abc"}
    lookup, ids = FusedEmbeddingLookup(tables, features, backend=backend), int64([1, 2, 3])
    bags = dict.fromkeys("abc", (ids, int64([0, 1, 3])))
    assert lookup(bags).pooled.shape == (2, 6)
    for offsets, message in (
        (int64([1, 1, 3]), "must run from 0 to 3"),
        (int64([0, 1, 2]), "must run from 0 to 3"),
        (int64([0, 4, 3]), "must never descend"),
        (int64([0, 3]), "must have the same number of rows"),
        (int64([]), r"must have shape \(B\+1,\) with B of at least 0"),
        (torch.zeros(3), "must be int64, got a float32"),
        (int64([0, 1, 3])[None], r"must have shape \(B \+ 1\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            lookup({**bags, "b": (ids, offsets)})
        with pytest.raises((TypeError, ValueError)):
            lookup(dict.fromkeys("abc", (ids, offsets.float())))
    for wrong, message in ((ids.float(), "int64"), (ids.to("meta"), "must be on cpu like the lookup, got meta")):
        with pytest.raises((TypeError, ValueError), match=message):
            lookup(dict.fromkeys("abc", wrong))
        with pytest.raises((TypeError, ValueError), match=message):
            lookup(dict.fromkeys("abc", (wrong, int64([0, 3]))))
        with pytest.raises((TypeError, ValueError), match=message):
            lookup({"a": ids, "b": wrong, "c": ids})
        with pytest.raises((TypeError, ValueError), match=message):
            lookup({**bags, "c": (wrong, int64([0, 1, 3]))})
        with pytest.raises((TypeError, ValueError), match=message):
            lookup({**bags, "c": (ids, int64([0, 1, 3]).to(wrong))})
    with pytest.raises(ValueError, match=r"must have shape \(B\+1,\) with B of at least 0"):
        lookup(dict.fromkeys("abc", (int64([]), int64([]))))
    with pytest.raises(ValueError, match="same number of rows, got 2 for 'b' and 3 for 'a'"):
        lookup({"a": ids, "b": ids[:2], "c": ids})
    with pytest.raises(ValueError, match=r"features\['b'\] must have shape \(N\)"):
        lookup({**bags, "b": (ids[:, None], int64([0, 1, 3]))})
    with pytest.raises(ValueError, match="same number of rows, got 3 for 'b' and 2 for 'a'"):
        lookup({**bags, "b": ids})
    with pytest.raises(ValueError, match=r"features\['b'\]\[1\] must run from 0 to 3"):
        lookup({"a": ids[:2], "b": (ids, int64([0, 1, 2])), "c": ids[:2]})
    with pytest.raises(TypeError, match=r"features\['b'\]\[1\] must be a torch.Tensor"):
        lookup({**bags, "b": (ids, None)})
    with pytest.raises(TypeError, match=r"features\['b'\] must be a torch.Tensor"):
        lookup({**bags, "b": (ids,)})


@pytest.mark.parametrize("case", BAD)
def test_bad_features_are_named_and_nothing_is_inserted(case):
    name, value, error, message = BAD[case]
    lookup, batch = make(), bags_of_all()
    batch = {key: each for key, each in batch.items() if key != name or value is not None}
    batch.update({} if value is None else {name: value})
    for call in (lookup, lookup.insert):
        with pytest.raises(error, match=message):
            call(batch)
    assert sum(lookup.num_ids.values()) == 0


def test_offsets_of_a_feature_that_does_not_pool_are_refused_where_all_are_pairs():
    tables, pair = {"t": EmbeddingTable(9, 4)}, jagged([[1], [2, 3]])
    lookup = FusedEmbeddingLookup(tables, {"a": IdFeature("t"), "b": IdFeature("t", pooling=None)})
    with pytest.raises(ValueError, match=r"features\['b'\] must be ids alone where they are not pooled"):
        lookup({"a": pair, "b": pair})


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_packed_batch_of_another_dtype_or_device_is_refused(backend):
    lookup = make(backend=backend)
    packed = lookup.pack(bags_of_all())
    for field in ("ids", "feature", "offsets"):
        for change, error, says in (
            (torch.Tensor.int, TypeError, "features must be int64, got a int32 tensor"),
            (lambda one: one.to("meta"), ValueError, "features must be packed on cpu like the lookup, got meta"),
        ):
            groups = tuple(
                group if getattr(group, field) is None else group._replace(**{field: change(getattr(group, field))})
                for group in packed.groups
            )
            for grad in (True, False):
                with torch.set_grad_enabled(grad), pytest.raises(error, match=says):
                    lookup(packed._replace(groups=groups))


@st.composite
def ids_and_bags(draw):
    """Of some features the ids of each row; how many each row has, None for any number; and whether it is wide.

    0 is a feature without bags, which has any number of ids.
    """
    num_rows, rows = draw(st.integers(0, 4)), []
    sizes = draw(st.lists(st.sampled_from([1, 2, None, 0]), min_size=1, max_size=5))
    for size in sizes:
        row = st.lists(IDS, min_size=size or 0, max_size=size or 3)
        rows.append(draw(st.lists(row, min_size=num_rows, max_size=num_rows)))
    return rows, sizes, draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))


@given(ids_and_bags(), st.sampled_from(["auto", "reference"]), st.sampled_from(["", "ids", "offsets"]), st.booleans())
def test_features_are_laid_side_by_side(drawn, backend, strided, turned):
    rows, sizes, wide = drawn
    names = [f"f{at}" for at in range(len(rows))]
    tables = {name: EmbeddingTable(9, 3 if one else 2) for name, one in zip(names, wide, strict=True)}
    poolings = zip(names, (None if size == 0 else "sum" for size in sizes), strict=True)
    lookup = FusedEmbeddingLookup(tables, {name: IdFeature(name, one) for name, one in poolings}, backend=backend)
    batch = {}
    for name, bags, size in zip(names, rows, sizes, strict=True):
        ids, offsets = jagged(bags)
        ids = ids.repeat_interleave(2)[::2] if strided == "ids" else ids
        offsets = offsets.repeat_interleave(2)[::2] if strided == "offsets" else offsets
        batch[name] = (ids, offsets) if size is None else ids.view(-1, 2) if size == 2 else ids
    packed = lookup.pack(dict(reversed(batch.items())) if turned else batch)
    alike = {1: "one", 0: "each"}
    assert len(packed.groups) == len({(one, alike.get(size)) for one, size in zip(wide, sizes, strict=True)})
    for group in packed.groups:
        own = [at for at, name in enumerate(names) if name in group.names]
        assert group.names == tuple(names[at] for at in own)
        num_ids = [[at] * sum(map(len, rows[at])) for at in own]
        each = [[at] for at in own] if sizes[own[0]] != 0 else list(itertools.chain(*num_ids))
        assert group.feature.tolist() == each
        flat = [bag for at in own for bag in rows[at]]
        assert group.ids.flatten().tolist() == [one for bag in flat for one in bag]
        if sizes[own[0]] == 0:
            assert group.shapes == tuple((len(one),) for one in num_ids)
        elif sizes[own[0]] != 1:
            assert group.offsets.tolist() == [0, *itertools.accumulate(map(len, flat))]
            assert group.sizes.tolist() == [sum(map(len, rows[at])) for at in own]
        else:
            assert (group.offsets, group.sizes) == (None, None)
            assert group.ids.shape == (len(own), len(rows[0]))


class OfOne(torch.nn.Module):
    """What a lookup gives of one feature, whose bags have an id each where they are bags."""

    def __init__(self, in_bags):
        super().__init__()
        self.lookup, self.in_bags = FusedEmbeddingLookup({"t": EmbeddingTable(9, 2)}, {"a": IdFeature("t")}), in_bags
        self.lookup.insert({"a": torch.arange(9)})

    def forward(self, ids):
        return self.lookup({"a": (ids, int64([0, 1, 2])) if self.in_bags else ids}).pooled


@pytest.mark.parametrize(("by", "in_bags"), [("jit", False), ("jit", True), ("make_fx", False)])
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_traced_takes_other_batches_too(by, in_bags, grad):
    module, ids, others = OfOne(in_bags), int64([1, 2]), int64([5, 6])
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")  # torch would have its old tracer be used no more
        traced = torch.jit.trace(module, (ids,), check_trace=False) if by == "jit" else make_fx(module)(ids)
        assert torch.equal(traced(others), module(others))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_default_device_is_not_that_of_the_ids(backend):
    tables, features = {"t": EmbeddingTable(9, 2)}, {name: IdFeature("t") for name in "abc"}
    lookup = FusedEmbeddingLookup(tables, features, backend=backend)
    ids, bags = int64([1, 2]), (int64([1, 2, 3]), int64([0, 1, 3]))
    for batch in (dict.fromkeys("abc", ids), dict.fromkeys("abc", bags), {"a": ids, "b": bags, "c": ids}):
        want = lookup(batch).pooled
        for grad in (False, True):
            with torch.device("meta"), torch.set_grad_enabled(grad):
                got, packed = lookup(batch).pooled, lookup(lookup.pack(batch)).pooled
            assert torch.equal(got, want)
            assert torch.equal(packed, want)


def test_a_packed_batch_without_a_feature_or_with_one_twice_is_refused():
    lookup = make()
    packed = lookup.pack(bags_of_all())
    for groups in (packed.groups[:-1], packed.groups[:1] + packed.groups):
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="each once, got"):
                lookup(packed._replace(groups=groups))


def test_more_ids_than_rows_are_an_error_and_none_is_inserted():
    lookup = make()
    before = copy.deepcopy(lookup.state_dict())
    message = "ids of 'users' must be at most 20 new ones, which are the rows that can be given, got 21"
    with pytest.raises(recblocks.TableFull, match=message) as full:
        lookup.insert({name: torch.arange(21) for name in FEATURES})
    assert (full.value.room, full.value.wanted, full.value.table) == (20, 21, "users")
    again = pickle.loads(pickle.dumps(full.value))
    assert (str(again), again.table, again.part) == (str(full.value), "users", full.value.part)
    assert all(torch.equal(one, before[name]) for name, one in lookup.state_dict().items())


def unchanged(lookup, before):
    state = lookup.state_dict()
    return state.keys() == before.keys() and all(torch.equal(one, before[name]) for name, one in state.items())


def full_lookup(gradient="rowwise_adagrad"):
    lookup = make(gradient, evict="least_used", learning_rate=0.1)
    lookup.insert({name: torch.arange(20) for name in FEATURES})
    lookup({name: torch.arange(20) for name in FEATURES}).pooled.sum().backward()
    return lookup


def test_an_insert_that_fails_while_weights_are_drawn_changes_nothing():
    lookup = full_lookup()
    before = copy.deepcopy(lookup.state_dict())
    new = {name: torch.arange(100, 120) for name in FEATURES}
    with pytest.raises(TypeError):
        lookup.insert(new, generator=5)
    assert unchanged(lookup, before)
    assert lookup.insert(new) == {"items": 20, "users": 20, "tags": 20}


def test_sightings_of_an_insert_that_fails_are_not_counted():
    lookup = simple(num_features=1, admit_after=2, sketch=CountMinSketch(64, 2))
    lookup.insert(columns(int64([[5]])))
    with pytest.raises(TypeError):
        lookup.insert(columns(int64([[5], [6]])), generator=5)
    assert lookup.table.sketch.query(int64([5, 6])).tolist() == [1, 0]


@pytest.mark.parametrize("where", ["_widened", "IdTable._grow", "Layout.places", "IdTable._remember"])
def test_a_growth_that_fails_changes_nothing(where, monkeypatch):
    lookup, batch = full_lookup("dense"), bags_of_all()
    before, want = copy.deepcopy(lookup.state_dict()), lookup(batch).pooled.detach()
    del lookup.weights["4"].grad, lookup.weights["2"].grad

    def fail(*_):
        raise KeyboardInterrupt

    name, _, attribute = where.rpartition(".")
    monkeypatch.setattr({"": fused_lookup, "IdTable": recblocks.IdTable, "Layout": Layout}[name], attribute, fail)
    with pytest.raises(KeyboardInterrupt):
        lookup.grow("users", 30)
    monkeypatch.undo()
    assert unchanged(lookup, before)
    assert torch.equal(lookup(batch).pooled, want)
    lookup.grow("users", 30)
    assert torch.equal(lookup(batch).pooled, want)


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
def test_weights_take_no_other_shape_while_a_graph_of_theirs_is_alive(gradient):
    lookup, batch = make(gradient), bags_of_all()
    lookup.insert(batch)
    loss = lookup(batch).pooled.sum()
    loss.backward()
    other = make(gradient)
    other.grow("items", 60)
    for call in (lambda: lookup.grow("items", 60), lambda: lookup.load_state_dict(other.state_dict())):
        with pytest.raises(RuntimeError, match="must not run while the graph of an earlier lookup, or a DDP, is alive"):
            call()
    assert lookup.capacities["items"] == 40
    swapped = make(gradient)
    swapped.grow("items", 41)
    del loss
    seen = lookup(batch).unpooled["seen"].sum()  # of one width alone
    before = copy.deepcopy(lookup.state_dict())
    swapped.grow("users", 21)
    with pytest.raises(RuntimeError, match="delete the last loss and vectors"):
        lookup.load_state_dict(swapped.state_dict())
    assert unchanged(lookup, before)
    del seen
    with torch.inference_mode():
        lookup.grow("items", 59)
    lookup.grow("items", 60)
    assert lookup.weights["4"].grad is None
    lookup(batch).pooled.sum().backward()
    assert lookup.weights["4"].grad.shape == lookup.weights["4"].shape


def test_who_looks_up_while_it_is_written_gets_an_error(monkeypatch):
    lookup, batch, refused = full_lookup(), bags_of_all(), []
    for name in ("_insert", "_grow"):
        work = getattr(recblocks.IdTable, name)

        def meanwhile(*args, work=work):
            done = work(*args)
            with pytest.raises(RuntimeError, match="a lookup must not run while the table is written"):
                lookup(batch)
            with pytest.raises(RuntimeError, match="a copy must not run while the table is written"):
                recblocks.ServingLookup(lookup)
            refused.append(1)
            return done

        monkeypatch.setattr(recblocks.IdTable, name, meanwhile)
    lookup.insert({name: torch.arange(30, 35) for name in FEATURES})
    lookup.grow("users", 30)
    assert len(refused) == 2


def test_a_checkpoint_with_another_sketch_or_rate_is_refused_and_nothing_is_loaded():
    lookup = make("rowwise_adagrad", admit_after=2, sketch=CountMinSketch(64, 2))
    other = make("rowwise_adagrad", admit_after=2, sketch=CountMinSketch(128, 2), learning_rate=3.0)
    other.grow("items", 60)
    before = copy.deepcopy(lookup.state_dict())
    with pytest.raises(ValueError, match="state_dict must be of a CountMinSketch"):
        lookup.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"state_dict\['learning_rate'\] must be one number"):
        lookup.load_state_dict({**lookup.state_dict(), "learning_rate": torch.zeros(4)})
    assert unchanged(lookup, before)
    plain = make("dense")
    plain.load_state_dict(make("sgd").state_dict())
    make("sgd").load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"state_dict\['moment_4'\] must have shape \(0\)"):
        plain.load_state_dict(make("rowwise_adagrad").state_dict())


def test_a_lookup_that_was_loaded_by_assignment_grows_alone():
    giver, lookup, batch = make(), make(), bags_of_all()
    giver.insert(batch)
    lookup.load_state_dict(giver.state_dict(), assign=True)
    want = lookup(batch).pooled.detach()
    giver.grow("users", 30)
    assert torch.equal(lookup(batch).pooled, want)
    assert torch.equal(giver(batch).pooled, want)


def test_ids_packed_for_another_lookup_are_refused():
    lookup = make()
    reordered = FusedEmbeddingLookup(TABLES, {name: FEATURES[name] for name in reversed(FEATURES)})
    wider = FusedEmbeddingLookup({**TABLES, "users": EmbeddingTable(9, dim=3)}, FEATURES)
    for other in (reordered, wider):
        for call in (lookup, lookup.insert):
            with pytest.raises(ValueError, match="features must be of a lookup with"):
                call(other.pack(bags_of_all()))
    larger = make()
    larger.grow("users", 90)
    assert torch.equal(lookup(larger.pack(bags_of_all())).pooled, lookup(bags_of_all()).pooled)


def test_growth_moves_what_belongs_to_a_row_with_it():
    tables = {"first": EmbeddingTable(4, dim=3), "second": EmbeddingTable(4, dim=3)}
    features = {"a": IdFeature("first"), "b": IdFeature("second")}
    lookup = FusedEmbeddingLookup(tables, features, gradient="rowwise_adagrad", evict="least_used")
    ids = int64([1, 2, 3, 4])
    lookup.insert({"a": ids, "b": ids})
    lookup.insert({"a": ids[:1], "b": ids[2:3]})  # of "second" id 3 is used most
    lookup.erase("second", ids[:1])
    (lookup({"a": ids, "b": ids}).pooled * torch.arange(4)[:, None]).sum().backward()
    moments = lookup.moment_3.clone()
    lookup.grow("first", 7)
    assert torch.equal(lookup.moment_3[:6], moments[:6])
    assert torch.equal(lookup.moment_3[6:9], torch.zeros(3))
    assert torch.equal(lookup.moment_3[9:], moments[6:])
    assert lookup.evict("second", 2).tolist() == [2, 4]
    assert lookup.insert({"a": ids[:1], "b": int64([9])}) == {"first": 0, "second": 1}
    assert lookup.table.find(int64([9, 2, 3, 4]), int64(1)).tolist() == [7, -1, 9, -1]


def test_a_reset_lookup_holds_nothing():
    lookup = full_lookup()
    lookup.reset_parameters(generator=torch.Generator().manual_seed(0))
    new = make("rowwise_adagrad", evict="least_used", learning_rate=0.1)
    assert unchanged(lookup, new.state_dict())
    assert lookup.num_ids == {"items": 0, "users": 0, "tags": 0}


def test_new_rows_are_drawn_within_the_bounds_of_their_table_and_by_the_generator():
    tables = {"wide": EmbeddingTable(4, dim=400), "narrow": EmbeddingTable(2500, dim=300)}
    features = {name: IdFeature(table, pooling=None) for name, table in (("c", "wide"), ("b", "narrow"), ("d", "wide"))}
    features["a"] = IdFeature("wide")
    lookup = FusedEmbeddingLookup(tables, features)
    batch = {"a": int64([1, 2]), "b": torch.arange(5), "c": int64([1, 2]), "d": int64([2])}
    lookup.insert(batch, generator=torch.Generator().manual_seed(7))
    vectors = lookup(batch)
    assert list(vectors.unpooled) == ["c", "b", "d"]
    for found, bound in ((vectors.pooled, 1 / 2), (vectors.unpooled["b"], 1 / 50)):
        assert bound * 0.9 < found.abs().max() <= bound
    again = FusedEmbeddingLookup(tables, features)
    again.insert(batch, generator=torch.Generator().manual_seed(7))
    assert torch.equal(again(batch).pooled, vectors.pooled)


def test_a_lookup_made_in_inference_mode_trains_outside():
    with torch.inference_mode():
        lookup = make("rowwise_adagrad")
    batch = bags_of_all()
    lookup.insert(batch)
    before = lookup(batch).pooled.detach()
    loss_of(lookup(batch)).backward()
    assert not torch.equal(lookup(batch).pooled, before)


@pytest.mark.parametrize("gradient", ["sgd", "rowwise_adagrad"])
def test_an_update_is_one_for_all_features_of_a_lookup_however_their_ids_are_given(gradient):
    tables, ids = {"t": EmbeddingTable(10, dim=2)}, int64([1, 2, 2])
    features = {name: IdFeature("t", pooling=None if name == "d" else "sum") for name in "abcd"}
    given = {
        "one each": dict.fromkeys(features, ids),
        "bags": {"a": ids, "b": ids[:, None], "c": (ids, torch.arange(4)), "d": ids},
    }
    for how, batch in given.items():
        lookup = FusedEmbeddingLookup(
            tables, features, gradient=gradient, learning_rate=0.1, generator=torch.Generator().manual_seed(0)
        )
        lookup.insert(batch, generator=torch.Generator().manual_seed(1))
        weight = lookup.weights["2"].detach().double().tolist()
        steps = []
        for step in range(1, 4):
            vectors = lookup(batch)
            (step * (vectors.pooled.sum() + vectors.unpooled["d"].sum())).backward()
            rows = lookup_rows(ids, lookup.table.slots, lookup.places[:, :1]).tolist()
            steps.append([(row, [float(step)] * 2) for row in rows for _ in features])
        want, _ = oracles.train_rows(weight, [0.0] * len(weight), steps, 0.1, gradient == "rowwise_adagrad")
        got = lookup.weights["2"].detach().double()
        # Three updates of numbers below 8, each rounded a few times to 2**-24 of itself.
        torch.testing.assert_close(got, torch.tensor(want).double(), rtol=0, atol=1e-5, msg=how)


def test_a_gradient_of_zeros_changes_nothing_and_small_ones_count():
    lookup = simple(num_features=1, gradient="rowwise_adagrad", learning_rate=1.0)
    lookup.insert(columns(int64([[1], [2]])))
    before = lookup(columns(int64([[1], [2]]))).pooled.detach()
    scales = torch.tensor([[0.0], [1e-8]])
    (lookup(columns(int64([[1], [2]]))).pooled * scales).sum().backward()
    after = lookup(columns(int64([[1], [2]]))).pooled.detach()
    assert torch.equal(after[0], before[0])
    # 1e-8 / (1e-8 + 1e-8): the half of a step, within float32's rounding of 1e-16 and its root.
    torch.testing.assert_close(after[1], before[1] - 0.5, rtol=0, atol=1e-4)


def test_sums_of_many_gradients_are_made_in_float32_whatever_the_weights_are():
    lookup = simple(num_features=1, gradient="sgd", learning_rate=1.0, dtype=torch.bfloat16)
    lookup.insert(columns(int64([[1]])))
    lookup(columns(int64([[1]]).expand(1000, 1))).pooled.sum().backward()
    # A sum in bfloat16 stops at 256, where 1 is half of its last place.
    torch.testing.assert_close(lookup(columns(int64([[1]]))).pooled, torch.full((1, 4), -1000.0).bfloat16())


# --- what is compiled ---


@pytest.mark.parametrize("gradient", ["sgd", "rowwise_adagrad"])
def test_a_compiled_lookup_trains_like_an_eager_one(gradient):
    torch.compiler.reset()
    one, other = (make(gradient, learning_rate=0.1) for _ in range(2))
    batch = bags_of_all()
    for lookup in (one, other):
        lookup.insert(batch, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
    for step in range(3):
        for lookup, call in ((one, compiled), (other, other)):
            lookup.learning_rate.fill_(0.1 * (step + 1))
            loss_of(call(batch)).backward()
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=0, atol=1e-6)
        assert not torch.equal(weight, make(gradient).weights[name])


def random_bags(num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, (num_rows,), generator=generator)
    return torch.randint(-9, 9, (int(lengths.sum()),), generator=generator), functional.pad(lengths.cumsum(0), (1, 0))


@pytest.mark.parametrize("gradient", ["dense", "rowwise_adagrad"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("grad", [True, False])
def test_one_compiled_lookup_takes_packed_batches_of_any_size(gradient, backend, grad):
    torch.compiler.reset()
    lookup = make(gradient, evict="least_used", backend=backend)
    compiled = torch.compile(lookup, backend="aot_eager", fullgraph=True, dynamic=True)

    def batch(num_rows):
        generator = torch.Generator().manual_seed(num_rows)
        ones = {name: torch.randint(-9, 9, (num_rows,), generator=generator) for name in ("item", "user", "place")}
        bags = {"tags": random_bags(num_rows, 1), "liked": random_bags(num_rows, 3)}
        seen = {"seen": torch.randint(-9, 9, (num_rows, 3), generator=generator)}
        return lookup.pack(ones | bags | seen)

    with torch.set_grad_enabled(grad):
        compiled(batch(6))
    with torch.set_grad_enabled(grad), torch.compiler.set_stance("fail_on_recompile"):
        for num_rows in (5, 2, 9):
            packed = batch(num_rows)
            lookup.insert(packed)
            got, want = compiled(packed), lookup(packed)
            assert torch.equal(got.pooled, want.pooled)
            assert torch.equal(got.unpooled["seen"], want.unpooled["seen"])
            lookup.erase("items", torch.arange(-9, 0))


@pytest.mark.parametrize("num_parts", [1, 3])
def test_every_form_of_a_find_answers_alike(num_parts):
    generator = torch.Generator().manual_seed(0)
    table = recblocks.IdTable([300] * num_parts)
    ids = torch.cat([int64(SPECIAL), torch.randint(LOWEST, HIGHEST, (292,), generator=generator)])
    part = None if num_parts == 1 else torch.arange(num_parts)[:, None]
    table.insert(ids.expand(num_parts, -1), part)
    table.erase(ids[::3].expand(num_parts, -1), part)
    asked = torch.cat([ids, ids + 1]).expand(num_parts, -1)
    want = _buckets.find_rows(asked, table.slots, part)
    kept = torch.ones(len(ids), dtype=torch.bool)
    kept[::3] = False
    assert torch.equal(want >= 0, torch.isin(asked, ids[kept]))
    for form in (_buckets.find, _buckets._find_slot_by_slot):
        assert torch.equal(form(asked, table.slots, part), want)
