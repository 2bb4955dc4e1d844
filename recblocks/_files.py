"""Files that are whole or not there, and where those are kept that can be made again."""

from __future__ import annotations

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Name a scratch file beside ``path`` to write, which takes its place in one step when the block has ended well.

    A crash at any instant leaves the old file or the new one.
    """
    path = pathlib.Path(path)
    scratch = path.with_name(f".{path.name}-{uuid.uuid4().hex}.part")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def user_cache() -> pathlib.Path:
    """The user's folder for what can be made again: ``$XDG_CACHE_HOME/recblocks``, else ``~/.cache/recblocks``."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "recblocks"
