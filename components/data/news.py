"""What a source holds that the model's newest accepted data set does not.

STORE/data-seen/MODEL.json    what was counted last, so that a source whose files did not change is not read again
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from components import digest, storage
from components.config import DataConfig, Frozen
from components.data import files, ledger, rows, sources
from components.data.ledger import Record
from components.data.spool import ROWS, batches
from components.errors import StorageError

if TYPE_CHECKING:
    from datasets import Dataset


class News(Frozen):
    """Rows of a source, and how many of them are new: not there before, or now with another label.

    `data_digest` is None when nothing is there. `accepted`: these rows are the newest accepted data set.
    """

    data_digest: str | None = None
    rows: int = 0
    new_rows: int = 0
    accepted: bool = False


class _Memo(Frozen):
    """Which files were counted, against which accepted data set, and the outcome."""

    listing: str
    accepted: str
    news: News


def look(config: DataConfig, store: str, model: str) -> News:
    """Count the new rows of a source; its rows are read only when its files changed, or data were accepted since.

    Raises DataError when they cannot be read, StorageError when source or store cannot be reached.
    """
    newest = ledger.newest(store, model)
    accepted = digest.of_json([newest.data_digest, newest.split_digest] if newest else None)
    listing = _listing(config)  # before the rows are read: whatever changes meanwhile is news the next time
    memo = _remembered(store, model) if listing else None
    if memo and (memo.listing, memo.accepted) == (listing, accepted):
        return memo.news
    news = News() if _is_empty(config) else _count(config, newest)
    if listing:
        content = _Memo(listing=listing, accepted=accepted, news=news).model_dump_json()
        storage.write(_uri(store, model), content.encode())
    return news


def _count(config: DataConfig, newest: Record | None) -> News:
    table = sources.read(config).table
    found = rows.data_digest(table)
    same = newest is not None and newest.data_digest == found
    new = 0 if same else _new(table, newest)
    return News(data_digest=found, rows=len(table), new_rows=new, accepted=same)


def _new(table: Dataset, newest: Record | None) -> int:
    """How many ids are not in the accepted data set, or have another label there; those of texts whose labels
    contradict each other do not count: no split takes them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    names = pc.unique(table.data.column("label"))
    ids, labels = np.empty(len(table), dtype=np.uint64), np.empty(len(table), dtype=np.int64)
    for number, batch in enumerate(batches(table)):
        place = slice(number * ROWS, number * ROWS + len(batch))
        ids[place] = rows.row_ids(batch)
        labels[place] = pc.index_in(batch["label"], value_set=names).to_numpy()
    order = np.argsort(ids)
    ids, labels = ids[order], labels[order]
    first = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    sure = np.minimum.reduceat(labels, first) == np.maximum.reduceat(labels, first)
    ids, labels = ids[first[sure]], labels[first[sure]]
    if newest is None:
        return len(ids)
    known, codes = ledger.known_rows(newest)
    order = np.argsort(known)
    known, codes = known[order], codes[order]
    place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    same = pc.index_in(pa.array(newest.labels), value_set=names).fill_null(-1).to_numpy()[codes[place]] == labels
    return int(len(ids) - ((known[place] == ids) & same).sum())


def _listing(config: DataConfig) -> str | None:
    """Digest of names, sizes and marks of the source's files; None when nothing but reading can tell."""
    settings = config.model_dump(mode="json")
    if sources.is_file(config.source):
        found = files.listing(config.source)
        return digest.of_json([settings, [[entry.name, entry.size, entry.mark] for entry in found]])
    return digest.of_json(settings) if config.source.startswith("vader:") else None  # those are pinned


def _is_empty(config: DataConfig) -> bool:
    """A folder that nobody has put a file into yet. A missing single file is an error, as it is for a retrain."""
    folder = sources.is_file(config.source) and files.is_folder(config.source)
    return folder and not files.listing(config.source)


def _remembered(store: str, model: str) -> _Memo | None:
    """None when nothing usable is there: then the rows are read."""
    try:
        return _Memo.model_validate_json(storage.read(_uri(store, model)))
    except (StorageError, ValidationError):
        return None


def _uri(store: str, model: str) -> str:
    return storage.join(store, "data-seen", f"{model}.json")
