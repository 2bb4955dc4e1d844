"""What a benchmark ran on, and how fast that multiplies matrices and copies memory."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any, NamedTuple

import torch

from benchmarks._timing import interleaved

PEERS = (
    *("triton", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchrec", "datasketches", "liger-kernel", "cut-cross-entropy"),
    *("faiss-cpu", "scikit-learn", "torchmetrics"),
)
SIDE, COPIED = 2048, 1 << 26  # of a matrix; float32 numbers, more than a cache holds


class Rates(NamedTuple):
    """Of one large product and one large copy: a yardstick, no bound, for another shape of product may be faster."""

    flops: float
    """A second, of a product of matrices."""
    bytes: float
    """A second, read and written, of a copy."""

    def floor(self, flops: float, moved: float) -> float:
        """Seconds that so many operations and bytes take at these rates, the ones beside the others."""
        return max(flops / self.flops, moved / self.bytes)


def measure_rates(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """With the matrices of that dtype; on a GPU these are larger, for it has more units to fill."""
    side = SIDE if device.type == "cpu" else 4 * SIDE
    generator = torch.Generator(device).manual_seed(0)  # so that what is drawn next is as it would be without
    left, right = (torch.randn(side, side, generator=generator, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.zeros(COPIED, device=device)
    target = torch.ones_like(source)
    calls = {"product": lambda: torch.mm(left, right, out=product), "copy": lambda: target.copy_(source)}
    seconds = interleaved(calls, device=device)
    return Rates(2 * side**3 / seconds["product"], 2 * source.nbytes / seconds["copy"])


def show_rates(factors: str, rates: Rates) -> None:
    """Print them; ``factors`` names the dtype of the matrices."""
    print(f"{factors} products {rates.flops / 1e9:.0f} GFLOP/s, copies {rates.bytes / 1e9:.1f} GB/s")


def described(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit, as a result must name them."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    installed = {one.name.replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    versions |= {name: installed[name] for name in PEERS if name in installed}
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    """The commit that is checked out, and whether files differ from it."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or "unknown"
