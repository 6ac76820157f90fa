"""The rows of a data set that was accepted before, parted as they were: whatever has become of the source since.

Nothing is added to the ledger, for nothing new is accepted; no row changes its part.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

from components.config import RetrainConfig
from components.data import ledger
from components.data.ledger import Record
from components.data.split import PARTS
from components.registry import tracking
from flows.values import Rows, Run

log = logging.getLogger("adapterline")


def rows(config: RetrainConfig, split_digest: str) -> Rows:
    """The accepted data set of this model with this split.

    Raises DataError when there is none, or its saved parts are not those any more.
    """
    record = ledger.accepted(config.registry.store, config.model, split_digest)
    with tempfile.TemporaryDirectory() as folder:
        ledger.load_parts(record.split_uri, record.split_digest, Path(folder))
    count = sum(record.rows_per_part.values())
    log.info("data      %s rows accepted on %s, as they were split then", f"{count:,}", record.accepted_at[:10])
    if since := _held_out_since(config, record):
        log.info("          %s of those learned from were held out later: comparisons leave them out", f"{since:,}")
    return Rows(record, record.data_digest, record.split_uri, None, record.labels, count)


def _held_out_since(config: RetrainConfig, record: Record) -> int:
    """How many rows that a version learns from this split were held out by later data sets.

    It learns from them as the version did that was trained on this split before; whoever compares a version on a later
    test part asks `ledger.learned_rows` which of its rows do not count.
    """
    newest = ledger.newest(config.registry.store, config.model)
    if newest is None or newest.frozen_digest == record.frozen_digest:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        frozen = ledger.load_frozen(config.registry.store, newest, Path(folder))
    return len(set(frozen["row"]) & ledger.learned_rows(record.split_uri))


def split(record: Record, run: Run) -> Record:
    """The same record, with its counts in the run."""
    counts = {f"rows_{part}": record.rows_per_part[part] for part in PARTS}
    kept = {"rows_kept": sum(counts.values()), "near_duplicates_kept_together": record.near_duplicates}
    tracking.record(run.tracking, run.id, metrics={**kept, **counts})
    tracking.keep(run.tracking, run.id, {"data/split.json": json.dumps({**record.model_dump(), **kept}, indent=2)})
    parts = ", ".join(f"{record.rows_per_part[part]:,} {part}" for part in PARTS)
    log.info("split     %s rows: %s", f"{kept['rows_kept']:,}", parts)
    return record
