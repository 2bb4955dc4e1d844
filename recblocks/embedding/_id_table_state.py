"""What a saved table must be before it is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recblocks import _checks
from recblocks.embedding import _buckets
from recblocks.sketch import CountMinSketch, refuse_others

MOST_ROWS = (1 << 31) - 1
LAYOUT = 1  # of what a checkpoint holds
SAVED = ("keys", "rows", "uses", "hashed", "begins", "numbers")


def capacities_of(begins: Tensor) -> list[int]:
    """How many rows each part has, for the first rows of the parts and the number of rows."""
    capacities: list[int] = begins.diff().tolist()
    return capacities


def check_sketch(sketch: CountMinSketch | None, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Refuse sightings of another sketch, half of one, or any where none are counted."""
    wanted = {} if sketch is None else {prefix + name: tensor.shape for name, tensor in sketch.named_buffers()}
    given = {name: state_dict[name].shape for name in state_dict if name.startswith(prefix) and "_extra" not in name}
    if sketch is not None:
        refuse_others(sketch, state_dict, prefix)
    if given != wanted:
        raise ValueError(f"state_dict must hold of a sketch {list(wanted)}, got {list(given)}, or of other shapes")


def check_state(given: dict[str, Tensor], prefix: str, *, counts_uses: bool) -> None:
    """Refuse what is no table, or one whose ids do not stand where they are looked for."""
    name = {each: f"state_dict[{prefix + each!r}]" for each in given}
    _checks.integers(name["begins"], given["begins"], None)
    begins = given["begins"].tolist()
    num_parts, capacity = len(begins) - 1, begins[-1] if begins else 0
    if begins[:1] != [0] or not 1 <= capacity <= MOST_ROWS or any(a >= b for a, b in itertools.pairwise(begins)):
        raise ValueError(f"{name['begins']} must ascend from 0 to at most {MOST_ROWS}, got {begins[:5]}")
    _checks.integers(name["numbers"], given["numbers"], 3 + num_parts)
    _checks.integers(name["hashed"], given["hashed"], 3)
    if bool((given["hashed"][1:] % 2 == 0).any()):
        raise ValueError(f"{name['hashed']} must be odd but for the first, got {given['hashed'].tolist()}")
    layout, num_ids = (int(number) for number in given["numbers"][:2])
    if layout != LAYOUT:
        raise ValueError(f"{name['numbers']} must be of layout {LAYOUT}, got {layout}")
    keys, rows, shape = given["keys"], given["rows"], (_buckets.num_buckets_of(capacity), _buckets.BUCKET)
    _checks.integers(name["keys"], keys, *shape)
    _checks.tensor(name["rows"], rows, *shape, dtype=torch.int32)
    _checks.integers(name["uses"], given["uses"], capacity if counts_uses else 0)
    seen = torch.zeros(capacity + 1, dtype=torch.bool, device=rows.device)
    if bool(((rows < -1) | (rows >= capacity)).any()):
        raise ValueError(f"{name['rows']} must be from -1 to {capacity - 1}, got {rows.min()} to {rows.max()}")
    seen[rows.flatten()] = True
    found = int((rows >= 0).sum())
    if not found == int(seen[:-1].sum()) == num_ids:
        raise ValueError(f"{name['rows']} must hold {num_ids} different rows, got {int(seen[:-1].sum())} in {found}")
    slots = _buckets.Slots(keys, rows, given["hashed"], given["begins"])
    for at in torch.split(torch.arange(keys.numel(), device=keys.device), _buckets.CHUNK):
        hashes, stands = keys.flatten()[at], rows.flatten()[at] >= 0
        nothing = _buckets.key_of_nothing(at // _buckets.BUCKET, keys.shape[0])
        if not torch.equal(torch.where(stands, _buckets.find_slots(hashes, slots), at), at):
            raise ValueError(f"{name['keys']} must hold each id once, in one of its two buckets, got others")
        if not torch.equal(torch.where(stands, nothing, hashes), nothing):
            raise ValueError(f"{name['keys']} must hold nothing where rows are -1, got something")
