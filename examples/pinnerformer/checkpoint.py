"""A checkpoint on disk is always a whole one: it is written beside the last and takes its place in one step."""

from __future__ import annotations

import os
import pathlib
import pickle
from typing import Any

import torch


def save(path: pathlib.Path, state: dict[str, Any]) -> None:
    """Write ``state``; a crash at any instant leaves the old checkpoint or the new one, never a part of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: pathlib.Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        ValueError: the file is not a whole checkpoint, as after a fault of the disk.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no whole checkpoint: remove it, or train without --resume") from error
    return state
