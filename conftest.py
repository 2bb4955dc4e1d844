"""The doctests of files that need an optional package run where it is installed; the test session installs them all."""

import importlib
import importlib.util
import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported, as torchrec does: without a GPU it interprets

NEED = {
    "torchrec": ["recblocks/embedding/torchrec.py", "recblocks/embedding/shardable_lookup.py"],
    "triton": ["recblocks/kernels/fused_lookup/triton.py"],
}
collect_ignore = [path for name, paths in NEED.items() if importlib.util.find_spec(name) is None for path in paths]

if importlib.util.find_spec("torchrec") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of its own while it is imported, which would be errors
        importlib.import_module("torchrec")
