"""The doctests of files that need an optional package run where it is installed; the test session installs them all."""

import importlib
import importlib.util
import os
import warnings

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported, as torchrec does: without a GPU it interprets

NEED = {
    "torchrec": ["recblocks/embedding/torchrec.py", "recblocks/embedding/shardable_lookup.py"],
    "triton": ["recblocks/kernels/*/triton.py", "recblocks/kernels/triton_hashing.py"],
}
collect_ignore_glob = [path for name, paths in NEED.items() if importlib.util.find_spec(name) is None for path in paths]


def _mend_interpreter() -> None:
    """Triton 3.6 interprets two things wrongly.

    It takes int() of arrays of one number, which numpy 2.4 refuses (triton-lang/triton#9171), and multiplies the bits
    of bfloat16 matrices as if they were integers.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def patch(tensor, scope, patch=interpreter._patch_lang_tensor):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def create_dot(self, a, b, *others, create_dot=interpreter.InterpreterBuilder.create_dot):
        return create_dot(self, _widened(a), _widened(b), *others)

    def _widened(matrix):
        if matrix.dtype.scalar.name != "bf16" or matrix.data.dtype != np.uint16:
            return matrix
        data = (matrix.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, interpreter.tl.float32)

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = create_dot


if importlib.util.find_spec("triton") is not None:
    _mend_interpreter()

if importlib.util.find_spec("torchrec") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of its own while it is imported, which would be errors
        importlib.import_module("torchrec")
