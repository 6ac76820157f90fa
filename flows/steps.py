"""The steps of a retrain as Prefect tasks. Each says what it does and leaves how to the components."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE

from components import base_model, digest, storage
from components.config import ComputeConfig, RetrainConfig
from components.data import expectations, ledger, rows, sources
from components.data.ledger import Record
from components.data.split import split as split_rows
from components.errors import AdapterlineError, BundleError, ConfigError, RegistryError
from components.evaluation import gate as rules
from components.methods import Member
from components.registry import bundle, claim, tracking, versions
from components.registry.versions import Version
from components.training import progress
from components.training.spec import JobSpec
from flows import elsewhere, jobs, screen
from flows.values import Judged, Plan, Rows, Run, Trained

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("adapterline")

# A saved split answers only for the code that made it.
SPLIT_CODE = ("data/split", "data/near_duplicates", "data/rows")


def _can_help(task: Any, task_run: Any, state: Any) -> bool:
    """Retry what a server or the kernel did to us, never what is wrong with data or parameters."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, AdapterlineError) and error.retry_can_help


# Caching is by digest and lies in what the steps leave behind (the ledger, the bundles, the versions), where it can be
# verified and outlives any Prefect server; Prefect's own cache of results would be a second, unverified truth.
STEP: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
RETRIED: dict[str, Any] = {**STEP, "retries": 2, "retry_delay_seconds": 10, "retry_condition_fn": _can_help}
# What a run's page shows of a job's spec.
SHOWN = {"method", "settings", "schedule", "training", "seed"}


@task(**RETRIED, name="fetch")
def fetch(config: RetrainConfig) -> Rows:
    """Read the labelled rows and keep a copy, named by digest, in the workspace."""
    storage.require(config.registry.store)
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
def up_to_date(config: RetrainConfig, plan: Plan) -> Version | None:
    """The version that an equal run already made and that still stands, if there is one. From here on the store knows
    which MLflow may refer to what lies in it."""
    connection = tracking.connect(config.registry)
    claim.make(connection, config.registry.store)
    return versions.answering(connection, config.model, plan.digest)


@task(**STEP, name="check")
def check(config: RetrainConfig) -> None:
    """Does the adapter fit the base, and the store the place where jobs run? Raises ConfigError with everything that
    does not, before anything is trained.
    """
    from components.adapters.methods import misfits

    base = base_model.find(config.base)
    problems = misfits(base.path, config.adapter.method, config.adapter.settings, config.training.max_tokens)
    if config.compute.deployment and not storage.is_s3(config.registry.store):
        raise ConfigError(
            f"registry.store at s3:// for jobs in {config.compute.deployment}",
            config.registry.store,
            "name a bucket that both can reach",
        )
    if problems:
        raise ConfigError("an adapter that fits the base model", "; ".join(problems), "correct adapter and training")


@contextmanager
def recorded(config: RetrainConfig, rows: Rows, plan: Plan) -> Iterator[Run]:
    """The parent run in MLflow for the length of the block; FAILED when an error leaves it."""
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
    name = f"{'fuse' if config.adapter.fusion else 'retrain'} {config.model}"
    run = Run(connection, tracking.start(connection, name, tags), reports, config.registry.store)
    try:
        tracking.record(connection, run.id, params=_flat(config.model_dump(mode="json")))
        yield run
    except BaseException as error:
        reason = str(error) if isinstance(error, AdapterlineError) else type(error).__name__
        tracking.keep_failure(connection, run.id, reason)
        raise
    tracking.finish(connection, run.id)


@task(**RETRIED, name="validate")
def validate(config: RetrainConfig, rows: Rows, run: Run) -> None:
    """Check the rows against all expectations. Raises ValidationFailed before anything is trained."""
    accepted = ledger.records(config.registry.store, config.model)
    previous = accepted[-1].rows_per_label if accepted else None
    report = expectations.validate(
        ledger.read_table(rows.path), rows.labels, config.validation, previous, config.report.show_samples
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
    store = config.registry.store
    settings = digest.of_json([config.split.model_dump(mode="json"), digest.of_code(*SPLIT_CODE)])
    cleaned = rows.clean(ledger.read_table(rows_.path), rows_.labels)
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


@task(**RETRIED, name="train", task_run_name="train {spec.method}")
def train(spec: JobSpec, compute: ComputeConfig, run: Run) -> Trained:
    """Run one job, or take its bundle when it is there already."""
    out = Path(compute.workspace) / "jobs" / f"{spec.method}-{spec.digest[:16]}"
    reused = bundle.is_complete(out)
    role = "baseline" if spec.method == "full" else "adapter"
    run_id = tracking.start(run.tracking, f"{role} {spec.method}", {"role": role, "job_digest": spec.digest}, run.id)
    try:
        if not reused:
            _follow(spec, out, run, run_id, compute)
        manifest = _own_bundle(out, spec)
    except BaseException as error:
        tracking.keep_failure(run.tracking, run_id, type(error).__name__)
        raise
    measured = json.loads((out / "metrics.json").read_bytes())
    tracking.record(
        run.tracking,
        run_id,
        metrics={
            **{f"test_{name}": value for name, value in measured["test"].items()},
            "trained_parameters": manifest.trained_parameters,
            "trained_share": manifest.trained_share,
            "bundle_bytes": manifest.bytes,
            "training_seconds": measured["training_seconds"],
            "tokens_per_second": measured["tokens_per_second"],
        },
        params=_flat(spec.model_dump(mode="json", include=SHOWN, exclude_none=True)),
        tags={"bundle_digest": manifest.digest, "reused": str(reused).lower()},
    )
    tracking.keep_history(run.tracking, run_id, measured["history"])  # the job sent them as it went, if it could
    if curve := measured.get("operating_curve"):  # AdapterDrop: step k of the chart is k layers without adapters
        points = [
            {"step": p["layers"], "drop_score": p["score"], "drop_ms": p["milliseconds"]} for p in curve["points"]
        ]
        tracking.keep_history(run.tracking, run_id, points, "drop_score")
    tracking.keep(run.tracking, run_id, {"metrics.json": json.dumps(measured, indent=2)})
    tracking.finish(run.tracking, run_id)
    screen.trained(role, spec, measured, reused)
    return Trained(out, manifest, run_id, measured["training_seconds"], reused)


def _own_bundle(out: Path, spec: JobSpec) -> bundle.Manifest:
    """The manifest of the bundle in our workspace, whole and made by this very job."""
    try:
        manifest = bundle.read_manifest(out)
    except BundleError as error:
        raise BundleError(error.expected, error.found, f"remove {out} and run again: it is trained anew") from error
    if manifest.job_digest != spec.digest:
        raise BundleError(
            f"the bundle of job {spec.digest[:12]}", manifest.job_digest[:12], f"remove {out} and run again"
        )
    return manifest


def _follow(spec: JobSpec, out: Path, run: Run, run_id: str, compute: ComputeConfig) -> None:
    """Run the job, showing its progress on the screen and on the run's page."""
    artifact: Any = create_progress_artifact(
        0.0, key=key("training", run.reports.name, spec.method), description=f"training {spec.method}"
    )
    shown = 0.0

    def report(event: progress.Event) -> None:
        nonlocal shown
        screen.bar(spec.method, event)
        if event.metrics is not None or time.monotonic() - shown > 5:
            shown = time.monotonic()
            update_progress_artifact(artifact, 100 * event.step / event.steps, progress.describe(event))

    try:
        if compute.deployment:
            elsewhere.follow(spec, out, run.store, run_id, compute, report)
        else:
            jobs.follow(spec, out, run_id, run.tracking.uri, compute.timeout_hours, report)
        update_progress_artifact(artifact, 100.0, "finished")
    finally:
        screen.bar(spec.method, None)


@task(**RETRIED, name="gate")
def gate(config: RetrainConfig, split: Record, baseline: Trained, adapter: Trained, run: Run) -> Judged:
    """Measure adapter, baseline, yardstick and champion on the frozen test part, and apply every rule."""
    import numpy as np

    from components.evaluation.tfidf import yardstick

    with tempfile.TemporaryDirectory() as folder:
        parts, labels = ledger.load_parts(split.split_uri, split.split_digest, Path(folder))
    test = parts["test"]
    ours, theirs = bundle.read_predictions(adapter.folder), bundle.read_predictions(baseline.folder)
    if not ours.rows == theirs.rows == list(test["row"]):
        raise BundleError("predictions for the same test rows", "different rows", "remove both bundles and train again")
    tfidf = yardstick(parts["train"], test, labels, config.seed)
    evidence = rules.Evidence(
        label_names=labels,
        labels=np.asarray(test["label"], dtype=np.int64),
        lengths=np.array([len(text) for text in test["text"]], dtype=np.int64),
        adapter=ours.probabilities,
        baseline=theirs.probabilities,
        tfidf=tfidf.probabilities,
        champion=_champion(config, test, labels, run),
        trainable_share=adapter.manifest.trained_share,
        bundle_bytes=adapter.manifest.bytes,
    )
    report = rules.judge(evidence, config.gate)
    judged = json.dumps(
        {
            **report.as_json(),
            "champion": evidence.champion.version if evidence.champion else None,
            "bundle_digest": adapter.manifest.digest,
            "policy": config.gate.model_dump(mode="json"),
        },
        indent=2,
    )
    (run.reports / "gate.json").write_text(judged)
    tracking.keep(run.tracking, run.id, {versions.GATE_REPORT: judged})
    table = screen.rule_rows(report)
    tracking.keep_table(run.tracking, run.id, table, "gate/rules.json")
    create_table_artifact(table, key=key("gate", config.model), description=f"# {config.model}: {report.verdict}")
    tracking.record(
        run.tracking,
        run.id,
        metrics={
            f"{who}/{name}{bound}".replace(" ", "_"): value
            for who, scores in report.scores.items()
            for name, score in scores.items()
            for bound, value in (("", score.value), ("_low", score.low), ("_high", score.high))
        },
        tags={"verdict": report.verdict, tracking.NOTE: screen.summary(report)},
    )
    return Judged(report, tfidf.seconds, tfidf.parameters)


def _champion(config: RetrainConfig, test: Dataset, labels: tuple[str, ...], run: Run) -> rules.Champion | None:
    """What is in production, on the rows of this test part that it never learned from."""
    import numpy as np

    version = versions.with_alias(run.tracking, config.model, versions.PRODUCTION)
    if version is None:
        return None
    if "split_uri" not in version.tags:
        found = f"version {version.number} without tag split_uri"
        raise RegistryError("a production version that this flow registered", found, "take the alias from it")
    learned = ledger.learned_rows(version.tags["split_uri"])
    unseen = np.array([index for index, row in enumerate(test["row"]) if row not in learned], dtype=np.int64)
    probabilities = np.zeros((0, len(labels)), dtype=np.float32)
    if len(unseen):
        uri = f"models:/{config.model}/{version.number}"
        probabilities = versions.score(run.tracking, uri, test.select(unseen), labels)
    return rules.Champion(version.number, unseen, probabilities)


@task(**RETRIED, name="register")
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
    return versions.register(
        run.tracking, adapter.run_id, config.model, adapter.folder, parts["test"], tags, screen.summary(judged.report)
    )


def key(*parts: str) -> str:
    """Key of a Prefect artifact: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
