"""What makes a row the same row: folding, ids, exact duplicates, the digest of a set of rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components import digest
from components.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

# 64 bits of sha256: among five million rows the chance of any two sharing an id is below one in a million.
ID_HEX = 16
LONGEST_LABEL = 64


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

    found = sorted(pc.unique(table.data.column("label")).to_pylist())
    if len(found) < 2:
        raise DataError("rows of at least two classes", "rows of one class only", "check data.columns.label")
    if not declared and (len(found) > len(table) / 2 or max(map(len, found)) > LONGEST_LABEL):
        # A text column taken for the label would put texts into every report: stop before the first one.
        raise DataError(
            f"label names of at most {LONGEST_LABEL} characters that repeat among rows",
            f"{len(found):,} different values in {len(table):,} rows",
            "check data.columns.label, or declare data.labels",
        )
    return declared or tuple(found)


def data_digest(table: Dataset) -> str:
    """Digest of all rows with their labels, independent of their order."""
    names = [name for name in ("text", "text_pair", "label") if name in table.column_names]
    hashes = [
        hashlib.sha256("\x1f".join(values).encode()).hexdigest()
        for batch in table.iter(batch_size=10_000)
        for values in zip(*(batch[name] for name in names), strict=True)
    ]
    return digest.of_json([names, sorted(hashes)])


def clean(table: Dataset, labels: tuple[str, ...]) -> Cleaned:
    """Keep one row of each folded text; drop texts whose labels contradict each other.

    table: string columns `text`, [`text_pair`], `label`; every label must be one of `labels`.
    Of exact duplicates the raw text that sorts first is kept, so the result does not depend on the order of rows.
    """
    keyed = table.map(_keys, batched=True, fn_kwargs={"labels": {name: index for index, name in enumerate(labels)}})
    frame = keyed.select_columns([name for name in ("row", "text", "text_pair", "label") if name in keyed.column_names])
    frame = frame.to_pandas()
    contradicts = frame.groupby("row")["label"].transform("nunique") > 1
    kept = frame[~contradicts].sort_values([name for name in frame.columns if name != "label"])
    kept = kept.drop_duplicates("row")
    return Cleaned(
        table=_table(kept),
        labels=labels,
        read=len(frame),
        exact_duplicates=len(frame) - int(contradicts.sum()) - len(kept),
        contradicting=tuple(sorted(frame.loc[contradicts, "row"].unique().tolist())),
        contradicting_rows=int(contradicts.sum()),
    )


def _keys(batch: dict[str, list[Any]], labels: dict[str, int]) -> dict[str, list[Any]]:
    pairs = batch.get("text_pair") or [None] * len(batch["text"])
    return {
        "row": [row_id(text, pair) for text, pair in zip(batch["text"], pairs, strict=True)],
        "label": [labels[label] for label in batch["label"]],
    }


def _table(frame: Any) -> Dataset:
    from datasets import Dataset

    return Dataset.from_pandas(frame, preserve_index=False)
