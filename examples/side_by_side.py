"""Train several models at once, with a progress bar each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Result = TypeVar("Result")
OnStep = Callable[[int, int, float], None]


def train_side_by_side(
    console: Console, trainings: Mapping[str, Callable[[OnStep], Result]], *, jobs: int
) -> dict[str, Result]:
    """Run trainings by name, ``jobs`` at a time; each gets what to call with its finished steps, all steps and loss."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    stopped = threading.Event()
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:

        def run(name: str, training: Callable[[OnStep], Result]) -> Result:
            task = progress.add_task(name, total=None, loss=float("nan"))

            def on_step(step: int, steps: int, loss: float) -> None:
                if stopped.is_set():
                    raise CancelledError
                progress.update(task, completed=step, total=steps, loss=loss)

            return training(on_step)

        running = {name: pool.submit(run, name, training) for name, training in trainings.items()}
        try:
            return {name: future.result() for name, future in running.items()}
        except BaseException:  # Ctrl-C too: the others stop at their next step
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
