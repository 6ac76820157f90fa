"""Everything in prefect.yaml deployed on the tests' Prefect server, with a worker for the pool `local`."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse

from infra import pools

HOME = Path(__file__).parent.parent.parent
PATIENCE_S = 300

Prefect = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="package")
def client(servers: dict[str, str]) -> Iterator[SyncPrefectClient]:
    """Of a server with the pools that `make up` makes."""
    with get_client(sync_client=True) as client:
        for name, template in pools.templates().items():
            pool = WorkPoolCreate.model_validate(
                {"name": name, "type": pools.TYPES[name], "base_job_template": json.loads(template)}
            )
            client.create_work_pool(pool)
        yield client


@pytest.fixture(scope="package")
def environment(servers: dict[str, str]) -> dict[str, str]:
    there = {**os.environ, **servers, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    there.pop("TRAIN_ON", None)
    return there


@pytest.fixture(scope="package")
def deployed(client: SyncPrefectClient, environment: dict[str, str]) -> dict[str, DeploymentResponse]:
    """All deployments by name, made in a terminal where nobody answers questions."""
    assert deploy(environment) == 0
    return {
        f"{client.read_flow(each.flow_id).name}/{each.name}": each
        for each in client.read_deployments()
        if each.entrypoint
    }


def deploy(environment: dict[str, str]) -> int:
    """`prefect deploy --all` with a terminal for input and output, to the end of its output."""
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "prefect", "deploy", "--all"]
    process = subprocess.Popen(command, cwd=HOME, env=environment, stdin=end, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that the other side is gone
        while block := os.read(terminal, 65_536):
            shown += block
            if b"[y/n]" in shown:
                process.kill()
    os.close(terminal)
    assert b"[y/n]" not in shown, "it asks a question"
    return process.wait(PATIENCE_S)


@pytest.fixture(scope="package")
def worker(
    deployed: dict[str, DeploymentResponse], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Works for the pool `local`."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local"]
    with (tmp_path_factory.mktemp("worker") / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd="/")
    yield
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="package")
def run(worker: None, environment: dict[str, str]) -> Prefect:
    """`prefect deployment run … --watch`."""

    def start(deployment: str, *parameters: str) -> subprocess.CompletedProcess[str]:
        options = [word for each in parameters for word in ("-p", each)]
        command = ["deployment", "run", deployment, *options, "--watch", "--watch-interval", "1"]
        return subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *command],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=HOME,
        )

    return start


def newest(client: SyncPrefectClient, deployment: DeploymentResponse) -> FlowRun:
    """The run of a deployment that was made last, not counting those that its schedule has in store."""
    found = [run for run in client.read_flow_runs() if run.deployment_id == deployment.id and not run.auto_scheduled]
    return max(found, key=lambda run: str(run.created))


def message(run: FlowRun) -> str:
    assert run.state is not None
    return str(run.state.message)


def until_ended(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    deadline = time.monotonic() + PATIENCE_S
    while (run := client.read_flow_run(run.id)).state is None or not run.state.is_final():
        assert time.monotonic() < deadline, f"still {run.state}"
        time.sleep(0.5)
    return run
