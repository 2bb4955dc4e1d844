"""The kernels of the fused lookup against plain torch: C++ on a CPU; Triton on a GPU, or else in its interpreter."""

import gc
import importlib.util
import itertools
import os
import subprocess
import sys
import types
from typing import Any, ClassVar, NamedTuple

import hopper
import pytest
import torch
from lookups import FEATURES, TABLES
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from recblocks import EmbeddingTable, FusedEmbeddingLookup, IdFeature, ServingLookup
from recblocks._hashing import mix, unmix
from recblocks.embedding._gather import lookup_rows
from recblocks.kernels import building
from recblocks.kernels.fused_lookup import apart as apart_module
from recblocks.kernels.fused_lookup import cpp, dispatch

DEVICES = {"cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
LOWEST, HIGHEST = -(2**63), 2**63 - 1
HAVE = {"cpp": building.compiler() is not None, "triton": importlib.util.find_spec("triton") is not None}


@pytest.fixture(params=["cpp", "triton"])
def backend(request):
    if not HAVE[request.param]:
        pytest.skip("needs a C++ compiler" if request.param == "cpp" else "needs triton")
    return request.param


@pytest.fixture
def device(backend):
    return DEVICES[backend]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """What a kernel does not write is not zero by luck."""
    empty = torch.empty

    def poisoned(*args, **options):
        tensor = empty(*args, **options)
        if tensor.is_meta:
            return tensor
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -12345)

    monkeypatch.setattr(torch, "empty", poisoned)


def make(dim, device, num_tables=3, **options):
    """Tables of which each is nearly full, some ids erased; each of its features has other rows for unseen ids."""
    tables = {f"t{at}": EmbeddingTable(31 + 2 * at, dim) for at in range(num_tables)}
    features = {f"f{at}": IdFeature(f"t{at % num_tables}", num_unseen=1 + at) for at in range(num_tables + 2)}
    lookup = FusedEmbeddingLookup(tables, features, generator=torch.Generator().manual_seed(0), **options)
    ids = torch.cat([torch.tensor([LOWEST, HIGHEST, -1]), torch.arange(27)])
    lookup.insert(dict.fromkeys(features, ids))
    lookup.erase("t0", torch.tensor([3, -1]))
    return lookup.to(device)


def some_ids(device, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-3, 40, shape, generator=generator)
    extreme = torch.randint(0, 9, shape, generator=generator)
    return torch.where(extreme == 0, LOWEST, torch.where(extreme == 1, HIGHEST, ids)).to(device)


def features_of(lookup, *shape):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(len(lookup.layout.features), shape, generator=generator).to(lookup.places.device)


def vectors_of(ids, feature, places, keys, rows, hashed, begins, weight, scale, offsets, num_features, mean, backend):
    """The operator for features of one width: (B, num_features, D), or (..., D) where these are None."""
    numbers, dim = feature.flatten(), weight.shape[1]
    outputs = torch.zeros_like(places[4:])
    outputs[2] = int(mean)
    if num_features is not None:
        outputs[1, numbers.clamp(0, places.shape[1] - 1)] = dim * torch.arange(len(numbers), device=places.device)
    places = torch.cat([places[:4], outputs])
    scales, pooled = [] if scale is None else [scale], num_features is not None
    how = [len(numbers) if pooled else 1], dim * (len(numbers) if pooled else 1), pooled, backend
    given = ids, feature, places, keys, rows, hashed, begins, [weight], scales, offsets
    out = dispatch.lookup_vectors(*given, *how)
    return out.view(len(out), len(numbers), dim) if pooled else out.view(*ids.shape, dim)


@pytest.mark.parametrize("num_tables", [1, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 13, 32])
def test_rows_are_those_of_plain_torch(backend, device, num_tables, num_rows):
    lookup = make(4, device, num_tables)
    num_features = len(lookup.layout.features)
    ids, feature = some_ids(device, num_features, num_rows), torch.arange(num_features, device=device)[:, None]
    want = lookup_rows(ids, lookup.table.slots, lookup.places[:, feature])
    assert len(want.unique()) > min(num_rows, 2) * num_features - 2
    given = lookup.places, *lookup.table.slots
    assert torch.equal(dispatch.lookup_rows(ids, feature, *given, backend), want)
    each = feature.expand_as(ids).flatten()
    assert torch.equal(dispatch.lookup_rows(ids.flatten(), each, *given, backend), want.flatten())
    strided = ids.repeat_interleave(2, 1)[:, ::2]
    assert not strided.is_contiguous() or num_rows == 1
    places = lookup.places.t().contiguous().t()
    assert torch.equal(dispatch.lookup_rows(strided, feature, places, *lookup.table.slots, backend), want)


@pytest.mark.parametrize("dim", [1, 3, 16, 17, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_vectors_and_bags_are_those_of_plain_torch(backend, device, dim, dtype):
    lookup = make(dim, device, num_tables=6)
    num_ids, slots = 61, lookup.table.slots
    ids, feature = some_ids(device, num_ids), features_of(lookup, num_ids)
    rows = lookup_rows(ids, slots, lookup.places[:, feature])
    weight, scale = (100 * lookup.weights[str(dim)].detach()).to(dtype), None
    want = weight.float()
    if dtype == torch.int8:
        scale = torch.rand(len(weight), generator=torch.Generator().manual_seed(3)).to(device)
        want = want * scale[:, None]
    given = lookup.places, *slots, weight, scale
    assert torch.equal(vectors_of(ids, feature, *given, None, None, False, backend), want[rows])
    offsets = torch.tensor([0, 0, 1, 1, 9, 20, 44, 61, 61], device=device)
    for num_features in (1, 2, 4, 8):
        numbers = torch.randperm(8, generator=torch.Generator().manual_seed(4))[:num_features, None].to(device)
        of_bags = numbers.expand(-1, 8 // num_features).flatten()
        rows = lookup_rows(ids, slots, lookup.places[:, of_bags.repeat_interleave(offsets.diff())])
        for mode in ("sum", "mean"):
            how = offsets, num_features, mode == "mean", backend
            got = vectors_of(ids, numbers, *given, *how)
            bags = functional.embedding_bag(rows, want, offsets, mode=mode, include_last_offset=True)
            by_row = bags.view(num_features, -1, dim).transpose(0, 1)
            # Up to 24 numbers below 127 are added in another order: 24 roundings of at most 3000 by 2**-24.
            torch.testing.assert_close(got, by_row, rtol=0, atol=5e-3 if dtype == torch.int8 else 5e-4)


@pytest.mark.parametrize("dim", [5, 16])
@pytest.mark.parametrize("num_rows", [1, 7, 64, 65, 200])
def test_one_id_each_comes_out_row_by_row(backend, device, num_rows, dim):
    lookup = make(dim, device)
    num_features = len(lookup.layout.features)
    ids, feature = some_ids(device, num_features, num_rows), torch.arange(num_features, device=device)[:, None]
    weight = lookup.weights[str(dim)].detach()
    given = ids, feature, lookup.places, *lookup.table.slots, weight
    got = vectors_of(*given, None, None, num_features, False, backend)
    rows = lookup_rows(ids, lookup.table.slots, lookup.places[:, feature])
    assert torch.equal(got, weight[rows].transpose(0, 1))


def test_no_ids_and_no_bags_give_nothing(backend, device):
    lookup = make(5, device)
    nothing, numbers = torch.empty(0, dtype=torch.int64, device=device), torch.arange(3, device=device)[:, None]
    for feature in (nothing, numbers):
        given = nothing, feature, lookup.places, *lookup.table.slots
        assert dispatch.lookup_rows(*given, backend).shape == (0,)
        given = *given, lookup.weights["5"].detach(), None
        assert vectors_of(*given, None, None, False, backend).shape == (0, 5)
        assert vectors_of(*given, None, 3, False, backend).shape == (0, feature.numel(), 5)
    begin = torch.zeros(1, dtype=torch.int64, device=device)
    assert vectors_of(*given, begin, 3, False, backend).shape == (0, 3, 5)
    only_empty = torch.zeros(4, dtype=torch.int64, device=device)
    got = vectors_of(*given, only_empty, 3, True, backend)
    assert torch.equal(got, torch.zeros(1, 3, 5, device=device))


def test_features_that_do_not_share_ids_or_bags_alike_are_refused(backend, device):
    lookup = make(5, device)
    ids, weight = torch.arange(5, device=device), lookup.weights["5"].detach()
    given, numbers = (lookup.places, *lookup.table.slots), torch.arange(2, device=device)[:, None]
    with pytest.raises(ValueError, match="feature must have a number for so many of 5 each, got 2"):
        dispatch.lookup_rows(ids, numbers, *given, backend)
    with pytest.raises(ValueError, match="feature must have a number for so many of 5 each, got 2"):
        vectors_of(ids, numbers, *given, weight, None, None, 2, False, backend)
    with pytest.raises(ValueError, match="feature must have a number for so many of 3 each, got 2"):
        vectors_of(ids, numbers, *given, weight, None, ids[:4], 2, False, backend)


def test_an_id_of_another_part_that_has_the_same_hash_is_not_there(backend, device):
    tables = {"t": EmbeddingTable(50, 4), "u": EmbeddingTable(50, 4)}
    features = {"a": IdFeature("t", num_unseen=3), "b": IdFeature("u", num_unseen=5)}
    lookup = FusedEmbeddingLookup(tables, features).to(device)
    ids, others = torch.arange(10, device=device), torch.arange(100, 110, device=device)
    lookup.insert({"a": ids, "b": others})
    first, _, step = lookup.table.hashed
    of_b, of_a = unmix(mix(ids, first) - step, first), unmix(mix(others, first) + step, first)
    feature = torch.tensor([1, 0], device=device)[:, None]
    asked = torch.stack([of_b, of_a])
    rows = dispatch.lookup_rows(asked, feature, lookup.places, *lookup.table.slots, backend)
    assert torch.equal(rows, lookup_rows(asked, lookup.table.slots, lookup.places[:, feature]))
    assert (lookup.table.find(asked, feature) < 0).all()
    assert rows.max() < 8  # those for unseen ids come first


def test_tensors_may_lie_in_memory_as_they_like(backend, device):
    lookup = make(6, device)
    ids = some_ids(device, 12)
    numbers, offsets = torch.tensor([[1], [3]], device=device), torch.tensor([0, 2, 3, 7, 12], device=device)
    weight = (100 * lookup.weights["6"].detach()).to(torch.int8)
    scale = torch.rand(len(weight), generator=torch.Generator().manual_seed(3)).to(device)
    given = [ids, numbers, lookup.places, *lookup.table.slots, weight, scale, offsets]
    want = vectors_of(*given, 2, True, backend)
    for at, one in enumerate(given):
        wide = one.repeat_interleave(2, 0)[::2]
        assert not wide.is_contiguous()
        got = vectors_of(*given[:at], wide, *given[at + 1 :], 2, True, backend)
        assert torch.equal(got, want)


def test_tensors_of_another_dtype_or_size_are_refused(backend, device):
    lookup = make(5, device)
    ids, feature = some_ids(device, 4), torch.zeros(1, 1, dtype=torch.int64, device=device)
    given = [ids, feature, lookup.places, *lookup.table.slots, lookup.weights["5"].detach()]
    for at in (0, 1, 2, 3, 5, 6):
        with pytest.raises(TypeError, match=r"ids and what says where to look must be int64, got torch\.int32"):
            dispatch.lookup_rows(*given[:at], given[at].int(), *given[at + 1 : -1], backend)
    for wrong in (given[4].long(), given[4][:-1]):
        with pytest.raises(ValueError, match="rows must be int32 like keys of shape"):
            dispatch.lookup_rows(*given[:4], wrong, *given[5:-1], backend)
    with pytest.raises(TypeError, match=r"must be int64, got torch\.int32"):
        vectors_of(*given, None, torch.tensor([0, 4]).int().to(device), 1, False, backend)
    with pytest.raises(ValueError, match="scales must have shape"):
        vectors_of(*given, torch.ones(1, device=device), None, None, False, backend)
    with pytest.raises(TypeError, match="scales must be float32"):
        vectors_of(*given, torch.ones(len(given[-1])).double().to(device), None, None, False, backend)
    with pytest.raises(ValueError, match="feature must have a number for so many of 4 each, got 0"):
        dispatch.lookup_rows(ids, feature.flatten()[:0], *given[2:-1], backend)
    with pytest.raises(ValueError, match=r"all must be on one device, got .* and meta"):
        dispatch.lookup_rows(ids, feature.to("meta"), *given[2:-1], backend)


def test_weights_scales_and_places_that_do_not_fit_are_refused(backend, device):
    lookup = make(5, device)
    ids, numbers = some_ids(device, 4), torch.arange(2, device=device)[:, None]
    weight, slots = lookup.weights["5"].detach(), lookup.table.slots
    one, scale = [weight, weight], torch.ones(len(weight), device=device)
    for weights, scales, counts, places, error, says in (
        (one, [scale], [1, 1], lookup.places, ValueError, "scales must be one a weight, or none, got 1 and 2 weights"),
        ([weight, weight.half()], [], [1, 1], lookup.places, TypeError, "weights must be of one dtype, got"),
        (one, [], [2], lookup.places, ValueError, r"counts must be one a weight, 2 in all, got \[2\]"),
        (one, [], [1, 2], lookup.places, ValueError, r"counts must be one a weight, 2 in all, got \[1, 2\]"),
        (one, [], [3, -1], lookup.places, ValueError, r"counts must be one a weight, 2 in all, got \[3, -1\]"),
        (one, [], [1, 1], lookup.places[:4], ValueError, r"places must have shape \(7, features\), got"),
        (one, [], [1, 1], lookup.places[:3], ValueError, "places must have at least 4 rows, got 3"),
        (
            [weight.double()],
            [],
            [2],
            lookup.places,
            TypeError,
            "weights must be float32 or float16 or bfloat16 or int8",
        ),
        ([weight[0]], [], [2], lookup.places, ValueError, r"weights must have shape \(R, D\)"),
        ([weight[:, :4]], [], [2], lookup.places, ValueError, "num_columns must be what the features take, 8, got 10"),
    ):
        given = ids, numbers, places, *slots, weights, scales, None, counts, 10, True, backend
        with pytest.raises(error, match=says):
            dispatch.lookup_vectors(*given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("alike", [False, True])
def test_features_of_all_widths_and_kinds_are_one_call(backend, device, dtype, alike, monkeypatch):
    dims = {"a": 16, "b": 3, "c": 32, "d": 16, "e": 1, "f": 32}
    features = {name: IdFeature(name, pooling="mean" if name in "adf" else "sum") for name in dims}
    lookup = FusedEmbeddingLookup({name: EmbeddingTable(20, dim) for name, dim in dims.items()}, features)
    lookup.insert(dict.fromkeys(dims, torch.arange(9)))
    lookup = lookup.to(device)
    offsets = torch.tensor([0, 2, 2, 3, 6, 6, 7], device=device)
    given = {name: some_ids(device, 6 if alike or name in "abe" else 7, seed=at) for at, name in enumerate(dims)}
    given = {name: ids if len(ids) == 6 else (ids, offsets) for name, ids in given.items()}
    calls, operator = [], dispatch.vectors_of
    monkeypatch.setattr(dispatch, "vectors_of", lambda *asked: calls.append(asked) or operator(*asked))
    got = ServingLookup(lookup, dtype=dtype, backend=backend)(given).pooled
    assert len(calls) == 1
    want = ServingLookup(lookup, dtype=dtype, backend="reference")(given).pooled
    # Three numbers below 1 that may be added in another order: two roundings by at most 2**-25 each.
    torch.testing.assert_close(got, want, rtol=0, atol=2e-7)


@pytest.mark.skipif(not HAVE["triton"], reason="needs triton")
@pytest.mark.parametrize("in_bags", [False, True])
def test_triton_launches_one_kernel_for_all_widths(in_bags, monkeypatch):
    from recblocks.kernels.fused_lookup import triton

    launches = []

    class Counted(NamedTuple):
        kernel: Any

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    for kernel in ("rows_of_ids", "vectors_of_ids", "vectors_of_bags"):
        monkeypatch.setattr(triton, kernel, Counted(getattr(triton, kernel)))
    dims = {"a": 16, "b": 3, "c": 32}
    lookup = FusedEmbeddingLookup(
        {name: EmbeddingTable(20, dim) for name, dim in dims.items()}, {name: IdFeature(name) for name in dims}
    )
    ids = torch.arange(40).to(DEVICES["triton"])
    given = dict.fromkeys(dims, ids.view(20, 2) if in_bags else ids)
    with torch.no_grad():
        lookup = lookup.to(ids.device)
        lookup.backend = "triton"
        lookup(given)
    # 20 bags of each feature; 40 ids of each, of which a program takes 32, or 16 where rows are of 32 numbers.
    assert launches == [(60,) if in_bags else (2 + 2 + 3,)]


# --- the Modules ---


def batch(device="cpu"):
    features = {
        "user": torch.arange(-4, 3),
        "item": torch.arange(7),
        "liked": torch.arange(14).view(7, 2),
        "tags": (torch.arange(6), torch.tensor([0, 0, 1, 3, 3, 4, 6, 6])),
        "seen": torch.arange(12).view(3, 4),
    }
    return {
        name: tuple(one.to(device) for one in ids) if isinstance(ids, tuple) else ids.to(device)
        for name, ids in features.items()
    }


def trained(backend, device, gradient="dense", **options):
    generator = torch.Generator(device).manual_seed(0)
    lookup = FusedEmbeddingLookup(
        TABLES, FEATURES, backend=backend, gradient=gradient, generator=generator, device=device, **options
    )
    lookup.insert(batch(device), generator=generator)
    return lookup


@pytest.mark.parametrize("gradient", ["dense", "sparse", "sgd", "rowwise_adagrad"])
def test_a_lookup_gives_and_learns_the_same_with_either_backend(backend, device, gradient):
    lookups = [trained(one, device, gradient, learning_rate=0.5) for one in (backend, "reference")]
    for _ in range(2):
        with torch.no_grad():
            got, want = (lookup(batch(device)) for lookup in lookups)
        # Bags of two: a sum in another order rounds the same, a mean once more.
        torch.testing.assert_close(got.pooled, want.pooled, rtol=0, atol=1e-6)
        assert torch.equal(got.unpooled["seen"], want.unpooled["seen"])
        for lookup in lookups:
            vectors = lookup(batch(device))
            (vectors.pooled.square().sum() + vectors.unpooled["seen"].sum()).backward()
            if gradient in ("dense", "sparse"):
                torch.optim.SGD(lookup.parameters(), lr=0.5).step()
    one, other = lookups
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_vectors_have_the_dtype_of_the_weights(backend, device, dtype):
    lookups = [trained(one, device, dtype=dtype) for one in (backend, "reference")]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got, want = (lookup(batch(device)) for lookup in lookups)
        assert got.pooled.dtype == got.unpooled["seen"].dtype == dtype
        assert torch.equal(got.unpooled["seen"], want.unpooled["seen"])
        # Bags of two: sums that are rounded to the weights' dtype once or twice, of numbers below 1.
        torch.testing.assert_close(got.pooled, want.pooled, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_served_lookup_gives_the_same_with_either_backend(backend, device, dtype):
    lookup = trained("reference", device)
    got, want = (ServingLookup(lookup, dtype=dtype, backend=one)(batch(device)) for one in (backend, "reference"))
    torch.testing.assert_close(got.pooled, want.pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.unpooled["seen"], want.unpooled["seen"], rtol=0, atol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_a_compiled_lookup_keeps_the_kernels_in_one_graph(backend, device, grad):
    torch.compiler.reset()
    lookup, operations = trained(backend, device), set()

    def look(graph, _):
        operations.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(lookup, backend=look, fullgraph=True)
    with torch.set_grad_enabled(grad):
        packed = lookup.pack(batch(device))
        got, want = compiled(packed).pooled, lookup(batch(device)).pooled
    assert torch.equal(got, want)
    name = "fused_lookup_rows" if grad else "fused_lookup_vectors"
    assert any(name in one for one in operations)


class _Seen(TorchDispatchMode):
    """What operators a mode sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_operators_pass_torch_s_own_check(backend, device):
    lookup, asked = trained(backend, device), []

    def noted(*given):
        asked.append(given)
        return torch.ops.recblocks.fused_lookup_vectors(*given)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), _Seen():
        patch.setattr(dispatch, "lookup_vectors", noted)
        lookup(batch(device))
    assert [given[12] for given in asked] == [False, True]  # the feature that does not pool, and the others at once
    for given in asked:
        without_grad = *given[:7], [one.detach() for one in given[7]], *given[8:]
        torch.library.opcheck(dispatch.lookup_vectors, without_grad)
    torch.library.opcheck(dispatch.lookup_rows, (*asked[0][:7], backend))


class _Functions(TorchFunctionMode):
    """What functions a mode sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class _Own(torch.Tensor):
    """A tensor of somebody's own, that sees what is done with it."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


def test_whoever_looks_sees_the_operator(backend, device):
    lookup = trained(backend, device)
    given = lookup.pack(batch(device))
    with torch.no_grad():
        want = lookup(given).pooled
        with _Seen() as mode:
            seen = lookup(given).pooled
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            profiled = lookup(given).pooled
        groups = [group._replace(ids=group.ids.as_subclass(_Own)) for group in given.groups]
        own = lookup(given._replace(groups=tuple(groups))).pooled
        first = list(_Own.seen)
        with _Functions() as functions:
            by_function = lookup(given).pooled
        served = ServingLookup(lookup, dtype=torch.int8, backend=backend)
        whole = served(given).pooled
        _Own.seen.clear()
        served.scale_4 = served.scale_4.as_subclass(_Own)
        scaled = served(given).pooled
    for found in (seen, profiled, own, by_function):
        assert torch.equal(found, want)
    assert torch.equal(scaled, whole)
    assert "recblocks.fused_lookup_vectors.default" in mode.names
    assert "recblocks::fused_lookup_vectors" in [event.key for event in profile.key_averages()]
    for names in (first, _Own.seen, functions.names):
        assert "recblocks.fused_lookup_vectors.default" in names


def test_where_nobody_looks_torch_s_dispatcher_is_passed_by(backend, device, monkeypatch):
    lookup, called = trained(backend, device), []
    monkeypatch.setattr(dispatch, "lookup_vectors", lambda *given: called.append(given))
    with torch.no_grad():
        lookup(batch(device))
    ServingLookup(lookup, backend=backend)(batch(device))
    assert called == []


def test_a_gradient_that_is_asked_of_a_served_weight_is_not_lost_in_silence(backend, device):
    served = ServingLookup(trained(backend, device), dtype=torch.float32, backend=backend)
    for weight in (served.weight_3, served.weight_4):
        weight.requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        served(batch(device)).pooled.sum().backward()


# --- Triton ---


BUILDING = """
import hopper
from recblocks.kernels.fused_lookup import triton as kernel

TYPES = dict.fromkeys(kernel.vectors_of_bags.arg_names, "*i64")
TYPES |= dict.fromkeys(("num_ids", "repeat", "num_rows", "num_columns", "num_features", "num_buckets"), "i32")
TYPES |= {"asked": ("*i64",) * 4 + ("*i32",) + ("*i64",) * 2, "out": "*fp32"}

hopper.build(kernel.rows_of_ids, TYPES | {"out": "*i64"}, {"IDS": 32})
for function in (kernel.vectors_of_ids, kernel.vectors_of_bags):
    for weight, scaled in (("*fp32", False), ("*fp16", False), ("*bf16", False), ("*i8", True)):
        for dims in ([1], [32], [96], [300], [1, 32, 96, 300]):
            each = {"weights": (weight,), "scales": ("*fp32",), "counts": ("i32",)}
            given = TYPES | {name: one * len(dims) for name, one in each.items()}
            hopper.build(function, given, {"SCALED": scaled, **kernel.sizes_of(dims)})
"""


def test_triton_s_kernels_build_for_a_hopper_gpu_and_spill_nothing(tmp_path):
    pytest.importorskip("triton")
    built = hopper.run(BUILDING, tmp_path)
    assert len(built) == 41
    assert not any(one.spilled for one in built)


# --- C++ ---

needs_compiler = pytest.mark.skipif(not HAVE["cpp"], reason="needs a C++ compiler")


def halves():
    """Every float16 there is, (64, 1024)."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(64, 1024)


@needs_compiler
def test_every_half_float_is_read_as_what_it_is():
    lookup = FusedEmbeddingLookup({"t": EmbeddingTable(64, 1024)}, {"f": IdFeature("t")})
    ids = torch.arange(64)
    lookup.insert({"f": ids})
    rows = lookup_rows(ids, lookup.table.slots, lookup.places)
    weight = torch.zeros(65, 1024, dtype=torch.float16)
    weight[rows] = halves()
    feature = torch.zeros(1, 1, dtype=torch.int64)
    given = ids[None], feature, lookup.places, *lookup.table.slots, weight, None, None, 1, False, "cpp"
    got = vectors_of(*given)[:, 0]
    torch.testing.assert_close(got, halves().float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit(), halves().float().signbit())


@needs_compiler
def test_any_number_of_threads_gives_the_same():
    lookup = make(5, "cpu")
    ids, feature = some_ids("cpu", 5000), features_of(lookup, 5000)
    sizes = torch.randint(0, 5, (2000,), generator=torch.Generator().manual_seed(4))
    offsets = functional.pad(sizes.cumsum(0).clamp(max=5000), (1, 0))
    given = ids, feature, lookup.places, *lookup.table.slots
    weight = lookup.weights["5"].detach()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(dispatch.lookup_rows(*given, "cpp"))
            found.append(vectors_of(*given, weight, None, None, None, False, "cpp"))
            bags = ids[: offsets[-1]], torch.arange(4)[:, None], *given[2:], weight, None, offsets, 4, True, "cpp"
            found.append(vectors_of(*bags))
        finally:
            torch.set_num_threads(1)
    for kind in range(3):
        assert torch.equal(found[kind], found[kind + 3])
        assert torch.equal(found[kind], found[kind + 6])
    assert torch.equal(found[0], lookup_rows(ids, lookup.table.slots, lookup.places[:, feature]))


@needs_compiler
@pytest.mark.parametrize("dim", [16, 40_000])
def test_bags_that_are_summed_some_at_a_time_are_those_of_plain_torch(dim):
    lookup = make(dim, "cpu")
    ids, numbers = some_ids("cpu", 700), torch.tensor([[4], [0], [3]])
    sizes = torch.randint(0, 3, (3 * (300 if dim == 16 else 2),), generator=torch.Generator().manual_seed(5))
    offsets = functional.pad(sizes.cumsum(0), (1, 0))
    ids = ids.repeat(2)[: offsets[-1]]
    weight = lookup.weights[str(dim)].detach()
    rows = lookup_rows(
        ids, lookup.table.slots, lookup.places[:, numbers.repeat(1, len(sizes) // 3).flatten().repeat_interleave(sizes)]
    )
    got = vectors_of(ids, numbers, lookup.places, *lookup.table.slots, weight, None, offsets, 3, False, "cpp")
    want = functional.embedding_bag(rows, weight, offsets, mode="sum", include_last_offset=True)
    assert torch.equal(got, want.view(3, -1, dim).transpose(0, 1))  # two numbers, in any order


@needs_compiler
def test_c_plus_plus_lays_features_side_by_side_where_it_looks_them_up(monkeypatch):
    laid = []
    monkeypatch.setattr(cpp, "lay", lambda *given, lay=cpp.lay: laid.append(len(given[0])) or lay(*given))
    for backend, want in (("auto", [2]), ("cpp", [2]), ("reference", [])):
        tables, features = {"t": EmbeddingTable(9, 2)}, {"a": IdFeature("t"), "b": IdFeature("t")}
        lookup = FusedEmbeddingLookup(tables, features, backend=backend)
        for one in (lookup, ServingLookup(lookup, backend=backend)):
            for call in (one, one.pack):
                laid.clear()
                call(dict.fromkeys("ab", torch.arange(3)))
                assert laid == want


APART = {"a": 16, "b": 3, "c": 32, "d": 16, "e": 1}


def apart(num_rows, dtype=torch.float32):
    """A served lookup of several widths and poolings, and a batch of it, in which a, c and d are in bags."""
    features = {name: IdFeature(name, pooling="mean" if name in "ad" else "sum") for name in APART}
    lookup = FusedEmbeddingLookup({name: EmbeddingTable(30, dim) for name, dim in APART.items()}, features)
    lookup.insert(dict.fromkeys(APART, torch.arange(20)))
    generator = torch.Generator().manual_seed(num_rows)
    batch = {name: torch.randint(-5, 40, (num_rows,), generator=generator) for name in APART}
    for name in "acd":
        offsets = functional.pad(torch.randint(4, (num_rows,), generator=generator).cumsum(0), (1, 0))
        batch[name] = torch.randint(-5, 40, (int(offsets[-1]),), generator=generator), offsets
    return ServingLookup(lookup, dtype=dtype, backend="cpp"), batch


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("num_rows", [63, 64, 65, 300])
def test_features_of_many_rows_are_looked_up_as_they_lie(dtype, num_rows, monkeypatch):
    served, batch = apart(num_rows, dtype)
    laid, lay = [], cpp.lay
    monkeypatch.setattr(cpp, "lay", lambda *given: laid.append(given) or lay(*given))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(served(batch).pooled)
        finally:
            torch.set_num_threads(1)
    assert bool(laid) == (num_rows < 64)
    served.backend = "reference"
    want = served(batch).pooled
    for got in found:
        # Three numbers below 1 that may be added in another order, and a mean: three roundings by at most 2**-25 each.
        torch.testing.assert_close(got, want, rtol=0, atol=3e-7)
    single = {name: ids if isinstance(ids, torch.Tensor) else ids[0][:num_rows] for name, ids in batch.items()}
    want = served(single).pooled
    served.backend = "cpp"
    assert torch.equal(served(single).pooled, want)


@needs_compiler
@pytest.mark.parametrize("name", ["a", "d"])
@pytest.mark.parametrize(("at", "number"), [(0, 1), (0, -1), (3, -2), (5, 10**6), (-1, 10**6), (-1, 1), (-2, 0)])
def test_offsets_that_are_none_are_refused_where_features_lie_apart(name, at, number):
    served, batch = apart(70)
    offsets = batch[name][1].clone()
    offsets[at] = number
    with pytest.raises(ValueError, match=rf"features\['{name}'\]\[1\] must"):
        served(batch | {name: (batch[name][0], offsets)})
    with pytest.raises(ValueError, match=rf"features\['{name}'\]\[1\] must"):
        served(batch | {name: (batch[name][0][:-1], batch[name][1])})


@needs_compiler
@pytest.mark.parametrize("which", ["ids", "offsets", "single"])
def test_features_may_lie_in_memory_as_they_like(which):
    served, batch = apart(80)
    want = served(batch).pooled
    ids, offsets, single = (one.repeat_interleave(2)[::2] for one in (*batch["a"], batch["b"]))
    changed = {"ids": {"a": (ids, batch["a"][1])}, "offsets": {"a": (batch["a"][0], offsets)}, "single": {"b": single}}
    got = served(batch | changed[which]).pooled
    assert torch.equal(got, want)


class _Pair(NamedTuple):
    ids: torch.Tensor
    offsets: torch.Tensor


WRONG = {
    "int32": lambda ids: ids.int(),
    "float": lambda ids: ids.double(),
    "bool": lambda ids: ids.bool(),
    "complex": lambda ids: ids.to(torch.complex64),
    "list": lambda ids: ids.tolist(),
    "none": lambda ids: None,  # noqa: ARG005 (like the others)
    "array": lambda ids: ids.numpy(),
    "number": lambda ids: ids[0],
    "fewer": lambda ids: ids[:-1],
    "empty": lambda ids: ids[:0],
    "cube": lambda ids: ids[:, None, None],
    "meta": lambda ids: ids.to("meta"),
    "sparse": lambda ids: ids.to_sparse(),
}


@needs_compiler
@pytest.mark.parametrize("where", ["ids", "offsets", "single", "first"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_refused_where_features_lie_apart_as_elsewhere(where, wrong):
    served, batch = apart(80)
    name, spoil = "b" if where == "single" else "a" if where == "first" else "c", WRONG[wrong]
    if where == "single":
        batch[name] = spoil(batch[name])
    else:
        ids, offsets = batch[name]
        batch[name] = (ids, spoil(offsets)) if where == "offsets" else (spoil(ids), offsets)
    found = []
    for backend in ("cpp", "reference"):
        served.backend = backend
        with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError), match=r"\w") as error:
            served(batch)
        found.append((error.type, str(error.value)))
    assert found[0] == found[1]
    assert found[0][0] in (TypeError, ValueError) or wrong == "sparse"


@needs_compiler
@pytest.mark.parametrize(
    "other",
    [
        lambda ids, offsets: (ids,),  # noqa: ARG005
        lambda ids, offsets: (ids, offsets, offsets),
        lambda ids, offsets: [ids, offsets],
        lambda ids, offsets: (ids, None),  # noqa: ARG005
    ],
)
def test_what_is_no_pair_is_refused_where_features_lie_apart(other):
    served, batch = apart(80)
    with pytest.raises(TypeError, match=r"features\['c'\](\[1\])? must be a torch.Tensor"):
        served(batch | {"c": other(*batch["c"])})


@needs_compiler
def test_whatever_else_a_feature_is_given_as_is_looked_up_too():
    served, batch = apart(80)
    want = served(batch).pooled
    others = {
        "c": _Pair(*batch["c"]),
        "b": batch["b"].as_subclass(_Own),
        "e": batch["e"][:, None],
        "a": (batch["a"][0], torch.nn.Parameter(batch["a"][1], requires_grad=False)),
    }
    _Own.seen.clear()
    for name, other in others.items():
        assert torch.equal(served(batch | {name: other}).pooled, want)
    assert _Own.seen
    assert torch.equal(served(types.MappingProxyType(batch)).pooled, want)
    assert torch.equal(served(dict(reversed(batch.items()))).pooled, want)


@needs_compiler
def test_a_torch_without_an_exchange_of_tensors_looks_up_too(monkeypatch):
    served, batch = apart(80)
    want = served(batch).pooled
    laid, lay = [], cpp.lay
    monkeypatch.setattr(cpp, "lay", lambda *given: laid.append(given) or lay(*given))
    python = apart_module._python
    monkeypatch.setattr(apart_module, "_python", python.__wrapped__)
    assert torch.equal(served(batch).pooled, want)
    assert not laid
    with monkeypatch.context() as patch:
        patch.setattr(apart_module, "_VERSION", 2)
        assert python.__wrapped__() is None
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    torch.testing.assert_close(served(batch).pooled, want, rtol=0, atol=3e-7)  # like in the test above
    assert laid


@needs_compiler
def test_looking_at_a_batch_keeps_nothing_of_it():
    served, batch = apart(80)
    held, num_calls = [torch.Tensor, tuple, *batch.values(), *batch["a"]], 50

    def call():
        for _ in range(num_calls):
            served(batch)
            with pytest.raises(ValueError, match=r"features that pool must have the same number of rows"):
                served(batch | {"e": batch["e"][:70]})
        gc.collect()
        return [sys.getrefcount(one) for one in held]

    # Whatever else runs may come to know the types; what each call kept would be as many as there are calls.
    assert all(after < before + num_calls for before, after in zip(call(), call(), strict=True))


@needs_compiler
@pytest.mark.parametrize("begin", [100, 256])
@pytest.mark.parametrize("number", [10**10, -(10**10)])
def test_offsets_that_are_none_somewhere_among_many_bags_are_refused(begin, number):
    served, batch = apart(600)
    offsets = batch["a"][1].clone()
    offsets[begin:300] = number
    for look_up in (served, lambda given: served(served.pack(given))):
        with pytest.raises(ValueError, match=r"features\['a'\]\[1\] must"):
            look_up(batch | {"a": (batch["a"][0], offsets)})
    packed = served.pack(batch)
    group = next(group for group in packed.groups if "a" in group.names)
    spoiled = group.offsets.clone()
    spoiled[begin:300] = number
    groups = [one._replace(offsets=spoiled) if one is group else one for one in packed.groups]
    with pytest.raises(ValueError, match="offsets must ascend from 0 to the number of ids"):
        served(packed._replace(groups=tuple(groups)))


@needs_compiler
@pytest.mark.parametrize("name", ["a", "b", "e"])
def test_features_of_fewer_rows_than_others_are_refused(name):
    served, batch = apart(80)
    batch[name] = torch.arange(70)
    with pytest.raises(ValueError, match=r"features that pool must have the same number of rows, got"):
        served(batch)


@needs_compiler
def test_a_feature_that_is_unknown_is_refused_where_features_lie_apart():
    served, batch = apart(80)
    with pytest.raises(ValueError, match=r"got none of \[\] and unknown \['z'\]"):
        served(batch | {"z": torch.arange(80)})


@needs_compiler
def test_tensors_without_memory_are_looked_up_as_torch_does():
    served, batch = apart(80)
    nothing = torch._efficientzerotensor(81, dtype=torch.int64)
    empty = torch.empty(0, dtype=torch.int64)
    for given in ({"b": nothing[:80]}, {"c": (empty, nothing)}):
        found = []
        for served.backend in ("cpp", "reference"):
            found.append(served(batch | given).pooled)
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=3e-7)  # like in the test above
    served.backend = "cpp"
    with pytest.raises(ValueError, match=r"features\['c'\]\[1\] must"):
        served(batch | {"c": (batch["c"][0], nothing)})


@needs_compiler
def test_weights_are_those_of_their_widths_in_whatever_order_they_stand():
    features = {name: IdFeature(name) for name in "ab"}
    lookup = FusedEmbeddingLookup({"a": EmbeddingTable(9, 8), "b": EmbeddingTable(9, 4)}, features)
    batch = dict.fromkeys("ab", torch.arange(70))
    lookup.insert(dict.fromkeys("ab", torch.arange(9)))
    assert list(lookup.weights) == ["8", "4"]  # and those of 4 come first in the operator
    with torch.no_grad():
        for some in (batch, {name: ids[:10] for name, ids in batch.items()}):
            found = []
            for lookup.backend in ("cpp", "reference"):
                found.append(lookup(some).pooled)
            assert torch.equal(*found)


@needs_compiler
def test_what_a_lookup_is_made_of_is_looked_at_where_features_lie_apart():
    features = {"a": IdFeature("t"), "b": IdFeature("t", pooling=None), "c": IdFeature("t")}
    lookup = FusedEmbeddingLookup({"t": EmbeddingTable(9, 4)}, features)
    batch = dict.fromkeys("abc", torch.arange(80))
    served = ServingLookup(lookup, dtype=torch.float32, backend="cpp")
    vectors = served(batch)
    assert (vectors.pooled.shape, vectors.unpooled["b"].shape) == ((80, 8), (80, 4))
    served, batch = apart(80)
    want = served(batch).pooled
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(served(batch).pooled, want)
    finally:
        torch.set_default_dtype(torch.float32)
    served.weight_16.requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        served(batch).pooled.sum().backward()
    served.weight_16 = served.weight_16.detach().double()
    with pytest.raises(TypeError, match="weights must be float32 or float16 or bfloat16 or int8"):
        served(batch)


@needs_compiler
def test_a_mapping_is_asked_for_each_feature_once():
    served, batch = apart(10)
    asked = []

    class Lazy(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    served(Lazy(batch))
    assert sorted(asked) == sorted(APART)


@needs_compiler
def test_whoever_looks_sees_features_that_lie_apart_looked_up_by_the_operator():
    served, batch = apart(80)
    want = served(batch).pooled
    with _Seen() as mode:
        seen = served(batch).pooled
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        profiled = served(batch).pooled
    assert torch.equal(seen, want)
    assert torch.equal(profiled, want)
    assert "recblocks.fused_lookup_vectors.default" in mode.names
    assert "recblocks::fused_lookup_vectors" in [event.key for event in profile.key_averages()]


@needs_compiler
def test_rows_and_columns_that_there_are_not_are_refused_where_features_lie_apart():
    served, batch = apart(80)
    for field, number in ((0, 9), (2, 10**6), (4, 7), (5, 60), (5, -1)):
        places = served.places.clone()
        served.places[field, 2] = number
        if field == 2:
            served.places[3, 2] = 1
            served.keys.fill_(0)
        with pytest.raises(IndexError, match="places must name parts of the id table, weights"):
            served(batch)
        served.places.copy_(places)


@needs_compiler
def test_on_the_meta_device_there_is_nothing_to_lay():
    lookup = FusedEmbeddingLookup({"t": EmbeddingTable(9, 2)}, {"a": IdFeature("t")}, device="meta", backend="cpp")
    with torch.no_grad():
        assert lookup({"a": torch.empty(5, dtype=torch.int64, device="meta")}).pooled.shape == (5, 2)


FORKING = """
import os, torch
from recblocks import EmbeddingTable, FusedEmbeddingLookup, IdFeature
torch.set_num_threads(2)
lookup = FusedEmbeddingLookup({"t": EmbeddingTable(9, 16)}, {str(at): IdFeature("t") for at in range(50)})
batch = dict.fromkeys(map(str, range(50)), torch.arange(256))
with torch.no_grad():
    want = lookup(batch).pooled
    child = os.fork()
    if not child:
        os._exit(0 if (lookup(lookup.pack(batch)).pooled.numpy() == want.numpy()).all() else 1)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_looks_up_too():
    subprocess.run([sys.executable, "-c", FORKING], check=True, timeout=120)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_features_are_laid_side_by_side_by_any_number_of_threads(threads):
    sizes = [0, 700, 1, 1500, 64, 0, 900]
    ids = [torch.arange(size) + 10_000 * at for at, size in enumerate(sizes)]
    offsets = [torch.tensor([0, size // 3, size]) for size in sizes]
    torch.set_num_threads(threads)
    try:
        every, begins, counts = cpp.lay(ids, offsets)
        assert torch.equal(every, torch.cat(ids))
        assert counts.tolist() == sizes
        ends = list(itertools.accumulate(sizes))
        starts = [end - size for end, size in zip(ends, sizes, strict=True)]
        want = [[start, start + size // 3] for start, size in zip(starts, sizes, strict=True)]
        assert begins.tolist() == [*itertools.chain(*want), ends[-1]]
        for wrong, size in enumerate(sizes):
            for bad in ([1, size, size], [0, 0, size + 1], [0, size + 1, size], [0, -1, size]):
                assert cpp.lay(ids, [*offsets[:wrong], torch.tensor(bad), *offsets[wrong + 1 :]]) is None
    finally:
        torch.set_num_threads(1)


@needs_compiler
@pytest.mark.parametrize(
    "offsets", [[0, 3, 2, 4], [-1, 2, 3, 4], [1, 2, 3, 4], [0, 2, 3, 3], [0, 2, 3, 5], [0, 2, 3, LOWEST]]
)
def test_bags_that_are_none_are_refused_and_nothing_else_is_read(offsets):
    lookup = make(5, "cpu")
    feature, weight = torch.tensor([[3]]), lookup.weights["5"].detach()
    given = some_ids("cpu", 4), feature, lookup.places, *lookup.table.slots, weight
    with pytest.raises(
        ValueError, match=f"offsets must ascend from 0 to the number of ids, got {offsets[0]}, {offsets[1]}"
    ):
        vectors_of(*given, None, torch.tensor(offsets), 1, False, "cpp")


@needs_compiler
def test_numbers_and_rows_out_of_range_are_refused():
    lookup = make(5, "cpu")
    ids, weight = torch.arange(4), lookup.weights["5"].detach()
    given = lookup.places, *lookup.table.slots
    for number in (-1, 5):
        feature = torch.tensor([0, 1, number, 2])
        with pytest.raises(IndexError, match=r"feature must be from 0 to 4, got (-1 to 2|0 to 5)"):
            dispatch.lookup_rows(ids, feature, *given, "cpp")
        with pytest.raises(IndexError, match=r"feature must be from 0 to 4, got (-1 to 2|0 to 5)"):
            vectors_of(ids, feature, *given, weight, None, None, None, False, "cpp")
    feature = torch.tensor([[4]])
    rows = dispatch.lookup_rows(ids, feature, *given, "cpp")
    fewer = weight[: int(rows.max())]
    for offsets in (None, torch.tensor([0, 4])):
        with pytest.raises(IndexError, match="places must name parts of the id table, weights, rows of these and"):
            vectors_of(ids, feature, *given, fewer, None, offsets, 1, False, "cpp")


@needs_compiler
@pytest.mark.parametrize(("field", "number"), [(4, -1), (4, 2), (5, -1), (5, 6), (5, 2**62)])
def test_weights_and_columns_that_there_are_not_are_refused(field, number):
    lookup = make(5, "cpu")
    ids, weight, places = torch.arange(4), lookup.weights["5"].detach(), lookup.places.clone()
    places[4:] = torch.tensor([[1, 1, 1, 1, 1], [0, 5, 0, 0, 0], [0, 0, 0, 0, 0]])
    places[field, 1] = number
    for feature, offsets, counts in (([0, 1], None, [0, 2]), ([0, 1], torch.arange(5), [0, 2])):
        given = ids, torch.tensor(feature), places, *lookup.table.slots, [weight[:0, :4], weight], [], offsets
        with pytest.raises(IndexError, match="places must name parts of the id table, weights, rows of these and"):
            dispatch.lookup_vectors(*given, counts, 10, True, "cpp")


@needs_compiler
@pytest.mark.parametrize("wrong_at", [0, 2500, 4999])
def test_what_is_wrong_anywhere_is_refused_by_any_number_of_threads(wrong_at):
    lookup = make(5, "cpu")
    ids, feature = torch.arange(5000), torch.zeros(5000, dtype=torch.int64)
    feature[wrong_at] = 5
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            with pytest.raises(IndexError, match="feature must be from 0 to 4, got 0 to 5"):
                dispatch.lookup_rows(ids, feature, lookup.places, *lookup.table.slots, "cpp")
        finally:
            torch.set_num_threads(1)


@needs_compiler
@pytest.mark.parametrize("part", [-1, 3])
def test_parts_that_the_table_has_not_are_refused(part):
    lookup = make(5, "cpu")
    places = lookup.places.clone()
    places[0, 0] = part
    with pytest.raises(IndexError, match="places must name parts of the id table"):
        dispatch.lookup_rows(torch.arange(4), torch.tensor([[0]]), places, *lookup.table.slots, "cpp")


@needs_compiler
def test_c_plus_plus_runs_on_a_cpu_only():
    assert dispatch.resolve("cpp", torch.device("cpu")) == dispatch.resolve("auto", torch.device("cpu")) == "cpp"
    with pytest.raises(ValueError, match=r"backend 'cpp' must run on a CPU, got cuda:0"):
        dispatch.resolve("cpp", torch.device("cuda:0"))


def test_inside_a_transform_it_is_plain_torch():
    seen = []

    def look(x):
        seen.append(dispatch.resolve("auto", x.device))
        return x.sum()

    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(3))
    assert seen == [None, None]


def test_what_is_exported_needs_torch_alone():
    lookup = trained("auto", "cpu")
    given = {"user": torch.arange(7), **{name: ids for name, ids in batch().items() if name != "user"}}
    exported = torch.export.export(ServingLookup(lookup), (given,))
    assert not [node for node in exported.graph.nodes if "recblocks" in str(node.target)]


LOOKING_UP = """
import warnings, torch, recblocks
from recblocks.kernels.fused_lookup import dispatch
warnings.simplefilter("always")
tables, features = {"t": recblocks.EmbeddingTable(9, 2)}, {"f": recblocks.IdFeature("t")}
lookup = recblocks.FusedEmbeddingLookup(tables, features, backend=BACKEND)
ids = torch.arange(5)
lookup.insert({"f": ids})
with torch.no_grad():
    got = lookup({"f": ids}).pooled
lookup.backend = "reference"
assert torch.equal(got, lookup({"f": ids}).pooled)
print(dispatch.resolve("auto", ids.device))
"""


def look_up(cache, backend="auto", **environment):
    """What a new process says that looks something up, with an empty cache folder unless it is given one."""
    own = {name: value for name, value in os.environ.items() if name != "CXX"} | {"XDG_CACHE_HOME": str(cache)}
    code = LOOKING_UP.replace("BACKEND", repr(backend))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own | environment)


def compiler_that(path, does):
    """A command that is run in the place of the compiler."""
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_it_is_built_once_a_user(tmp_path):
    command = compiler_that(tmp_path / "c++", f'echo built >> {tmp_path}/log; exec {building.compiler()[0]} "$@"')
    for _ in range(2):
        done = look_up(tmp_path, CXX=command)
        assert (done.stdout.split(), done.stderr) == (["cpp"], "")
    assert (tmp_path / "log").read_text().split() == ["built"]
    assert [path.suffix for path in (tmp_path / "recblocks").iterdir()] == [".so"]


@needs_compiler
def test_what_it_is_built_from_tells_libraries_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "user_cache", lambda: tmp_path / "cache")
    source, header = tmp_path / "one.cpp", tmp_path / "other.h"
    source.write_text('extern "C" int number() { return NUMBER; }')
    header.write_text("// another header")

    def number(flags):
        return building.library([source], {"number": []}, flags).number()

    assert [number(["-DNUMBER=1"]), number(["-DNUMBER=2"]), number(["-DNUMBER=1"])] == [1, 2, 1]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(building, "_HEADER", header)
    assert number(["-DNUMBER=1"]) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 3


@needs_compiler
def test_a_compiler_without_openmp_and_a_cache_that_cannot_be_written_will_do(tmp_path):
    without = f'case "$*" in *-fopenmp*) exit 1;; esac; exec {building.compiler()[0]} "$@"'
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, where there ought to be a folder")
    for cache in (blocked, tmp_path / "cache"):
        done = look_up(cache, CXX=compiler_that(tmp_path / "c++", without))
        assert (done.stdout.split(), done.stderr) == (["cpp"], "")
    assert not list((tmp_path / "cache").rglob("*.so"))  # one that has no threads is not kept: the next try may have


@needs_compiler
@pytest.mark.parametrize("spoiled", ["", "no library"])
def test_what_is_kept_and_cannot_be_loaded_is_built_again(tmp_path, spoiled):
    assert look_up(tmp_path).stdout.split() == ["cpp"]
    (kept,) = (tmp_path / "recblocks").iterdir()
    whole = kept.stat().st_size
    kept.unlink()  # a file that is loaded must not be written into
    kept.write_text(spoiled)
    done = look_up(tmp_path)
    assert (done.stdout.split(), done.stderr) == (["cpp"], "")
    assert kept.stat().st_size == whole


@needs_compiler
def test_a_library_of_something_else_is_built_again(tmp_path):
    look_up(tmp_path)
    (kept,) = (tmp_path / "recblocks").iterdir()
    kept.unlink()
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int other() { return 0; }')
    subprocess.run([*building.compiler(), "-shared", "-fPIC", str(source), "-o", str(kept)], check=True)
    done = look_up(tmp_path)
    assert (done.stdout.split(), done.stderr) == (["cpp"], "")


@needs_compiler
def test_a_user_without_a_home_builds_for_the_process(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(building, "user_cache", homeless)
    assert cpp.library.__wrapped__().fill_rows


def test_without_a_compiler_it_is_plain_torch(tmp_path):
    done = look_up(tmp_path, PATH=str(tmp_path))
    assert (done.stdout.split(), done.stderr) == (["None"], "")
    done = look_up(tmp_path, backend="cpp", PATH=str(tmp_path))
    assert "RuntimeError: backend 'cpp' needs a C++ compiler: install g++ or clang++" in done.stderr


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("/no/such/compiler", "/no/such/compiler cannot be run"),
        ("false", "false failed"),
        ('g++ "', "CXX must be a command, got 'g++ \"'"),
    ],
)
def test_a_compiler_that_fails_is_warned_of_once(tmp_path, command, says):
    done = look_up(tmp_path, CXX=command)
    assert done.stdout.split() == ["None"]
    assert done.stderr.count(f"RuntimeWarning: ids are looked up in plain torch, as {says}") == 1
    assert not list(tmp_path.rglob("*.so*"))


@needs_compiler
def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path):
    own = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", LOOKING_UP.replace("BACKEND", "'cpp'")]
    running = [subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    assert [one.communicate() for one in running] == [(b"cpp\n", b"")] * 4
    assert len(list((tmp_path / "recblocks").iterdir())) == 1
