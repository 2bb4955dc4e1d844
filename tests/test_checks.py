import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from recblocks import _checks


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: _checks.tensor("x", [1.0]), TypeError, ["x must be a torch.Tensor", "[1.0]"]),
        (lambda: _checks.tensor("x", torch.ones(2, 3), "B", 4), ValueError, ["x", "(B, 4)", "(2, 3)"]),
        (lambda: _checks.tensor("x", torch.ones(2), "B", 2), ValueError, ["x", "(B, 2)", "(2,)"]),
        (lambda: _checks.floating("x", torch.ones(2, dtype=torch.int64)), TypeError, ["float32", "int64"]),
        (lambda: _checks.integers("ids", torch.ones(2), "N"), TypeError, ["ids", "int64", "float32"]),
        (lambda: _checks.mask("valid", torch.ones(2), "N"), TypeError, ["valid", "bool"]),
        (lambda: _checks.choice("unit", "min", ("s", "ms")), ValueError, ["unit", "'s', 'ms'", "'min'"]),
        (lambda: _checks.choice("unit", ["s"], {"s": 1}), ValueError, ["unit", "'s'", "['s'] (list)"]),
        (lambda: _checks.positive_int("width", 0), ValueError, ["width", "at least 1", "0"]),
        (lambda: _checks.positive_int("width", True), TypeError, ["width", "int", "True"]),
        (lambda: _checks.integer("cut", 1.0), TypeError, ["cut", "int", "1.0 (float)"]),
        (lambda: _checks.integer("cut", True), TypeError, ["cut", "int", "True"]),
        (lambda: _checks.integer("cut", "1"), TypeError, ["cut", "int", "'1'"]),
        (lambda: _checks.integer("cut", np.float64(1)), TypeError, ["cut", "int"]),
        (lambda: _checks.integer("cut", torch.tensor(1.0)), TypeError, ["cut", "int", "float32"]),
        (lambda: _checks.integer("cut", 2**63), ValueError, ["cut", str(2**63 - 1), f"got {2**63}"]),
        (lambda: _checks.integer("rank", -1, at_least=0, at_most=3), ValueError, ["rank", "from 0 to 3", "-1"]),
        (lambda: _checks.number("rate", 1.5, above=0, at_most=1), ValueError, ["rate", "above 0", "at most 1", "1.5"]),
        (lambda: _checks.number("rate", float("nan")), ValueError, ["rate", "finite", "nan"]),
        (lambda: _checks.number("rate", -math.inf), ValueError, ["rate", "finite", "-inf"]),
        (lambda: _checks.number("rate", 10**400), ValueError, ["rate", "finite", "1000"]),
        (lambda: _checks.number("rate", "1"), TypeError, ["rate", "number", "'1'"]),
        (
            lambda: _checks.optional("no_such_package.part", "pip install it"),
            ImportError,
            ["no_such_package", "pip install it"],
        ),
    ],
)
def test_an_error_names_the_argument_what_came_and_what_is_wanted(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_what_fits_passes():
    _checks.tensor("x", torch.ones(2, 3), "B", 3, dtype=torch.float32)
    _checks.tensor("x", torch.ones(2, 3))
    _checks.integers("ids", torch.arange(3), None)
    _checks.choice("unit", "s", ("s", "ms"))
    _checks.number("rate", 1, above=0, at_most=1)
    found = [_checks.integer("cut", 3), _checks.integer("cut", np.int64(3)), _checks.integer("cut", torch.tensor(3))]
    assert [(one, type(one)) for one in found] == [(3, int)] * 3
    assert _checks.integer("cut", -(2**63)) == -(2**63)
    assert _checks.optional("math", "") is not None


def test_numbers_are_readable_on_a_cpu_and_not_inside_a_graph():
    assert _checks.readable(torch.ones(1))
    assert not _checks.readable(torch.ones(1, device="meta"))
    seen = []

    def forward(x):
        seen.append(_checks.readable(x))
        return x + 1

    torch.compile(forward, backend="eager", fullgraph=True)(torch.ones(1))
    assert seen == [False]


OPTIONAL = "faiss datasketch datasketches pyarrow pandas lmdb torchrec scipy sklearn matplotlib triton"


def test_the_package_imports_with_every_optional_package_blocked():
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL.split()!r})); import recblocks"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_does_not_import_torch_s_compiler():
    # It takes a second, and a process that compiles nothing never needs it.
    code = "import sys, torch, recblocks; raise SystemExit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_are_read_on_a_cpu_only_and_outside_of_transforms():
    seen = []

    def look(x):
        seen.append(_checks.readable(x))
        return x.sum()

    x = torch.ones(3)
    look(x)
    look(torch.nn.Parameter(x))
    assert seen == [True, True]
    look(x.to("meta"))
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x[None])
    with FakeTensorMode():
        look(torch.ones(3))
    torch.compile(look, backend="eager", fullgraph=True)(x)
    assert seen[2:] == [False] * 5


def test_a_symbolic_number_is_checked_in_one_graph():
    def scaled(x, rate):
        _checks.number("rate", rate, above=0, at_most=1)
        return x * rate

    compiled = torch.compile(scaled, backend="eager", fullgraph=True, dynamic=True)
    for rate in (0.5, 0.25):
        assert compiled(torch.ones(1), rate).item() == rate


def test_a_message_does_not_repeat_a_million_numbers():
    with pytest.raises(TypeError, match=r"^x must be a torch.Tensor, got \[0, 1, 2, .*\.\.\. \(list\)$") as error:
        _checks.tensor("x", list(range(1_000_000)))
    assert len(str(error.value)) < 400
