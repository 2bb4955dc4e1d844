"""What every public Module can do, whatever it computes; tests/modules.py lists them."""

import copy
import io
import random

import modules
import numpy as np
import pytest
import torch
from modules import run
from torch.utils._pytree import tree_leaves, tree_map

import recblocks

# The same float32 operations in another order or with another kernel: a few roundings (2**-24 each) of numbers up to
# 22. What these tests are after (a lost mask, a state left empty, a rounded period) moves an output by more than 1e-2.
SAME = {"rtol": 1e-5, "atol": 1e-5}
# bfloat16 keeps 8 bits: 2**-9 a rounding, some twenty of them in a row in the deepest Module.
SHORT = {"rtol": 2**-5, "atol": 2**-4}

each_module = pytest.mark.parametrize("entry", modules.ENTRIES, ids=lambda entry: entry.name)


def make(entry, device="cpu", dtype=torch.float32):
    module = entry.build(device, dtype)
    if isinstance(module, recblocks.CountMinSketch) and device == "cpu":
        module.update(entry.inputs()["ids"])
    if isinstance(module, recblocks.IdTable) and device == "cpu":
        module.insert(torch.arange(9))
    if isinstance(module, recblocks.FusedEmbeddingLookup) and device == "cpu":
        module.insert(entry.inputs()["features"])
    return module


def garbage(dtype):
    return torch.iinfo(dtype).max // 4 + min(12345, torch.iinfo(dtype).max // 2)


def run_with_gradients(call, module, inputs):
    out = run(call, inputs)
    parameters = [one for one in module.parameters() if one.requires_grad]
    if not parameters:
        return out, ()
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), parameters)


def test_every_public_module_stands_in_the_list():
    public = {getattr(recblocks, name) for name in recblocks.__all__}
    public = {thing for thing in public if isinstance(thing, type) and issubclass(thing, torch.nn.Module)}
    assert public == {type(make(entry)) for entry in modules.ENTRIES} | modules.OF_TORCHREC
    names = [entry.name for entry in modules.ENTRIES]
    assert len(names) == len(set(names))


@each_module
def test_a_module_made_on_meta_works_after_to_empty_and_reset_parameters(entry):
    module = make(entry, device="meta")
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else garbage(tensor.dtype))
    if list(module.parameters()) or list(module.buffers()):
        module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert run(module, inputs := entry.inputs()).isfinite().all()
    # What no state_dict carries must be as in a Module made in place.
    usual = make(entry)
    module.load_state_dict(usual.state_dict())
    assert torch.equal(run(module, inputs), run(usual, inputs))


@each_module
@pytest.mark.parametrize("assign", [False, True])
def test_a_module_made_on_meta_works_after_loading(entry, assign):
    usual, module = make(entry), make(entry, device="meta")
    if not assign:
        module.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.fill_(float("nan") if tensor.is_floating_point() else garbage(tensor.dtype))
    module.load_state_dict(usual.state_dict(), assign=assign)
    inputs = entry.inputs()
    assert torch.equal(run(module, inputs), run(usual, inputs))


@each_module
def test_dtype_is_that_of_the_parameters(entry):
    for dtype in (torch.float64, torch.bfloat16):
        assert {parameter.dtype for parameter in make(entry, dtype=dtype).parameters()} <= {dtype}


@each_module
def test_deepcopy_is_equal_and_shares_nothing(entry):
    module, inputs = make(entry), entry.inputs()
    want = run(module, inputs)
    other = copy.deepcopy(module)
    assert torch.equal(run(other, inputs), want)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.fill_(1)
    assert torch.equal(run(module, inputs), want)


@each_module
def test_a_cast_to_bfloat16_stays_close(entry):
    module, inputs = make(entry), entry.inputs()
    want = run(module, inputs)
    got = run(module.to(torch.bfloat16), inputs)
    torch.testing.assert_close(got.to(want.dtype), want, **SHORT)


@each_module
def test_autocast_keeps_the_dtype_and_stays_close(entry):
    module, inputs = make(entry), entry.inputs()
    want = run(module, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, grads = run_with_gradients(module, module, inputs)
    assert got.dtype == want.dtype
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(got, want, **SHORT)


# torch warns of its own deprecated function while inductor loads.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@each_module
def test_compile_gives_one_graph_the_same_output_and_gradients(entry, backend):
    torch.compiler.reset()
    module, inputs = make(entry), entry.inputs()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for mode in (True, False):
        module.train(mode)
        out, grads = run_with_gradients(compiled, module, inputs)
        want, want_grads = run_with_gradients(module, module, inputs)
        torch.testing.assert_close(out, want, **SAME)
        for grad, want_grad in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(grad, want_grad, **SAME)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in modules.ENTRIES if "packed" in e.name], ids=lambda entry: entry.name)
def test_packed_sequences_of_other_lengths_need_no_other_compilation(entry):
    torch.compiler.reset()
    module = make(entry)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    inputs = entry.inputs()
    run(compiled, inputs)
    packed = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and name != "offsets"}
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ([1, 3, 4, 2], [2, 2], [4, 4, 4, 4, 1]):
            offsets = torch.tensor([0, *lengths]).cumsum(0)
            rows = torch.randint(6, (sum(lengths),))
            other = inputs | {name: value[rows] for name, value in packed.items()} | {"offsets": offsets}
            torch.testing.assert_close(run(compiled, other), run(module, other), **SAME)


@each_module
def test_export_takes_other_numbers_of_rows(entry):
    module, inputs = make(entry).eval(), entry.inputs()
    dynamic = tree_map(lambda value: {0: torch.export.Dim.DYNAMIC} if isinstance(value, torch.Tensor) else None, inputs)
    exported = torch.export.export(module, (), inputs, dynamic_shapes=dynamic).module()
    operations = {str(node.target) for node in exported.graph.nodes}
    assert not operations & {"aten.item.default", "aten._local_scalar_dense.default"}, "a forward waits for the device"
    torch.testing.assert_close(run(exported, inputs), run(module, inputs), **SAME)
    if entry.has_rows and inputs:
        more = tree_map(lambda value: torch.cat([value, value, value[:1]]), inputs)
        torch.testing.assert_close(run(exported, more), run(module, more), **SAME)


@each_module
def test_a_forward_asks_for_no_number_on_a_device(entry):
    """The meta device has none: what waits for one (item, cpu, a shape or branch that depends on data) fails there."""
    inputs = entry.inputs()
    on_meta = tree_map(lambda value: value.to("meta") if isinstance(value, torch.Tensor) else value, inputs)
    out = run(make(entry, device="meta"), on_meta)
    assert out.is_meta
    assert out.shape == run(make(entry), inputs).shape


@each_module
def test_a_saved_state_gives_the_same_module(entry):
    module, inputs = make(entry), entry.inputs()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = make(entry)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(other, inputs), run(module, inputs))


@each_module
def test_eval_touches_no_random_state(entry):
    module, inputs = make(entry).eval(), entry.inputs()
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    first = run(module, inputs)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    np.testing.assert_equal(np.random.get_state(), numpy_state)  # noqa: NPY002
    assert torch.equal(run(module, inputs), first)


@pytest.mark.parametrize("entry", [e for e in modules.ENTRIES if e.has_rows], ids=lambda entry: entry.name)
def test_a_row_alone_is_the_row_in_the_batch(entry):
    module, inputs = make(entry), entry.inputs()
    out = run(module, inputs)
    for row in range(len(out)):
        alone = run(module, tree_map(lambda value, row=row: value[row : row + 1], inputs))
        torch.testing.assert_close(alone[0], out[row], **SAME)


@each_module
def test_training_evaluation_and_no_grad_agree(entry):
    module, inputs = make(entry), entry.inputs()
    training = run(module.train(), inputs)
    evaluation = run(module.eval(), inputs)
    torch.testing.assert_close(evaluation, training, **SAME)
    with torch.no_grad():
        torch.testing.assert_close(run(module, inputs), training, **SAME)
    with torch.inference_mode():
        torch.testing.assert_close(run(module, inputs), training, **SAME)


@each_module
def test_the_inputs_are_left_as_they_were(entry):
    module, inputs = make(entry), entry.inputs()
    before = copy.deepcopy(inputs)
    run(module, inputs)
    for value, was in zip(tree_leaves(inputs), tree_leaves(before), strict=True):
        assert torch.equal(value, was) if isinstance(value, torch.Tensor) else value == was
