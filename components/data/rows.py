"""What makes a row the same row: folding, ids, exact duplicates, the digest of a set of rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from components.data.spool import ROWS, batches, spooled
from components.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# 64 bits of sha256: among five million rows the chance of any two sharing an id is below one in a million.
ID_HEX = 16
LONGEST_LABEL = 64
# Rows are sorted this many, or this many bytes, at a time.
BUCKET_ROWS, BUCKET_BYTES = 100_000, 1 << 26


@dataclass(frozen=True)
class Cleaned:
    """Rows ready to be split, and what became of the others.

    table: columns `row` (id, hex), `text`, [`text_pair`], `label` (index into `labels`), sorted by `row`.
    contradicting: ids of folded texts that came with more than one label; all their rows are dropped.
    """

    table: Dataset
    labels: tuple[str, ...]
    read: int
    exact_duplicates: int
    contradicting: tuple[str, ...]
    contradicting_rows: int


def fold(text: str) -> str:
    """Case and white space folded: what two rows must share to be exact duplicates."""
    return " ".join(text.casefold().split())


def row_id(text: str, pair: str | None = None) -> str:
    """Id of a row by its folded content: the same on any machine, in any order, in any later data set."""
    content = fold(text) if pair is None else f"{fold(text)}\x1f{fold(pair)}"
    return hashlib.sha256(content.encode()).hexdigest()[:ID_HEX]


def label_names(table: Dataset, declared: tuple[str, ...] | None) -> tuple[str, ...]:
    """The declared labels, else those found, sorted. Raises DataError when there are not at least two."""
    import pyarrow.compute as pc

    found = pc.unique(table.data.column("label"))
    if len(found) < 2:
        raise DataError("rows of at least two classes", "rows of one class only", "check data.columns.label")
    if not declared and (len(found) > len(table) / 2 or pc.max(pc.utf8_length(found)).as_py() > LONGEST_LABEL):
        # A text column taken for the label would put texts into every report: stop before the first one.
        raise DataError(
            f"label names of at most {LONGEST_LABEL} characters that repeat among rows",
            f"{len(found):,} different values in {len(table):,} rows",
            "check data.columns.label, or declare data.labels",
        )
    return declared or tuple(sorted(found.to_pylist()))


def row_ids(table: pa.Table) -> npt.NDArray[np.uint64]:
    """The ids of rows with `text` and [`text_pair`] as numbers, (rows,); `hexed` writes them as `row_id` does."""
    texts = [fold(text) for text in table["text"].to_pylist()]
    if "text_pair" in table.column_names:
        pairs = map(fold, table["text_pair"].to_pylist())
        texts = [f"{text}\x1f{pair}" for text, pair in zip(texts, pairs, strict=True)]
    firsts = b"".join(hashlib.sha256(text.encode()).digest()[: ID_HEX // 2] for text in texts)
    return np.frombuffer(firsts, ">u8").astype(np.uint64)


def hexed(ids: npt.NDArray[np.uint64]) -> pa.Array:
    """Ids as strings of 16 hexadecimal digits, (rows,)."""
    import pyarrow as pa

    digits = pa.py_buffer(ids.astype(">u8").tobytes().hex().encode())
    starts = np.arange(len(ids) + 1, dtype=np.int32) * ID_HEX
    return pa.StringArray.from_buffers(len(ids), pa.py_buffer(starts), digits)


def ids_of(table: Dataset) -> npt.NDArray[np.uint64]:
    """The column `row` as numbers, (rows,): eight bytes a row."""
    found = np.empty(len(table), dtype=np.uint64)
    for number, batch in enumerate(batches(table, ["row"])):
        digits = bytes.fromhex("".join(batch["row"].to_pylist()))
        found[number * ROWS :][: len(batch)] = np.frombuffer(digits, ">u8")
    return found


def data_digest(table: Dataset) -> str:
    """Digest of all rows with their labels, independent of their order: of the JSON list of the names of the columns
    and the sorted hashes of the rows. 32 bytes a row are held.
    """
    names = [name for name in ("text", "text_pair", "label") if name in table.column_names]
    hashes = np.empty(len(table), dtype="S32")
    for number, batch in enumerate(batches(table, names)):
        rows = zip(*(batch[name].to_pylist() for name in names), strict=True)
        content = b"".join(hashlib.sha256("\x1f".join(values).encode()).digest() for values in rows)
        hashes[number * ROWS :][: len(batch)] = np.frombuffer(content, "S32")
    hashes.sort()
    whole = hashlib.sha256(f"[{json.dumps(names, separators=(',', ':'))},[".encode())
    for start in range(0, len(hashes), ROWS):
        digits = hashes[start : start + ROWS].tobytes().hex()
        listed = ",".join(f'"{digits[at : at + 64]}"' for at in range(0, len(digits), 64))
        whole.update(f"{',' if start else ''}{listed}".encode())
    whole.update(b"]]")
    return whole.hexdigest()


def clean(table: Dataset, labels: tuple[str, ...]) -> Cleaned:
    """Keep one row of each folded text; drop texts whose labels contradict each other.

    table: string columns `text`, [`text_pair`], `label`. Raises DataError when a label is not one of `labels`.
    Of exact duplicates the raw text that sorts first is kept, so the result does not depend on the order of rows.

    Rows are dealt out into buckets by the first bits of their ids, and each bucket is sorted by itself: ids are evenly
    spread, and those of exact duplicates are equal.
    """
    import pyarrow as pa

    texts = [name for name in ("text", "text_pair") if name in table.column_names]
    columns = [*((name, pa.string()) for name in texts), ("label", pa.int64())]
    buckets = 1 + max(len(table) // BUCKET_ROWS, table.data.nbytes // BUCKET_BYTES)
    starts: list[npt.NDArray[np.int64]] = []
    dealt = spooled(_dealt(table, labels, buckets, starts), pa.schema([("row", pa.uint64()), *columns]))
    kept = _Kept(dealt, starts, buckets)
    result = spooled(kept.tables(), pa.schema([("row", pa.string()), *columns]))
    dropped = kept.contradicting_rows
    return Cleaned(
        table=result,
        labels=labels,
        read=len(table),
        exact_duplicates=len(table) - dropped - len(result),
        contradicting=tuple(kept.contradicting),
        contradicting_rows=dropped,
    )


def _dealt(
    table: Dataset, labels: tuple[str, ...], buckets: int, starts: list[npt.NDArray[np.int64]]
) -> Iterator[pa.Table]:
    """The rows with ids and label numbers, each batch in the order of buckets; `starts` is told where those begin."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for batch in batches(table):
        ids = row_ids(batch)
        codes = pc.index_in(batch["label"], value_set=pa.array(labels))
        if codes.null_count:
            raise DataError(f"labels among {', '.join(labels)}", "others", "correct them, or declare data.labels")
        bucket = (ids >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)  # in the order of ids
        order = np.argsort(bucket, kind="stable")
        starts.append(np.searchsorted(bucket[order], np.arange(buckets + 1)))
        batch = batch.set_column(batch.column_names.index("label"), "label", codes.cast(pa.int64()))
        yield batch.append_column("row", pa.array(ids)).take(order).combine_chunks()


class _Kept:
    """What is kept of each bucket, and what is learned of the others on the way."""

    def __init__(self, dealt: Dataset, starts: list[npt.NDArray[np.int64]], buckets: int) -> None:
        self._batches = [batch for batch in dealt.data.to_batches() if len(batch)]
        self._starts, self._buckets = starts, buckets
        self.contradicting: list[str] = []
        self.contradicting_rows = 0

    def tables(self) -> Iterator[pa.Table]:
        import pyarrow as pa

        for bucket in range(self._buckets):
            pieces = (
                batch.slice(starts[bucket], starts[bucket + 1] - starts[bucket])
                for batch, starts in zip(self._batches, self._starts, strict=True)
            )
            rows = pa.Table.from_batches([piece for piece in pieces if len(piece)], self._batches[0].schema)
            if len(rows):
                yield self._table(rows.combine_chunks())

    def _table(self, rows: pa.Table) -> pa.Table:
        order = [(name, "ascending") for name in rows.column_names if name != "label"]
        rows = rows.sort_by(order)
        ids, labels = rows["row"].to_numpy(), rows["label"].to_numpy()
        first = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
        contradicts = np.minimum.reduceat(labels, first) != np.maximum.reduceat(labels, first)
        self.contradicting += hexed(ids[first[contradicts]]).to_pylist()
        self.contradicting_rows += int(np.diff(np.append(first, len(ids)))[contradicts].sum())
        rows = rows.take(first[~contradicts])
        return rows.set_column(rows.column_names.index("row"), "row", hexed(ids[first[~contradicts]]))
