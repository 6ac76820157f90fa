"""The supervised stack with its real servers: one is brought up for all tests of this file, which run in this order."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from components import storage
from infra import credentials, health, local, parts, processes, supervision
from infra.folder import identity

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("stack")]

OBJECT = f"s3://{local.BUCKET}/kept"
PATIENCE_S = 120.0
FLOW = """
import os, pathlib, time
from prefect import flow

@flow
def sleepy(name: str):
    pathlib.Path(name).write_text(os.environ["PREFECT__FLOW_RUN_ID"])
    time.sleep(600)
"""


@dataclass(frozen=True)
class Place:
    """A stack's folder, the folder that its commands run in, and what the first `up` said on a full disk, if tried."""

    folder: Path
    checkout: Path
    refused: subprocess.CompletedProcess[str] | None
    said: str

    def run(self, verb: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return stack_command(verb, self.folder, self.checkout, **variables)

    def prefect(self, *arguments: str) -> str:
        """The `prefect` command as a person types it: nothing exported."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(
            command, cwd=self.checkout, env=bare(self.checkout), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, body: object = None) -> Any:
        """One call of the Prefect API."""
        login = credentials.read(self.folder)["PREFECT_API_AUTH_STRING"]
        status, content = health.ask(supervision.ports(self.folder)["prefect"], f"/api/{path}", login, body)
        assert status == 200, (path, status, content)
        return content

    @property
    def processes(self) -> list[processes.Marked]:
        return processes.marked(identity(self.folder))

    def secrets(self) -> list[str]:
        known = credentials.read(self.folder)
        return [part for name in credentials.SECRET for part in known[name].split(":") if part != credentials.USER]


def bare(home: Path) -> dict[str, str]:
    """The environment without what earlier tests or the caller's shell set for these servers."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "AWS_", "ADAPTERLINE_"))
    }
    return {**kept, "PREFECT_HOME": str(home / "home"), "KUBECONFIG": str(home / "none")}


def stack_command(verb: str, folder: Path, directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.local", "--folder", str(folder), verb],
        cwd=directory,
        env={**bare(directory), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Brought up in a file system that was too small at first, where one may be mounted."""
    checkout = tmp_path_factory.mktemp("checkout")
    folder = checkout / "stack"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)],  # noqa: S607
        check=False,
        capture_output=True,
    )
    mounted, refused = mount.returncode == 0, None
    try:
        if mounted:
            refused = stack_command("up", folder, checkout)
            subprocess.run(["mount", "-o", "remount,size=4g", str(folder)], check=True)  # noqa: S607
        first = stack_command("up", folder, checkout)
        assert first.returncode == 0, first.stderr
        yield Place(folder, checkout, refused, first.stdout + first.stderr)
    finally:
        stack_command("down", folder, checkout)
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607


@pytest.fixture(scope="module")
def runs(place: Place) -> dict[str, psutil.Process]:
    """Two flow runs that the worker of the local pool started, by name, while they sleep."""
    (place.checkout / "sleepy.py").write_text(FLOW)
    place.prefect("deploy", "sleepy.py:sleepy", "--name", "test", "--pool", "local")
    for name in ("one", "two"):
        place.prefect("deployment", "run", "sleepy/test", "--param", f"name={name}")
    until(lambda: all((place.checkout / name).exists() for name in ("one", "two")), "the worker takes both runs")
    by_run = {each.run: each.process for each in place.processes if each.run}
    return {name: by_run[run_of(place, name)] for name in ("one", "two")}


def run_of(place: Place, name: str) -> str:
    return (place.checkout / name).read_text()


@pytest.mark.fault("disk full when the stack starts", "one line, nothing runs")
def test_a_full_disk_is_told_in_one_line(place: Place) -> None:
    if place.refused is None:
        pytest.skip("this user may not mount a small file system")
    assert place.refused.returncode == 1
    assert place.refused.stderr.startswith(f"expected 300 MB free for {place.folder}; found ")
    assert place.refused.stderr.count("\n") == 1


def test_up_shows_where_to_look(place: Place) -> None:
    numbers = supervision.ports(place.folder)
    for name in ("prefect", "mlflow", "s3"):
        assert f"http://127.0.0.1:{numbers[name]}" in place.said
    assert str(place.folder / "credentials.json") in place.said


def test_a_second_up_starts_nothing_again(place: Place) -> None:
    before = {name: state["pid"] for name, state in supervision.states(place.folder).items()}
    assert place.run("up").returncode == 0
    assert {name: state["pid"] for name, state in supervision.states(place.folder).items()} == before


def test_status_is_0_when_all_is_up(place: Place) -> None:
    shown = place.run("status")
    assert (shown.returncode, shown.stderr) == (0, "")


def test_a_worker_that_cannot_work_is_off_and_says_what_it_takes(place: Place) -> None:
    (line,) = [line for line in place.run("status").stdout.splitlines() if line.startswith("worker-k8s")]
    assert "set KUBECONFIG" in line


def test_prefect_knows_the_pools(place: Place) -> None:
    found = {pool["name"]: pool["type"] for pool in place.ask("work_pools/filter", {})}
    assert found.items() >= {"local": "process", "docker": "docker"}.items()


def test_prefect_holds_no_secret(place: Place) -> None:
    kept = [place.ask(kind, {}) for kind in ("block_documents/filter", "variables/filter", "work_pools/filter")]
    assert [secret for secret in place.secrets() if secret in json.dumps(kept)] == []


def test_one_job_at_a_time_has_the_gpu(place: Place) -> None:
    assert place.ask("v2/concurrency_limits/gpu")["limit"] == 1


@pytest.mark.parametrize("path", ["/api/admin/version", "/api/work_pools/local"])
def test_prefect_is_closed_to_strangers(place: Place, path: str) -> None:
    assert health.ask(supervision.ports(place.folder)["prefect"], path)[0] == 401


def test_mlflow_is_closed_to_strangers(place: Place) -> None:
    port = supervision.ports(place.folder)["mlflow"]
    assert health.ask(port, "/api/2.0/mlflow/experiments/get?experiment_id=0")[0] == 401


def test_everything_listens_on_loopback_only(place: Place) -> None:
    listening = {
        connection.laddr.ip
        for each in place.processes
        for connection in each.process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_the_prefect_command_finds_the_server(place: Place) -> None:
    assert "local" in place.prefect("work-pool", "ls")


def test_files_are_for_their_owner_only(place: Place) -> None:
    files = [place.checkout / ".env", *(path for path in place.folder.rglob("*") if path.is_file())]
    open_files = {
        str(path): oct(path.stat().st_mode)
        for path in files
        if stat.S_IMODE(path.stat().st_mode) & 0o077 and not path.is_relative_to(place.folder / "s3")
    }
    assert open_files == {}
    assert stat.S_IMODE((place.folder / "s3").stat().st_mode) == 0o700


def test_no_secret_is_on_a_command_line(place: Place) -> None:
    lines = " ".join(" ".join(each.process.cmdline()) for each in place.processes)
    assert [secret for secret in place.secrets() if secret in lines] == []


def test_no_secret_is_printed_logged_or_configured(place: Place) -> None:
    logs = [path.read_text() for path in (place.folder / "logs").iterdir()]
    texts = [place.said, place.run("status").stdout, (place.folder / "supervisord.conf").read_text(), *logs]
    assert [secret for secret in place.secrets() if any(secret in text for text in texts)] == []


def test_commands_of_the_same_folder_use_it_and_leave_it_up(place: Place) -> None:
    numbers = supervision.ports(place.folder)
    with local.stack(place.folder) as stack:
        assert stack.environment["MLFLOW_TRACKING_URI"] == f"http://127.0.0.1:{numbers['mlflow']}"
        assert stack.environment["PREFECT_API_URL"] == f"http://127.0.0.1:{numbers['prefect']}/api"
    assert health.store(numbers["s3"])


def test_flows_use_its_prefect_server_wherever_they_are_run(place: Place, tmp_path: Path) -> None:
    script = "import flows; from prefect.settings import PREFECT_API_URL as url; print(url.value())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**bare(tmp_path), "ADAPTERLINE_STACK": str(place.folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"http://127.0.0.1:{supervision.ports(place.folder)['prefect']}/api\n", done.stderr


def test_models_and_runs_go_to_the_server_with_its_login(place: Place) -> None:
    with local.stack(place.folder) as stack:
        script = (
            "import mlflow; mlflow.set_experiment('kept')\n"
            "with mlflow.start_run(): mlflow.log_text('text', 'file.txt')\n"
            "print(mlflow.search_runs(output_format='list')[0].info.artifact_uri)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**bare(place.checkout), **stack.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        # Where it is read without the server, too.
        assert done.stdout.splitlines()[-1].startswith(f"s3://{local.BUCKET}/mlflow/"), done.stderr
        with local.exported(stack.environment):
            assert any(name.endswith("file.txt") for name in storage.names(f"s3://{local.BUCKET}/mlflow"))


@pytest.mark.fault("kill -9 of S3, MLflow, Prefect and a worker", "the supervisor starts them again")
def test_each_part_is_restarted_after_kill_9(place: Place) -> None:
    names = (*parts.SERVERS, "worker-local")
    before = {name: supervision.states(place.folder)[name]["pid"] for name in names}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    until(lambda: place.run("status").returncode == 0, "all parts are up again")
    after = {name: supervision.states(place.folder)[name]["pid"] for name in names}
    assert {name for name in names if after[name] != before[name]} == set(names)


@pytest.mark.fault("kill -9 of the supervisor and a worker", "flow runs go on, `make up` mends the rest")
def test_after_kill_9_of_the_supervisor_up_works(place: Place, runs: dict[str, psutil.Process]) -> None:
    with local.stack(place.folder) as stack, local.exported(stack.environment):
        storage.write(OBJECT, b"kept")
    worker = supervision.states(place.folder)["worker-local"]["pid"]
    os.kill(int((place.folder / "supervisord.pid").read_text()), signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    runs["two"].kill()
    assert place.run("status").returncode == 1
    again = place.run("up")
    assert again.returncode == 0, again.stderr


def test_a_flow_run_outlives_the_supervisor(place: Place, runs: dict[str, psutil.Process]) -> None:
    assert runs["one"].is_running()
    assert place.ask(f"flow_runs/{run_of(place, 'one')}")["state_type"] == "RUNNING"


@pytest.mark.fault("kill -9 of a flow while no worker watches", "Crashed, once a worker is back")
def test_a_flow_run_that_died_unseen_is_crashed(place: Place, runs: dict[str, psutil.Process]) -> None:
    assert place.ask(f"flow_runs/{run_of(place, 'two')}")["state_type"] == "CRASHED"


def test_down_leaves_no_process_and_no_dotenv(place: Place, runs: dict[str, psutil.Process]) -> None:
    done = place.run("down")
    assert (done.returncode, done.stderr) == (0, "")
    assert place.processes == []
    assert not runs["one"].is_running()
    assert not (place.checkout / ".env").exists()


def test_after_down_the_data_are_there(place: Place) -> None:
    with local.stack(place.folder) as stack, local.exported(stack.environment):
        assert storage.read(OBJECT) == b"kept"
    with contextlib.closing(
        sqlite3.connect(stack.environment["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///"))
    ) as runs:
        assert runs.execute("select count(*) from experiments where name = 'kept'").fetchone() == (1,)


def test_down_twice_is_harmless(place: Place) -> None:
    done = place.run("down")
    assert (done.returncode, done.stdout) == (0, "nothing was up\n")


def test_status_is_1_when_down(place: Place) -> None:
    assert place.run("status").returncode == 1


def test_ports_are_remembered(place: Place) -> None:
    from infra import ports

    before = json.loads((place.folder / "ports.json").read_text())
    assert ports.choose(place.folder) == before
