"""Triton's kernels of the count-min sketch against numpy's; on a GPU, or else in its interpreter."""

import hopper
import pytest
import torch

from recblocks import CountMinSketch
from recblocks import sketch as sketch_module
from recblocks.kernels.count_min import dispatch

kernels = pytest.importorskip("recblocks.kernels.count_min.triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = torch.tensor([-(2**63), 2**63 - 1, 0, -1])


@pytest.fixture
def by_triton(monkeypatch):
    """Sketches that take the kernels wherever they are."""
    monkeypatch.setattr(sketch_module._checks, "readable", lambda _: False)
    monkeypatch.setattr(dispatch, "runs_on", lambda _: True)


def filled(shape, seed, device, rounds=2):
    """A sketch of two batches of ids, once and with counts, of which one was shared."""
    sketch = CountMinSketch(*shape, seed=seed, device=device)
    generator = torch.Generator().manual_seed(1)
    for number in (1, 127, 128, 129)[: 2 * rounds]:
        ids = torch.cat([torch.randint(300, (number,), generator=generator), LIMITS]).to(device)
        sketch.update(ids)
        sketch.update(ids, torch.randint(5, ids.shape, generator=generator).to(device))
        sketch.update(ids, torch.rand(ids.shape, generator=generator).to(device))
        if number == 127:
            sketch.all_reduce()
    return sketch


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("shape", [(1, 1), (7, 2), (1000, 5), (2**20 - 3, 4)])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_counters_and_answers_are_those_of_numpy(shape, seed, monkeypatch):
    got = filled(shape, seed, DEVICE)
    asked = torch.cat([torch.arange(-50, 350), LIMITS])
    answers = [got.query(asked[:size].to(DEVICE).view(1, -1)).cpu() for size in (0, 1, 128, 404)]
    monkeypatch.undo()
    want = filled(shape, seed, "cpu")
    for one, other in zip(got.buffers(), want.buffers(), strict=True):
        assert torch.equal(one.cpu(), other)
    for one in answers:
        assert torch.equal(one, want.query(asked[: one.numel()]).view(1, -1))


@pytest.mark.usefixtures("by_triton")
def test_nothing_is_counted_of_no_ids():
    sketch = CountMinSketch(10, 3, device=DEVICE)
    sketch.update(torch.empty(0, dtype=torch.int64, device=DEVICE))
    assert sketch.total == 0
    assert not sketch.pending.any()


@pytest.mark.usefixtures("by_triton")
def test_ids_in_any_order_of_memory():
    ids = torch.arange(24, device=DEVICE).view(4, 6)
    one, other = (CountMinSketch(50, 3, device=DEVICE) for _ in range(2))
    one.update(ids.t(), ids.t() + 1)
    other.update(ids.t().contiguous(), (ids + 1).t().contiguous())
    assert torch.equal(one.pending, other.pending)
    assert torch.equal(one.query(ids.t()), other.query(ids).t())


def test_operators_are_those_of_torch():
    sketch = filled((20, 3), 5, DEVICE)
    ids, how = torch.arange(9, device=DEVICE), (*sketch._hash[:2], 1 << 16)
    for amounts in (None, ids + 1):
        torch.library.opcheck(dispatch.add, (ids, amounts, sketch.pending, sketch.pending_total, *how))
    torch.library.opcheck(dispatch.answer, (ids, sketch.synced, sketch.pending, *how))


def test_a_cpu_and_transforms_take_no_kernel(monkeypatch):
    ids = torch.arange(3)
    assert not dispatch.runs_on(ids)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert dispatch.runs_on(ids)
    monkeypatch.setattr(dispatch, "transformed", lambda: True)
    assert not dispatch.runs_on(ids)


BUILDING = """
import hopper
from recblocks.kernels.count_min import triton as kernel

TYPES = dict.fromkeys(("ids", "amounts", "pending", "synced", "total"), "*i64") | {"out": "*fp64"}
TYPES |= dict.fromkeys(("each", "sighting", "num", "width"), "i32") | {"offset": "i64"}
for depth in (1, 5, 16):
    types = TYPES | {"multipliers": ("i64",) * ((depth + 1) // 2)}
    hopper.build(kernel.count, types, {"DEPTH": depth, "IDS": kernel._IDS})
    hopper.build(kernel.count, types, {"DEPTH": depth, "IDS": kernel._IDS, "amounts": None})
    hopper.build(kernel.answer, types, {"DEPTH": depth, "IDS": kernel._IDS})
"""


def test_kernels_build_for_a_hopper_gpu_and_spill_nothing(tmp_path):
    built = hopper.run(BUILDING, tmp_path)
    assert len(built) == 9
    assert not any(one.spilled for one in built)
