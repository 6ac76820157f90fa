"""Runs in MLflow: one parent for each retrain, nested ones for its jobs, metrics in batches."""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

from components import storage
from components.config import RegistryConfig
from components.errors import RegistryError, RegistryUnavailable
from components.serving.score import REFUSALS

RUN_VARIABLE = "ADAPTERLINE_MLFLOW_RUN"
# The scheme of artifacts that go through a server, which alone knows where they lie.
PROXIED = "mlflow-artifacts"
# As many as every kind of search allows at once.
PAGE = 500
# A server that is away is reported within a minute; MLflow's own default keeps a client waiting for many.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}

# Opens the page for training runs; by default MLflow shows an experiment as one on language-model traces.
TRAINING = {"mlflow.experimentKind": "custom_model_development"}
# What MLflow puts a run below another by; `mlflow.utils.mlflow_tags` would import all of MLflow.
PARENT = "mlflow.parentRunId"
# The text on top of a run's page.
NOTE = "mlflow.note.content"

P = ParamSpec("P")
T = TypeVar("T")

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
            server = urlsplit(self.uri.rstrip("/"))
            place = server._replace(netloc=server.netloc.rpartition("@")[2]).geturl()  # never show a password
            return f"{place}/#/experiments/{self.experiment_id}/runs/{run_id}/artifacts/{artifact}"
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
    with calls(uri):
        found = client.get_experiment_by_name(config.experiment)
        if found is not None:
            return Tracking(client, uri, found.experiment_id)
        # A server keeps artifacts where it was told to; without one they go to the store.
        place = None if uri.startswith("http") else storage.join(config.store, "mlflow")
        return Tracking(client, uri, client.create_experiment(config.experiment, place, TRAINING))


def load_mlflow(uri: str) -> Any:
    """The library, quiet and pointed at a tracking server."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    for name in ("mlflow", "alembic", "mlflow.store"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)
    return mlflow


@contextmanager
def calls(uri: str) -> Iterator[None]:
    """Turn what MLflow and its store raise into RegistryError, or RegistryUnavailable where a retry can help."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    place = _shown(uri)
    try:
        yield
    except MlflowException as error:
        if error.error_code in REFUSALS:
            found = f"{error.error_code}: {(str(error).splitlines() or [''])[0]}"
            raise RegistryError(f"MLflow at {place} to agree", found, "check rights and names") from error
        raise _unavailable(place, error) from error
    except (BotoCoreError, ClientError, Boto3Error, RequestException) as error:
        raise _unavailable(place, error) from error


def _shown(uri: str) -> str:
    return uri.split("://")[0] + "://…" if "@" in uri else uri  # never show a password


def _unavailable(place: str, error: Exception) -> RegistryUnavailable:
    found = type(error).__name__
    return RegistryUnavailable(f"MLflow and its store to answer at {place}", found, "start them or correct the URI")


def _translated(function: Callable[Concatenate[Tracking, P], T]) -> Callable[Concatenate[Tracking, P], T]:
    @functools.wraps(function)
    def wrapped(tracking: Tracking, /, *arguments: P.args, **named: P.kwargs) -> T:
        with calls(tracking.uri):
            return function(tracking, *arguments, **named)

    return wrapped


@_translated
def start(tracking: Tracking, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
    """Id of a new run, nested below `parent`. Raises RegistryError where it could keep no artifacts."""
    if not tracking.uri.startswith("http"):
        _require_reach(tracking)
    nested = {PARENT: parent} if parent else {}
    run = tracking.client.create_run(tracking.experiment_id, run_name=name, tags={**tags, **nested})
    return str(run.info.run_id)


def _require_reach(tracking: Tracking) -> None:
    """An experiment that was made through a server may keep artifacts where only that server knows."""
    experiment = tracking.client.get_experiment(tracking.experiment_id)
    if str(experiment.artifact_location).startswith(f"{PROXIED}:"):
        raise RegistryError(
            f"the MLflow server through which experiment {experiment.name} keeps artifacts",
            f"its database alone, at {_shown(tracking.uri)}",
            "start the server (`make up`) and run again, or name another registry.experiment",
        )


@_translated
def finish(tracking: Tracking, run_id: str, status: str = "FINISHED") -> None:
    """End a run as FINISHED or FAILED."""
    tracking.client.set_terminated(run_id, status)


@_translated
def end_abandoned(tracking: Tracking, model: str, known: Collection[str]) -> None:
    """End the runs about a model that nobody will end: those still running that are not among the known ones."""
    running = f"tags.model = '{model}' and attributes.status = 'RUNNING'"
    for run in tracking.client.search_runs([tracking.experiment_id], running):
        if run.info.run_id not in known:
            tracking.client.set_terminated(run.info.run_id, "KILLED")


@_translated
def finished(tracking: Tracking, tag: str, value: str) -> str | None:
    """Id of the newest run with this tag that finished; None when there is none."""
    wanted = f"tags.{tag} = '{value}' and attributes.status = 'FINISHED'"
    runs = tracking.client.search_runs([tracking.experiment_id], wanted, max_results=1)  # newest first
    return str(runs[0].info.run_id) if runs else None


@_translated
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


@_translated
def keep(tracking: Tracking, run_id: str, files: Mapping[str, str]) -> None:
    """Save texts as artifacts of a run: {path in the run: content}."""
    for path, content in files.items():
        tracking.client.log_text(run_id, content, path)


@_translated
def kept(tracking: Tracking, run_id: str, path: str) -> str | None:
    """A text that was saved as an artifact of a run; None when it has none at this path."""
    folder = path.rpartition("/")[0] or None
    if path not in {item.path for item in tracking.client.list_artifacts(run_id, folder)}:
        return None
    with tempfile.TemporaryDirectory() as target:
        return Path(tracking.client.download_artifacts(run_id, path, target)).read_text(encoding="utf-8")


@_translated
def keep_image(tracking: Tracking, run_id: str, content: bytes, path: str) -> None:
    """Save a picture, as it would lie in a file, as an artifact of a run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.rpartition("/")[2]
        file.write_bytes(content)
        tracking.client.log_artifact(run_id, str(file), path.rpartition("/")[0] or None)


@_translated
def keep_table(tracking: Tracking, run_id: str, rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Save rows of equal keys as a table that the run's page shows, in place of an earlier one."""
    content = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
    tracking.client.log_text(run_id, json.dumps(content), path)
    shown = json.dumps([{"path": path, "type": "table"}])
    tracking.client.set_tag(run_id, "mlflow.loggedArtifacts", shown)


@_translated
def keep_history(
    tracking: Tracking, run_id: str, history: Sequence[Mapping[str, float]], always: str = "validation_log_loss"
) -> None:
    """Log the metrics of every epoch that the run does not hold yet, in one request. always: one that each has."""
    from mlflow.entities import Metric

    there = {point.step for point in tracking.client.get_metric_history(run_id, always)}
    now = int(time.time() * 1000)
    missing = [
        Metric(name, float(value), now, int(epoch["step"]))
        for epoch in history
        if int(epoch["step"]) not in there
        for name, value in epoch.items()
        if name not in ("epoch", "step")
    ]
    if missing:
        tracking.client.log_batch(run_id, missing)


def keep_failure(tracking: Tracking, run_id: str, reason: str = "") -> None:
    """End a run as FAILED. Its own failure is logged, not raised: it must not hide the one that is being handled."""
    try:
        record(tracking, run_id, tags={"reason": reason[:5000]})
        finish(tracking, run_id, "FAILED")
    except RegistryError as error:
        log.warning("run %s could not be marked as failed: %s", run_id, error)


def _key(name: str) -> str:
    """MLflow allows few characters in names of metrics; labels may hold any."""
    return "".join(sign if sign.isalnum() or sign in "_-./ :" else "_" for sign in name)


def pages(search: Callable[..., Any], **what: Any) -> Iterator[Any]:
    """Everything that a search of MLflow's client finds, page by page."""
    token = None
    while True:
        page = search(**what, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


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
        try:
            with calls(uri):
                return cls(Tracking(load_mlflow(uri).MlflowClient(uri), uri, ""), run_id)
        except RegistryError as error:
            log.warning("metrics go to the bundle only: %s", error)
            return None

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            record(self._tracking, self._run_id, metrics, step=step)
        except RegistryError as error:
            log.warning("metrics of step %d did not reach MLflow, the flow sends them at the end: %s", step, error)
