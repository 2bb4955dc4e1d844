"""The folder that holds timelines: one raw little-endian file a column, and a header that is written last."""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from recblocks import _checks
from recblocks.timelines import _arrays
from recblocks.timelines._arrays import Array

FORMAT = "recblocks.timelines"
VERSION = 1
HEADER = "header.json"
_BLOCK = 1 << 22


class TimelinesWriter:
    """Write timelines to a folder chunk by chunk, in the memory of one chunk.

    A chunk holds whole users, in any order, and every user of a chunk comes after those of the chunks before. The
    header is written on leaving the ``with`` block without an error, so what was cut off is never opened.

    Args:
        path: a folder, created if need be; one that already holds timelines is refused.
        unit: "s" or "ms", the unit of ``time``.

    Raises:
        FileExistsError: the folder already holds timelines.

    Example:
        >>> import tempfile
        >>> from recblocks import Timelines
        >>> folder = tempfile.mkdtemp()
        >>> with TimelinesWriter(folder, unit="s") as writer:
        ...     for user in range(3):
        ...         writer.append(user=torch.full((2,), user), time=torch.tensor([1, 2]), item=torch.tensor([8, 9]))
        >>> Timelines.open(folder)
        Timelines(3 users, 6 actions, unit='s', time, item)
    """

    def __init__(self, path: str | os.PathLike[str], *, unit: str) -> None:
        _checks.choice("unit", unit, _arrays.UNITS)
        self._folder = pathlib.Path(path)
        self._folder.mkdir(parents=True, exist_ok=True)
        if (self._folder / HEADER).exists():
            raise FileExistsError(f"{self._folder} already holds timelines; remove the folder or choose another")
        self._unit = unit
        self._files: dict[str, _ColumnFile] = {}
        self._num_actions = 0
        self._last_user: int | None = None

    def append(self, *, user: object, time: object, item: object, **columns: object) -> None:
        """Write the actions of further users; arguments as for ``write_timelines``.

        Raises:
            ValueError: a user does not come after those already written, or the columns are not those of the first
                chunk.
        """
        users, times, arrays = _arrays.check_actions(user, time, item, self._unit, columns)
        ids, offsets, ordered = _arrays.group_actions(users, times, arrays)
        if ids.size and self._last_user is not None and ids[0] <= self._last_user:
            raise ValueError(f"user must come after {self._last_user}, the last one written, got {ids[0]}")
        chunk = {"users": ids, "offsets": offsets[1:] + self._num_actions}
        chunk |= {_column_key(name): column for name, column in ordered.items()}
        self._open_files(chunk)
        for key, array in chunk.items():
            self._files[key].write(array)
        self._num_actions += users.size
        self._last_user = int(ids[-1]) if ids.size else self._last_user

    def _open_files(self, chunk: dict[str, Array]) -> None:
        if not self._files:
            self._files = {key: _ColumnFile(self._folder / f"{key}.bin", array.dtype) for key, array in chunk.items()}
            self._files["offsets"].write(np.zeros(1, dtype=np.int64))
        written = {key: file.dtype for key, file in self._files.items()}
        given = {key: array.dtype.newbyteorder("<") for key, array in chunk.items()}
        if written != given:
            raise ValueError(f"columns must be those of the first chunk, {_names(written)}, got {_names(given)}")

    def __enter__(self) -> TimelinesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._files:
            none = np.empty(0, dtype=np.int64)
            self.append(user=none, time=none, item=none)
        for file in self._files.values():
            file.close()
        if kind is None:
            self._write_header()

    def _write_header(self) -> None:
        header = {
            "format": FORMAT,
            "version": VERSION,
            "unit": self._unit,
            "num_actions": self._num_actions,
            "files": {key: file.described() for key, file in self._files.items()},
        }
        temporary = self._folder / f"{HEADER}.part"
        with temporary.open("w") as file:
            json.dump(header, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._folder / HEADER)


class _ColumnFile:
    """One column on its way to disk, with its size and checksum so far."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype[np.generic]) -> None:
        self.dtype = dtype.newbyteorder("<")
        self._file: IO[bytes] = path.open("wb")
        self._bytes = 0
        self._crc = 0

    def write(self, array: Array) -> None:
        data = np.ascontiguousarray(array.astype(self.dtype, copy=False)).view(np.uint8).data
        self._file.write(data)
        self._bytes += data.nbytes
        self._crc = zlib.crc32(data, self._crc)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def described(self) -> dict[str, object]:
        return {"dtype": self.dtype.str, "bytes": self._bytes, "crc32": self._crc}


def read(folder: pathlib.Path, *, verify: bool) -> tuple[str, Tensor, Tensor, dict[str, Tensor]]:
    """Memory-map a folder: its unit, users, offsets and columns; see ``Timelines.open``."""
    header = _read_header(folder)
    try:
        unit, num_actions, files = header["unit"], header["num_actions"], header["files"]
        maps = {
            key: _map(folder / f"{key}.bin", np.dtype(entry["dtype"]), entry["bytes"], entry["crc32"], verify)
            for key, entry in files.items()
        }
        users, offsets = maps.pop("users"), maps.pop("offsets")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / HEADER} is damaged: {error!r}") from error
    columns = {key.removeprefix(_column_key("")): column for key, column in maps.items()}
    sizes = {"offsets": (offsets, users.shape[0] + 1), **{name: (one, num_actions) for name, one in columns.items()}}
    for name, (tensor, expected) in sizes.items():
        if tensor.shape[0] != expected:
            raise ValueError(
                f"{folder / HEADER} is damaged: {name} must have {expected} entries, got {tensor.shape[0]}"
            )
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_actions:
        raise ValueError(
            f"{folder / 'offsets.bin'} is damaged: must run from 0 to {num_actions}, "
            f"got {int(offsets[0])} to {int(offsets[-1])}"
        )
    return unit, users, offsets, columns


def _read_header(folder: pathlib.Path) -> Any:
    path = folder / HEADER
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    if not path.exists():
        raise ValueError(f"{path} is missing: {folder} holds no timelines, or their writing was cut off")
    try:
        header = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: expected JSON, found {error}") from error
    found = (header.get("format"), header.get("version")) if isinstance(header, dict) else header
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path}: expected format {FORMAT!r} version {VERSION}, found {found}")
    return header


def _map(path: pathlib.Path, dtype: np.dtype[np.generic], size: int, crc: int, verify: bool) -> Tensor:
    if not path.exists():
        raise ValueError(f"{path} is missing: expected {size} bytes")
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"{path} has another size: expected {size} bytes, found {found}")
    if verify:
        found_crc = _checksum(path)
        if found_crc != crc:
            raise ValueError(f"{path} is damaged: expected checksum {crc:08x}, found {found_crc:08x}")
    if size == 0:
        return torch.from_numpy(np.empty(0, dtype=dtype))
    # Mode "c" (private, never written back) is what torch takes without a warning; pages only read stay file-backed.
    return torch.from_numpy(np.memmap(path, dtype=dtype, mode="c"))


def _checksum(path: pathlib.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _column_key(name: str) -> str:
    return f"column.{name}"


def _names(dtypes: dict[str, np.dtype[np.generic]]) -> str:
    return ", ".join(f"{key.removeprefix(_column_key(''))} {dtype.name}" for key, dtype in dtypes.items())
