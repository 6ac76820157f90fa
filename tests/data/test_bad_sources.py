"""Bad files: each is refused with one line that says what is wrong, and never with a word of its rows."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from components.config import Columns, DataConfig
from components.data import rows, sources
from components.errors import AdapterlineError
from tests.data.refusal import SECRET, refusal

HEADER = b"text,label\n"
GOOD = HEADER + b"".join(b"%s row %d,%s\n" % (SECRET.encode(), n, (b"cat", b"dog")[n % 2]) for n in range(500))
LATIN = f"{SECRET} café".encode("latin-1")


def refused(path: Path, **settings: Any) -> AdapterlineError:
    return refusal(lambda: sources.read(DataConfig(source=str(path), **settings)))


def put(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def parquet(folder: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pa.table(columns), folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("name", ["absent.csv", "sub/absent.csv", "absent.csv.gz"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    error = refused(tmp_path / name)
    assert str(tmp_path / name) in error.expected
    assert error.found == "nothing there"


def test_missing_relative_file_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "a file at data/rows.csv" in refused(Path("data/rows.csv")).expected


def test_unknown_ending(tmp_path: Path) -> None:
    assert refused(put(tmp_path, "rows.xlsx", GOOD)).found == "rows.xlsx"


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.parquet", "rows.csv.gz", "rows.jsonl.gz"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    assert refused(put(tmp_path, name, b"")).expected == "rows"


@pytest.mark.parametrize("content", [HEADER, HEADER.strip(), b"\n\n"], ids=["header", "no line end", "blank lines"])
def test_header_only(tmp_path: Path, content: bytes) -> None:
    assert refused(put(tmp_path, "rows.csv", content)).expected == "rows"


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = parquet(tmp_path, text=pa.array([], pa.string()), label=pa.array([], pa.string()))
    assert refused(path).expected == "rows"


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_missing_column(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        path = parquet(tmp_path, text=[SECRET], label=["cat"])
    else:
        content = b'{"text": "%s", "label": "cat"}\n' % SECRET.encode() if name.endswith("jsonl") else GOOD
        path = put(tmp_path, name, content)
    error = refused(path, columns=Columns(label="verdict"))
    assert error.expected == f"columns text, verdict in {name}"
    assert error.found == "columns text, label"
    assert "verdict is not there" in error.todo


@pytest.mark.parametrize("first", [f"a whole sentence of {SECRET},cat", f"{SECRET},0", f"{SECRET * 9},cat"])
def test_missing_header_line_does_not_show_the_first_row(tmp_path: Path, first: str) -> None:
    error = refused(put(tmp_path, "rows.csv", first.encode() + b"\n" + GOOD.removeprefix(HEADER)))
    assert "header" in error.todo


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz", "rows.jsonl", "rows.jsonl.gz"])
def test_bytes_that_are_not_utf8(tmp_path: Path, name: str, place: str) -> None:
    if "jsonl" in name:
        header, good, bad = b"", b'{"text": "good", "label": "cat"}\n', b'{"text": "%s", "label": "dog"}\n' % LATIN
    else:
        cut = b"\t" if "tsv" in name else b","
        header, good, bad = b"text%slabel\n" % cut, b"good%scat\n" % cut, LATIN + cut + b"dog\n"
    content = header + (bad + good * 9 if place == "first" else good * 9 + bad)
    assert refused(put(tmp_path, name, content)).expected == f"UTF-8 text in {name}"


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.jsonl"])
def test_names_of_columns_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    """Also of one that nobody asks for."""
    odd = "größe".encode("latin-1")
    row = b'{"text": "good", "label": "cat", "%s": 1}\n' % odd
    content = row if "jsonl" in name else b"text,label,%s\ngood,cat,1\n" % odd
    assert refused(put(tmp_path, name, content)).expected == f"UTF-8 text in {name}"


def test_utf16_file(tmp_path: Path) -> None:
    assert refused(put(tmp_path, "rows.csv", GOOD.decode().encode("utf-16"))).expected == "UTF-8 text in rows.csv"


@pytest.mark.parametrize("kept", [1, 12, 0.5, -9, -1], ids=str)
def test_gzip_cut_short(tmp_path: Path, kept: float) -> None:
    whole = gzip.compress(GOOD)
    (tmp_path / "rows.csv.gz").write_bytes(whole[: int(len(whole) * kept) if kept == 0.5 else int(kept)])
    assert refused(tmp_path / "rows.csv.gz").found == "one that is damaged or cut short"


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_rows_that_are_longer_than_is_read_at_once(tmp_path: Path, name: str) -> None:
    long = SECRET * 400_000
    row = f'{{"text": "{long}", "label": "cat"}}\n' if "jsonl" in name else f"{long},cat\n"
    content = row.encode() if "jsonl" in name else GOOD + row.encode() + GOOD
    assert refused(put(tmp_path, name, content)).expected == f"rows of at most a megabyte in {name}"


def test_plain_file_named_gz(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.gz").write_bytes(GOOD)
    assert refused(tmp_path / "rows.csv.gz").expected == "a whole file, rows.csv.gz"


def test_parquet_cut_short(tmp_path: Path) -> None:
    path = parquet(tmp_path, text=[SECRET] * 500, label=["cat", "dog"] * 250)
    path.write_bytes(path.read_bytes()[:-20])
    assert refused(path).expected == "a whole file, rows.parquet"


MALFORMED = [
    f"{SECRET},cat,{SECRET}",  # too many columns
    f"room #101 of {SECRET},utf8 row 7,{SECRET}",  # words that a search in the reader's message would fall for
    SECRET,  # too few
    f'"{SECRET} without a closing quote,cat',
]


@pytest.mark.parametrize("row", MALFORMED, ids=["more", "misleading", "fewer", "quote"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_malformed_csv_row_is_counted_and_not_quoted(tmp_path: Path, name: str, row: str) -> None:
    error = refused(put(tmp_path, name, GOOD + row.encode() + b"\n"))
    assert error.found == "a malformed one near row 501"
    assert error.__cause__ is None
    assert error.__suppress_context__


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "%s" "label": "cat"}',
        '{"text": "%s", "label": ',
        '{"text": "%s", "label": 1}',
        '[{"text": "%s"}]',
        "%s",
    ],
    ids=["syntax", "cut", "type", "list", "text"],
)
def test_malformed_json_line(tmp_path: Path, line: str) -> None:
    good = b'{"text": "fine", "label": "cat"}\n'
    error = refused(put(tmp_path, "rows.jsonl", good * 3 + (line % SECRET).encode() + b"\n"))
    assert error.expected.startswith("one JSON object a line in rows.jsonl")
    assert error.__suppress_context__


@pytest.mark.parametrize("absent", ["", "  ", "NaN", "null", "N/A"])
def test_csv_rows_without_label(tmp_path: Path, absent: str) -> None:
    content = GOOD + f"{SECRET} one,{absent}\n{SECRET} two,cat\n{SECRET} three,{absent}\n".encode()
    assert refused(put(tmp_path, "rows.csv", content)).found == "2 rows without one, the first at row 501"


def test_csv_rows_without_a_declared_label(tmp_path: Path) -> None:
    content = GOOD + f"{SECRET},\n".encode()
    assert refused(put(tmp_path, "rows.csv", content), labels=("cat", "dog")).found.startswith("1 rows without one")


@pytest.mark.parametrize("label", ["null", '""'])
def test_json_rows_without_label(tmp_path: Path, label: str) -> None:
    content = f'{{"text": "a", "label": "cat"}}\n{{"text": "{SECRET}", "label": {label}}}\n'.encode()
    assert refused(put(tmp_path, "rows.jsonl", content)).found == "1 rows without one, the first at row 2"


def test_parquet_rows_with_nan_as_label(tmp_path: Path) -> None:
    path = parquet(tmp_path, text=[SECRET] * 4, label=[0.0, float("nan"), 1.0, None])
    assert refused(path).found == "2 rows without one, the first at row 2"


def test_fractions_as_labels(tmp_path: Path) -> None:
    assert refused(parquet(tmp_path, text=[SECRET] * 2, label=[0.25, 1.0])).found == "fractions"


def test_lists_as_texts(tmp_path: Path) -> None:
    assert refused(parquet(tmp_path, text=[[SECRET], [SECRET]], label=["a", "b"])).found.startswith("type list")


def test_bytes_as_ids(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"text": [SECRET] * 2, "label": ["a", "b"]}
    for ids in (pa.array([b"\xff" * 16, b"\xfe" * 16], pa.uuid()), pa.array([b"\xff", b"\xfe"], pa.large_binary())):
        error = refused(parquet(tmp_path, **columns, key=ids), columns=Columns(id="key"))
        assert error.found == f"type {ids.type}"


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_two_columns_of_one_name(tmp_path: Path, name: str) -> None:
    table = pa.table([["a"], ["cat"], ["b"]], names=["text", "label", "text"])
    path = put(tmp_path, "rows.csv", b"text,label,text\na,cat,b\n")
    if name == "rows.parquet":
        pyarrow.parquet.write_table(table, path := tmp_path / name)
    assert refused(path).expected == f"one column text in {name}"


def test_repeated_ids(tmp_path: Path) -> None:
    content = b"text,label,key\na,cat,1\nb,dog,2\nc,cat,1\nd,dog,1\n"
    error = refused(put(tmp_path, "rows.csv", content), columns=Columns(id="key"))
    assert error.found == "2 repeated ids"


def test_one_class_only(tmp_path: Path) -> None:
    path = put(tmp_path, "rows.csv", HEADER + f"{SECRET},cat\n".encode() * 9)
    table = sources.read(DataConfig(source=str(path))).table
    assert refusal(lambda: rows.label_names(table, None)).found == "rows of one class only"


def test_text_column_mistaken_for_the_label_column(tmp_path: Path) -> None:
    table = sources.read(
        DataConfig(source=str(put(tmp_path, "rows.csv", GOOD)), columns=Columns(text="label", label="text"))
    ).table
    error = refusal(lambda: rows.label_names(table, None))
    assert error.found == "500 different values in 500 rows"
    assert "data.columns.label" in error.todo


def test_long_texts_mistaken_for_labels(tmp_path: Path) -> None:
    """Even when they repeat so often that they could be classes."""
    content = "text,label\n" + f"cat,{SECRET * 10}\ndog,{SECRET * 11}\n" * 50
    table = sources.read(DataConfig(source=str(put(tmp_path, "rows.csv", content.encode())))).table
    refusal(lambda: rows.label_names(table, None))
