"""Files of rows: one, or all below a folder or S3 prefix.

    out/tickets.csv   s3://bucket/tickets.tsv.gz   rows.jsonl   rows.parquet     one, by its ending
    out/incoming/     s3://bucket/incoming/                                      all below, of one format, by name

Below a folder, names with a part that starts with a dot or an underscore are left alone: what is still being written
may lie there under such a name.
"""

from __future__ import annotations

import codecs
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from components import storage
from components.config import Columns
from components.errors import DataError
from components.storage import Entry

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
BLOCK = 1 << 24  # bytes of JSON lines parsed at once
# Arrow ends "Row #3: Expected 2 columns, got 3: …" with the row itself, which no message of ours may hold.
QUOTED_ROW = re.compile(r"got \d+: .*", re.DOTALL)


def listing(source: str) -> list[Entry]:
    """The files of a source, by name; none when nothing is there (yet)."""
    if is_folder(source):
        return [entry for entry in storage.listing(source) if _is_data(entry)]
    found = storage.find(source)
    return [found] if found else []


def read(source: str, columns: Columns) -> Iterator[tuple[str, pa.Table]]:
    """The configured columns of every file, some rows at a time, each with the name of its file.

    Raises DataError when there is none, or one is empty, damaged, not UTF-8, lacks a column or is of another format
    than the others; StorageError when S3 refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        if not is_folder(source):
            name = source.rsplit("/", 1)[-1]
            path = storage.download(source, Path(folder) / name) if storage.is_s3(source) else Path(source)
            yield from _file(path, name, columns)
            return
        for name in _of_one_format(source):
            fetched = Path(folder) / f"file{''.join(Path(name).suffixes[-2:])}"
            yield from _file(storage.download(storage.join(source, name), fetched), name, columns)
            fetched.unlink(missing_ok=True)


def is_folder(source: str) -> bool:
    """A folder or prefix. An S3 prefix ends with a slash, or at least has no ending as a file has."""
    return source.endswith("/") or (
        "." not in source.removeprefix("s3://").partition("/")[2].rsplit("/", 1)[-1]
        if storage.is_s3(source)
        else Path(source).is_dir()
    )


def _is_data(entry: Entry) -> bool:
    parts = entry.name.split("/")  # S3 consoles make folders as empty objects whose names end with a slash
    return bool(parts[-1]) and not any(part.startswith((".", "_")) for part in parts)


def _of_one_format(source: str) -> list[str]:
    names = [entry.name for entry in listing(source)]
    if not names:
        raise DataError(f"files of rows below {source}", "none", "put some there, or correct data.source")
    forms = {name: _form(name) for name in names}
    for name, form in forms.items():
        if form is None:
            raise DataError(f"files ending in {', '.join(FORMATS)} below {source}", name, "convert or move it")
    if len(set(forms.values())) > 1:
        found = ", ".join(sorted({str(form) for form in forms.values()}))
        raise DataError(f"files of one format below {source}", found, "convert or move some")
    return names


def _form(name: str) -> str | None:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes if suffix.lower() != ".gz"]
    return FORMATS.get(suffixes[-1] if suffixes else "")


def _file(path: Path, name: str, columns: Columns) -> Iterator[tuple[str, pa.Table]]:
    import pyarrow as pa

    if not path.is_file():
        raise DataError(f"a file at {path}", "a folder" if path.is_dir() else "nothing there", "correct data.source")
    form = _form(name)
    if form is None:
        raise DataError(f"a file ending in {', '.join(FORMATS)}", name, "convert or rename it")
    if path.stat().st_size == 0:
        raise DataError("rows", f"an empty file, {name}", "check what wrote it")
    rows = 0
    try:
        for batch in _parse(path, name, form, columns):
            batch.validate(full=True)  # only the CSV reader looks whether text is UTF-8
            rows += len(batch)
            yield name, pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, name, form, error) from None  # Arrow's message quotes the row
    if not rows:
        raise DataError("rows", f"none in {name}", "check what wrote it")


def _parse(path: Path, name: str, form: str, columns: Columns) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet

    if form == "parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            names = wanted(columns, file.schema_arrow.names, name)
            yield from (batch.select(names) for batch in file.iter_batches(columns=names))
    elif form == "jsonl":
        yield from _json_lines(path, name, columns)
    else:
        yield from _delimited(path, name, "\t" if form == "tsv" else ",", columns)


def _json_lines(path: Path, name: str, columns: Columns) -> Iterator[pa.RecordBatch]:
    """Read twice: a column has one type in the whole file, and which one only its last line may tell."""
    import pyarrow as pa
    from pyarrow import json

    found: dict[str, set[pa.DataType]] = {}
    for block in _lines(path):
        parsing = json.ParseOptions(newlines_in_values=False)
        for field in json.read_json(pa.BufferReader(block), parse_options=parsing).schema:
            found.setdefault(field.name, set()).add(field.type)
    if not found:
        raise pa.ArrowInvalid("empty")
    schema = pa.schema([(each, _one_type(found[each])) for each in wanted(columns, list(found), name)])
    parsing = json.ParseOptions(schema, newlines_in_values=False, unexpected_field_behavior="ignore")
    for block in _lines(path):
        yield from json.read_json(pa.BufferReader(block), parse_options=parsing).to_batches()


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines, some at a time."""
    left = b""
    with opened(path) as stream:
        while block := stream.read(BLOCK):
            lines, end, rest = block.rpartition(b"\n")
            if end:
                yield left + lines + end
                left = b""
            left += rest
    if left.strip():
        yield left


def opened(path: Path) -> pa.NativeFile:
    """What is in a file, unpacked."""
    import pyarrow as pa

    return pa.input_stream(path, compression="gzip" if _is_packed(path) else None)


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _one_type(found: set[pa.DataType]) -> pa.DataType:
    """The type that Arrow gives a column whose parts by themselves have these. Raises ArrowInvalid if there is none."""
    import pyarrow as pa

    kinds = found - {pa.null()} or {pa.null()}
    if len(kinds) == 1:
        return kinds.pop()
    if kinds == {pa.int64(), pa.float64()}:
        return pa.float64()
    if all(pa.types.is_string(kind) or pa.types.is_timestamp(kind) for kind in kinds):
        return pa.string()  # texts that look like times by chance
    raise pa.ArrowInvalid("a column changes its type")


def _delimited(path: Path, name: str, delimiter: str, columns: Columns) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    from pyarrow import csv

    reading = csv.ReadOptions(use_threads=False)  # else it cannot say which row is malformed
    parsing = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with opened(path) as stream:
        header = csv.open_csv(stream, read_options=reading, parse_options=parsing).schema
    names = wanted(columns, header.names, name)
    with opened(path) as stream:
        yield from csv.open_csv(
            stream,
            read_options=reading,
            parse_options=parsing,
            convert_options=csv.ConvertOptions(
                include_columns=names,
                column_types=dict.fromkeys(names, pa.string()),  # "007" and "NA" are text, not numbers or nulls
                strings_can_be_null=False,
            ),
        )


def wanted(columns: Columns, found: list[str], place: str) -> list[str]:
    """The configured columns. Raises DataError when one is not among those found in that place."""
    names = [name for name in (columns.text, columns.text_pair, columns.label, columns.id) if name]
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"columns {', '.join(names)} in {place}",
            f"columns {', '.join(found)}" if _is_header(names, found) else "a first line without them",
            f"add the header line, or set data.columns: {', '.join(missing)} is not there",
        )
    if several := [name for name in names if found.count(name) > 1]:
        raise DataError(f"one column {several[0]} in {place}", "several of that name", "rename or remove the others")
    return names


def _is_header(names: list[str], found: list[str]) -> bool:
    """Without a header line the first row is taken for one, and its texts must not be shown."""
    return any(name in found for name in names)


def _damaged(path: Path, name: str, form: str, error: Exception) -> DataError:
    """What is wrong with a file that Arrow refuses; never Arrow's own words, which quote the rows."""
    reason = QUOTED_ROW.sub("", str(error)).lower()
    if isinstance(error, UnicodeDecodeError) or "utf8" in reason or not _is_utf8(path):
        return DataError(f"UTF-8 text in {name}", "other bytes", "convert it, e.g. iconv -f latin1 -t utf-8")
    if form == "parquet" or isinstance(error, OSError):
        return DataError(f"a whole file, {name}", "one that is damaged or cut short", "fetch or write it again")
    if "straddl" in reason:
        return DataError(
            f"rows of at most a megabyte in {name}",
            "a longer one, or a quote that does not end",
            "correct it, or write Parquet",
        )
    if "empty" in reason:
        return DataError("rows", f"none in {name}", "check what wrote it")
    if form == "jsonl":
        return DataError(
            f"one JSON object a line in {name}, with one type a column",
            "a line that is malformed or of another type",
            "correct it",
        )
    row = re.search(r"row #(\d+)", reason)
    place = f" near row {int(row.group(1)) - 1:,}" if row else ""  # Arrow counts the header, we do not
    return DataError(f"well-formed rows in {name}", f"a malformed one{place}", "correct quotes and separators")


def _is_utf8(path: Path) -> bool:
    if _is_packed(path) or path.suffix == ".parquet":
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
