"""KuaiRand: what a feed of short videos showed, and everything that its users did with it."""

from __future__ import annotations

import io
import os
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recblocks import _checks
from recblocks.timelines import _files
from recblocks.timelines._arrays import Array
from recblocks.timelines.cleaning import changes

KUAIRAND_TYPES = ("shown", "click", "long_view", "like", "comment", "forward", "follow", "hate")
"""Action types: an impression's is the last one of these that happened."""

_VAL, _TEST = ("kuairand_pure/val.parquet", "77d41160c6ad"), ("kuairand_pure/test.parquet", "afe40f62090c")
_EARLIER = ("kuairand_pure/user_sequences.parquet", "322e6dcd06ed")
_ITEMS = ("kuairand_pure/item_features.parquet", "d5e02514a967")
_EXPLICIT = ("kuairand27k_explicit/processed_standard_kcore_15.tsv", "321128c4543d")
_WHERE = "https://kuairand.com (as preprocessed publicly; see the README of the folder)"
_INSTALL = "pip install 'recblocks[data]'"


class Impressions(NamedTuple):
    """What was shown to whom, and what came of it; N impressions by user, then time."""

    columns: dict[str, Tensor]
    """(N,) int64: user, item, time (ms), surface, action_type (see `KUAIRAND_TYPES`), day (the source's date, in
    days since 1970; Beijing's, but for events about midnight), test (1 in the source's test split; a row
    that stands in both splits counts as the earlier one's)."""
    labels: dict[str, Tensor]
    """(N,) bool for each of `KUAIRAND_TYPES` but "shown"."""
    earlier: dict[str, Tensor]
    """(E,) int64 columns user, item, place: what each user watched before, newest first from place 0; no times."""
    items: dict[str, Tensor]
    """(I,) int64 columns item (raw ids, ascending), author, tag (the first one, -1 = none), music; or item alone."""
    report: dict[str, int]
    """Rows read, merged (same user, item and time) and kept."""


def kuairand_pure(data_dir: str | os.PathLike[str] | None = None) -> Impressions:
    """Load KuaiRand-Pure's validation (25 to 30 April 2022) and test (1 to 8 May) impressions.

    Nothing that was measured while or after the video played is kept as a column: no play time, no watch ratio, and
    none of the item table's counts, which have no date and may cover the test days.

    Args:
        data_dir: the folder that holds ``kuairand_pure/``; default ``$RECBLOCKS_DATA``.

    Returns:
        Impressions; ``earlier`` holds up to 50 videos a user up to 24 April, of which only the order is known.

    Raises:
        FileNotFoundError: If a file is not there; the message says where to get it.
        ValueError: If it is another file.

    Example:
        >>> seen = kuairand_pure("/data")  # doctest: +SKIP
        >>> seen.labels["long_view"].float().mean()  # doctest: +SKIP

    Note:
        There are no request ids: a chunk is one user's impressions of one day. No impression is randomised
        (``is_rand`` is 0 throughout), so nothing here is free of position bias.

    Source: Gao et al. 2022, KuaiRand (CC BY-SA 4.0).
    """
    parts = [_parquet(data_dir, *file) for file in (_VAL, _TEST)]
    rows = {name: np.concatenate([part.column(name).to_numpy() for part in parts]) for name in _PURE_COLUMNS}
    test = np.repeat([0, 1], [part.num_rows for part in parts])
    flags = {name: rows[source] != 0 for name, source in _PURE_FLAGS.items()}
    table = _parquet(data_dir, *_EARLIER)
    watched = table.column("watch_seq").to_pylist()
    length = np.array([len(seen) for seen in watched])
    item = np.concatenate([seen[::-1] for seen in watched])
    earlier = {
        "user": table.column("user_id").to_numpy().repeat(length),
        "item": item,
        "place": np.arange(item.size) - (length.cumsum() - length).repeat(length),
    }
    features = _parquet(data_dir, *_ITEMS)
    tags = [text.split(",")[0] for text in features.column("tag").to_pylist()]
    items = {
        "item": features.column("video_id").to_numpy(),
        "author": features.column("author_id").to_numpy(),
        "tag": np.array([int(tag) if tag.isdigit() else -1 for tag in tags]),
        "music": features.column("music_id").to_numpy(),
    }
    return _impressions(rows, rows["tab"], test, flags, earlier, items)


def kuairand27k_explicit(data_dir: str | os.PathLike[str] | None = None) -> Impressions:
    """Load 41,828 impressions of KuaiRand-27K that were liked or hated, 7 to 21 April 2022.

    They were selected on explicit feedback, so their rates are not natural: every row is a like or a hate.

    Args:
        data_dir: the folder that holds ``kuairand27k_explicit/``; default ``$RECBLOCKS_DATA``.

    Returns:
        Impressions without earlier videos or item features; surface is 0 and test 1 from the 19th on.

    Raises:
        FileNotFoundError: If the file is not there; the message says where to get it.
        ValueError: If it is another file.

    Example:
        >>> seen = kuairand27k_explicit("/data")  # doctest: +SKIP

    Source: Gao et al. 2022, KuaiRand (CC BY-SA 4.0).
    """
    text = _files.read_file(data_dir, *_EXPLICIT, _WHERE).decode()
    names, *lines = text.splitlines()
    wanted = [names.split("\t").index(name) for name in _EXPLICIT_COLUMNS]
    numbers = np.loadtxt(io.StringIO("\n".join(lines)), dtype=np.int64, delimiter="\t", usecols=wanted, unpack=True)
    rows = dict(zip(_EXPLICIT_COLUMNS, numbers, strict=True))
    flags = {name: rows[source] != 0 for name, source in _EXPLICIT_FLAGS.items()}
    flags |= {"like": rows["label"] == 1, "hate": rows["label"] == 0}
    test = (rows["date"] >= 20220419).astype(np.int64)
    nowhere = np.zeros_like(test)
    none = {name: np.empty(0, np.int64) for name in ("user", "item", "place")}
    items = {"item": np.unique(rows["video_id"])}
    return _impressions(rows, nowhere, test, flags, none, items)


_PURE_FLAGS = {
    "click": "is_click", "long_view": "long_view", "like": "is_like", "comment": "is_comment",
    "forward": "is_forward", "follow": "is_follow", "hate": "is_hate",
}  # fmt: skip
_PURE_COLUMNS = ("user_id", "video_id", "date", "time_ms", "tab", *_PURE_FLAGS.values())
_EXPLICIT_FLAGS = {
    "click": "is_click", "long_view": "long_view", "comment": "is_comment", "forward": "is_forward",
    "follow": "is_follow",
}  # fmt: skip
_EXPLICIT_COLUMNS = ("user_id", "video_id", "date", "time_ms", "label", *_EXPLICIT_FLAGS.values())


def _parquet(data_dir: str | os.PathLike[str] | None, name: str, digest: str) -> Any:
    parquet = _checks.optional("pyarrow.parquet", _INSTALL)
    return parquet.read_table(io.BytesIO(_files.read_file(data_dir, name, digest, _WHERE)))


def _impressions(
    rows: dict[str, Array],
    surface: Array,
    test: Array,
    flags: dict[str, Array],
    earlier: dict[str, Array],
    items: dict[str, Array],
) -> Impressions:
    """Sort, merge what was recorded twice, and derive the action types."""
    user, item, time = rows["user_id"], rows["video_id"], rows["time_ms"]
    order = np.lexsort((item, time, user))
    begins = np.flatnonzero(changes(user[order], time[order], item[order]))
    first = order[begins]
    labels = {name: np.logical_or.reduceat(flags[name][order], begins) for name in KUAIRAND_TYPES[1:]}
    action_type = np.zeros(first.size, np.int64)
    for kind, name in enumerate(KUAIRAND_TYPES[1:], start=1):
        action_type[labels[name]] = kind
    columns = {
        "user": user[first],
        "item": item[first],
        "time": time[first],
        "surface": surface[first],
        "action_type": action_type,
        "day": _days(rows["date"][first]),
        "test": test[first],
    }
    by_id = items["item"].argsort()
    return Impressions(
        columns=_tensors(columns),
        labels={name: torch.from_numpy(label) for name, label in labels.items()},
        earlier=_tensors(earlier),
        items=_tensors({name: column[by_id] for name, column in items.items()}),
        report={"read": user.size, "merged": user.size - first.size, "kept": first.size},
    )


def _days(date: Array) -> Array:
    """Days since 1970 of dates like 20220425."""
    different, place = np.unique(date, return_inverse=True)
    days = [f"{day // 10_000}-{day // 100 % 100:02}-{day % 100:02}" for day in different.tolist()]
    return np.array(days, dtype="datetime64[D]").astype(np.int64)[place]


def _tensors(columns: dict[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(column.astype(np.int64)) for name, column in columns.items()}
