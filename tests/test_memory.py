"""Training reads timelines from disk: ten times as many actions cost it no more memory.

As a script, ``python tests/test_memory.py write FOLDER ACTIONS`` and ``python tests/test_memory.py train FOLDER`` print
the highest RssAnon they saw, in KiB.
"""

from __future__ import annotations

import functools
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from recblocks import Timelines, TimelinesWriter, TrainingBatches, dense_all_action

ACTIONS_PER_USER = 100
USERS_PER_CHUNK = 5_000
BYTES_PER_ACTION = 8 + 8 + 1 + 1 + 4 + 16 / ACTIONS_PER_USER
ITEMS = 20_000
STEPS = 400


def anonymous_kib() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def write(folder: str, actions: int) -> int:
    rng = np.random.default_rng(0)
    count = USERS_PER_CHUNK * ACTIONS_PER_USER
    peak = 0
    with TimelinesWriter(folder, unit="s") as writer:
        for first in range(0, actions // ACTIONS_PER_USER, USERS_PER_CHUNK):
            writer.append(
                user=np.repeat(np.arange(first, first + USERS_PER_CHUNK), ACTIONS_PER_USER),
                time=rng.integers(0, 365 * 86_400, count),
                item=rng.integers(0, ITEMS, count),
                action_type=rng.integers(0, 4, count, dtype=np.int8),
                surface=rng.integers(0, 3, count, dtype=np.int8),
                duration=rng.random(count, dtype=np.float32) * 20,
            )
            peak = max(peak, anonymous_kib())
    return peak


def train(folder: str) -> int:
    """A bag of embeddings per user against the batch's own labels, a few hundred steps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    timelines = Timelines.open(folder)
    objective = functools.partial(dense_all_action, max_len=64, positive=lambda action: action["duration"] > 10)
    batches = TrainingBatches(timelines, objective, users_per_batch=64, fraction=0.1, max_sequences=2)
    table = torch.nn.Embedding(ITEMS, 16)
    optimizer = torch.optim.Adam(table.parameters())
    peak = 0
    for step in range(STEPS):
        examples = batches[step]
        vectors = table(timelines.columns["item"][examples.actions]) * examples.valid[..., None]
        users = vectors.flip(1).cumsum(1).flip(1)[examples.pair_row, examples.pair_slot][:512]
        labels = table(timelines.columns["item"][examples.pair_label])[:512]
        loss = torch.nn.functional.cross_entropy(users @ labels.T, torch.arange(len(users)))
        optimizer.zero_grad()
        loss.backward()
        peak = max(peak, anonymous_kib())
        optimizer.step()
    return peak


def run(*arguments: object) -> int:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_ten_times_the_actions_cost_no_more_memory(tmp_path: pathlib.Path) -> None:
    sizes = (10_000_000, 100_000_000)
    needed = 1.2 * sum(sizes) * BYTES_PER_ACTION
    if shutil.disk_usage(tmp_path).free < needed:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of disk")
    writing, training = {}, {}
    for size in sizes:
        folder = tmp_path / str(size)
        try:
            writing[size] = run("write", folder, size)
            training[size] = run("train", folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"RssAnon in KiB, writing: {writing}, training: {training}")
    small, large = (training[size] for size in sizes)
    assert abs(large - small) <= 0.05 * small
    assert writing[sizes[1]] <= 1.05 * writing[sizes[0]]


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    print(write(rest[0], int(rest[1])) if kind == "write" else train(rest[0]))
