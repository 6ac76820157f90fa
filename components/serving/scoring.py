"""Batch scoring: rows stream through in windows, so that memory does not grow with their number.

A window is some thousand rows. Within it texts are tokenised and run in order of length, in batches of bounded tokens;
the answers are in the order of the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from components import storage
from components.config import Columns
from components.data import files
from components.errors import ConfigError, DataError
from components.serving.answers import columns, names, writing
from components.serving.models import Models
from components.serving.settings import ScoreConfig

if TYPE_CHECKING:
    import pyarrow as pa

# A window ends with either. Tokenising takes some hundred bytes a token, so it is the bytes that bound the memory.
WINDOW_ROWS, WINDOW_BYTES = 4_096, 1 << 22
BLOCK = 1 << 24
ROW = "row"  # the column of rows' numbers


@dataclass(frozen=True)
class Progress:
    """rows, of about `total`, in so many seconds."""

    rows: int
    total: int
    seconds: float
    without_text: int = 0

    @property
    def rows_per_s(self) -> float:
        return self.rows / max(self.seconds, 1e-9)

    @property
    def eta_s(self) -> float:
        return max(0, self.total - self.rows) / max(self.rows_per_s, 1e-9)


def score(config: ScoreConfig, models: Models, report: Callable[[Progress], None]) -> Progress:
    """Write the answers of the models to every row of the source, in its order, with its number from 0.

    report: told after each window.  Returns where that ended.

    Raises ConfigError for an id named as another column of the answers, DataError for files that are not right,
    StorageError for places that are not; nothing is at `out` then.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset

    if config.id in (ROW, *names(models.labels)):
        wanted_id = "an id of another name than columns of the answers have"
        raise ConfigError(wanted_id, config.id, "rename that column of the source, or score without an id")
    wanted = Columns(text=config.text, text_pair=config.text_pair, label="", id=config.id)
    begin, done = time.monotonic(), Progress(0, 0, 0)
    with _local(config.source) as source, writing(config.out) as answers:
        total = estimated(source)
        for window in windows(_alike(source, wanted)):
            texts = {"text": window[config.text]}
            if config.text_pair:
                texts["text_pair"] = window[config.text_pair]
            blank = reduce(pc.or_, map(_blank, texts.values()))
            filled = pa.table({name: column.fill_null("") for name, column in texts.items()})
            found = models.answers(Dataset(filled))
            of_source = {ROW: pa.array(range(done.rows, done.rows + len(window)), pa.int64())}
            if config.id:
                of_source[config.id] = window[config.id]
            mask = blank.to_numpy()
            answers.write(pa.table({**of_source, **columns(found, models.labels, mask)}))
            rows = done.rows + len(window)
            seconds = time.monotonic() - begin
            done = Progress(rows, max(total, rows), seconds, done.without_text + int(mask.sum()))
            report(done)
    return done


def windows(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of at most WINDOW_ROWS rows and, but for single rows, about WINDOW_BYTES."""
    import pyarrow as pa

    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= WINDOW_ROWS or sum(each.nbytes for each in held) >= WINDOW_BYTES:
            yield from _cut(pa.concat_tables(held))
            held.clear()
    if held:
        yield from _cut(pa.concat_tables(held))


def _cut(table: pa.Table) -> Iterator[pa.Table]:
    size = max(1, min(WINDOW_ROWS, len(table) * WINDOW_BYTES // max(1, table.nbytes)))
    for start in range(0, len(table), size):
        yield table.slice(start, size)


def _alike(source: str, wanted: Columns) -> Iterator[pa.Table]:
    """The rows of all files, in columns of one type each: texts are strings, ids what they are in the first file that
    has any. Raises DataError where a column cannot be.
    """
    import pyarrow as pa

    kind = _type_of_ids(source, wanted) if wanted.id and files.is_folder(source) else None
    for file, table in files.read(source, wanted):
        alike = {name: _texts(table[name], name, file) for name in (wanted.text, wanted.text_pair) if name}
        if wanted.id:
            ids = table[wanted.id]
            alike[wanted.id] = ids if kind is None else _ids(ids, kind, wanted.id, file)
        yield pa.table(alike)


def _type_of_ids(source: str, wanted: Columns) -> pa.DataType:
    """Strings may be laid out otherwise in each file, and are plain ones here."""
    import pyarrow as pa

    kinds = (table.schema.field(wanted.id).type for _, table in files.read(source, wanted))
    kind = next((kind for kind in kinds if not pa.types.is_null(kind)), pa.null())
    return pa.string() if _is_text(kind) else kind


def _texts(column: pa.ChunkedArray, name: str, file: str) -> pa.ChunkedArray:
    import pyarrow as pa

    if not (pa.types.is_null(column.type) or _is_text(column.type)):
        found = f"{column.type} in {file}"
        raise DataError(f"texts in column {name}", found, "name another column, or write it as text")
    return column.cast(pa.string())


def _ids(column: pa.ChunkedArray, kind: pa.DataType, name: str, file: str) -> pa.ChunkedArray:
    import pyarrow as pa

    found = column.type
    same = found == kind or pa.types.is_null(found) or (_is_text(found) and _is_text(kind))
    try:
        if same or (pa.types.is_integer(found) and pa.types.is_integer(kind)):
            return column.cast(kind)
    except pa.ArrowInvalid:  # an integer that is too large
        pass
    expected = f"one type of column {name} in all files"
    raise DataError(expected, f"{found} in {file}, {kind} before it", "write it alike in all, e.g. as text")


def _is_text(kind: pa.DataType) -> bool:
    """Strings, however they are laid out."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    layouts = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    return any(is_layout(kind) for is_layout in layouts)


def _blank(texts: Any) -> Any:
    """Where there is nothing but white space, or null: CSV cannot tell one from the other."""
    import pyarrow.compute as pc

    return pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts.fill_null(""))), 0)


def estimated(source: str) -> int:
    """About how many rows the files of a local source have: exactly in Parquet, else lines, of which texts may have
    several. 0 where that cannot be told; what is wrong with a file, its reader says.
    """
    import pyarrow as pa
    import pyarrow.parquet

    count = 0
    for entry in files.listing(source):
        path = Path(source) / entry.name if files.is_folder(source) else Path(source)
        try:
            if path.suffix == ".parquet":
                count += pyarrow.parquet.read_metadata(path).num_rows
                continue
            with files.opened(path) as stream:
                while block := stream.read(BLOCK):
                    count += block.count(b"\n")
        except (pa.ArrowInvalid, OSError):
            return 0
    return count


@contextmanager
def _local(source: str) -> Iterator[str]:
    """The source on this machine, for the length of the block."""
    if not storage.is_s3(source):
        yield source
        return
    with TemporaryDirectory() as folder:
        if files.is_folder(source):
            yield str(storage.download_folder(source, Path(folder)))
        else:
            yield str(storage.download(source, Path(folder) / source.rsplit("/", 1)[-1]))
