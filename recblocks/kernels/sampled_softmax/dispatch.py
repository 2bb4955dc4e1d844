"""Which backend of the sampled softmax runs, and its Triton kernels as two operators of torch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.kernels.dispatch import HAS_TRITON, transformed
from recblocks.kernels.own_positives import Ranges, owned_ranges
from recblocks.kernels.sampled_softmax.pool import Pool, Wanted, empty_gradients, refuse

BACKENDS = ("auto", "reference", "chunked", "triton")

_WIDEST = {torch.bfloat16: 256}  # numbers of an embedding of which a multiprocessor's registers hold enough lines
_WIDEST_OF_OTHERS = 64


def resolve(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Turn a ``backend=`` argument into the name of the backend that runs.

    "auto" takes Triton's kernels on an NVIDIA GPU of the Ampere generation or later, where these are to be had, for
    bfloat16 embeddings of at most 256 numbers and others, but for float64, of at most 64; chunked on a CPU and on CUDA;
    the reference elsewhere, and inside a torch.func transform (grad, vmap, ...), which the operators of both lack.

    Args:
        backend: one of `BACKENDS`.
        device: where the tensors are.
        dtype: what the embeddings promote to.
        dim: numbers of an embedding.

    Raises:
        ImportError: for "triton" where that is missing.
        RuntimeError: for a fast backend inside a torch.func transform.
        ValueError: for a name that is unknown, and for "triton" with embeddings that are too wide for it.

    Example:
        >>> resolve("auto", torch.device("cpu"), torch.float32, 64)
        'chunked'
    """
    _checks.choice("backend", backend, BACKENDS)
    widest = _WIDEST.get(dtype, _WIDEST_OF_OTHERS)
    if transformed() and backend in ("chunked", "triton"):
        raise RuntimeError(f"backend {backend!r} takes no torch.func transform; take 'auto' or 'reference'")
    if backend == "triton":
        if not HAS_TRITON:
            _checks.optional("triton", "pip install triton")
        if dim > widest:
            raise ValueError(f"backend 'triton' must get embeddings of at most {widest} numbers of {dtype}, got {dim}")
        return backend
    if backend != "auto":
        return backend
    if device.type not in ("cpu", "cuda") or transformed():
        return "reference"
    fits = HAS_TRITON and dim <= widest and dtype != torch.float64
    return "triton" if fits and device.type == "cuda" and _is_recent(device) else "chunked"


def _is_recent(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU with matrix units for bfloat16 and tf32."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _kernels() -> ModuleType:
    return importlib.import_module("recblocks.kernels.sampled_softmax.triton")


def log_sum_exp(queries: Tensor, pool: Pool, inverse_temperature: Tensor) -> Tensor:
    """Each row's L (U,), -inf where every column is masked, by Triton's kernels; differentiable once.

    Args:
        queries: (U, D), and the pool's negatives of the same dtype, that of the products' factors.
        pool: the columns and their masks.
        inverse_temperature: () 1/τ, float32 (float64 where the embeddings are), as the bias and the answer.
    """
    owned: list[Tensor] = []
    if pool.own:
        row_order, column_order, of_rows, of_columns = owned_ranges(*pool.own)
        owned = [row_order, column_order, *of_rows, *of_columns]
    with_mean = torch.is_grad_enabled() and (queries.requires_grad or inverse_temperature.requires_grad)
    found: tuple[Tensor, Tensor] = _softmax_of_rows(
        queries, pool.negatives, pool.bias, inverse_temperature, pool.masked, owned, pool.present, with_mean
    )
    return found[0]


@torch.library.custom_op("recblocks::sampled_softmax_of_rows", mutates_args=())
def _softmax_of_rows(
    queries: Tensor,
    negatives: Tensor,
    bias: Tensor | None,
    inverse_temperature: Tensor,
    masked: Tensor | None,
    owned: list[Tensor],
    present: Tensor | None,
    with_mean: bool,
) -> tuple[Tensor, Tensor]:
    """Each row's L, and the mean (U, D) of the columns under its softmax, or (0,)."""
    num_rows = queries.shape[0]
    if num_rows == 0 or negatives.shape[0] == 0:
        nothing = inverse_temperature.new_full((num_rows,), -torch.inf)
        return nothing, inverse_temperature.new_zeros(queries.shape if with_mean else 0)
    if masked is not None or owned:
        negatives, bias = _finite(negatives, bias)
    ranges = None
    if owned:
        order, ranges = owned[1], Ranges(*owned[2:6])
        negatives, bias = negatives.index_select(0, order), bias if bias is None else bias.index_select(0, order)
    log_sum_exp, mean = _kernels().softmax_over_columns(
        queries, negatives, bias, inverse_temperature, masked, ranges, with_mean
    )
    if present is not None:
        log_sum_exp.masked_fill_(~present, -torch.inf)
        if with_mean:
            mean.masked_fill_(~present[:, None], 0)
    return log_sum_exp, mean


@_softmax_of_rows.register_fake
def _(queries: Tensor, _negatives: Tensor, _bias: Tensor, inverse: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return inverse.new_empty(queries.shape[0]), inverse.new_empty(queries.shape if others[-1] else 0)


@torch.library.custom_op("recblocks::sampled_softmax_of_rows_backward", mutates_args=())
def _gradients(
    slopes: Tensor,
    log_sum_exp: Tensor,
    mean: Tensor,
    queries: Tensor,
    negatives: Tensor,
    bias: Tensor | None,
    inverse_temperature: Tensor,
    masked: Tensor | None,
    owned: list[Tensor],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum of slopes * L by queries, negatives, bias and inverse temperature; empty if not wanted."""
    wants = Wanted(*wanted)
    grads = _like(queries, negatives, inverse_temperature, wants)
    if wants.queries:
        by_logit = slopes[:, None] * mean
        torch.sum(by_logit * queries, (0, 1), out=grads[3])
        torch.mul(by_logit, inverse_temperature, out=grads[0])
    if not wants.negatives and not wants.bias:
        return grads
    if queries.shape[0] == 0 or negatives.shape[0] == 0:
        return grads[0], grads[1].zero_(), grads[2].zero_(), grads[3]
    if masked is not None or owned:
        negatives, bias = _finite(negatives, bias)
    ranges = None
    if owned:
        order, ranges = owned[0], Ranges(*owned[6:])
        queries, log_sum_exp, slopes = (one.index_select(0, order) for one in (queries, log_sum_exp, slopes))
    of_negatives, of_bias = _kernels().gradients_over_rows(
        queries, negatives, bias, inverse_temperature, masked, ranges, log_sum_exp, slopes
    )
    if wants.negatives:
        grads[1].copy_(of_negatives)
    return grads[0], grads[1], of_bias if wants.bias else grads[2], grads[3]


@_gradients.register_fake
def _(_slopes: Tensor, _log_sum_exp: Tensor, _mean: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    queries, negatives, _, inverse_temperature, *_, wanted = others
    return _like(queries, negatives, inverse_temperature, Wanted(*wanted))


def _like(
    queries: Tensor, negatives: Tensor, inverse_temperature: Tensor, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the gradients."""
    of_queries, of_negatives, *_ = empty_gradients(queries, negatives, wanted)
    of_bias = inverse_temperature.new_empty(negatives.shape[0] if wanted.bias else 0)
    return of_queries, of_negatives, of_bias, inverse_temperature.new_empty(() if wanted.queries else 0)


def _finite(negatives: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeros in columns that hold anything else, and NaN in their biases: it reaches those rows alone that see them."""
    finite = negatives.isfinite().all(1)
    if bias is None:
        bias = finite.new_zeros(finite.shape, dtype=torch.promote_types(negatives.dtype, torch.float32))
    return negatives.masked_fill(~finite[:, None], 0), bias.masked_fill(~finite, torch.nan)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, negatives, bias, inverse, masked, owned, *_ = inputs
    ctx.save_for_backward(*output, queries, negatives, bias, inverse, masked, *owned)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros in the size of the mean, which nobody differentiates


def _backward(ctx: Any, slopes: Tensor | None, _: None) -> tuple[Tensor | list[None] | None, ...]:
    saved = ctx.saved_tensors  # under activation checkpointing they can be read once
    (*given, masked), owned = saved[:7], list(saved[7:])
    unneeded = None, [None] * len(owned), None, None
    if slopes is None:
        return *[None] * 4, *unneeded
    needed = ctx.needs_input_grad
    grads = _gradients(slopes, *given, masked, owned, [needed[0] or needed[3], needed[1], needed[2]])
    return *[grad if need else None for grad, need in zip(grads, needed[:4], strict=True)], *unneeded


_softmax_of_rows.register_autograd(_backward, setup_context=_setup)
_gradients.register_autograd(refuse)
