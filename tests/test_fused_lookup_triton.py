"""The Triton kernels of the fused lookup against plain torch: on a GPU, or else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from lookups import FEATURES, TABLES
from torch.nn import functional

pytest.importorskip("triton")

from recblocks import EmbeddingTable, FusedEmbeddingLookup, IdFeature, ServingLookup
from recblocks.embedding._gather import lookup_rows
from recblocks.kernels.fused_lookup import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOWEST, HIGHEST = -(2**63), 2**63 - 1


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


def make(dim, num_tables=3, **options):
    """Tables of which each is nearly full, some ids erased; each of its features has other rows for unseen ids."""
    tables = {f"t{at}": EmbeddingTable(31 + 2 * at, dim) for at in range(num_tables)}
    features = {f"f{at}": IdFeature(f"t{at % num_tables}", num_unseen=1 + at) for at in range(num_tables + 2)}
    lookup = FusedEmbeddingLookup(tables, features, generator=torch.Generator().manual_seed(0), **options)
    ids = torch.cat([torch.tensor([LOWEST, HIGHEST, -1]), torch.arange(27)])
    lookup.insert(dict.fromkeys(features, ids))
    lookup.erase("t0", torch.tensor([3, -1]))
    return lookup.to(DEVICE)


def some_ids(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-3, 40, shape, generator=generator)
    extreme = torch.randint(0, 9, shape, generator=generator)
    return torch.where(extreme == 0, LOWEST, torch.where(extreme == 1, HIGHEST, ids)).to(DEVICE)


def features_of(lookup, *shape):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(len(lookup.layout.features), shape, generator=generator).to(DEVICE)


@pytest.mark.parametrize("num_tables", [1, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 13, 32])
def test_rows_are_those_of_plain_torch(num_tables, num_rows):
    lookup = make(4, num_tables)
    num_features = len(lookup.layout.features)
    ids, feature = some_ids(num_rows, num_features), torch.arange(num_features, device=DEVICE)
    want = lookup_rows(ids, lookup.table.slots, lookup.places[:, feature])
    assert len(want.unique()) > min(num_rows, 2) * num_features - 2
    given = lookup.places, *lookup.table.slots
    assert torch.equal(dispatch.lookup_rows(ids, feature, *given, "triton"), want)
    each = feature.expand_as(ids).flatten()
    assert torch.equal(dispatch.lookup_rows(ids.flatten(), each, *given, "triton"), want.flatten())
    strided = ids.repeat_interleave(2, 0)[::2].t().contiguous().t()
    assert not strided.is_contiguous() or num_rows == 1
    places = lookup.places.t().contiguous().t()
    assert torch.equal(dispatch.lookup_rows(strided, feature, places, *lookup.table.slots, "triton"), want)


@pytest.mark.parametrize("dim", [1, 3, 8, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_vectors_and_bags_are_those_of_plain_torch(dim, dtype):
    lookup = make(dim)
    num_ids, slots = 61, lookup.table.slots
    ids, feature = some_ids(num_ids), features_of(lookup, num_ids)
    rows = lookup_rows(ids, slots, lookup.places[:, feature])
    weight, scale = (100 * lookup.weights[str(dim)].detach()).to(dtype), None
    want = weight.float()
    if dtype == torch.int8:
        scale = torch.rand(len(weight), generator=torch.Generator().manual_seed(3)).to(DEVICE)
        want = want * scale[:, None]
    given = ids, feature, lookup.places, *slots, weight, scale
    assert torch.equal(dispatch.lookup_vectors(*given, None, False, "triton"), want[rows])
    offsets = torch.tensor([0, 0, 1, 1, 9, 20, 44, 61, 61], device=DEVICE)
    for mode in ("sum", "mean"):
        got = dispatch.lookup_vectors(*given, offsets, mode == "mean", "triton")
        bags = functional.embedding_bag(rows, want, offsets, mode=mode, include_last_offset=True)
        # Up to 24 numbers below 127 are added in another order: 24 roundings of at most 3000 by 2**-24.
        torch.testing.assert_close(got, bags, rtol=0, atol=5e-3 if dtype == torch.int8 else 5e-4)


def test_no_ids_and_no_bags_give_nothing():
    lookup = make(5)
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    given = nothing, nothing, lookup.places, *lookup.table.slots
    assert dispatch.lookup_rows(*given, "triton").shape == (0,)
    weight = lookup.weights["5"].detach()
    assert dispatch.lookup_vectors(*given, weight, None, None, False, "triton").shape == (0, 5)
    begin = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert dispatch.lookup_vectors(*given, weight, None, begin, False, "triton").shape == (0, 5)
    only_empty = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    assert torch.equal(
        dispatch.lookup_vectors(*given, weight, None, only_empty, True, "triton"), torch.zeros(3, 5, device=DEVICE)
    )


# --- the Modules ---


def batch():
    features = {
        "user": torch.arange(-4, 3),
        "item": torch.arange(7),
        "liked": torch.arange(14).view(7, 2),
        "tags": (torch.arange(6), torch.tensor([0, 0, 1, 3, 3, 4, 6, 6])),
        "seen": torch.arange(12).view(3, 4),
    }
    return {
        name: tuple(one.to(DEVICE) for one in ids) if isinstance(ids, tuple) else ids.to(DEVICE)
        for name, ids in features.items()
    }


def trained(backend, gradient="dense", **options):
    generator = torch.Generator(DEVICE).manual_seed(0)
    lookup = FusedEmbeddingLookup(
        TABLES, FEATURES, backend=backend, gradient=gradient, generator=generator, device=DEVICE, **options
    )
    lookup.insert(batch(), generator=generator)
    return lookup


@pytest.mark.parametrize("gradient", ["dense", "rowwise_adagrad"])
def test_a_lookup_gives_and_learns_the_same_with_either_backend(gradient):
    one, other = trained("triton", gradient, learning_rate=0.5), trained("reference", gradient, learning_rate=0.5)
    for _ in range(2):
        with torch.no_grad():
            got, want = one(batch()), other(batch())
        # Bags of two: a sum in another order rounds the same, a mean once more.
        torch.testing.assert_close(got.pooled, want.pooled, rtol=0, atol=1e-6)
        assert torch.equal(got.unpooled["seen"], want.unpooled["seen"])
        for lookup in (one, other):
            vectors = lookup(batch())
            (vectors.pooled.square().sum() + vectors.unpooled["seen"].sum()).backward()
            if gradient == "dense":
                torch.optim.SGD(lookup.parameters(), lr=0.5).step()
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_vectors_have_the_dtype_of_the_weights(dtype):
    one, other = trained("triton", dtype=dtype), trained("reference", dtype=dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got, want = one(batch()), other(batch())
        assert got.pooled.dtype == got.unpooled["seen"].dtype == dtype
        assert torch.equal(got.unpooled["seen"], want.unpooled["seen"])
        # Bags of two: sums that are rounded to the weights' dtype once or twice, of numbers below 1.
        torch.testing.assert_close(got.pooled, want.pooled, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_served_lookup_gives_the_same_with_either_backend(dtype):
    lookup = trained("reference")
    got, want = (ServingLookup(lookup, dtype=dtype, backend=one)(batch()) for one in ("triton", "reference"))
    torch.testing.assert_close(got.pooled, want.pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.unpooled["seen"], want.unpooled["seen"], rtol=0, atol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_a_compiled_lookup_keeps_the_kernels_in_one_graph(grad):
    torch.compiler.reset()
    lookup, operations = trained("triton"), set()

    def look(graph, _):
        operations.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(lookup, backend=look, fullgraph=True)
    with torch.set_grad_enabled(grad):
        got, want = compiled(lookup.pack(batch())).pooled, lookup(batch()).pooled
    assert torch.equal(got, want)
    name = "fused_lookup_rows" if grad else "fused_lookup_vectors"
    assert any(name in one for one in operations)


def test_the_operators_pass_torch_s_own_check():
    lookup = trained("triton")
    group = lookup.pack(batch()).groups[0]
    given = group.ids, group.feature, lookup.places, *lookup.table.slots
    torch.library.opcheck(dispatch.lookup_rows, (*given, "triton"))
    dim = str(lookup.layout.dim_of[group.names[0]])
    torch.library.opcheck(
        dispatch.lookup_vectors, (*given, lookup.weights[dim].detach(), None, group.offsets, False, "triton")
    )


COMPILING = """
import os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from recblocks.kernels.fused_lookup import triton as kernel

TYPES = dict.fromkeys(("num_ids", "num_columns", "num_features", "num_buckets"), "i32")
TYPES |= {"rows": "*i32", "scale": "*fp32", "out": "*fp32"}
ptxas = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
for function, own in ((kernel.one_each, {"GATHERS": True}), (kernel.bags, {"MEAN": True})):
    for weight, scaled in (("*fp32", False), ("*fp16", False), ("*bf16", False), ("*i8", True)):
        for dim in (1, 32, 96, 300):
            fixed = {"SCALED": scaled, **kernel.sizes_of(dim), **own}
            names = function.arg_names
            types = {name: "constexpr" if name in fixed else TYPES.get(name, "*i64") for name in names}
            constants = {(names.index(name),): value for name, value in fixed.items()}
            source = ASTSource(fn=function, signature=types | {"weight": weight}, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "kernel.ptx")
                with open(path, "w") as file:
                    file.write(compiled.asm["ptx"])
                command = [ptxas, "-v", "--gpu-name", "sm_90a", path, "-o", os.path.join(folder, "kernel.cubin")]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            spilled = re.findall(r"(\\d+) bytes spill (?:stores|loads)", said)
            print(function.__name__, weight, dim, *spilled)
"""


def test_the_kernels_build_for_a_hopper_gpu_and_spill_nothing(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    # From a file: Triton reads the source of what it compiles, and of a -c there is none to read.
    path = tmp_path / "compiling.py"
    path.write_text(COMPILING)
    said = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True, env=environment)
    lines = said.stdout.splitlines()
    assert len(lines) == 32
    assert all(line.endswith(" 0 0") for line in lines)
