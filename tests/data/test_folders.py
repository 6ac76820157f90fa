"""Folders of files: all rows of one format, in name order, and no file left out unsaid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from components.config import Columns, DataConfig
from components.data import sources
from components.errors import AdapterlineError
from tests.data.refusal import SECRET, refusal

ROWS = "text,label\n"


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def read(folder: Path, **settings: Any) -> dict[str, list[str]]:
    table = sources.read(DataConfig(source=str(folder), **settings)).table
    return {name: list(table[name]) for name in table.column_names}


def refused(folder: Path, **settings: Any) -> AdapterlineError:
    return refusal(lambda: sources.read(DataConfig(source=str(folder), **settings)))


def test_rows_of_all_files_come_in_name_order(tmp_path: Path) -> None:
    put(tmp_path, {"b.csv": ROWS + "second,dog\n", "a/z.csv": ROWS + "first,cat\n", "c.csv": ROWS + "third,cat\n"})
    assert read(tmp_path) == {"text": ["first", "second", "third"], "label": ["cat", "dog", "cat"]}


def test_columns_are_found_by_name_in_every_file(tmp_path: Path) -> None:
    put(tmp_path, {"1.csv": ROWS + "one,cat\n", "2.csv": "label,extra,text\ndog,x,two\n"})
    assert read(tmp_path) == {"text": ["one", "two"], "label": ["cat", "dog"]}


def test_packed_and_plain_files_are_of_one_format(tmp_path: Path) -> None:
    import gzip

    put(tmp_path, {"1.csv": ROWS + "one,cat\n"})
    (tmp_path / "2.csv.gz").write_bytes(gzip.compress((ROWS + "two,dog\n").encode()))
    assert read(tmp_path)["text"] == ["one", "two"]


def test_labels_of_unlike_types_become_the_same_strings(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"text": ["one"], "label": [1]}), tmp_path / "1.parquet")
    pyarrow.parquet.write_table(pa.table({"text": ["two"], "label": ["1"]}), tmp_path / "2.parquet")
    assert read(tmp_path)["label"] == ["1", "1"]


@pytest.mark.parametrize("name", ["_SUCCESS", ".part.csv", "_unfinished/2.csv", "sub/.hidden/2.csv"])
def test_what_is_still_being_written_is_left_alone(tmp_path: Path, name: str) -> None:
    put(tmp_path, {"1.csv": ROWS + "one,cat\n", name: "no rows"})
    assert read(tmp_path)["text"] == ["one"]


def test_a_folder_without_files(tmp_path: Path) -> None:
    error = refused(put(tmp_path, {"_SUCCESS": ""}))
    assert error.expected == f"files of rows below {tmp_path}"
    assert error.found == "none"


def test_several_formats(tmp_path: Path) -> None:
    put(tmp_path, {"1.csv": ROWS + "one,cat\n", "2.jsonl": '{"text": "two", "label": "dog"}\n'})
    assert refused(tmp_path).found == "csv, jsonl"


def test_a_file_that_holds_no_rows_is_not_passed_over(tmp_path: Path) -> None:
    put(tmp_path, {"1.csv": ROWS + "one,cat\n", "notes.txt": "hello"})
    assert refused(tmp_path).found == "notes.txt"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,mark\none,cat\n", "columns text, label in day/2.csv"),
        (ROWS + f"{SECRET},cat,more\n", "well-formed rows in day/2.csv"),
        (ROWS + f"{SECRET},\n", "a label in every row of column label of day/2.csv"),
        (ROWS, "rows; found none in day/2.csv"),
        ("", "rows; found an empty file, day/2.csv"),
    ],
    ids=["column", "malformed", "label", "header only", "empty"],
)
def test_the_bad_file_is_named(tmp_path: Path, content: str, told: str) -> None:
    put(tmp_path, {"1.csv": ROWS + "one,cat\n", "day/2.csv": content})
    assert told in str(refused(tmp_path))


def test_ids_differ_among_all_files(tmp_path: Path) -> None:
    put(tmp_path, {"1.csv": "text,label,key\none,cat,7\n", "2.csv": "text,label,key\ntwo,dog,7\n"})
    assert refused(tmp_path, columns=Columns(id="key")).found == "1 repeated ids"


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(Path("data/incoming/")).expected  # a path drops the slash
    assert refusal(lambda: sources.read(DataConfig(source="data/incoming/"))).expected == (
        "files of rows below data/incoming/"
    )
