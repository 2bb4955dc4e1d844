"""DCN v2 beside torchrec's cross networks with the same weights; forward and backward, and inference."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._comparison import Comparison
from benchmarks._compiled import compiled
from recblocks import CrossNetwork

NUM_ROWS, WIDTH, NUM_LAYERS, RANK, NUM_EXPERTS, NUM_BATCHES = 4096, 512, 3, 64, 4, 3
# Sums of 512 products, in another order, in three layers and back: some 2**-24 a step.
ALLOWED = 1e-5
# Of 6 million ReLUs a few get a number within that of 0. On the other side of the corner one of a gradient's 256 terms
# is there or is not.
CORNERS = 2 / 256
KINDS: dict[str, dict[str, int]] = {
    "full rank": {},
    "low rank": {"rank": RANK},
    "experts": {"rank": RANK, "num_experts": NUM_EXPERTS},
}
PEERS = {"full rank": "CrossNet", "low rank": "LowRankCrossNet", "experts": "LowRankMixtureCrossNet"}


def torchrec_with_the_weights_of(model: CrossNetwork, kind: str) -> nn.Module:
    """The peer, which holds transposed or stacked what ours has as layers of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fbgemm's own deprecations while it is imported
        crossnet: Any = importlib.import_module("torchrec.modules.crossnet")
    options = {"low_rank" if name == "rank" else name: value for name, value in KINDS[kind].items()}
    peer: Any = getattr(crossnet, PEERS[kind])(WIDTH, NUM_LAYERS, **options)
    layers: list[Any] = list(model.layers)
    with torch.no_grad():
        for index, layer in enumerate(layers):
            if kind == "full rank":
                peer.kernels[index].copy_(layer.weight)
                peer.bias[index].copy_(layer.bias[:, None])
            elif kind == "low rank":
                peer.V_kernels[index].copy_(layer.down.weight)
                peer.W_kernels[index].copy_(layer.up.weight)
                peer.bias[index].copy_(layer.up.bias)
            else:
                peer.V_kernels[index].copy_(layer.down.weight.unflatten(0, (NUM_EXPERTS, RANK)))
                peer.C_kernels[index].copy_(layer.mix)
                peer.U_kernels[index].copy_(torch.stack(layer.up.weight.split(RANK, dim=1)))
                peer.bias[index].copy_(layer.up.bias[:, None])
        if model.gate is not None:
            for gate, weight in zip(peer.gates, model.gate.weight, strict=True):
                gate.weight.copy_(weight[None])
    return peer.to(next(model.parameters()).device)  # type: ignore[no-any-return]


def trained(model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    """The output and its gradient by x; that of the parameters is made too, but lies otherwise in every form."""
    leaf = x.to(parameters[0].dtype).detach().requires_grad_()
    crossed = model(leaf)
    aim = torch.linspace(-1, 1, crossed.numel(), dtype=crossed.dtype, device=x.device).view_as(crossed)
    return [crossed.detach(), torch.autograd.grad((crossed * aim).sum(), (leaf, *parameters))[0]]


def inferred(model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(x.to(parameters[0].dtype))]


def work(kind: str) -> float:
    """Of the products of a forward."""
    experts = NUM_EXPERTS * (RANK * RANK + WIDTH)  # what mixes an expert's numbers, and its gate
    a_row = {"full rank": WIDTH * WIDTH, "low rank": 2 * WIDTH * RANK}
    a_row["experts"] = NUM_EXPERTS * 2 * WIDTH * RANK + experts
    return 2.0 * NUM_ROWS * NUM_LAYERS * a_row[kind]


def comparisons(device: torch.device) -> Iterator[Comparison]:
    has_peer = importlib.util.find_spec("torchrec") is not None
    batches = [
        torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device)
        for seed in range(NUM_BATCHES)
    ]
    for kind, options in KINDS.items():
        torch.manual_seed(0)
        model = CrossNetwork(WIDTH, num_layers=NUM_LAYERS, **options).to(device)  # type: ignore[arg-type]
        models: dict[str, nn.Module] = {"recblocks": model}
        if has_peer:
            models["torchrec"] = torchrec_with_the_weights_of(model, kind)
        for what, form, times in (("forward and backward", trained, 3), ("inference", inferred, 1)):
            forms = {name: functools.partial(form, one, list(one.parameters())) for name, one in models.items()}
            for name, one in models.items():
                for mode, quick in compiled(name, one, device).items():
                    forms[mode] = functools.partial(form, quick, list(one.parameters()))
            in_float64 = copy.deepcopy(model).double()
            yield Comparison(
                op=f"DCN v2, {kind}, {what}",
                sizes={"rows": NUM_ROWS, "width": WIDTH, "layers": NUM_LAYERS, **options},
                dtype="float32",
                batches=batches,
                exact=functools.partial(form, in_float64, list(in_float64.parameters())),
                forms=forms,
                allowed=CORNERS if kind == "experts" and form is trained else ALLOWED,
                flops=times * work(kind),
                absent={} if has_peer else {"torchrec": "not installed"},
            )
