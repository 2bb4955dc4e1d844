"""The doctests of files that need an optional package run where it is installed; the test session installs them all."""

import importlib.util

NEED = {
    "torchrec": ["recblocks/embedding/torchrec.py", "recblocks/embedding/shardable_lookup.py"],
    "triton": ["recblocks/kernels/fused_lookup/triton.py"],
}
collect_ignore = [path for name, paths in NEED.items() if importlib.util.find_spec(name) is None for path in paths]
