"""Rows of an accepted data set, parted as they were, from a store without servers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from components import storage
from components.config import RetrainConfig, SplitConfig
from components.data import ledger
from components.data.ledger import Record
from components.data.split import Split, split
from components.errors import DataError
from flows import saved
from flows.values import Rows
from tests.conftest import toy_rows
from tests.data.toy_corpus import cleaned


@pytest.fixture(scope="module")
def first() -> Split:
    return split(cleaned(toy_rows(200)), SplitConfig())


@pytest.fixture
def config(tmp_path: Path) -> RetrainConfig:
    return RetrainConfig.model_validate(
        {"model": "tickets", "data": {"source": "gone.csv"}, "registry": {"store": str(tmp_path)}}
    )


def accept(config: RetrainConfig, what: Split, data: str) -> Record:
    store = config.registry.store
    return ledger.accept(store, "tickets", what, data, "settings", len(ledger.records(store, "tickets")) + 1)


def test_they_are_the_rows_that_were_accepted(config: RetrainConfig, first: Split) -> None:
    record = accept(config, first, "data")
    found = saved.rows(config, first.digest)
    assert found == Rows(record, "data", record.split_uri, None, first.labels, 200)


def test_parts_that_were_changed_are_refused_before_anything_is_trained(config: RetrainConfig, first: Split) -> None:
    record = accept(config, first, "data")
    storage.write(storage.join(record.split_uri, "train.parquet"), b"another")
    with pytest.raises(DataError, match="a damaged file"):
        saved.rows(config, first.digest)


def test_rows_that_were_held_out_since_are_told(
    config: RetrainConfig, first: Split, caplog: pytest.LogCaptureFixture
) -> None:
    """With more rows the test part takes some that were learned from."""
    accept(config, first, "data")
    later = split(cleaned(toy_rows(200) + toy_rows(200, seed=1)), SplitConfig(), first.frozen)
    accept(config, later, "more data")
    held_out = set(later.frozen["row"]) & {*first.train["row"], *first.validation["row"]}
    assert held_out
    with caplog.at_level(logging.INFO, "adapterline"):
        saved.rows(config, first.digest)
    assert f"{len(held_out)} of those learned from were held out later" in caplog.text


def test_nothing_is_told_where_nothing_was_held_out_since(
    config: RetrainConfig, first: Split, caplog: pytest.LogCaptureFixture
) -> None:
    accept(config, first, "data")
    with caplog.at_level(logging.INFO, "adapterline"):
        saved.rows(config, first.digest)
    assert "held out later" not in caplog.text
