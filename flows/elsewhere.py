"""Jobs in a Prefect deployment: started, followed, ended with the flow.

What travels is small: the spec goes to the store, the deployment gets its URI and digest, and what comes back is the
bundle at its URI, the child run's log and state, and the pulse.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx

from components import digest, errors, storage
from components.config import ComputeConfig
from components.errors import ComputeError, JobCancelled, JobKilled, TrainingError
from components.registry import bundle
from components.training import progress
from components.training.spec import JobSpec
from flows import jobs
from flows.pulse import SILENCE_S, Listener

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

POLL_S = 2.0
# A worker is thought away when its pool has not been ready for so long, and the job has not begun.
UNATTENDED_S = 60.0
# How long a cancelled job may take to end before the flow leaves without it.
CANCEL_S = 60.0
# How long the Prefect server may be away while a job goes on.
AWAY_S = 900.0

log = logging.getLogger("adapterline")


def follow(
    spec: JobSpec, out: Path, store: str, mlflow_run: str, compute: ComputeConfig, report: Callable[[Any], None]
) -> None:
    """Run one job in `compute.deployment` to its end and bring its bundle to the folder `out`.

    Raises ComputeError when there is nothing to run it or that refuses it, JobKilled when its process, container or pod
    was killed, JobCancelled, and TrainingError with the job's own line. When this process is interrupted the job is
    cancelled with it.
    """
    from prefect import get_client

    there = storage.join(store, "jobs", out.name)
    if not storage.exists(storage.join(there, bundle.MANIFEST)):
        with get_client(sync_client=True) as client:
            run = _running(client, spec, compute) or _start(client, spec, there, mlflow_run, compute)
            _attend(client, spec, run, there, report)
    shutil.rmtree(out / bundle.CHECKPOINT, ignore_errors=True)  # of this job, interrupted when it ran here
    storage.download_folder(there, out, last=bundle.MANIFEST)


def tag(spec: JobSpec) -> str:
    """Marks the runs of one job."""
    return f"job:{spec.digest[:16]}"


def _start(client: SyncPrefectClient, spec: JobSpec, out: str, mlflow_run: str, compute: ComputeConfig) -> FlowRun:
    from prefect.deployments import run_deployment
    from prefect.exceptions import ObjectNotFound

    name = str(compute.deployment)
    try:
        client.read_deployment_by_name(name)
    except ObjectNotFound:
        raise ComputeError(f"deployment {name}", "none of that name", "make it with `prefect deploy --all`") from None
    jobs.require_flow(spec)
    content, uri = spec.model_dump_json(indent=2).encode(), f"{out}.spec.json"
    storage.write(uri, content)
    parameters = {
        "spec": uri,
        "digest": digest.of_bytes(content),
        "out": out,
        "mlflow_run": mlflow_run,
        "timeout_hours": compute.timeout_hours,
    }
    try:
        run: Any = run_deployment(
            name,
            parameters=parameters,
            timeout=0,
            flow_run_name=f"{spec.method}-{spec.digest[:8]}",
            tags=[tag(spec), spec.method],
            job_variables=compute.job_variables,
        )
    except httpx.HTTPStatusError as error:
        if error.response.status_code >= 500:
            raise
        raise ComputeError(
            f"a run of deployment {name} with these compute.job_variables",
            _refusal(error.response),
            "correct that and run again",
        ) from error
    log.info("          %s goes to %s as run %s", spec.method, name, run.name)
    return client.read_flow_run(run.id)


def _refusal(response: httpx.Response) -> str:
    """Why the server would not have it, in its own words."""
    try:
        said = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        said = response.reason_phrase
    return " ".join(str(said).split())[:300]


def _running(client: SyncPrefectClient, spec: JobSpec, compute: ComputeConfig) -> FlowRun | None:
    """A run of this very job that has not ended: a flow before this one was killed and left it, or shares it."""
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
    from prefect.client.schemas.objects import StateType

    alive = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]
    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(
            {"tags": {"all_": [tag(spec)]}, "state": {"type": {"any_": alive}}}
        ),
        deployment_filter=DeploymentFilter.model_validate(
            {"name": {"any_": [str(compute.deployment).partition("/")[2]]}}
        ),
    )
    if found:
        log.info("          %s goes on in run %s", spec.method, found[0].name)
    return found[0] if found else None


def _attend(
    client: SyncPrefectClient, spec: JobSpec, run: FlowRun, out: str, report: Callable[[progress.Event], None]
) -> None:
    """Poll a run until it ends, passing on its progress and its log. A server that restarts is waited for."""
    patience = math.inf  # until when a cancelled run may take to end
    listener, told = Listener(out), 0
    attended = answered = time.monotonic()

    def cancel() -> None:
        nonlocal patience
        patience = min(patience, time.monotonic() + CANCEL_S)
        _cancel(run.id)

    try:
        with jobs.ended_with_flow(cancel):
            while time.monotonic() < patience:
                if event := listener.listen():
                    report(event)
                try:
                    run = _read(client, spec, run)
                    told = _relay(client, spec, run, told)
                    if run.state is not None and run.state.is_final():
                        _hear_out(client, spec, run, told)
                        break
                    if run.state is not None and run.state.is_running():
                        attended = time.monotonic()
                    else:
                        listener.restart()
                        attended = _attended(client, run, attended)
                    answered = time.monotonic()
                except httpx.HTTPError as error:
                    _endure(error, answered)
                    if run.state is None or not run.state.is_running():  # nor can it begin, or its worker be seen
                        listener.restart()
                        attended = time.monotonic()
                if listener.silence > SILENCE_S:
                    _declare_dead(run.id)
                    found = f"none for {SILENCE_S:.0f} s"
                    raise JobKilled(f"signs of life of job {spec.method}", found, "run again: it resumes")
                time.sleep(POLL_S)
    except BaseException:
        cancel()
        raise
    _judge(spec, run)


def _read(client: SyncPrefectClient, spec: JobSpec, run: FlowRun) -> FlowRun:
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_flow_run(run.id)
    except ObjectNotFound:
        where = f"job {spec.method} in run {run.name}"
        raise JobCancelled(f"{where} to finish", "that run was deleted", "run again: it resumes") from None


def _endure(error: httpx.HTTPError, answered: float) -> None:
    """Raise ComputeError when the Prefect server refuses us, or has been away for too long."""
    refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
    if refused or time.monotonic() - answered > AWAY_S:
        found = f"{type(error).__name__} for {time.monotonic() - answered:.0f} s"
        raise ComputeError(
            "a Prefect server that answers", found, "see to it and run again: the job resumes"
        ) from error


def _relay(client: SyncPrefectClient, spec: JobSpec, run: FlowRun, told: int) -> int:
    """Pass on the child's log lines beyond the first `told`; how many there are now."""
    from prefect.client.schemas.filters import LogFilter
    from prefect.client.schemas.sorting import LogSort

    lines = client.read_logs(
        LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}}),
        offset=told,
        limit=200,
        sort=LogSort.TIMESTAMP_ASC,
    )
    for line in lines:
        if line.name.startswith("adapterline") or line.level >= logging.ERROR:
            log.log(line.level, "%s | %s", spec.method, line.message.strip())
    return told + len(lines)


def _hear_out(client: SyncPrefectClient, spec: JobSpec, run: FlowRun, told: int) -> None:
    """Pass on what the log of an ended run still tells: it travels in batches, the last of them behind the state."""
    heard = -1
    while told > heard:
        heard = told
        time.sleep(POLL_S)
        told = _relay(client, spec, run, told)


def _attended(client: SyncPrefectClient, run: FlowRun, since: float) -> float:
    """When the run's pool last had a worker. Raises ComputeError when it has none for too long."""
    from prefect.client.schemas.objects import WorkPoolStatus

    pool = client.read_work_pool(str(run.work_pool_name))
    if pool.status == WorkPoolStatus.READY:
        return time.monotonic()
    if time.monotonic() - since > UNATTENDED_S:
        raise ComputeError(
            f"a worker on work pool {pool.name}",
            f"none ({pool.status})",
            "start one, e.g. with `make up`, and run again",
        )
    return since


def _cancel(run_id: UUID) -> None:
    """Ask for a run to be cancelled. May be called while the flow is being killed: never raises."""
    from prefect import get_client
    from prefect.exceptions import PrefectException
    from prefect.states import Cancelling

    try:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run_id, Cancelling())
    except (PrefectException, httpx.HTTPError) as error:
        log.warning("run %s could not be cancelled: %s", run_id, type(error).__name__)


def _declare_dead(run_id: UUID) -> None:
    """Mark a run as crashed, if the server can be told."""
    from prefect import get_client
    from prefect.states import Crashed

    with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, Crashed(message="no sign of life from the job"), force=True)


def _judge(spec: JobSpec, run: FlowRun) -> None:
    """Raise the error that an ended run stands for; none for one that completed."""
    state = run.state
    if state is not None and state.is_completed():
        return
    where = f"job {spec.method} in run {run.name}"
    if state is None or state.is_cancelled() or not state.is_final():
        raise JobCancelled(f"{where} to finish", "it was cancelled", "run again: it resumes")
    found = (state.message or "no message").strip()
    if state.is_crashed():
        raise _crashed(where, run, found)
    raise errors.from_line(state.name or "", found, TrainingError)


def _crashed(where: str, run: FlowRun, found: str) -> TrainingError:
    """What infrastructure did to a job: it refused it, ran out of memory, or killed it."""
    if run.run_count == 0 and found.startswith("Failed to submit"):  # Prefect's words, also for a watch that broke off
        return ComputeError(f"{where} to start", _in_words(found), "correct that and run again")
    if "OutOfMemory" in found:
        return errors.OutOfMemory(
            f"{where} to fit into memory", found, "raise compute.job_variables memory; it resumes"
        )
    return JobKilled(f"{where} to finish", found, "run again: it resumes")


def _in_words(found: str) -> str:
    """What Docker means by its best-known refusals."""
    if "could not select device driver" in found:
        return "no GPU driver for containers on the worker's machine (Docker could not select a device driver)"
    if "ImageNotFound" in found or "No such image" in found or "pull access denied" in found:
        return f"no such image there ({found})"
    return found
