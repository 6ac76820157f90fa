"""The step that trains: one job, followed wherever it runs, and what its run in MLflow shows."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from components.config import ComputeConfig
from components.errors import BundleError
from components.registry import bundle, tracking
from components.training import progress
from components.training.spec import JobSpec
from flows import elsewhere, jobs, screen
from flows.steps import RETRIED, flat, key
from flows.values import Run, Trained

# What a run's page shows of a job's spec.
SHOWN = {"method", "settings", "schedule", "training", "seed"}


@task(**RETRIED, name="train", task_run_name="train {spec.method}")
def train(spec: JobSpec, compute: ComputeConfig, run: Run) -> Trained:
    """Run one job, or take its bundle when it is there already."""
    out = job_folder(spec, compute)
    if reused := bundle.is_complete(out):
        (out / bundle.MANIFEST).touch()  # in use again, as `tidy` sees it
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
        params=flat(spec.model_dump(mode="json", include=SHOWN, exclude_none=True)),
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


def job_folder(spec: JobSpec, compute: ComputeConfig) -> Path:
    """Where a job leaves its bundle."""
    return Path(compute.workspace) / "jobs" / f"{spec.method}-{spec.digest[:16]}"


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

    def tell(percent: float, words: str) -> None:
        with suppress(httpx.HTTPError):  # a server that is away for minutes ends no training
            update_progress_artifact(artifact, percent, words)

    def report(event: progress.Event) -> None:
        nonlocal shown
        screen.bar(spec.method, event)
        if event.metrics is not None or time.monotonic() - shown > 5:
            shown = time.monotonic()
            tell(100 * event.step / event.steps, progress.describe(event))

    try:
        if compute.deployment:
            elsewhere.follow(spec, out, run.store, run_id, compute, report)
        else:
            jobs.follow(spec, out, run_id, run.tracking.uri, compute.timeout_hours, report)
        tell(100.0, "finished")
    finally:
        screen.bar(spec.method, None)
