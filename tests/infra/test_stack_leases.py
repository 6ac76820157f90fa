"""Who holds a slot of a limit outlives the Prefect server, and nobody who was killed holds one for ever."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra import credentials, health, parts, ports, processes
from infra.folder import identity
from tests.infra.test_stack import bare, until

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("stack")]

HOLD = "import flows; from flows.turns import alone\nwith alone('m'): print('held', flush=True); input()"
TAKE = "import flows; from flows.turns import alone\nwith alone('m'): print('held')"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "stack"
    made.mkdir()
    numbers = dict(zip(("s3", "mlflow", "prefect"), ports.free_ports(3), strict=True))
    (made / "ports.json").write_text(json.dumps(numbers))
    return made


@contextlib.contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """The stack's Prefect server, killed at the end; what its clients need."""
    mark = {processes.MARK: identity(folder), processes.PART: "prefect", "ADAPTERLINE_STACK": str(folder)}
    port, login = json.loads((folder / "ports.json").read_text())["prefect"], credentials.read(folder)
    with (folder / "prefect.log").open("a") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "infra.parts", "prefect"],
            env={**os.environ, **mark}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        until(lambda: health.prefect(port, login), "the server answers")
        auth = login["PREFECT_API_AUTH_STRING"]
        yield {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_API_AUTH_STRING": auth}
    finally:
        started.kill()
        started.wait()


def take(place: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Hold the model `m` for a moment."""
    environment = {**bare(place), **variables}
    return subprocess.run(
        [sys.executable, "-c", TAKE], cwd=place, env=environment, capture_output=True, text=True, check=False
    )


def hold_and_be_killed(place: Path, variables: dict[str, str]) -> None:
    """Hold the model `m`, and be killed with all that was started for it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=place, env={**bare(place), **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for process in (*psutil.Process(holder.pid).children(recursive=True), psutil.Process(holder.pid)):
            process.send_signal(signal.SIGKILL)


def expire(leases: Path) -> None:
    """As if the time of all leases had passed."""
    past = "2020-01-01T00:00:00+00:00"
    for file in leases.glob("*.json"):
        content = json.loads(file.read_text())
        content = {**content, "expiration": past} if "expiration" in content else dict.fromkeys(content, past)
        file.write_text(json.dumps(content))


@pytest.mark.fault("kill -9 of a retrain and of the Prefect server", "the model is free for the next run")
def test_a_model_is_free_again_after_its_run_and_the_server_were_killed(folder: Path) -> None:
    leases = folder / "prefect" / parts.LEASES_FOLDER
    with server(folder) as variables:
        hold_and_be_killed(folder, variables)
    with server(folder) as variables:
        refused = take(folder, variables)
    expire(leases)
    # It was killed while it wrote the index, and its number is another process's by now.
    (leases / "expirations.lock").write_text(str(os.getpid()))
    with server(folder) as variables:
        until(lambda: take(folder, variables).returncode == 0, "the model is free")
    assert "ModelBusy" in refused.stderr, refused.stderr


@pytest.mark.fault("kill -9 of a retrain by hand", "the model is free for the next run")
def test_a_model_is_free_again_after_a_run_without_a_server_of_its_own_was_killed(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "ADAPTERLINE_STACK": str(tmp_path / "stack")}
    hold_and_be_killed(tmp_path, home)
    refused = take(tmp_path, home)
    expire(tmp_path / "home" / parts.LEASES_FOLDER)
    taken = take(tmp_path, home)
    assert "ModelBusy" in refused.stderr, refused.stderr
    assert taken.stdout == "held\n", taken.stderr


SETTLE = """
import json, pathlib, sys
from prefect import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate as Update
from infra import pools
with get_client(sync_client=True) as client:
    for name in ("gpu", "retrain-m", "mine"):
        client.upsert_global_concurrency_limit_by_name(name, 2)
        client.update_global_concurrency_limit(name, Update(active_slots=2))
    held = client.read_global_concurrency_limit_by_name("gpu").id
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    (folder / "lease.json").write_text(json.dumps({"resource_ids": [str(held)], "metadata": {"slots": 1}}))
    (folder / "expirations.json").write_text("{}")
    pools.settle(client, {"living": [], "settle": ["local"]})
    print({limit.name: limit.active_slots for limit in client.read_global_concurrency_limits()})
"""


def test_slots_that_no_lease_holds_are_freed_and_no_others(folder: Path) -> None:
    with server(folder) as variables:
        home = parts.prefect_home(folder)
        done = subprocess.run(
            [sys.executable, "-c", SETTLE, str(folder / "prefect" / parts.LEASES_FOLDER)],
            env={**bare(folder), **variables, **home}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.stdout == "{'gpu': 1, 'mine': 2, 'retrain-m': 0}\n", done.stderr
