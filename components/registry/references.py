"""What must stay: the keys that registered versions, their history, accepted data and running jobs name.

    bundle:DIGEST  split:DIGEST  test rows:DIGEST  rows:DIGEST  base:DIGEST  job:DIGEST[:16]  report:DIGEST[:16]
    baseline:SPLIT  recorded:BUNDLE  run:ID  logged model:ID

An answer that cannot be had is an error: nothing may be taken for unreferred because somebody did not answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components import base_model, storage
from components.data import ledger, vader
from components.registry import history
from components.registry.tracking import PARENT, calls, load_mlflow, pages

RECORD = re.compile(rf"^([^/]+)/{ledger.NAME}$")
RUN_ID, MODEL_ID = re.compile(r"\b[0-9a-f]{32}\b"), re.compile(r"\bm-[0-9a-f]{32}\b")
# Begins the tags of a sweep's run that list its jobs, DIGEST[:16] each: their own runs begin when all are trained.
JOBS = "jobs_"
ALIVE = ("RUNNING", "SCHEDULED")
# A retrain has two jobs, one after the other at worst, of which each is tried three times; and a day for the rest.
# A run that says for longer that it is running was killed.
TRIES, REST_S = 6, 86_400


@dataclass(frozen=True)
class Version:
    """A registered version, under an alias or not."""

    name: str
    number: str
    source: str
    run_id: str
    tags: Mapping[str, str]
    model_id: str = ""

    @property
    def model_ids(self) -> list[str]:
        """The logged models it may be loaded from. A copy of another version names that as its source."""
        return [*MODEL_ID.findall(self.source), *([self.model_id] if self.model_id else [])]


@dataclass(frozen=True)
class Run:
    """A run that MLflow has, deleted ones too. started: s since 1970.  timeout_hours: of a flow's jobs.
    experiment: its id.
    """

    id: str
    deleted: bool
    status: str
    started: float
    tags: Mapping[str, str]
    timeout_hours: float | None = None
    experiment: str = ""

    def lives(self, now: float) -> bool:
        if self.deleted or self.status not in ALIVE:
            return False
        return self.timeout_hours is None or now - self.started < TRIES * self.timeout_hours * 3600 + REST_S


@dataclass(frozen=True)
class Experiment:
    """created: ms since 1970, as MLflow keeps it."""

    id: str
    name: str
    location: str
    created: int


@dataclass(frozen=True)
class Registry:
    """What one MLflow knows. models: those that are not deleted, by id, with the ids of their runs."""

    experiments: Sequence[Experiment]
    versions: Sequence[Version]
    runs: Mapping[str, Run]
    models: Mapping[str, str]


def ask(uri: str, models: Iterable[str] = ()) -> Registry:
    """Everything that MLflow knows. models: names of which it must say itself whether they are there.

    Raises RegistryError when it refuses, as it does where the user may not read a model: a search would just leave it
    out.
    """
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

    client = load_mlflow(uri).MlflowClient(uri)
    with calls(uri):
        for name in models:
            try:
                client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        found = list(pages(client.search_experiments, view_type=ViewType.ALL))
        places = [each.experiment_id for each in found]
        runs = pages(client.search_runs, experiment_ids=places, run_view_type=ViewType.ALL) if places else ()
        logged = pages(client.search_logged_models, experiment_ids=places) if places else ()
        return Registry(
            [Experiment(e.experiment_id, e.name, e.artifact_location, int(e.creation_time or 0)) for e in found],
            [
                Version(v.name, str(v.version), v.source or "", v.run_id or "", dict(v.tags), v.model_id or "")
                for v in pages(client.search_model_versions)
            ],
            {run.info.run_id: _run(run) for run in runs},
            {model.model_id: model.source_run_id or "" for model in logged},
        )


def _run(run: Any) -> Run:
    hours = run.data.params.get("compute.timeout_hours")
    info = run.info
    return Run(
        info.run_id,
        info.lifecycle_stage == "deleted",
        info.status,
        (info.start_time or 0) / 1000,
        run.data.tags,
        float(hours) if hours else None,
        info.experiment_id,
    )


def is_gone(uri: str, key: str) -> bool:
    """Does MLflow say of this very run or logged model that it has none such?"""
    from mlflow.exceptions import MlflowException

    client = load_mlflow(uri).MlflowClient(uri)
    kind, _, name = key.partition(":")
    with calls(uri):
        try:
            (client.get_run if kind == "run" else client.get_logged_model)(name)
        except MlflowException as error:
            return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")
    return False


def accepted(store: str) -> dict[str, list[ledger.Record]]:
    """The accepted data sets of every model, oldest first."""
    names = storage.names(storage.join(store, "data"))  # where there may be data of a user's, too
    models = sorted({match[1] for name in names if (match := RECORD.match(name))})
    return {model: ledger.records(store, model) for model in models}


def promotions(store: str) -> dict[str, list[history.Record]]:
    """The history of every model, oldest first. Raises HistoryError when a record is missing or was changed."""
    return {model: history.records(store, model) for model in history.models(store)}


def roots(
    registry: Registry,
    data: Iterable[Sequence[ledger.Record]],
    promoted: Iterable[Sequence[history.Record]],
    now: float,
) -> frozenset[str]:
    """The keys that are referred to from outside of the things themselves. now: s since 1970."""
    return frozenset().union(
        *(_of_version(version) for version in registry.versions),
        *(_of_data(records) for records in data),
        *(_of_promotion(each) for records in promoted for each in records),
        _of_runs(registry, now),
        _of_code(),
    )


def _of_version(version: Version) -> set[str]:
    tags = version.tags
    named = {
        "bundle": tags.get("bundle_digest"),
        "recorded": tags.get("bundle_digest"),
        "split": tags.get("split_digest"),
        "rows": tags.get("data_digest"),
        "base": tags.get("base_weights_sha256"),
        "report": tags.get("run_digest", "")[:16],
        "run": tags.get("gate_run"),
    }
    keys = {f"{kind}:{name}" for kind, name in named.items() if name}
    keys |= {f"run:{run}" for run in (version.run_id, *RUN_ID.findall(version.source)) if run}
    if uri := tags.get("split_uri"):
        keys.add(f"split:{uri.rstrip('/').rpartition('/')[2]}")
    return keys | {f"logged model:{name}" for name in version.model_ids}


def _of_data(records: Sequence[ledger.Record]) -> set[str]:
    """Every split stays; the next retrain can use a baseline on the newest."""
    keys = {f"split:{record.split_digest}" for record in records}
    keys |= {f"split:{record.split_uri.rstrip('/').rpartition('/')[2]}" for record in records}
    keys |= {f"test rows:{record.frozen_digest}" for record in records}
    return keys | {f"baseline:{record.split_digest}" for record in records[-1:]}


def _of_promotion(record: history.Record) -> set[str]:
    keys = {f"{kind}:{record.bundle_digest}" for kind in ("bundle", "recorded") if record.bundle_digest}
    return keys | ({f"run:{record.run}"} if record.run else set())


def _of_runs(registry: Registry, now: float) -> set[str]:
    """What MLflow's runs are there to show, and what those that run are at work on."""
    keys = {f"run:{run.id}" for run in registry.runs.values() if not run.deleted}
    for run in registry.runs.values():
        parent = registry.runs.get(run.tags.get(PARENT, ""))
        if (run if parent is None else parent).lives(now):
            named = {"job": "job_digest", "report": "run_digest"}
            keys |= {f"{kind}:{run.tags[tag][:16]}" for kind, tag in named.items() if tag in run.tags}
            keys |= {f"job:{job}" for tag in run.tags if tag.startswith(JOBS) for job in run.tags[tag].split()}
            keys |= {f"rows:{run.tags['data_digest']}"} if "data_digest" in run.tags else set()
            keys |= {f"logged model:{model}" for model, source in registry.models.items() if source == run.id}
    return keys


def _of_code() -> set[str]:
    """What this code fetches by its pins."""
    embedded = base_model.EMBEDDED
    keys = {f"embedded:{name}-{archive.sha256[:12]}" for name, (archive, _) in embedded.items()}
    archives = (vader.ARCHIVE, *(archive for archive, _ in embedded.values()))
    return keys | {f"archive:{archive.filename}" for archive in archives}
