"""A training's checkpoints: a folder a step that is whole or not there, read by any number of ranks."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from examples.pinnerformer import checkpoint as whole_file
from examples.ranks import is_first_rank, wait_for_ranks


def save(folder: pathlib.Path, step: int, rest: dict[str, Any], tables: dict[str, Any] | None) -> None:
    """Write a checkpoint beside the last, then put it in its place; every rank must call it.

    Args:
        folder: of all checkpoints of this training.
        step: how many steps were done.
        rest: what every rank has, or the only process.
        tables: what is in pieces over the ranks, if anything is.
    """
    partial, whole = folder / f"step-{step}.partial", folder / f"step-{step}"
    if is_first_rank():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_ranks()
    if tables is not None:
        dcp.save(tables, checkpoint_id=partial / "tables")
    if is_first_rank():
        whole_file.save(partial / "rest.pt", rest)
    wait_for_ranks()
    if is_first_rank():
        older = _steps(folder)
        partial.rename(whole)
        for step in older:
            shutil.rmtree(folder / f"step-{step}")
    wait_for_ranks()


def last(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder of the newest checkpoint, if there is one."""
    steps = _steps(folder)
    return folder / f"step-{max(steps)}" if steps else None


class Saved:
    """The checkpoints of one training.

    Args:
        folder: where they are.
        made_for: what the training must be that goes on from them; the last is its options.
        generators: what it draws from.
    """

    def __init__(self, folder: pathlib.Path, made_for: tuple[Any, ...], generators: list[torch.Generator]) -> None:
        *others, options = made_for
        kept = dataclasses.replace(options, checkpoint=None, checkpoint_every=0)
        self.folder, self.made_for, self.generators = folder, repr((*others, kept)), generators

    def save(self, model: Any, losses: list[float]) -> None:
        """Write what `steps.OneProcess` or `sharded.Sharded` is after so many losses; every rank must call it."""
        rest, tables = model.state()
        rest |= {"made_for": self.made_for, "loss": losses, "generators": [one.get_state() for one in self.generators]}
        save(self.folder, len(losses), rest, tables)

    def resume(self, model: Any) -> list[float]:
        """Go on from the last one; the losses until then, none where there is no checkpoint.

        Raises:
            ValueError: it is another training's.
        """
        newest = last(self.folder)
        if newest is None:
            return []
        rest: dict[str, Any] = torch.load(newest / "rest.pt", weights_only=True)
        if rest["made_for"] != self.made_for:
            raise ValueError(f"checkpoint must be of {self.made_for}, got {rest['made_for']}")
        _, tables = model.state()
        if tables is not None:
            dcp.load(tables, checkpoint_id=newest / "tables")
        model.load(rest, tables)
        for generator, state in zip(self.generators, rest["generators"], strict=True):
            generator.set_state(state)
        losses: list[float] = rest["loss"]
        return losses


def _steps(folder: pathlib.Path) -> list[int]:
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return [int(name) for name in names if name.isdigit()]
