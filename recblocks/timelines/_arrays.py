"""What callers hand in (numpy, torch, masked arrays, datetimes) as plain numpy vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recblocks import _checks

Array = npt.NDArray[Any]

UNITS = ("s", "ms")
DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_INT64 = np.iinfo(np.int64)


def check_name(name: object) -> None:
    """Require a column's name that can be a keyword of ``write_timelines`` and part of a file's name."""
    if not isinstance(name, str) or not name.isidentifier() or name in ("user", "unit"):
        raise ValueError(f"a column's name must be an identifier other than 'user' and 'unit', got {name!r}")


def split_nulls(name: str, value: object) -> tuple[Array, Array]:
    """Return a vector and which of its entries are null (masked, or NaT)."""
    if isinstance(value, torch.Tensor):
        if str(value.dtype).removeprefix("torch.") not in DTYPES:
            raise TypeError(f"{name} must be {', '.join(DTYPES)}, got {_checks.describe(value)}")
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy array or a torch.Tensor, got {_checks.describe(value)}")
    if value.ndim != 1:
        raise ValueError(f"{name} must have shape (any), got an array of shape {value.shape}")
    data = np.ma.getdata(value)
    null = np.ma.getmaskarray(value) | np.isnat(data) if data.dtype.kind == "M" else np.ma.getmaskarray(value)
    return data, null


def without_nulls(name: str, value: object) -> Array:
    """Return a vector that has no null, or say how many it has."""
    data, null = split_nulls(name, value)
    if null.any():
        raise ValueError(f"{name} has {int(null.sum())} nulls among {null.size}; clean_actions drops such rows")
    return data


def as_int64(name: str, value: Array) -> Array:
    """Return integers as int64; never rounds and never wraps."""
    if value.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {value.dtype} (missing values belong in a numpy masked array)")
    if value.dtype == np.uint64 and value.size and value.max() > _INT64.max:
        raise ValueError(f"{name} must fit int64, got {value.max()}; pass its bits: {name}.view(numpy.int64)")
    return value.astype(np.int64, copy=False)


def as_time(name: str, value: Array, unit: str) -> Array:
    """Return times as int64 in the unit; datetime64 is converted, rounding down."""
    _checks.choice("unit", unit, UNITS)
    if value.dtype.kind == "M":
        target = np.dtype(f"datetime64[{unit}]")
        finer = np.promote_types(value.dtype, target) == target  # else it is rounded, and cannot overflow
        try:
            converted = value.astype(target)
            fits = not finer or ((converted.astype(value.dtype) == value) | np.isnat(value)).all()
        except OverflowError:  # numpy before 2.5 wraps
            fits = False
        if not fits:
            raise ValueError(f"{name} must fit int64 in {unit!r}, got {value.dtype} beyond it")
        value = converted.view(np.int64)
    return as_int64(name, value)


def as_column(name: str, value: Array) -> Array:
    """Return a further column in a dtype that both numpy and torch hold, in this machine's byte order."""
    if value.dtype.name not in DTYPES:
        raise TypeError(f"{name} must be {', '.join(DTYPES)}, got {value.dtype}")
    return value.astype(value.dtype.newbyteorder("="), copy=False)


def group_actions(user: Array, time: Array, columns: dict[str, Array]) -> tuple[Array, Array, dict[str, Array]]:
    """Order rows by user, newest first; rows of one user and time keep the order in which they came.

    Returns:
        users (U,) ascending, offsets (U+1,), and every column (``time`` among them) in that order.
    """
    same = user[1:] == user[:-1]
    if not ((user[1:] > user[:-1]) | (same & (time[1:] <= time[:-1]))).all():
        order = np.lexsort((~time, user))  # ~t = -1 - t: the newest first, and it cannot overflow
        user, time = user[order], time[order]
        columns = {name: column[order] for name, column in columns.items()}
        same = user[1:] == user[:-1]
    first = np.flatnonzero(np.concatenate([np.ones(min(user.size, 1), dtype=bool), ~same]))
    offsets = np.append(first, user.size).astype(np.int64)
    return user[first], offsets, {"time": time, **columns}


def check_actions(
    user: object, time: object, item: object, unit: str, columns: dict[str, object]
) -> tuple[Array, Array, dict[str, Array]]:
    """Return users, times and the other columns as vectors of one length, or say which one does not fit."""
    users = as_int64("user", without_nulls("user", user))
    times = as_time("time", without_nulls("time", time), unit)
    arrays = {"item": as_int64("item", without_nulls("item", item))}
    for name, value in columns.items():
        check_name(name)
        arrays[name] = as_column(name, without_nulls(name, value))
    for name, array in {"time": times, **arrays}.items():
        if array.shape != users.shape:
            raise ValueError(f"{name} must have one entry for each of the {users.size} users given, got {array.size}")
    return users, times, arrays
