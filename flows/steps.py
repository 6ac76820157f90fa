"""The steps of a retrain as Prefect tasks. Each says what it does and leaves how to the components."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE

from components import base_model, cache, digest, fit, storage
from components.config import RetrainConfig
from components.data import expectations, ledger, rows, sources
from components.data.ledger import Record
from components.data.split import split as split_rows
from components.errors import AdapterlineError, ConfigError
from components.methods import Member
from components.registry import claim, registration, standing, tracking, versions
from components.registry.versions import Version
from flows import jobs, saved, screen
from flows.values import Judged, Plan, Rows, Run, Trained

log = logging.getLogger("adapterline")

# A saved split answers only for the code that made it.
SPLIT_CODE = tuple(
    f"data/{part}" for part in ("split", "near_duplicates", "minhash", "word_sets", "rows", "ids", "spool")
)


def _can_help(task: Any, task_run: Any, state: Any) -> bool:
    """Retry what a server or the kernel did to us, never what is wrong with data or parameters."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, AdapterlineError) and error.retry_can_help


# Caching is by digest and lies in what the steps leave behind (the ledger, the bundles, the versions), where it can be
# verified and outlives any Prefect server; Prefect's own cache of results would be a second, unverified truth.
STEP: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
RETRIED: dict[str, Any] = {**STEP, "retries": 2, "retry_delay_seconds": 10, "retry_condition_fn": _can_help}


@task(**RETRIED, name="fetch")
def fetch(config: RetrainConfig, split: str | None = None) -> Rows:
    """Read the labelled rows and keep a copy, named by digest, in the workspace. split: digest of one that was saved,
    whose rows are taken instead.
    """
    storage.require(config.registry.store)
    if split is not None:
        return saved.rows(config, split)
    read = sources.read(config.data)
    labels = rows.label_names(read.table, config.data.labels)
    digest_ = rows.data_digest(read.table)
    path = Path(config.compute.workspace) / "rows" / f"{digest_}.parquet"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # texts are for their owner
    read.table.to_parquet(path)
    log.info("data      %s rows from %s", f"{len(read.table):,}", config.data.source)
    return Rows(path, digest_, read.source, read.revision, labels, len(read.table))


@task(**RETRIED, name="plan")
def plan(config: RetrainConfig, rows: Rows, members: tuple[Member, ...] = ()) -> Plan:
    """Pin the base model and fix what will be trained. members: those of a fusion."""
    if config.adapter.fusion and not members:
        raise ConfigError("a method that trains by itself", "fusion", "run flows.fuse with these parameters")
    base = base_model.find(config.base)
    at_once = jobs.at_once(config.compute)
    limits = jobs.limits(config.compute, at_once)
    return Plan(config, base.pin, rows.data_digest, rows.labels, at_once, limits, members)


@task(**RETRIED, name="up to date?")
def up_to_date(config: RetrainConfig, plan: Plan, rows: Rows) -> Version | None:
    """The version that an equal run already made and that still stands, if there is one. From here on the store knows
    which MLflow may refer to what lies in it."""
    connection = tracking.connect(config.registry)
    claim.make(connection, config.registry.store, config.compute.workspace, str(cache.folder()))
    found = versions.answering(connection, config.model, plan.digest)
    if found and isinstance(rows.kept, Record) and found.tags.get("split_digest") != rows.kept.split_digest:
        return None  # the same rows, parted otherwise
    return found


@task(**STEP, name="check")
def check(config: RetrainConfig) -> None:
    """Does the adapter fit the base, and the store the place where jobs run? Raises ConfigError with everything that
    does not, before anything is trained.
    """
    if config.compute.deployment and not storage.is_s3(config.registry.store):
        raise ConfigError(
            f"registry.store at s3:// for jobs in {config.compute.deployment}",
            config.registry.store,
            "name a bucket that both can reach",
        )
    require_fit(config, base_model.find(config.base).path)


def require_fit(config: RetrainConfig, base: Path) -> None:
    """Raise ConfigError with everything of the adapter and the training that the base in this folder does not allow."""
    if problems := fit.problems(base, config.adapter, config.training.max_tokens):
        raise ConfigError("an adapter that fits the base model", "; ".join(problems), "correct adapter and training")


@contextmanager
def recorded(config: RetrainConfig, rows: Rows, plan: Plan, what: str | None = None) -> Iterator[Run]:
    """The parent run in MLflow for the length of the block; FAILED when an error leaves it. what: by default a retrain,
    or the making of a fusion."""
    connection = tracking.connect(config.registry)
    tags = {
        "model": config.model,
        versions.RUN_DIGEST: plan.digest,
        "data_digest": rows.data_digest,
        "data_source": rows.source,
        "data_revision": rows.revision or "",
        **base_model.describe(plan.base),
    }
    reports = Path(config.compute.workspace) / "reports" / plan.digest[:16]
    reports.mkdir(parents=True, exist_ok=True)
    for left in reports.iterdir():
        left.touch()  # in use again, as `tidy` sees it
    name = f"{what or ('fuse' if config.adapter.fusion else 'retrain')} {config.model}"
    run = Run(connection, tracking.start(connection, name, tags), reports, config.registry.store)
    try:
        tracking.record(connection, run.id, params=flat(config.model_dump(mode="json")))
        tracking.keep(connection, run.id, {standing.CONFIG: config.model_dump_json(indent=2)})
        yield run
    except BaseException as error:
        reason = str(error) if isinstance(error, AdapterlineError) else type(error).__name__
        tracking.keep_failure(connection, run.id, reason)
        raise
    tracking.finish(connection, run.id)


@task(**RETRIED, name="validate")
def validate(config: RetrainConfig, rows: Rows, run: Run) -> None:
    """Check the rows against all expectations. Raises ValidationFailed before anything is trained."""
    if isinstance(rows.kept, Record):
        return  # they were accepted before
    accepted = ledger.records(config.registry.store, config.model)
    previous = accepted[-1].rows_per_label if accepted else None
    report = expectations.validate(
        ledger.read_table(rows.kept), rows.labels, config.validation, previous, config.report.show_samples
    )
    page = run.reports / "data.html"
    page.write_text(report.html, encoding="utf-8")
    tracking.keep(run.tracking, run.id, {"data/report.html": report.html, "data/validation.json": report.result})
    link = run.tracking.page(run.id, "data/report.html")
    create_link_artifact(
        link, "data report", key=key("data", config.model), description="What Great Expectations found"
    )
    for warning in report.warnings:
        log.warning("warning   expected %s; found %s", warning.expected, warning.found)
    report.raise_for_errors(str(page))
    log.info(
        "validated %d expectations met, %d warnings", len(report.outcomes) - len(report.warnings), len(report.warnings)
    )


@task(**RETRIED, name="split")
def split(config: RetrainConfig, rows_: Rows, run: Run) -> Record:
    """Part the rows without leaks; the same data and settings give the split that was saved for them."""
    if isinstance(rows_.kept, Record):
        return saved.split(rows_.kept, run)
    store = config.registry.store
    settings = digest.of_json([config.split.model_dump(mode="json"), digest.of_code(*SPLIT_CODE)])
    cleaned = rows.clean(ledger.read_table(rows_.kept), rows_.labels)
    earlier = ledger.records(store, config.model)
    # Only the newest record may answer: since an older one, further rows may have been held out for testing.
    record = earlier[-1] if earlier and earlier[-1].answers(rows_.data_digest, settings, rows_.labels) else None
    if record is None:
        with tempfile.TemporaryDirectory() as folder:
            frozen = ledger.load_frozen(store, earlier[-1], Path(folder)) if earlier else None
            parts = split_rows(cleaned, config.split, frozen)
            record = ledger.accept(store, config.model, parts, rows_.data_digest, settings, len(earlier) + 1)
    counts = {
        "rows_read": cleaned.read,
        "rows_kept": len(cleaned.table),
        "exact_duplicates_dropped": cleaned.exact_duplicates,
        "contradicting_rows_dropped": cleaned.contradicting_rows,
        "near_duplicates_kept_together": record.near_duplicates,
        **{f"rows_{part}": count for part, count in record.rows_per_part.items()},
    }
    tracking.record(run.tracking, run.id, metrics=counts)
    contradictions = {"contradicting_row_ids": cleaned.contradicting, **counts}
    tracking.keep(
        run.tracking, run.id, {"data/split.json": json.dumps({**record.model_dump(), **contradictions}, indent=2)}
    )
    screen.data(counts)
    return record


@task(**{**RETRIED, "retries": 3, "retry_delay_seconds": [10, 30, 60]}, name="register")
def register(config: RetrainConfig, plan: Plan, split: Record, adapter: Trained, judged: Judged, run: Run) -> Version:
    """Make the bundle the next version and the candidate, once a fresh process has reproduced its predictions."""
    tags = {
        versions.RUN_DIGEST: plan.digest,
        "method": adapter.manifest.method,
        "verdict": judged.report.verdict,
        "bundle_digest": adapter.manifest.digest,
        "data_digest": plan.data_digest,
        "split_digest": split.split_digest,
        "split_uri": split.split_uri,
        "gate_run": run.id,
        **({"members": ", ".join(map(str, plan.members))} if plan.members else {}),
        **base_model.describe(plan.base),
    }
    with tempfile.TemporaryDirectory() as folder:
        parts, _ = ledger.load_parts(split.split_uri, split.split_digest, Path(folder))
    return registration.register(
        run.tracking,
        adapter.run_id,
        config.model,
        adapter.folder,
        parts["test"],
        tags,
        screen.summary(judged.report),
        config.report.examples,
    )


def key(*parts: str) -> str:
    """Key of a Prefect artifact: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
