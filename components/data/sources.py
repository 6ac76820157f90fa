"""Labelled rows from wherever they are, as one Arrow table on disk.

    out/tickets.csv   s3://bucket/tickets.tsv.gz   out/incoming/   s3://bucket/incoming/   files: one, or all below
    mrjunos/depression-reddit-cleaned                                            a hub data set, with a revision
    vader:tweets                                                                 the embedded default

The result has the columns `text`, `text_pair` (when configured), `label` and `id` (when configured), all strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from components import storage
from components.config import DataConfig
from components.data import files
from components.data.spool import batches, spooled
from components.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from datasets import Dataset

HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
# What spreadsheets and pandas write for "no value"; a label unless declared as one.
NO_VALUE = ("", "nan", "none", "null", "na", "n/a", "<na>")


@dataclass(frozen=True)
class Rows:
    """Rows as read: `table` with string columns, and the revision that answered (hub data sets only)."""

    table: Dataset
    source: str
    revision: str | None = None


def read(config: DataConfig) -> Rows:
    """Read all rows of a source.

    Raises DataError when the file is missing, empty, damaged, not UTF-8, lacks a column, or has rows without label
    or with repeated ids; StorageError when S3 refuses.
    """
    import pyarrow as pa

    revision = None
    if config.source.startswith("vader:"):
        from components.data import vader

        read_ = iter([(config.source, vader.read(config.source.removeprefix("vader:")))])
    elif is_file(config.source):
        read_ = files.read(config.source, config.columns)
    else:
        read_, revision = _hub(config)
    renamed = _renamed(config)
    table = spooled(_checked(read_, renamed, config), pa.schema([(name, pa.string()) for name in renamed]))
    if "id" in renamed:
        _unique(table.data.column("id"), renamed["id"])
    return Rows(table, config.source, revision)


def is_file(source: str) -> bool:
    """`data/rows.csv` has the shape of a hub id, but is plainly meant as a file even when it is not there."""
    return not source.startswith("vader:") and (
        storage.is_s3(source)
        or Path(source).exists()
        or not HUB_ID.match(source)
        or source.endswith((*files.FORMATS, ".gz"))
    )


def _hub(config: DataConfig) -> tuple[Iterator[tuple[str, pa.Table]], str]:
    """A hub data set through its snapshot: works offline once it is in the hub's cache; runs no code of others."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(config.source, repo_type="dataset", revision=config.revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DataError(
            f"hub data set {config.source} at revision {config.revision or 'main'}",
            f"{type(error).__name__}: the hub cannot be reached or does not have it",
            "go online, correct the id, or point data.source at a local file",
        ) from error
    try:
        data = load_dataset(str(folder), split=config.part)
    except (ValueError, OSError, DatasetGenerationError) as error:
        raise DataError(
            f"part {config.part!r} of {config.source}",
            type(error).__name__,
            "set data.part to one it has, and check that its files are whole",
        ) from None  # the reader's message may quote a row
    if len(data) == 0:
        raise DataError("rows", f"none in {config.source}", "check what wrote it")
    names = _label_names(data, config.columns.label)
    chosen = files.wanted(config.columns, data.column_names, config.source)
    parts = ((config.source, _named(part, config.columns.label, names)) for part in batches(data, chosen))
    return parts, folder.name


def _label_names(data: Dataset, column: str) -> list[str] | None:
    from datasets import ClassLabel

    feature = data.features.get(column)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _named(table: pa.Table, column: str, names: list[str] | None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    if names is None:
        return table
    codes = table[column].combine_chunks()
    labels = pa.array(names).take(pc.if_else(pc.less(codes, 0), None, codes))  # the hub writes -1 for "no label"
    return table.set_column(table.column_names.index(column), column, labels)


def _renamed(config: DataConfig) -> dict[str, str]:
    """Our column names, and those of the source."""
    if config.source.startswith("vader:"):
        return {"text": "text", "label": "label"}
    given = config.columns
    renamed = {"text": given.text, "text_pair": given.text_pair, "label": given.label, "id": given.id}
    return {ours: theirs for ours, theirs in renamed.items() if theirs}


def _checked(read_: Iterator[tuple[str, pa.Table]], renamed: dict[str, str], config: DataConfig) -> Iterator[pa.Table]:
    """The same rows under our column names, as strings. A file that is one of several is named in errors."""
    import pyarrow as pa

    several = is_file(config.source) and files.is_folder(config.source)
    for file, tables in groupby(read_, key=itemgetter(0)):
        place = f" of {file}" if several else ""
        rows = missing = first = 0
        for _, table in tables:
            columns = {ours: _strings(table[theirs], f"{theirs}{place}") for ours, theirs in renamed.items()}
            columns["label"], absent = _labels(columns["label"], config.labels or ())
            if not missing and absent.any():
                first = rows + int(absent.argmax()) + 1
            missing += int(absent.sum())
            rows += len(table)
            yield pa.table(columns)
        if missing:
            raise DataError(
                f"a label in every row of column {renamed['label']}{place}",
                f"{missing} rows without one, the first at row {first}",
                "label or remove them",
            )


def _strings(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Whole numbers and booleans as their names, 1.0 as "1"; nulls become empty strings, for the expectations."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), None, column)
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid:
            raise DataError(f"text or whole numbers in column {name}", "fractions", "correct data.columns") from None
    refused = DataError(f"text or whole numbers in column {name}", f"type {kind}", "correct data.columns")
    of_bytes = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary
    if pa.types.is_nested(kind) or any(is_kind(kind) for is_kind in of_bytes):
        raise refused
    try:
        return pc.fill_null(column.cast(pa.string()), "")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # UUIDs, say
        raise refused from None


def _labels(column: pa.ChunkedArray, declared: tuple[str, ...]) -> tuple[pa.ChunkedArray, npt.NDArray[np.bool_]]:
    """Labels without white space around them, and which rows have none. Both (rows,)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pc.utf8_trim_whitespace(column)
    absent = pa.array([value for value in NO_VALUE if value not in declared])
    missing = pc.is_in(pc.utf8_lower(column), value_set=absent)
    if declared:
        missing = pc.and_(missing, pc.invert(pc.is_in(column, value_set=pa.array(declared))))
    return column, missing.to_numpy()


def _unique(column: pa.ChunkedArray, name: str) -> None:
    import pyarrow.compute as pc

    repeated = len(column) - pc.count_distinct(column).as_py()
    if repeated:
        raise DataError(
            f"a different id in every row of column {name}",
            f"{repeated} repeated ids",
            "correct the ids or data.columns.id",
        )
