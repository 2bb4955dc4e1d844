"""One user's candidates beside the user's part done once, against a row for every candidate; evaluation, no gradient.

Every form sees the same users in turn, who have acted in every slot, or in fewer and fewer of them. The rows are also
timed in chunks as small as the shared form's, so that what sharing gains can be told from what the cache gains.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks._comparison import Comparison
from recblocks import ActionTransformer, OutputCompression

NUM_CANDIDATES, SLOTS, ITEM_DIM, TYPE_DIM, NUM_TYPES, NUM_USERS = 1000, 100, 32, 32, 6, 4
NUM_OF_A_BATCH = 256  # on a GPU, with the compression
CHUNK = 26  # what encode_candidates takes at a time at 100 slots and one head

User: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def users(device: torch.device, *, fewer: int) -> list[User]:
    """Item, action type and valid of one user, each with so many fewer actions than the one before; the candidates."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(1, SLOTS, ITEM_DIM, generator=generator).to(device),
            torch.randint(NUM_TYPES, (1, SLOTS), generator=generator).to(device),
            (torch.arange(SLOTS)[None] < SLOTS - fewer * number).to(device),
            torch.randn(NUM_CANDIDATES, ITEM_DIM, generator=generator).to(device),
        )
        for number in range(NUM_USERS)
    ]


@torch.inference_mode()
def rows(model: ActionTransformer, user: User) -> list[Tensor]:
    item, action_type, valid, candidates = user
    num = len(candidates)
    actions = item.expand(num, -1, -1), action_type.expand(num, -1)
    out, _ = model(*actions, candidates, valid=valid.expand(num, -1))
    return [out]


def rows_in_chunks(model: ActionTransformer, user: User) -> list[Tensor]:
    *actions, candidates = user
    return [torch.cat([rows(model, (*actions, some))[0] for some in candidates.split(CHUNK)])]


@torch.inference_mode()
def shared(model: ActionTransformer, user: User) -> list[Tensor]:
    item, action_type, valid, candidates = user
    return [model.encode_candidates(model.encode_user(item, action_type, valid=valid), candidates)]


def exact(model: ActionTransformer, user: User) -> list[Tensor]:
    item, action_type, valid, candidates = user
    return rows_in_chunks(model, (item.double(), action_type, valid, candidates.double()))


def comparisons(device: torch.device) -> Iterator[Comparison]:
    torch.manual_seed(0)
    model = ActionTransformer(item_dim=ITEM_DIM, num_action_types=NUM_TYPES, type_dim=TYPE_DIM).eval().to(device)
    wide = copy.deepcopy(model).double()
    forms = {"the user once": shared, "a row a candidate": rows, "rows in chunks": rows_in_chunks}
    for fewer, filled in ((0, "every slot filled"), (20, "100, 80, 60, 40 slots filled")):
        yield Comparison(
            op=f"one user's candidates, TransAct, {filled}",
            sizes={"candidates": NUM_CANDIDATES, "slots": SLOTS, "width": model.out_dim},
            dtype="float32",
            batches=users(device, fewer=fewer),
            exact=functools.partial(exact, wide),
            forms={name: functools.partial(form, model) for name, form in forms.items()},
            allowed=1e-5,
            bars={"a row a candidate": 1.4},
        )
    if device.type == "cuda":
        yield in_bfloat16(model, device)


def in_bfloat16(model: ActionTransformer, device: torch.device) -> Comparison:
    """What one kernel of a GPU does, compression included."""
    half = copy.deepcopy(model).bfloat16()
    wide = copy.deepcopy(half).double()
    batches = [
        (item.bfloat16(), action_type, valid, candidates[:NUM_OF_A_BATCH].bfloat16())
        for item, action_type, valid, candidates in users(device, fewer=20)
    ]
    compression = OutputCompression(10)
    return Comparison(
        op="one user's candidates, TransAct, compressed",
        sizes={"candidates": NUM_OF_A_BATCH, "slots": SLOTS, "width": model.out_dim},
        dtype="bfloat16",
        batches=batches,
        exact=lambda user: compressed(compression, wide, (user[0].double(), *user[1:3], user[3].double())),
        forms={
            "the user once": functools.partial(shared_and_compressed, compression, half),
            "a row a candidate": functools.partial(compressed, compression, half),
        },
        allowed=2**-5,  # of the largest number: some ten roundings to bfloat16, one behind the other
    )


@torch.inference_mode()
def compressed(compression: OutputCompression, model: ActionTransformer, user: User) -> list[Tensor]:
    (out,) = rows(model, user)
    return [compression(out, user[2].expand(len(out), -1))]


@torch.inference_mode()
def shared_and_compressed(compression: OutputCompression, model: ActionTransformer, user: User) -> list[Tensor]:
    item, action_type, valid, candidates = user
    encoded = model.encode_user(item, action_type, valid=valid)
    return [model.encode_candidates(encoded, candidates, compression=compression)]
