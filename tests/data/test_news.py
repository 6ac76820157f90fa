"""News: what counts as a new row, and when the rows need not be read to say so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from components import storage
from components.config import DataConfig, SplitConfig
from components.data import ledger, news, rows, sources
from components.data.split import split
from components.errors import DataError
from tests.conftest import toy_rows, write_csv

Row = tuple[str, str]


class Place:
    """A folder of files, a store, and a model that accepts what it is told to."""

    def __init__(self, folder: Path) -> None:
        self.files = folder / "incoming"
        self.files.mkdir()
        self.store = str(folder / "store")
        self.config = DataConfig(source=str(self.files))

    def put(self, name: str, content: list[Row]) -> Path:
        return write_csv(self.files / name, content)

    def accept(self) -> None:
        table = sources.read(self.config).table
        cleaned = rows.clean(table, ("bad", "good"))
        number = len(ledger.records(self.store, "model")) + 1
        ledger.accept(self.store, "model", split(cleaned, SplitConfig()), rows.data_digest(table), "settings", number)

    def look(self) -> news.News:
        return news.look(self.config, self.store, "model")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def accepted(place: Place) -> Place:
    """With 100 rows that were accepted."""
    place.put("1.csv", toy_rows(100))
    place.accept()
    return place


def test_an_empty_folder_holds_nothing_new(place: Place) -> None:
    assert place.look() == news.News(data_digest=None, rows=0, new_rows=0)


def test_all_rows_are_new_to_a_model_without_data(place: Place) -> None:
    place.put("1.csv", toy_rows(100))
    assert place.look().new_rows == 100


def test_accepted_rows_are_not_new(accepted: Place) -> None:
    found = accepted.look()
    assert (found.new_rows, found.accepted) == (0, True)


def test_rows_of_a_further_file_are_new(accepted: Place) -> None:
    accepted.put("2.csv", toy_rows(12, seed=1))
    found = accepted.look()
    assert (found.rows, found.new_rows, found.accepted) == (112, 12, False)


def test_the_same_rows_again_are_not_new(accepted: Place) -> None:
    accepted.put("2.csv", [(text.upper() + " ", label) for text, label in toy_rows(30)])
    assert accepted.look().new_rows == 0


def test_a_row_with_another_label_is_new(accepted: Place) -> None:
    (text, _), *others = toy_rows(100)
    accepted.put("1.csv", [(text, "good"), *others])
    assert accepted.look().new_rows == 1


def test_rows_that_contradict_each_other_are_not_new(accepted: Place) -> None:
    accepted.put("2.csv", [("a text of both kinds", "good"), ("A text of both kinds", "bad")])
    assert accepted.look().new_rows == 0


def test_other_data_have_another_digest(accepted: Place) -> None:
    before = accepted.look().data_digest
    accepted.put("2.csv", toy_rows(12, seed=1))
    assert accepted.look().data_digest != before


def test_rows_are_not_read_again_while_the_files_are_the_same(accepted: Place) -> None:
    path = accepted.put("2.csv", toy_rows(12, seed=1))
    before, about = accepted.look(), path.stat()
    path.write_bytes(b"?" * about.st_size)  # reading this would fail
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert accepted.look() == before


def test_a_file_written_anew_is_read_again(accepted: Place) -> None:
    path = accepted.put("2.csv", toy_rows(12, seed=1))
    accepted.look()
    path.write_bytes(b"?" * path.stat().st_size)
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataError):
        accepted.look()


def test_rows_are_counted_anew_once_they_were_accepted(accepted: Place) -> None:
    accepted.put("2.csv", toy_rows(12, seed=1))
    assert accepted.look().new_rows == 12
    accepted.accept()
    assert accepted.look().new_rows == 0


def test_what_was_remembered_may_be_lost_or_damaged(accepted: Place) -> None:
    accepted.put("2.csv", toy_rows(12, seed=1))
    before = accepted.look()
    (memo,) = storage.names(f"{accepted.store}/data-seen")
    storage.write(f"{accepted.store}/data-seen/{memo}", b'{"listing": 3')
    assert accepted.look() == before


def test_other_columns_are_other_rows(accepted: Place) -> None:
    accepted.look()
    accepted.config = accepted.config.model_copy(update={"labels": ("good", "bad", "ugly"), "part": "other"})
    assert accepted.look().new_rows == 0  # counted anew, not refused


def test_a_file_that_is_not_there_is_an_error(place: Place) -> None:
    place.config = DataConfig(source=str(place.files / "rows.csv"))
    with pytest.raises(DataError, match="nothing there"):
        place.look()
