"""One job as its own flow: the face of a process, a container or a pod that trains.

    prefect deployment run train/gpu -p spec=s3://…/job.spec.json -p digest=… -p out=s3://…/job --watch

`retrain` starts it where `compute.deployment` says. Spec, data and bundle travel by URI and digest; how far the job is
lies beside the bundle, in OUT.progress.json.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from components import digest as digests
from components import storage
from components.errors import AdapterlineError, ConfigError
from components.training import spec as specs
from components.training.progress import Event
from components.training.spec import JobSpec
from flows import jobs, screen, turns
from flows.pulse import Pulse


@flow(name="train", persist_result=False)
def train(
    spec: str, digest: str, out: str, mlflow_run: str = "", timeout_hours: float = 12, turn: str | None = None
) -> State[None]:
    """Train one job where this flow runs, and leave its bundle at `out`.

    spec, digest: a job spec (s3:// or file) and the sha256 of its content.  mlflow_run: takes each epoch's metrics.
    turn: a global concurrency limit to wait for, e.g. `gpu`.

    Ends as Failed with the name of the error, so that whoever follows can tell a job that was killed from one that
    cannot succeed.
    """
    try:
        # who waits for a turn is alive
        with Pulse(out) as pulse, turns.turn(turn) if turn else nullcontext(), tempfile.TemporaryDirectory() as folder:
            job = _fetched(spec, digest)
            path = Path(folder) / "spec.json"
            path.write_text(job.model_dump_json())

            def report(event: Event) -> None:
                pulse(event)
                screen.bar(job.method, event)

            jobs.run(job, str(path), out, mlflow_run, os.environ.get("MLFLOW_TRACKING_URI", ""), timeout_hours, report)
    except AdapterlineError as error:
        return Failed(name=type(error).__name__, message=str(error))
    return Completed(message=f"bundle at {out}")


def _fetched(uri: str, digest: str) -> JobSpec:
    """The spec, if it is the one that was meant, with the cores of this place where it names none."""
    content = storage.read(uri)
    found = digests.of_bytes(content)
    if found != digest:
        raise ConfigError(f"job spec {digest[:12]} at {uri}", found[:12], "start the job again from flows/retrain.py")
    job = specs.parse(content)
    if job.limits.threads:
        return job
    limits = job.limits.model_copy(update={"threads": max(1, jobs.cores() // job.limits.processes)})
    return job.model_copy(update={"limits": limits})
