"""Arrow, pandas and Parquet on the way in and out; the only file here that needs pyarrow."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor

from recblocks import _checks
from recblocks.timelines._arrays import Array

_INSTALL = 'pip install "recblocks[data]"'
_UNIT_KEY = b"recblocks.unit"


def _pyarrow(module: str = "pyarrow") -> Any:
    return _checks.optional(module, _INSTALL)


def columns_from_arrow(table: Any, *, unit: str | None = None) -> dict[str, Array]:
    """Return an Arrow table's columns as numpy vectors; one with nulls becomes a masked array.

    Args:
        table: a pyarrow Table of integers, floats, booleans, timestamps or dates.
        unit: the unit its integer times are taken for; compared with the unit that ``Timelines.to_arrow`` noted.

    Returns:
        What ``clean_actions`` and ``Timelines.from_arrays`` take.

    Raises:
        ValueError: the table notes another unit.
        TypeError: a column is of another type, text for instance: encode it as integers first.
    """
    noted = (table.schema.metadata or {}).get(_UNIT_KEY)
    if noted is not None and unit is not None and noted.decode() != unit:
        raise ValueError(f"unit must be {noted.decode()!r}, which the table notes, got {unit!r}")
    return {name: _column(name, table.column(name)) for name in table.column_names}


def _column(name: str, column: Any) -> Array:
    arrow = _pyarrow()
    compute = _pyarrow("pyarrow.compute")
    kind = column.type
    if arrow.types.is_date(kind):
        column = column.cast(arrow.timestamp("s"))
    elif not (
        arrow.types.is_integer(kind)
        or arrow.types.is_floating(kind)
        or arrow.types.is_boolean(kind)
        or arrow.types.is_timestamp(kind)
    ):
        raise TypeError(f"{name} must be integers, floats, booleans, timestamps or dates, got {kind}")
    values: Array
    if column.null_count == 0 or arrow.types.is_timestamp(column.type):
        values = column.to_numpy()  # a null timestamp becomes NaT
        return values
    filled = compute.fill_null(column, arrow.scalar(0, arrow.int8()).cast(kind)).to_numpy()
    values = np.ma.masked_array(filled, mask=column.is_null().to_numpy())
    return values


def arrow_from_columns(columns: dict[str, Tensor], *, unit: str) -> Any:
    """Return a pyarrow Table of the columns that notes the unit of ``time``."""
    table = _pyarrow().table({name: column.numpy() for name, column in columns.items()})
    return table.replace_schema_metadata({_UNIT_KEY: unit.encode()})


def arrow_from_pandas(frame: Any) -> Any:
    """Return a pandas DataFrame's columns as a pyarrow Table; the index is left out."""
    return _pyarrow().Table.from_pandas(frame, preserve_index=False)


def read_parquet(path: str | os.PathLike[str]) -> Any:
    """Read a Parquet file or folder into a pyarrow Table."""
    return _pyarrow("pyarrow.parquet").read_table(path)


def write_parquet(table: Any, path: str | os.PathLike[str]) -> None:
    """Write a pyarrow Table to one Parquet file."""
    _pyarrow("pyarrow.parquet").write_table(table, path)
