"""What tests of the losses over a pool share."""

import contextlib
import importlib
import importlib.util

import pytest
import torch

from recblocks.kernels.sampled_softmax import chunked

# Triton's kernels by its interpreter; on a GPU they have files of their own.
INTERPRETED = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
FAST = ("chunked", "triton") if INTERPRETED else ("chunked",)
BACKENDS = ("reference", *FAST)

# Of logits below 40 a float32 is off by 40 * 2**-24, a probability by as large a share of it, and a sum by a few.
FLOAT32 = 200 * torch.finfo(torch.float32).eps


@contextlib.contextmanager
def tiles_of(rows):
    """Make the chunked backend take this many rows, and pairs, at a time, whatever the number of columns."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_TILE_BYTES", 0), ("_MIN_ROWS", rows), ("_PAIRS", rows)):
            patch.setattr(chunked, name, value)
        yield


def interpret_small_tiles(patch, *ops):
    """Make Triton's kernels take few lines at a time, where they are interpreted."""
    sizes = {"WIDTH": 32, "KEPT": 4, "TILE": 4, "PRECISION": "ieee"}
    for op in ops if INTERPRETED else ():
        kernels = importlib.import_module(f"recblocks.kernels.{op}.triton")
        patch.setattr(kernels, "sizes_of", lambda dim, *_: (sizes | {"DIM": dim}, {}))


def gradients(loss_of, embeddings, keywords, log_q, dtype, backend):
    """The loss, with embeddings of ``dtype``, and its gradients by these, by the ``log_q`` so named and by τ."""
    leaves = [one.to(dtype).detach().requires_grad_() for one in embeddings]
    numbers = torch.promote_types(dtype, torch.float32)
    keywords = {
        name: one.to(numbers) if torch.is_tensor(one) and one.is_floating_point() else one
        for name, one in keywords.items()
    }
    corrected = keywords[log_q] = keywords[log_q].detach().requires_grad_()
    temperature = torch.tensor(0.3, dtype=numbers, device=leaves[0].device, requires_grad=True)
    loss = loss_of(*leaves, **keywords, temperature=temperature, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, [*leaves, corrected, temperature])


def agree(loss_of, embeddings, keywords, log_q, dtype, allowed):
    """Triton's kernels give what the reference gives in float64, gradients within this share of their norm."""
    given = loss_of, embeddings, keywords, log_q
    (loss, got), (want_loss, want) = gradients(*given, dtype, "triton"), gradients(*given, torch.float64, "reference")
    assert abs(loss - want_loss) <= FLOAT32 * abs(want_loss)
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).norm() <= allowed * max(other.norm(), 1e-6)
