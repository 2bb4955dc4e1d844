"""The folder that holds timelines, published as a whole: one raw little-endian file a column, and a header."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import uuid
import zlib
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from recblocks import _checks
from recblocks.timelines import _arrays
from recblocks.timelines._arrays import Array

FORMAT = "recblocks.timelines"
VERSION = 2
HEADER = "header.json"
_BLOCK = 1 << 22


class TimelinesWriter:
    """Write timelines to a folder chunk by chunk, in the memory of one chunk.

    A chunk holds whole users, in any order, and every user of a chunk comes after those of the chunks before. Files
    are written to a hidden folder beside ``path``, which takes its place on leaving the ``with`` block without an
    error: what was cut off is never opened, and of two writers one fails. A process that is killed leaves the hidden
    folder behind.

    Args:
        path: a folder that is not there yet, or empty.
        unit: "s" or "ms", the unit of ``time``.

    Raises:
        FileExistsError: the folder already holds timelines or other files, on construction or by the end.

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
        self._folder = pathlib.Path(path).resolve()
        self._part = self._folder.with_name(f".{self._folder.name}-{uuid.uuid4().hex}.part")
        self._refuse_what_is_there()
        self._unit = unit
        self._files: dict[str, _ColumnFile] = {}
        self._num_actions = 0
        self._last_user: int | None = None

    def append(self, /, *, user: object, time: object, item: object, **columns: object) -> None:
        """Write the actions of further users; arguments as for ``write_timelines``.

        Raises:
            ValueError: a user does not come after those already written, or the columns are not those of the first
                chunk.
        """
        users, times, arrays = _arrays.check_actions(user, time, item, self._unit, columns)
        self._append(*_arrays.group_actions(users, times, arrays))

    def append_timelines(self, users: Tensor, lengths: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Write further users whose actions lie in order already; unlike ``append``'s, a user may have none.

        Args:
            users: (U,) int64 raw ids, ascending.
            lengths: (U,) int64 actions of each user.
            columns: (N,) tensors by name, ``time`` and ``item`` among them, by user, then newest first.

        Raises:
            ValueError: as ``append``.
        """
        arrays = {name: _arrays.as_column(name, _arrays.without_nulls(name, one)) for name, one in columns.items()}
        self._append(users.numpy(), np.append(0, lengths.cumsum(0).numpy()), arrays)

    def _append(self, ids: Array, offsets: Array, ordered: dict[str, Array]) -> None:
        if ids.size and self._last_user is not None and ids[0] <= self._last_user:
            raise ValueError(f"user must come after {self._last_user}, the last one written, got {ids[0]}")
        chunk = {"users": ids, "offsets": offsets[1:] + self._num_actions}
        chunk |= {_column_key(name): column for name, column in ordered.items()}
        self._open_files(chunk)
        for key, array in chunk.items():
            self._files[key].write(array)
        self._num_actions += int(offsets[-1])
        self._last_user = int(ids[-1]) if ids.size else self._last_user

    def _open_files(self, chunk: dict[str, Array]) -> None:
        if not self._files:
            self._part.mkdir(parents=True)
            self._files = {key: _ColumnFile(self._part / f"{key}.bin", array.dtype) for key, array in chunk.items()}
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
        try:
            if kind is None and not self._files:
                none = np.empty(0, dtype=np.int64)
                self.append(user=none, time=none, item=none)
            for file in self._files.values():
                file.close()
            if kind is None:
                self._write_header()
                self._publish()
        finally:
            shutil.rmtree(self._part, ignore_errors=True)

    def _publish(self) -> None:
        try:
            self._part.rename(self._folder)  # onto a folder only if that is empty, and then at once
        except OSError:
            self._refuse_what_is_there()
            raise

    def _refuse_what_is_there(self) -> None:
        if (self._folder / HEADER).exists():
            raise FileExistsError(f"{self._folder} already holds timelines; remove the folder or choose another")
        if self._folder.exists() and not (self._folder.is_dir() and next(self._folder.iterdir(), None) is None):
            raise FileExistsError(f"{self._folder} must be an empty folder, or not be there, but holds something else")

    def _write_header(self) -> None:
        header = {
            "format": FORMAT,
            "version": VERSION,
            "unit": self._unit,
            "num_actions": self._num_actions,
            "files": {key: file.described() for key, file in self._files.items()},
        }
        with (self._part / HEADER).open("w") as file:
            json.dump(header | {"crc32": _header_checksum(header)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


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
    if found != (FORMAT, VERSION) or type(header["version"]) is not int:
        raise ValueError(f"{path}: expected format {FORMAT!r} version {VERSION}, found {found}")
    crc, expected = header.pop("crc32", None), _header_checksum(header)
    if crc != expected:
        raise ValueError(f"{path} is damaged: expected checksum {expected}, found {crc}")
    return header


def _header_checksum(header: dict[str, object]) -> int:
    """Of everything in the header but the checksum itself."""
    return zlib.crc32(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())


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
