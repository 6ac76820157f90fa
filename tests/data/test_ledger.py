"""Ledger: what was accepted is found again unchanged, and no two data sets share a number."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow.parquet
import pytest

from components import storage
from components.config import SplitConfig
from components.data import ledger
from components.data.split import PARTS, Split, split
from components.errors import DataError, LedgerMoved, StorageError
from tests.conftest import toy_rows
from tests.data.refusal import refusal
from tests.data.toy_corpus import cleaned


@pytest.fixture(scope="module")
def first() -> Split:
    return split(cleaned(toy_rows(100)), SplitConfig())


@pytest.fixture(scope="module")
def second(first: Split) -> Split:
    """Of other rows, so that the first one's test rows are only remembered."""
    return split(cleaned(toy_rows(100, seed=1)), SplitConfig(), first.frozen)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def accept(store: str, what: Split, data: str = "data") -> ledger.Record:
    return ledger.accept(store, "model", what, data, "settings", len(ledger.records(store, "model")) + 1)


def test_parts_come_back_as_they_were(store: str, first: Split, tmp_path: Path) -> None:
    record = accept(store, first)
    parts, labels = ledger.load_parts(record.split_uri, record.split_digest, tmp_path)
    assert labels == first.labels
    assert {name: table.to_dict() for name, table in parts.items()} == {
        name: table.to_dict() for name, table in first.parts.items()
    }


def test_record_counts_rows(store: str, first: Split) -> None:
    record = accept(store, first)
    assert record.rows_per_part == {"train": 70, "validation": 10, "test": 20}
    assert record.rows_per_label == {"bad": 50, "good": 50}


def test_record_answers_for_its_own_data_and_settings_only(store: str, first: Split) -> None:
    record = accept(store, first)
    assert record.answers("data", "settings", ("bad", "good"))
    assert not record.answers("other", "settings", ("bad", "good"))
    assert not record.answers("data", "other", ("bad", "good"))
    assert not record.answers("data", "settings", ("good", "bad"))


def test_frozen_rows_of_all_data_sets_come_back(store: str, first: Split, second: Split, tmp_path: Path) -> None:
    accept(store, first)
    frozen = ledger.load_frozen(store, accept(store, second), tmp_path)
    assert set(frozen["row"]) == {*first.test["row"], *second.test["row"]}


def test_frozen_rows_that_came_back_freeze_again(store: str, first: Split, tmp_path: Path) -> None:
    """What the store returns serves the next split as what was saved would have."""
    frozen = ledger.load_frozen(store, accept(store, first), tmp_path)
    rows = cleaned(toy_rows(100) + toy_rows(50, seed=2))
    assert split(rows, SplitConfig(seed=5), frozen).digest == split(rows, SplitConfig(seed=5), first.frozen).digest


def test_learned_rows_are_train_and_validation(store: str, first: Split) -> None:
    learned = ledger.learned_rows(accept(store, first).split_uri)
    assert learned == {*first.train["row"], *first.validation["row"]}


def test_records_are_in_order_of_acceptance(store: str, first: Split, second: Split) -> None:
    accepted = [accept(store, first, "one"), accept(store, second, "two"), accept(store, first, "three")]
    assert ledger.records(store, "model") == accepted
    assert storage.names(f"{store}/data/model") == ["000001.json", "000002.json", "000003.json"]


def test_models_do_not_share_records(store: str, first: Split) -> None:
    accept(store, first)
    assert ledger.records(store, "other") == []


def test_of_two_writers_one_wins_and_the_other_must_split_again(store: str, first: Split) -> None:
    """The loser's split does not know what the winner held out."""
    start = threading.Barrier(2)
    outcomes: list[str] = []

    def write(name: str) -> None:
        start.wait()
        try:
            ledger.accept(store, "model", first, name, "settings", 1)
            outcomes.append("won")
        except LedgerMoved as error:
            assert error.retry_can_help
            outcomes.append("lost")

    writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(outcomes) == ["lost", "won"]
    assert len(ledger.records(store, "model")) == 1


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("column", ["text", "label", "row"])
def test_tampered_part_is_refused(store: str, first: Split, tmp_path: Path, part: str, column: str) -> None:
    record = accept(store, first)
    path = Path(record.split_uri) / f"{part}.parquet"
    table = pyarrow.parquet.read_table(path)
    values = table[column].to_pylist()
    values[0] = 1 - values[0] if column == "label" else values[0] + "x"
    where = table.column_names.index(column)
    pyarrow.parquet.write_table(table.set_column(where, column, [values]), path)
    error = refusal(lambda: ledger.load_parts(record.split_uri, record.split_digest, tmp_path))
    assert record.split_digest[:12] in error.expected


@pytest.mark.parametrize("name", ["test.parquet", "split.json"])
@pytest.mark.parametrize("kept", [0, 20])
def test_split_with_a_file_cut_short_is_refused(store: str, first: Split, tmp_path: Path, name: str, kept: int) -> None:
    record = accept(store, first)
    path = Path(record.split_uri) / name
    path.write_bytes(path.read_bytes()[:kept])
    refusal(lambda: ledger.load_parts(record.split_uri, record.split_digest, tmp_path), DataError)


def test_split_with_other_labels_is_refused(store: str, first: Split, tmp_path: Path) -> None:
    record = accept(store, first)
    path = Path(record.split_uri) / "split.json"
    path.write_text(path.read_text().replace('"bad"', '"dreadful"'))
    refusal(lambda: ledger.load_parts(record.split_uri, record.split_digest, tmp_path), DataError)


def test_split_that_is_gone_is_refused(store: str, tmp_path: Path) -> None:
    refusal(lambda: ledger.load_parts(f"{store}/splits/gone", "0" * 64, tmp_path), StorageError)


def test_rows_of_a_users_beside_the_records_are_none(store: str, first: Split) -> None:
    for name in ("rows.csv", "000000.csv", "2026/000002.json"):
        storage.write(f"{store}/data/model/{name}", b"text,label")
    assert ledger.newest(store, "model") is None
    record = accept(store, first)
    assert ledger.records(store, "model") == [ledger.newest(store, "model")] == [record]


def test_damaged_record_is_refused(store: str, first: Split) -> None:
    accept(store, first)
    Path(store, "data", "model", "000001.json").write_text('{"data_digest": 1}')
    error = refusal(lambda: ledger.records(store, "model"), DataError)
    assert "000001.json" in error.expected


def test_frozen_rows_that_were_changed_are_refused(store: str, first: Split, second: Split, tmp_path: Path) -> None:
    one, other = accept(store, first), accept(store, second)
    assert one.frozen_digest != other.frozen_digest
    frozen = Path(store) / "frozen"
    (frozen / f"{one.frozen_digest}.parquet").replace(frozen / f"{other.frozen_digest}.parquet")
    with pytest.raises(DataError, match="frozen test rows"):
        ledger.load_frozen(store, other, tmp_path)


def test_an_accepted_data_set_is_found_by_its_split(store: str, first: Split, second: Split) -> None:
    record = accept(store, first)
    accept(store, second, "other data")
    assert ledger.accepted(store, "model", first.digest) == record


def test_a_split_that_was_never_accepted_is_not_found(store: str, first: Split, second: Split) -> None:
    accept(store, first)
    assert "found 1 others" in str(refusal(lambda: ledger.accepted(store, "model", second.digest)))
