"""Look for new data and start a retrain when there are enough: look → enough? → start.

    prefect deployment run retrain/on-new-data -p min_new_rows=50 --watch

Cheap while the files of the source stay as they are. Each data set is retrained once, however often this looks:
whether it passed, failed the gate or was refused, a second run on the same rows would say the same. A run that was cut
off said nothing: it crashed, or failed with an error that a retry can help. Then another is started, three in all.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow, get_client, task
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed
from pydantic import Field

from components import config as configs
from components import errors
from components.config import RetrainConfig
from components.data import news
from components.data.news import News
from components.errors import AdapterlineError, ComputeError, ModelBusy
from flows.steps import RETRIED, STEP

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

log = logging.getLogger("adapterline")

# So many runs for the same rows may be cut off; then a person has to look why.
ATTEMPTS = 3
PAGE = 200  # the most runs that Prefect tells of at once


@flow(name="retrain", persist_result=False, flow_run_name="look for new data")
def on_new_data(
    config: RetrainConfig | None = None,
    preset: str | None = None,
    overrides: dict[str, Any] | None = None,
    min_new_rows: Annotated[int, Field(gt=0)] = 100,
    starts: str = "retrain/on-demand",
) -> State[None]:
    """Start deployment `starts` with these parameters when its source holds at least `min_new_rows` new rows,
    or rows that were accepted by a run that was then cut off.

    config, preset, overrides: as of flows/retrain.py.  A row is new when the newest accepted data set of the model has
    no row of that text and label.

    Ends as Waiting, Started, or Tried when these very rows were given to a run before.
    """
    settled = configs.settle(config, preset, overrides or {})
    found = look(settled)
    if found.new_rows < min_new_rows and not (found.accepted and left_over(settled.model, found)):
        return _ended("Waiting", f"{found.new_rows:,} new rows, {min_new_rows:,} wanted")
    given = {"config": config and config.model_dump(mode="json"), "preset": preset, "overrides": overrides or {}}
    return _ended(*start(starts, settled.model, found, given))


@task(**RETRIED, name="look")
def look(config: RetrainConfig) -> News:
    """Count the rows that the newest accepted data set does not hold."""
    return news.look(config.data, config.registry.store, config.model)


@task(**STEP, name="left over")
def left_over(model: str, found: News) -> bool:
    """Were these rows given to runs of which none got to the end?"""
    earlier = _runs_for(_tag(model, found))
    return bool(earlier) and not any(_had_its_turn(run) for run in earlier)


@task(**STEP, name="start")
def start(deployment: str, model: str, found: News, parameters: dict[str, Any]) -> tuple[str, str]:
    """Start a run for these rows, unless one has had them or too many were cut off. How that ended, and why."""
    _require(deployment)
    tag = _tag(model, found)
    earlier = _runs_for(tag)
    if tried := [run for run in earlier if _had_its_turn(run)]:
        return "Tried", f"run {tried[0].name} has had these rows: {_state_of(tried[0])}"
    cut_off = [run for run in earlier if _was_cut_off(run)]
    if len(cut_off) >= ATTEMPTS:
        told = ", ".join(f"{run.name} ({_state_of(run)})" for run in cut_off)
        return "Tried", f"{len(cut_off)} runs with these rows were cut off: {told}; see why, then start {deployment}"
    run: Any = run_deployment(
        deployment,
        parameters=parameters,
        timeout=0,
        as_subflow=False,
        tags=[tag],
        idempotency_key=f"{tag}:{len(earlier)}",  # of two that look at once, one starts the run
    )
    again = f", again after {earlier[-1].name} ({_state_of(earlier[-1])})" if earlier else ""
    return "Started", f"{found.new_rows:,} new rows: run {run.name} of {deployment}{again}"


def _had_its_turn(run: FlowRun) -> bool:
    """Also while it has not ended. A second run on these rows would say the same."""
    return not _was_turned_away(run) and not _was_cut_off(run)


def _was_turned_away(run: FlowRun) -> bool:
    """Before it looked at the rows, because another run held the deployment or the model."""
    unbegun = run.state is not None and run.state.is_cancelled() and run.run_count == 0
    return unbegun or _error_of(run) is ModelBusy


def _was_cut_off(run: FlowRun) -> bool:
    """By what says nothing about the rows: its process was killed, the machine went down, a server did not answer."""
    error = _error_of(run)
    crashed = run.state is not None and run.state.is_crashed()
    return crashed or (error is not None and error.retry_can_help)


def _error_of(run: FlowRun) -> type[AdapterlineError] | None:
    """Our error that the run failed with; Prefect keeps its class as a word of the state's message."""
    if run.state is None or not run.state.is_failed():
        return None
    said = re.search(r"encountered an exception: (\w+):", run.state.message or "")
    kind = getattr(errors, said[1], None) if said else None
    return kind if isinstance(kind, type) and issubclass(kind, AdapterlineError) else None


def _tag(model: str, found: News) -> str:
    """What the runs that were started for these rows are found by."""
    return f"data:{model}:{str(found.data_digest)[:16]}"


def _runs_for(tag: str) -> list[FlowRun]:
    """Oldest first."""
    from prefect.client.schemas.filters import FlowRunFilter

    found: list[FlowRun] = []
    wanted = FlowRunFilter.model_validate({"tags": {"all_": [tag]}})
    with get_client(sync_client=True) as client:
        while page := client.read_flow_runs(flow_run_filter=wanted, limit=PAGE, offset=len(found)):
            found += page
    return sorted(found, key=lambda run: str(run.created))


def _require(deployment: str) -> None:
    try:
        with get_client(sync_client=True) as client:
            client.read_deployment_by_name(deployment)
    except (ObjectNotFound, ValueError):
        raise ComputeError(
            f"deployment {deployment}", "none of that name", "make it with `prefect deploy --all`"
        ) from None


def _state_of(run: FlowRun) -> str:
    return run.state.name or run.state.type.value if run.state else "unknown"


def _ended(name: str, message: str) -> State[None]:
    log.info("%s: %s", name.lower(), message)
    return Completed(name=name, message=message)
