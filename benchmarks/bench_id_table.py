"""What a stored id costs in memory, beside a Python dict and fbgemm's tables, and what growing holds at most.

Each figure comes from a process of its own, ``python -m benchmarks.bench_id_table FORM``: by how much its anonymous
memory grew (Linux). The ids are 64 random bits; fbgemm's pruned_hashmap takes 32 of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks._timing import Table
from recblocks import IdTable

NUM_IDS = 4_000_000
LOAD = 0.85
STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def memory(name: str) -> int:
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def filled(ids: Tensor, **options: str) -> IdTable:
    found = IdTable(NUM_IDS, **options)
    for some in ids.split(50_000):
        found.insert(some)
    return found


def dictionary(ids: Tensor) -> dict[int, int]:
    return {one: row for some in ids.split(50_000) for row, one in enumerate(some.tolist())}


def pruned_hashmap(_: Tensor) -> Tensor:
    slots = torch.empty(int(NUM_IDS / LOAD), 2, dtype=torch.int32).fill_(-1)
    given, ends = torch.arange(NUM_IDS, dtype=torch.int32), torch.tensor([0, NUM_IDS], dtype=torch.int32)
    torch.ops.fbgemm.pruned_hashmap_insert(given, given, ends, slots, torch.tensor([0, len(slots)]))
    return slots


FORMS: dict[str, Callable[[Tensor], object]] = {
    "IdTable": filled,
    "IdTable that counts uses": lambda ids: filled(ids, evict="least_used"),
    "Python dict": dictionary,
    "fbgemm's pruned_hashmap, 32-bit ids": pruned_hashmap,
}


def growth(ids: Tensor) -> tuple[float, float, float]:
    """Bytes an id of the old table, of the new one of twice the capacity, and of the most that was held meanwhile."""
    begin = memory("RssAnon")
    found = filled(ids)
    old, rest = memory("RssAnon") - begin, memory("VmRSS") - memory("RssAnon")
    CLEAR.write_text("5")  # from here on VmHWM is a new high-water mark
    found.grow(2 * NUM_IDS)
    most = memory("VmHWM") - rest - begin
    return old / NUM_IDS, sum(each.nbytes for each in found.buffers()) / NUM_IDS, most / NUM_IDS


def measured(form: str) -> list[float]:
    """What a process of its own says."""
    command = [sys.executable, "-m", "benchmarks.bench_id_table", form]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(word) for word in said.split()]


def tables() -> Iterator[Table]:
    rows: list[tuple[object, ...]] = []
    for form in FORMS:
        if form.startswith("fbgemm") and not importlib.util.find_spec("fbgemm_gpu"):
            continue
        rows.append((form, *measured(form)))
    title = f"bytes a stored id, key, row and bookkeeping: {NUM_IDS:,} ids, {LOAD:.0%} of the slots filled"
    yield Table(title, ("form", "bytes"), rows)
    old, new, most = measured("growth")
    yield Table(
        f"an IdTable of {NUM_IDS:,} ids grows to twice its capacity: bytes an id",
        ("the old table", "the new one", "both", "held at most"),
        [(old, new, old + new, most)],
    )


def child(form: str) -> None:
    ids = torch.randint(-(2**63), 2**63 - 1, (NUM_IDS,), generator=torch.Generator().manual_seed(0))
    IdTable(9).insert(ids[:9])  # what is loaded at the first call is not the table's
    if form.startswith("fbgemm"):
        importlib.import_module("fbgemm_gpu")
    if form == "growth":
        print(*growth(ids))
        return
    begin = memory("RssAnon")
    kept = FORMS[form](ids)
    print((memory("RssAnon") - begin) / NUM_IDS)
    del kept


if __name__ == "__main__":
    child(sys.argv[1])
