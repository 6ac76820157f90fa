"""Look for new data and start a retrain when there are enough: look → enough? → start.

    prefect deployment run retrain/on-new-data -p min_new_rows=50 --watch

Cheap while the files of the source stay as they are. Each data set is retrained once, however often this looks:
whether it passed, failed the gate or was refused, a second run on the same rows would say the same.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow, get_client, task
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed
from pydantic import Field

from components import config as configs
from components.config import RetrainConfig
from components.data import news
from components.data.news import News
from components.errors import ComputeError, ModelBusy
from flows.steps import RETRIED, STEP

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

log = logging.getLogger("adapterline")


@flow(name="retrain", persist_result=False, flow_run_name="look for new data")
def on_new_data(
    config: RetrainConfig | None = None,
    preset: str | None = None,
    overrides: dict[str, Any] | None = None,
    min_new_rows: Annotated[int, Field(gt=0)] = 100,
    starts: str = "retrain/nightly",
) -> State[None]:
    """Start deployment `starts` with these parameters when its source holds at least `min_new_rows` new rows.

    config, preset, overrides: as of flows/retrain.py.  A row is new when the newest accepted data set of the model has
    no row of that text and label.

    Ends as Waiting, Started, or Tried when these very rows were given to a run before.
    """
    settled = configs.settle(config, preset, overrides or {})
    found = look(settled)
    if found.new_rows < min_new_rows:
        return _ended("Waiting", f"{found.new_rows:,} new rows, {min_new_rows:,} wanted")
    given = {"config": config and config.model_dump(mode="json"), "preset": preset, "overrides": overrides or {}}
    return _ended(*start(starts, settled.model, found, given))


@task(**RETRIED, name="look")
def look(config: RetrainConfig) -> News:
    """Count the rows that the newest accepted data set does not hold."""
    return news.look(config.data, config.registry.store, config.model)


@task(**STEP, name="start")
def start(deployment: str, model: str, found: News, parameters: dict[str, Any]) -> tuple[str, str]:
    """Start a run for these rows, unless one has had them, or the deployment is busy. How that ended, and why."""
    tag = f"data:{model}:{str(found.data_digest)[:16]}"
    with get_client(sync_client=True) as client:
        _require(client, deployment)
        earlier = _runs(client, {"tags": {"all_": [tag]}})
        if tried := [run for run in earlier if _had_its_turn(run)]:
            return "Tried", f"run {tried[0].name} has had these rows: {_state_of(tried[0])}"
        alive = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
        if busy := _runs(client, alive, {"name": {"any_": [deployment.partition("/")[2]]}}):
            return "Waiting", f"{found.new_rows:,} new rows, until run {busy[0].name} of {deployment} has ended"
    run: Any = run_deployment(
        deployment,
        parameters=parameters,
        timeout=0,
        as_subflow=False,
        tags=[tag],
        idempotency_key=f"{tag}:{len(earlier)}",  # of two that look at once, one starts the run
    )
    return "Started", f"{found.new_rows:,} new rows: run {run.name} of {deployment}"


def _had_its_turn(run: FlowRun) -> bool:
    """Not if the run was turned away before it looked at the rows, because another held the deployment or the model."""
    state = run.state
    if state is None or not state.is_final():
        return True
    turned_away = state.is_cancelled() and run.run_count == 0
    return not turned_away and not (state.is_failed() and ModelBusy.__name__ in (state.message or ""))


def _require(client: SyncPrefectClient, deployment: str) -> None:
    try:
        client.read_deployment_by_name(deployment)
    except (ObjectNotFound, ValueError):
        raise ComputeError(
            f"deployment {deployment}", "none of that name", "make it with `prefect deploy --all`"
        ) from None


def _runs(client: SyncPrefectClient, which: dict[str, Any], of: dict[str, Any] | None = None) -> list[FlowRun]:
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter

    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(which),
        deployment_filter=DeploymentFilter.model_validate(of) if of else None,
    )


def _state_of(run: FlowRun) -> str:
    return run.state.name or run.state.type.value if run.state else "unknown"


def _ended(name: str, message: str) -> State[None]:
    log.info("%s: %s", name.lower(), message)
    return Completed(name=name, message=message)
