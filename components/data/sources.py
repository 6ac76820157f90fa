"""Labelled rows from wherever they are, as one Arrow table.

    out/tickets.csv   s3://bucket/tickets.tsv.gz   rows.jsonl   rows.parquet     files, by ending
    mrjunos/depression-reddit-cleaned                                            a hub data set, with a revision
    vader:tweets                                                                 the embedded default

The result has the columns `text`, `text_pair` (when configured), `label` and `id` (when configured), all strings.
"""

from __future__ import annotations

import codecs
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import storage
from components.config import Columns, DataConfig
from components.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
# Arrow ends "Row #3: Expected 2 columns, got 3: …" with the row itself, which no message of ours may hold.
QUOTED_ROW = re.compile(r"got \d+: .*", re.DOTALL)
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
    from datasets import Dataset

    revision = None
    if config.source.startswith("vader:"):
        from components.data import vader

        table = vader.read(config.source.removeprefix("vader:"))
    elif storage.is_s3(config.source):
        with tempfile.TemporaryDirectory() as folder:
            name = config.source.rsplit("/", 1)[-1]
            table = _file(storage.download(config.source, Path(folder) / name), config)
    elif _is_file(config.source):
        table = _file(Path(config.source), config)
    else:
        table, revision = _hub(config)
    return Rows(Dataset(_checked(table, config)), config.source, revision)


def _is_file(source: str) -> bool:
    """`data/rows.csv` has the shape of a hub id, but is plainly meant as a file even when it is not there."""
    return Path(source).exists() or not HUB_ID.match(source) or source.endswith((*FORMATS, ".gz"))


def _file(path: Path, config: DataConfig) -> pa.Table:
    import pyarrow as pa

    if not path.is_file():
        raise DataError(f"a file at {path}", "a folder" if path.is_dir() else "nothing there", "correct data.source")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    form = FORMATS.get(suffixes[-1] if suffixes else "")
    if form is None:
        raise DataError(f"a file ending in {', '.join(FORMATS)}", path.name, "convert or rename it")
    if path.stat().st_size == 0:
        raise DataError("rows", f"an empty file, {path.name}", "check what wrote it")
    try:
        table = _parse(path, form, config.columns)
        table.validate(full=True)  # only the CSV reader looks whether text is UTF-8
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, form, error) from None  # Arrow's message quotes the row
    return table


def _parse(path: Path, form: str, columns: Columns) -> pa.Table:
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet

    if form == "parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = _wanted(columns, file.schema_arrow.names, path.name)
            return pyarrow.parquet.read_table(path, columns=wanted).select(wanted)
    if form == "jsonl":
        with pa.input_stream(path, compression="detect") as stream:
            table = pyarrow.json.read_json(stream, parse_options=pyarrow.json.ParseOptions(newlines_in_values=False))
        return table.select(_wanted(columns, table.column_names, path.name))
    return _delimited(path, "\t" if form == "tsv" else ",", columns)


def _delimited(path: Path, delimiter: str, columns: Columns) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv

    reading = csv.ReadOptions(use_threads=False)  # else it cannot say which row is malformed
    parsing = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pa.input_stream(path, compression="detect") as stream:
        header = csv.open_csv(stream, read_options=reading, parse_options=parsing).schema
    wanted = _wanted(columns, header.names, path.name)
    with pa.input_stream(path, compression="detect") as stream:
        return csv.read_csv(
            stream,
            read_options=reading,
            parse_options=parsing,
            convert_options=csv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.string()),  # "007" and "NA" are text, not numbers or nulls
                strings_can_be_null=False,
            ),
        )


def _wanted(columns: Columns, found: list[str], place: str) -> list[str]:
    wanted = [name for name in (columns.text, columns.text_pair, columns.label, columns.id) if name]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(
            f"columns {', '.join(wanted)} in {place}",
            f"columns {', '.join(found)}" if _is_header(wanted, found) else "a first line without them",
            f"add the header line, or set data.columns: {', '.join(missing)} is not there",
        )
    return wanted


def _is_header(wanted: list[str], found: list[str]) -> bool:
    """Without a header line the first row is taken for one, and its texts must not be shown."""
    return any(name in found for name in wanted)


def _hub(config: DataConfig) -> tuple[pa.Table, str]:
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
    names = _label_names(data, config.columns.label)
    table = data.with_format("arrow")[:].select(_wanted(config.columns, data.column_names, config.source))
    if names:
        table = _named(table, config.columns.label, names)
    return table, folder.name


def _label_names(data: Dataset, column: str) -> list[str] | None:
    from datasets import ClassLabel

    feature = data.features.get(column)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _named(table: pa.Table, column: str, names: list[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    codes = table[column].combine_chunks()
    labels = pa.array(names).take(pc.if_else(pc.less(codes, 0), None, codes))  # the hub writes -1 for "no label"
    return table.set_column(table.column_names.index(column), column, labels)


def _checked(table: pa.Table, config: DataConfig) -> pa.Table:
    """The same rows under our column names, as strings."""
    import pyarrow as pa

    if table.num_rows == 0:
        raise DataError("rows", f"none in {config.source}", "check what wrote it")
    given = config.columns
    renamed = {"text": given.text, "text_pair": given.text_pair, "label": given.label, "id": given.id}
    if config.source.startswith("vader:"):
        renamed = {"text": "text", "label": "label"}
    columns = {ours: _strings(table[theirs], theirs) for ours, theirs in renamed.items() if theirs}
    columns["label"] = _labels(columns["label"], config.labels or (), renamed["label"] or "label")
    if "id" in columns:
        _unique(columns["id"], given.id or "id")
    return pa.table(columns)


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
    if pa.types.is_nested(kind) or pa.types.is_binary(kind):
        raise DataError(f"text or whole numbers in column {name}", f"type {kind}", "correct data.columns")
    return pc.fill_null(column.cast(pa.string()), "")


def _labels(column: pa.ChunkedArray, declared: tuple[str, ...], name: str) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pc.utf8_trim_whitespace(column)
    absent = pa.array([value for value in NO_VALUE if value not in declared])
    missing = pc.is_in(pc.utf8_lower(column), value_set=absent)
    count = pc.sum(missing).as_py() or 0
    if declared:
        missing = pc.and_(missing, pc.invert(pc.is_in(column, value_set=pa.array(declared))))
        count = pc.sum(missing).as_py() or 0
    if count:
        raise DataError(
            f"a label in every row of column {name}",
            f"{count} rows without one, the first at row {_first(missing)}",
            "label or remove them",
        )
    return column


def _unique(column: pa.ChunkedArray, name: str) -> None:
    import pyarrow.compute as pc

    repeated = len(column) - pc.count_distinct(column).as_py()
    if repeated:
        raise DataError(
            f"a different id in every row of column {name}",
            f"{repeated} repeated ids",
            "correct the ids or data.columns.id",
        )


def _first(mask: Any) -> int:
    """Number of the first true row, counted from 1."""
    import pyarrow.compute as pc

    return int(pc.index(mask, True).as_py()) + 1


def _damaged(path: Path, form: str, error: Exception) -> DataError:
    """What is wrong with a file that Arrow refuses; never Arrow's own words, which quote the rows."""
    reason = QUOTED_ROW.sub("", str(error)).lower()
    if "utf8" in reason or not _is_utf8(path):
        return DataError(f"UTF-8 text in {path.name}", "other bytes", "convert it, e.g. iconv -f latin1 -t utf-8")
    if form == "parquet" or isinstance(error, OSError):
        return DataError(f"a whole file, {path.name}", "one that is damaged or cut short", "fetch or write it again")
    if "empty" in reason:
        return DataError("rows", f"none in {path.name}", "check what wrote it")
    if form == "jsonl":
        return DataError(
            f"one JSON object a line in {path.name}, with one type a column",
            "a line that is malformed or of another type",
            "correct it",
        )
    row = re.search(r"row #(\d+)", reason)
    place = f" near row {int(row.group(1)) - 1:,}" if row else ""  # Arrow counts the header, we do not
    return DataError(f"well-formed rows in {path.name}", f"a malformed one{place}", "correct quotes and separators")


def _is_utf8(path: Path) -> bool:
    if path.suffix in (".gz", ".parquet"):
        return True
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True
