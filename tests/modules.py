"""Every public Module, how to build a tiny one and what to call it with: what tests/test_conformance.py walks over.

A new Module gets an entry here, and one more for each way to call it that runs other code.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import recblocks


class Entry(NamedTuple):
    """``build(device, dtype)`` makes the Module; ``inputs()`` draws what it is called with, by name.

    ``has_rows``: dimension 0 of every input and of the output counts rows that have nothing to do with each other.
    """

    name: str
    build: Callable[[str, torch.dtype], torch.nn.Module]
    inputs: Callable[[], dict[str, Any]]
    has_rows: bool = True


def run(module, inputs):
    """The tensor that a Module computes: the first one, where it also says which of its outputs are real."""
    out = module(**inputs)
    return out[0] if isinstance(out, tuple) else out


OF_TORCHREC = {recblocks.KeyedLookup, recblocks.ShardableLookup}  # test_torchrec.py has what torchrec leaves to them
ROWS, SLOTS = 3, 4
VALID = torch.tensor([[True, True, True, True], [True, False, True, False], [False, False, False, False]])
OFFSETS = torch.tensor([0, 4, 4, 6])


def action_encoder(device, dtype):
    return recblocks.ActionEncoder(
        item_dim=5,
        num_action_types=3,
        num_surfaces=2,
        type_dim=2,
        surface_dim=2,
        unit="ms",
        device=device,
        dtype=dtype,
    )


def action_columns(*shape):
    return {
        "item": torch.randn(*shape, 5),
        "action_type": torch.randint(3, shape),
        "surface": torch.randint(2, shape),
        "duration": 60 * torch.rand(shape),
        "time": 1_700_000_000_000 - torch.randint(10**9, shape).cumsum(-1),
    }


def causal_encoder(device, dtype):
    return recblocks.CausalSequenceEncoder(
        5, 6, hidden_dim=8, num_layers=1, num_heads=2, max_len=SLOTS, device=device, dtype=dtype
    )


def action_transformer(device, dtype, **options):
    return recblocks.ActionTransformer(
        item_dim=4, type_dim=2, num_heads=2, dropout=0.0, device=device, dtype=dtype, **options
    )


def action_transformer_inputs(*names):
    given = {"item": torch.randn(ROWS, SLOTS, 4), "valid": VALID.clone()}
    draw = {
        "action_type": lambda: torch.randint(3, (ROWS, SLOTS)),
        "candidate": lambda: torch.randn(ROWS, 4),
        "user": lambda: torch.randn(ROWS, 5),
        "action_time": lambda: 1_700_000_000_000 - torch.randint(10**9, (ROWS, SLOTS)),
        "request_time": lambda: torch.full((ROWS,), 1_700_000_000_000),
    }
    return given | {name: draw[name]() for name in names}


def fused_lookup(device, dtype, gradient, backend="auto"):
    tables = {"item": recblocks.EmbeddingTable(30, dim=4), "user": recblocks.EmbeddingTable(9, dim=3)}
    features = {
        "user": recblocks.IdFeature("user", num_unseen=2),
        "item": recblocks.IdFeature("item"),
        "liked": recblocks.IdFeature("item", pooling="mean"),
        "seen": recblocks.IdFeature("item", pooling=None),
    }
    # A rate of 0: what compares two gradients must find the same weights twice.
    return recblocks.FusedEmbeddingLookup(
        tables, features, gradient=gradient, learning_rate=0, backend=backend, device=device, dtype=dtype
    )


def serving_lookup(device, dtype):
    lookup = fused_lookup(device, torch.float32, "dense")
    lookup.reset_parameters(generator=torch.Generator().manual_seed(0))
    if device == "cpu":
        lookup.insert(raw_ids(jagged=False), generator=torch.Generator().manual_seed(0))
    return recblocks.ServingLookup(lookup, dtype=dtype)


def raw_ids(*, jagged):
    return {
        "user": torch.tensor([-(2**63), 0, 7]),
        "item": torch.tensor([5, 5, 2**62]),
        "liked": (torch.tensor([8, 9, 5, 8, 1, 3]), OFFSETS) if jagged else torch.arange(12).view(ROWS, SLOTS),
        "seen": torch.arange(20, 32).view(ROWS, SLOTS),
    }


ENTRIES = [
    Entry(
        "LogPeriodicTimeEncoder",
        lambda device, dtype: recblocks.LogPeriodicTimeEncoder([60.0, 3600.0], unit="ms", device=device, dtype=dtype),
        lambda: {"t": 1_700_000_000_000 + torch.randint(10**9, (ROWS, SLOTS))},
    ),
    Entry(
        "LogPeriodicTimeEncoder of float64 time without a phase",
        lambda device, dtype: recblocks.LogPeriodicTimeEncoder(
            [60.0, 0.5], learn_phase=False, device=device, dtype=dtype
        ),
        lambda: {"t": 1.7e9 + torch.rand(ROWS, SLOTS, dtype=torch.float64)},
    ),
    Entry("ActionEncoder", action_encoder, lambda: action_columns(ROWS, SLOTS) | {"valid": VALID.clone()}),
    Entry("ActionEncoder packed", action_encoder, lambda: action_columns(6) | {"offsets": OFFSETS.clone()}, False),
    Entry(
        "ItemEncoder",
        lambda device, dtype: recblocks.ItemEncoder(5, 4, hidden_dim=8, device=device, dtype=dtype),
        lambda: {"x": torch.randn(ROWS, 5)},
    ),
    Entry("CausalSequenceEncoder", causal_encoder, lambda: {"x": torch.randn(ROWS, SLOTS, 5), "valid": VALID.clone()}),
    Entry(
        "CausalSequenceEncoder by lengths",
        causal_encoder,
        lambda: {"x": torch.randn(ROWS, SLOTS, 5), "lengths": torch.tensor([4, 0, 2])},
    ),
    Entry(
        "CausalSequenceEncoder packed",
        causal_encoder,
        lambda: {"x": torch.randn(6, 5), "offsets": OFFSETS.clone(), "max_length": SLOTS},
        False,
    ),
    *(
        Entry(
            name,
            lambda device, dtype, kind=kind: recblocks.CrossNetwork(
                5, num_layers=2, device=device, dtype=dtype, **kind
            ),
            lambda: {"x": torch.randn(ROWS, 5)},
        )
        for name, kind in (
            ("CrossNetwork", {}),
            ("CrossNetwork of low rank", {"rank": 2}),
            ("CrossNetwork of experts", {"rank": 2, "num_experts": 3}),
        )
    ),
    *(
        Entry(
            kind.__name__,
            lambda device, dtype, kind=kind, sizes=sizes: kind(5, **sizes, device=device, dtype=dtype),
            lambda: {"x": torch.randn(ROWS, SLOTS, 5), "valid": VALID.clone()},
        )
        for kind, sizes in (
            (recblocks.CNNAggregator, {"channels": 6, "kernel_size": 3}),
            (recblocks.RNNAggregator, {"hidden_dim": 6}),
            (recblocks.LSTMAggregator, {"hidden_dim": 6}),
        )
    ),
    Entry(
        "AveragePooling",
        lambda *_: recblocks.AveragePooling(5),
        lambda: {"x": torch.randn(ROWS, SLOTS, 5), "valid": VALID.clone()},
    ),
    Entry(
        "OutputCompression",
        lambda *_: recblocks.OutputCompression(2),
        lambda: {"x": torch.randn(ROWS, SLOTS, 5), "valid": VALID.clone()},
    ),
    Entry(
        "OutputCompression of random columns",
        lambda device, _: recblocks.OutputCompression(2, columns="random", max_len=SLOTS + 1, device=device),
        lambda: {"x": torch.randn(ROWS, SLOTS, 5), "valid": VALID.clone()},
    ),
    Entry(
        # Every action is older than the window, so that training and evaluation agree.
        "RandomTimeWindowMask",
        lambda *_: recblocks.RandomTimeWindowMask(max_window=0.5),
        lambda: {
            "action_time": 1_700_000_000 - torch.arange(1, SLOTS + 1).expand(ROWS, -1),
            "request_time": torch.full((ROWS,), 1_700_000_000),
        },
    ),
    Entry(
        "ActionTransformer",
        lambda device, dtype: action_transformer(device, dtype, num_action_types=3),
        lambda: action_transformer_inputs("action_type", "candidate"),
    ),
    Entry(
        "ActionTransformer of appended candidates with learned positions and user tokens",
        lambda device, dtype: action_transformer(
            device, dtype, num_action_types=3, fusion="append", positions="learned", max_len=SLOTS, user_dim=5
        ),
        lambda: action_transformer_inputs("action_type", "candidate", "user"),
    ),
    Entry(
        "ActionTransformer of items alone with sinusoidal positions",
        lambda device, dtype: action_transformer(device, dtype, fusion=None, positions="sinusoidal"),
        action_transformer_inputs,
    ),
    Entry(
        "ActionTransformer of ages",
        lambda device, dtype: action_transformer(device, dtype, positions="linear", unit="ms"),
        lambda: action_transformer_inputs("candidate", "action_time", "request_time"),
    ),
    Entry(
        "LearnedTemperature",
        lambda device, dtype: recblocks.LearnedTemperature(device=device, dtype=dtype),
        dict,
        False,
    ),
    Entry(
        "CountMinSketch",
        lambda device, _: recblocks.CountMinSketch(16, 3, device=device),
        lambda: {"ids": torch.randint(-(2**62), 2**62, (ROWS, SLOTS))},
    ),
    Entry(
        "IdTable",
        lambda device, _: recblocks.IdTable(9, device=device),
        lambda: {"ids": torch.arange(-6, 6).view(ROWS, SLOTS)},
    ),
    *(
        Entry(
            f"FusedEmbeddingLookup {gradient} {backend}{', jagged' if jagged else ''}",
            lambda device, dtype, given=(gradient, backend): fused_lookup(device, dtype, *given),
            lambda jagged=jagged: {"features": raw_ids(jagged=jagged)},
            not jagged,
        )
        for gradient, jagged, backend in [
            ("dense", False, "auto"),
            ("dense", True, "auto"),
            ("rowwise_adagrad", False, "auto"),
            ("dense", False, "reference"),
        ]
    ),
    *(
        Entry(
            f"ServingLookup {dtype}",
            lambda device, _, dtype=dtype: serving_lookup(device, dtype),
            lambda: {"features": raw_ids(jagged=False)},
        )
        for dtype in (torch.float32, torch.float16, torch.int8)
    ),
]
