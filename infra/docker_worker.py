"""The worker of the `docker` pool: Prefect's own, which also removes what it started.

    python -m infra.docker_worker --pool docker

Prefect's worker leaves ended containers behind, or with `auto_remove` never learns how they ended. This one reads how a
container ended, tells the memory limit from a kill, and then removes it. Runs whose container ended while no worker
was watching are settled at the next look. Addresses and keys of the servers pass from the worker's own environment into
the container, so that no secret stands in a work pool, a deployment or a parameter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import sys
import warnings
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
from docker.errors import APIError, DockerException, NotFound
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Crashed
from prefect.utilities.processutils import setup_signal_handlers_worker
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration, DockerWorkerResult
from requests import RequestException

if TYPE_CHECKING:
    from docker.models.containers import Container
    from prefect.client.schemas.objects import FlowRun, State

RUN_LABEL = "io.prefect.flow-run-id"
STACK_LABEL = "adapterline.stack"
STACK_VARIABLE = "ADAPTERLINE_STACK_ID"
PASSED_ON = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)
ENDED = ("created", "exited", "dead")
# One that was created and never started is removed when it is older than this: another worker may be about to start it.
STARTS_WITHIN = timedelta(minutes=1)
# What is raised while the engine or the Prefect server is away.
AWAY = (DockerException, RequestException, PrefectHTTPStatusError, httpx.TransportError)
# How often to look for containers whose run nobody watches, s.
LOOK_S = 5.0


class Configuration(DockerWorkerJobConfiguration):
    """Of one container."""

    def prepare_for_flow_run(self, *arguments: Any, **named: Any) -> None:
        super().prepare_for_flow_run(*arguments, **named)
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self.env = {**passed, **self.env}  # type: ignore[has-type]  # Prefect is not typed for us
        self.labels[STACK_LABEL] = os.environ.get(STACK_VARIABLE, "")


# That it takes the place of Prefect's own is meant.
warnings.filterwarnings("ignore", message="Type 'RemovingWorker'")


class RemovingWorker(DockerWorker):
    """Runs each flow run in a container, and leaves no container behind."""

    type = "docker"
    job_configuration = Configuration

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._watched: set[str] = set()

    async def run(
        self, flow_run: FlowRun, configuration: DockerWorkerJobConfiguration, task_status: Any = None
    ) -> DockerWorkerResult:
        """Run to the end of the container. Raises what Docker says when it cannot be started, or watched to its end:
        then it runs on, and `look` settles it.
        """
        self._watched.add(str(flow_run.id))
        try:
            return await super().run(flow_run, configuration, task_status)
        finally:
            try:
                for container in await asyncio.to_thread(self._ended, flow_run.id):
                    await self._settle(container)
            except AWAY as error:
                self._logger.warning("run %s is settled later: %s", flow_run.id, error)
            finally:
                self._watched.discard(str(flow_run.id))

    async def look(self) -> None:
        """Settle, again and again, what ended while nobody watched: its worker was killed, or the engine restarted."""
        while True:
            try:
                await self.look_once()
            except AWAY as error:
                self._logger.warning("engine or server away (%s), looking again", type(error).__name__)
            await asyncio.sleep(LOOK_S)

    async def look_once(self) -> None:
        """Settle what ended by now. Raises one of AWAY."""
        for container in await asyncio.to_thread(self._ended, None):
            if container.labels[RUN_LABEL] not in self._watched and not _about_to_start(container):
                await self._settle(container)

    def _ended(self, run: UUID | None) -> list[Container]:
        """Ended containers of one run, or of all runs of this stack. Raises DockerException or RequestException."""
        labels = [RUN_LABEL if run is None else f"{RUN_LABEL}={run}"]
        if run is None:
            labels.append(f"{STACK_LABEL}={os.environ.get(STACK_VARIABLE, '')}")
        try:
            client = self._get_client()
        except RuntimeError as error:  # Prefect's, in place of Docker's
            raise DockerException(str(error)) from error
        with contextlib.closing(client):
            found: list[Container] = client.containers.list(all=True, filters={"label": labels}, ignore_removed=True)
            return [container for container in found if container.status in ENDED]

    async def _settle(self, container: Container) -> None:
        """Tell the run how its container ended, unless the run knows better; then remove the container."""
        ended = container.attrs["State"]
        if container.status != "created" and (ended["OOMKilled"] or ended["ExitCode"] != 0):
            await self._tell(UUID(container.labels[RUN_LABEL]), container)
        await asyncio.to_thread(self._remove, container)

    async def _tell(self, run_id: UUID, container: Container) -> None:
        try:
            run = await self.client.read_flow_run(run_id)
        except ObjectNotFound:
            return
        # A process inside that was killed for want of memory is reported as killed: only the engine knows of the limit.
        unclear = run.state is None or run.state.is_crashed() or not run.state.is_final()
        if unclear:
            cancelled = run.state is not None and run.state.is_cancelling()
            how: State[None] = Cancelled() if cancelled else Crashed(message=_ending(container))
            await self.client.set_flow_run_state(run.id, how, force=True)

    def _remove(self, container: Container) -> None:
        try:
            # Not by force, unless it is half removed: what began to run meanwhile stays.
            container.remove(v=True, force=container.status == "dead")
        except NotFound:
            return
        except APIError as error:
            self._logger.warning("container %s could not be removed: %s", container.name, error)


def _about_to_start(container: Container) -> bool:
    age = datetime.now(UTC) - datetime.fromisoformat(container.attrs["Created"])
    return container.status == "created" and age < STARTS_WITHIN


def _ending(container: Container) -> str:
    """How a container ended, in words."""
    state, limit = container.attrs["State"], container.attrs["HostConfig"]["Memory"]
    if state["OOMKilled"]:
        return f"OutOfMemory: the container reached its memory limit of {limit / 1e9:.1f} GB"
    return f"Killed: the container ended with status {state['ExitCode']}"


async def serve(pool: str) -> None:
    """Work for a pool until interrupted. Ends, too, when looking does: whoever started the worker starts it again."""
    name = f"{pool} on {socket.gethostname()}"
    if not os.environ.get(STACK_VARIABLE):  # started by hand: it must not settle what is another's
        os.environ[STACK_VARIABLE] = name
    worker = RemovingWorker(work_pool_name=pool, name=name)
    setup_signal_handlers_worker(os.getpid(), "the worker", print)
    async with asyncio.TaskGroup() as group:
        looking = group.create_task(_looking(worker))
        await worker.start(with_healthcheck=bool(os.environ.get("PREFECT_WORKER_WEBSERVER_PORT")))
        looking.cancel()


async def _looking(worker: RemovingWorker) -> None:
    while not worker.is_setup:
        await asyncio.sleep(0.5)
    await worker.look()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.docker_worker", description="Run flow runs in containers.")
    parser.add_argument("--pool", default="docker")
    options = parser.parse_args(arguments)
    asyncio.run(serve(options.pool))
    return 0


if __name__ == "__main__":
    sys.exit(main())
