"""Runs in MLflow: one parent for each retrain, nested ones for its jobs, metrics in batches."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components import storage
from components.config import RegistryConfig
from components.errors import RegistryError, RegistryUnavailable

RUN_VARIABLE = "ADAPTERLINE_MLFLOW_RUN"
# A server that is away is reported within a minute; MLflow's own default keeps a client waiting for many.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}

# Opens the page for training runs; by default MLflow shows an experiment as one on language-model traces.
TRAINING = {"mlflow.experimentKind": "custom_model_development"}
# The text on top of a run's page.
NOTE = "mlflow.note.content"

log = logging.getLogger("adapterline")


@dataclass(frozen=True)
class Tracking:
    """A connection to one experiment."""

    client: Any
    uri: str
    experiment_id: str

    def page(self, run_id: str, artifact: str) -> str:
        """Where a person finds an artifact: a page of the MLflow server, or the artifact's URI without one."""
        if self.uri.startswith("http"):
            return f"{self.uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}/artifacts/{artifact}"
        return storage.join(str(self.client.get_run(run_id).info.artifact_uri), artifact)


def connect(config: RegistryConfig) -> Tracking:
    """The experiment, made when it is not there. Raises RegistryError when MLflow cannot be reached."""
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise RegistryError(
            "an MLflow tracking URI",
            "none",
            "set MLFLOW_TRACKING_URI or registry.tracking_uri, or run under `infra.local`",
        )
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    mlflow = load_mlflow(uri)
    client = mlflow.MlflowClient(uri)
    try:
        found = client.get_experiment_by_name(config.experiment)
        if found is not None:
            return Tracking(client, uri, found.experiment_id)
        # A server keeps artifacts where it was told to; without one they go to the store.
        place = None if uri.startswith("http") else storage.join(config.store, "mlflow")
        return Tracking(client, uri, client.create_experiment(config.experiment, place, TRAINING))
    except mlflow.MlflowException as error:
        raise unreachable(uri, error) from error


def load_mlflow(uri: str) -> Any:
    """The library, quiet and pointed at a tracking server."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for name in ("mlflow", "alembic", "mlflow.store"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)
    return mlflow


def unreachable(uri: str, error: Exception) -> RegistryUnavailable:
    place = uri.split("://")[0] + "://…" if "@" in uri else uri  # never show a password
    return RegistryUnavailable(
        f"an MLflow that answers at {place}", type(error).__name__, "start it or correct the URI"
    )


def start(tracking: Tracking, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
    """Id of a new run, nested below `parent`."""
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    nested = {MLFLOW_PARENT_RUN_ID: parent} if parent else {}
    run = tracking.client.create_run(tracking.experiment_id, run_name=name, tags={**tags, **nested})
    return str(run.info.run_id)


def finish(tracking: Tracking, run_id: str, status: str = "FINISHED") -> None:
    """End a run as FINISHED or FAILED."""
    tracking.client.set_terminated(run_id, status)


def record(
    tracking: Tracking,
    run_id: str,
    metrics: Mapping[str, float] | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    step: int = 0,
) -> None:
    """Log everything in one request."""
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    tracking.client.log_batch(
        run_id,
        [Metric(_key(name), float(value), now, step) for name, value in (metrics or {}).items()],
        [Param(name, str(value)[:6000]) for name, value in (params or {}).items()],
        [RunTag(name, value) for name, value in (tags or {}).items()],
    )


def keep(tracking: Tracking, run_id: str, files: Mapping[str, str]) -> None:
    """Save texts as artifacts of a run: {path in the run: content}."""
    for path, content in files.items():
        tracking.client.log_text(run_id, content, path)


def keep_folder(tracking: Tracking, run_id: str, folder: Path, path: str) -> None:
    tracking.client.log_artifacts(run_id, str(folder), path)


def _key(name: str) -> str:
    """MLflow allows few characters in names of metrics; labels may hold any."""
    return "".join(sign if sign.isalnum() or sign in "_-./ :" else "_" for sign in name)


class EpochLog:
    """Sends each epoch's metrics to one run, in one request. A training never dies of a log that is away."""

    def __init__(self, tracking: Tracking, run_id: str) -> None:
        self._tracking, self._run_id = tracking, run_id

    @classmethod
    def from_environment(cls) -> EpochLog | None:
        """The log named by $MLFLOW_TRACKING_URI and $ADAPTERLINE_MLFLOW_RUN, None when they are not set."""
        uri, run_id = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get(RUN_VARIABLE)
        if not (uri and run_id):
            return None
        client = load_mlflow(uri).MlflowClient(uri)
        return cls(Tracking(client, uri, ""), run_id)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            record(self._tracking, self._run_id, metrics, step=step)
        except MlflowException as error:
            # The same numbers are in the bundle, and the flow logs them again at the end.
            log.warning("metrics of step %d did not reach MLflow (%s)", step, type(error).__name__)
