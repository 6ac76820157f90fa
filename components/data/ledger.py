"""Which data a model was given, in order: one numbered record for each accepted data set, never overwritten.

STORE/data/MODEL/000001.json           the record: digests, counts, where the split lies
STORE/splits/DIGEST/train.parquet …    the split itself, so that any version can be evaluated again later
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from components import storage
from components.config import Frozen
from components.data.ids import Ids, numbers
from components.data.split import PARTS, Split, label_codes, split_digest, table_digest
from components.data.spool import ROWS, spooled
from components.errors import DataError, LedgerMoved

if TYPE_CHECKING:
    from datasets import Dataset

NAME = r"\d{6}\.json"  # of a record; beside them there may be data of a user's


class Record(Frozen):
    """One accepted data set."""

    data_digest: str
    split_config_digest: str
    split_digest: str
    split_uri: str
    frozen_digest: str
    labels: tuple[str, ...]
    rows_per_label: dict[str, int]
    rows_per_part: dict[str, int]
    near_duplicates: int
    accepted_at: str

    def answers(self, data_digest: str, split_config_digest: str, labels: tuple[str, ...]) -> bool:
        """Is this the split of these data under these settings?"""
        mine = (self.data_digest, self.split_config_digest, self.labels)
        return mine == (data_digest, split_config_digest, labels)


def records(store: str, model: str) -> list[Record]:
    """All accepted data sets of a model, oldest first.

    Raises StorageError when the store cannot be reached, DataError when a record is damaged.
    """
    return [_record(uri) for uri in _uris(store, model)]


def newest(store: str, model: str) -> Record | None:
    """The last accepted data set of a model, without reading the others."""
    found = _uris(store, model)
    return _record(found[-1]) if found else None


def accepted(store: str, model: str, split_digest: str) -> Record:
    """The newest record of a model with this split. Raises DataError when it was never accepted."""
    found = records(store, model)
    for record in reversed(found):
        if record.split_digest == split_digest:
            return record
    raise DataError(
        f"an accepted data set of {model} with split {split_digest[:12]} in {store}",
        f"{len(found)} others",
        "name the store that it was trained from, or retrain it on new rows",
    )


def accept(store: str, model: str, split: Split, data_digest: str, split_config_digest: str, number: int) -> Record:
    """Save a split and append its record under `number`, one more than the records it was made with.

    Raises LedgerMoved when another writer took the number: its test rows must be held out too, so split again.
    """
    digest = split.digest
    uri = storage.join(store, "splits", digest)
    save(split, uri)
    frozen = table_digest(split.frozen)
    with tempfile.TemporaryDirectory() as folder:
        split.frozen.to_parquet(path := Path(folder) / "frozen.parquet")
        storage.upload(path, _frozen_uri(store, frozen))
    codes = np.concatenate([label_codes(table) for table in split.parts.values()])
    counts = np.bincount(codes, minlength=len(split.labels)).tolist()
    record = Record(
        data_digest=data_digest,
        split_config_digest=split_config_digest,
        split_digest=digest,
        split_uri=uri,
        frozen_digest=frozen,
        labels=split.labels,
        rows_per_label=dict(zip(split.labels, counts, strict=True)),
        rows_per_part={name: len(table) for name, table in split.parts.items()},
        near_duplicates=split.near_duplicates,
        accepted_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if not storage.write(_record_uri(store, model, number), record.model_dump_json().encode(), if_absent=True):
        raise LedgerMoved(f"data set {number} of {model} to be this one", "another accepted meanwhile", "split again")
    return record


def save(split: Split, uri: str) -> None:
    """Write the parts as Parquet, then `split.json`, whose presence means that all is there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, table in split.parts.items():
            table.to_parquet(folder / f"{part}.parquet")
        about = {
            "digest": split.digest,
            "labels": split.labels,
            "rows": {part: len(table) for part, table in split.parts.items()},
        }
        (folder / "split.json").write_text(json.dumps(about, indent=2))
        storage.upload_folder(folder, uri, last="split.json")


def load_parts(uri: str, digest: str, folder: Path) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """The three parts of a saved split and its labels; `folder` takes the downloads.

    Raises DataError when the content is not the one with that digest.
    """
    local = storage.download_folder(uri, folder)
    try:
        labels = tuple(json.loads((local / "split.json").read_bytes())["labels"])
        parts = {name: read_table(local / f"{name}.parquet") for name in PARTS}
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors are among them
        raise DataError(
            f"split {digest[:12]} at {uri}", f"a damaged file ({type(error).__name__})", "split the data again"
        ) from error
    found = split_digest(parts, labels)
    if found != digest:
        raise DataError(f"split {digest[:12]} at {uri}", f"content with digest {found[:12]}", "split the data again")
    return parts, labels


def load_frozen(store: str, record: Record, folder: Path) -> Dataset:
    """Every row that any data set up to this record held out for testing.

    Raises DataError when it is not what was saved: a row lost here could be trained on.
    """
    uri = _frozen_uri(store, record.frozen_digest)
    try:
        table = read_table(storage.download(uri, folder / "frozen.parquet"))
        found = table_digest(table)
    except (OSError, ValueError) as error:
        raise DataError(f"the frozen test rows at {uri}", "a damaged file", "restore it from a copy") from error
    if found != record.frozen_digest:
        raise DataError(f"frozen test rows {record.frozen_digest[:12]} at {uri}", found[:12], "restore it from a copy")
    return table


def learned_rows(uri: str) -> Ids:
    """Ids of the rows that a version trained on this split has learned from: its train and validation parts."""
    return Ids(_ids_and_codes(uri, ("train", "validation"))[0])


def known_rows(record: Record) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Id of every row of an accepted data set, and which of its labels it has. (rows,) both."""
    return _ids_and_codes(record.split_uri, PARTS)


def _ids_and_codes(uri: str, parts: Iterable[str]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Columns `row` and `label` of parts of a saved split."""
    import pyarrow.parquet

    ids, codes = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.int64)]
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            path = storage.download(storage.join(uri, f"{part}.parquet"), Path(folder) / f"{part}.parquet")
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(ROWS, columns=["row", "label"]):
                    ids.append(numbers(batch["row"].to_pylist()))
                    codes.append(batch["label"].to_numpy())
    return np.concatenate(ids), np.concatenate(codes)


def _uris(store: str, model: str) -> list[str]:
    """Where the records of a model lie, oldest first."""
    folder = _folder(store, model)
    return [storage.join(folder, name) for name in storage.names(folder) if re.fullmatch(NAME, name)]


def _record(uri: str) -> Record:
    try:
        return Record.model_validate_json(storage.read(uri))
    except ValidationError as error:
        raise DataError(f"a record of accepted data at {uri}", "something else", "restore or remove it") from error


def read_table(path: Path) -> Dataset:
    """A Parquet file as a table on disk, which is gone with it; no copy in the cache folder of `datasets`."""
    import pyarrow as pa
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        parts = (pa.Table.from_batches([batch]) for batch in file.iter_batches(ROWS))
        return spooled(parts, file.schema_arrow)


def _folder(store: str, model: str) -> str:
    return storage.join(store, "data", model)


def _frozen_uri(store: str, digest: str) -> str:
    return storage.join(store, "frozen", f"{digest}.parquet")


def _record_uri(store: str, model: str, number: int) -> str:
    return storage.join(_folder(store, model), f"{number:06d}.json")
