"""Sources: whatever the file, the same rows come out, as strings under our column names."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from components.config import Columns, DataConfig
from components.data import sources

TEXTS = ["first, with a comma", 'second "quoted"', "third\tafter a tab", "vierte Zeile: äöü €"]
LABELS = ["cat", "dog", "dog", "cat"]


def delimited(rows: list[tuple[str, ...]], delimiter: str = ",") -> bytes:
    lines = [delimiter.join('"' + value.replace('"', '""') + '"' for value in row) for row in rows]
    return "\n".join(lines).encode() + b"\n"


def json_lines(columns: dict[str, list[Any]]) -> bytes:
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write columns in the format of the file's ending."""
    name = path.name.lower()
    plain, packed = name.removesuffix(".gz"), name.endswith(".gz")
    if plain.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.table(columns), path)
        return path
    if plain.endswith((".jsonl", ".ndjson", ".json")):
        content = json_lines(columns)
    else:
        rows = [tuple(columns), *zip(*(map(str, values) for values in columns.values()), strict=True)]
        content = delimited(rows, "\t" if plain.endswith(".tsv") else ",")
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def read(path: Path, **settings: Any) -> pa.Table:
    return sources.read(DataConfig(source=str(path), **settings)).table.data.table


ENDINGS = [
    ".csv",
    ".tsv",
    ".jsonl",
    ".ndjson",
    ".json",
    ".parquet",
    ".csv.gz",
    ".tsv.gz",
    ".jsonl.gz",
    ".CSV",
    ".csv.GZ",
]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    table = read(write(tmp_path / f"rows{ending}", {"text": TEXTS, "label": LABELS}))
    assert table.to_pydict() == {"text": TEXTS, "label": LABELS}


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_whole_number_labels_become_strings(tmp_path: Path, ending: str) -> None:
    table = read(write(tmp_path / f"rows{ending}", {"text": TEXTS, "label": [0, 1, 1, 0]}))
    assert table["label"].to_pylist() == ["0", "1", "1", "0"]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (pa.array([0.0, 1.0, 1.0, 0.0]), ["0", "1", "1", "0"]),
        (pa.array([True, False, False, True]), ["true", "false", "false", "true"]),
        (pa.array(LABELS).dictionary_encode(), LABELS),
        (pa.array(LABELS, pa.large_string()), LABELS),
        (pa.array([0, 1, 1, 0], pa.uint8()), ["0", "1", "1", "0"]),
    ],
    ids=["float", "bool", "dictionary", "large_string", "uint8"],
)
def test_parquet_types_become_strings(tmp_path: Path, values: pa.Array, names: list[str]) -> None:
    pyarrow.parquet.write_table(pa.table({"text": TEXTS, "label": values}), tmp_path / "rows.parquet")
    table = read(tmp_path / "rows.parquet")
    assert table["label"].to_pylist() == names
    assert table.schema.types == [pa.string(), pa.string()]


def test_columns_are_found_by_their_configured_names(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.csv",
        {"other": ["x"] * 4, "verdict": LABELS, "claim": TEXTS, "evidence": TEXTS[::-1], "key": list("abcd")},
    )
    columns = Columns(text="claim", text_pair="evidence", label="verdict", id="key")
    assert read(path, columns=columns).to_pydict() == {
        "text": TEXTS,
        "text_pair": TEXTS[::-1],
        "label": LABELS,
        "id": list("abcd"),
    }


def test_csv_values_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    texts = ["007", "NA", "1e5", "2024-01-31"]
    assert read(write(tmp_path / "rows.csv", {"text": texts, "label": LABELS}))["text"].to_pylist() == texts


def test_csv_text_may_span_lines(tmp_path: Path) -> None:
    texts = ["one\ntwo", *TEXTS[1:]]
    assert read(write(tmp_path / "rows.csv", {"text": texts, "label": LABELS}))["text"].to_pylist() == texts


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbftext,label\nhello,a\nthere,b\n")
    assert read(tmp_path / "rows.csv").column_names == ["text", "label"]


def test_white_space_around_labels_is_no_part_of_them(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", {"text": TEXTS, "label": [" cat", "dog ", "dog", "cat"]})
    assert read(path)["label"].to_pylist() == LABELS


def test_declared_label_may_be_a_word_that_else_means_no_value(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", {"text": TEXTS, "label": ["none", "some", "some", "none"]})
    assert read(path, labels=("none", "some"))["label"].to_pylist() == ["none", "some", "some", "none"]


def test_absent_text_is_left_to_the_expectations(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": [*TEXTS[:3], None], "label": LABELS})
    assert read(path)["text"].to_pylist() == [*TEXTS[:3], ""]
