"""What `up` refuses, what it takes back, and the small parts of the stack that need no server."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import availability, credentials, environment, local, ports, processes, stack, supervision
from infra.errors import StackError
from infra.folder import identity, write_private
from tests.infra.test_stack import bare, stack_command, until

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("stack")]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports.free_ports(1)[0]))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("name", ["PREFECT", "MLFLOW", "S3"])
def test_a_configured_port_that_is_taken_is_one_line_and_nothing_runs(tmp_path: Path, taken: int, name: str) -> None:
    variable = f"ADAPTERLINE_{name}_PORT"
    done = stack_command("up", tmp_path / "stack", tmp_path, **{variable: str(taken)})
    assert done.returncode == 1
    assert done.stderr.startswith(f"expected port {taken} of {variable} to be free; found it in use; ")
    assert done.stderr.count("\n") == 1
    assert processes.marked(identity(tmp_path / "stack")) == []


@pytest.mark.parametrize("text", ["no", "0", "70000", "-1"])
def test_a_configured_port_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ADAPTERLINE_MLFLOW_PORT", text)
    with pytest.raises(StackError, match=f"in ADAPTERLINE_MLFLOW_PORT; found '{text}'"):
        ports.choose(tmp_path)


def test_a_remembered_port_that_is_taken_is_replaced(tmp_path: Path, taken: int) -> None:
    (tmp_path / "ports.json").write_text(json.dumps({"mlflow": taken}))
    assert ports.choose(tmp_path)["mlflow"] != taken


def test_the_store_needs_the_port_that_grpc_takes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    monkeypatch.setenv("ADAPTERLINE_S3_PORT", str(taken - ports.GRPC))
    with pytest.raises(StackError, match=f"expected port {taken} .* for gRPC"):
        ports.choose(tmp_path)


def test_a_configured_port_goes_before_one_that_another_server_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = ports.free_ports(1)
    (tmp_path / "ports.json").write_text(json.dumps({"prefect": port}))
    monkeypatch.setenv("ADAPTERLINE_MLFLOW_PORT", str(port))
    chosen = ports.choose(tmp_path)
    assert chosen["mlflow"] == port
    assert chosen["prefect"] != port


def test_free_ports_never_meet_one_anothers_grpc_nor_outgoing_connections() -> None:
    found = ports.free_ports(500)
    needed = {*found, *(port + ports.GRPC for port in found)}
    assert len(needed) == 2 * len(found)
    assert max(needed) < 32_768


@pytest.mark.parametrize("further", [0, ports.GRPC])
def test_two_servers_cannot_have_the_same_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: int) -> None:
    (port,) = ports.free_ports(1)
    monkeypatch.setenv("ADAPTERLINE_S3_PORT", str(port))
    monkeypatch.setenv("ADAPTERLINE_MLFLOW_PORT", str(port + further))
    found = f"expected ADAPTERLINE_MLFLOW_PORT and ADAPTERLINE_S3_PORT to need different ports; found {port + further}"
    with pytest.raises(StackError, match=found):
        ports.choose(tmp_path)


def test_a_supervisor_that_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "ANSWER_S", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "supervisor.sock"))
        silent.listen()
        with pytest.raises(StackError, match="expected supervisord to answer; found timed out"):
            supervision.states(tmp_path)


def test_down_names_a_process_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = {processes.MARK: identity(tmp_path)}
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command, env={**os.environ, **mark}) as endless:
        monkeypatch.setattr(processes, "end", list)  # as of one that waits for a broken disk
        try:
            with pytest.raises(StackError, match=f"found process {endless.pid}; end it, then `make down`"):
                stack.down(tmp_path, print)
        finally:
            endless.kill()


def test_up_waits_for_no_one_who_uses_the_store(tmp_path: Path) -> None:
    with local.stack(tmp_path / "stack"):
        done = stack_command("up", tmp_path / "stack", tmp_path)
    assert done.returncode == 1
    assert "found a command at work in it" in done.stderr


def test_an_interrupted_up_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "stack"
    command = [sys.executable, "-m", "infra.local", "--folder", str(folder), "up"]
    up = subprocess.Popen(command, cwd=tmp_path, env=bare(tmp_path), stdout=subprocess.PIPE, text=True)
    assert up.stdout is not None
    assert up.stdout.readline() == "  s3 is up\n"
    up.send_signal(signal.SIGTERM)
    assert up.wait(60) == 130
    assert processes.marked(identity(folder)) == []


def test_a_folder_whose_name_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    done = stack_command("up", tmp_path / ("a" * 100), tmp_path)
    assert done.returncode == 1
    assert "name a shorter one in ADAPTERLINE_STACK" in done.stderr


def test_keys_of_an_earlier_store_are_kept(tmp_path: Path) -> None:
    old = {"AWS_ACCESS_KEY_ID": "old", "AWS_SECRET_ACCESS_KEY": "older"}
    write_private(tmp_path / "credentials.json", json.dumps(old))
    assert credentials.read(tmp_path).items() >= old.items()


def test_two_stacks_have_no_secret_in_common(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = credentials.read(tmp_path / "a"), credentials.read(tmp_path / "b")
    assert [name for name in credentials.SECRET if first[name] == second[name]] == []


STACK_PORTS = (1, 2, 3)


def test_a_dotenv_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PREFECT_API_URL=http://elsewhere/api\n")
    assert not environment.write(environment.Stack(tmp_path, *STACK_PORTS), tmp_path / ".env")
    environment.remove(tmp_path, tmp_path / ".env")
    assert (tmp_path / ".env").read_text() == "PREFECT_API_URL=http://elsewhere/api\n"


def test_a_dotenv_that_is_a_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".env").symlink_to(tmp_path / "target")
    assert not environment.write(environment.Stack(tmp_path, *STACK_PORTS), tmp_path / ".env")
    assert not (tmp_path / "target").exists()


def test_our_dotenv_is_private(tmp_path: Path) -> None:
    assert environment.write(environment.Stack(tmp_path, *STACK_PORTS), tmp_path / ".env")
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_a_dotenv_that_a_killed_stack_left_is_removed_before_prefect_reads_it(tmp_path: Path) -> None:
    environment.write(environment.Stack(tmp_path, *STACK_PORTS), tmp_path / ".env")
    script = "import flows; from prefect.settings import PREFECT_API_URL as url; print(url.value())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=bare(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.stdout == "None\n", done.stderr
    assert not (tmp_path / ".env").exists()


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    variables = {**os.environ, processes.MARK: identity(tmp_path)}
    stubborn = subprocess.Popen([sys.executable, "-c", script], env=variables, stdout=subprocess.PIPE, text=True)
    assert stubborn.stdout is not None
    assert stubborn.stdout.readline() == "up\n"
    monkeypatch.setattr(processes, "TERMINATE_S", 0.5)
    processes.end(each.process for each in processes.marked(identity(tmp_path)))
    assert stubborn.wait(1) == -signal.SIGKILL


def test_no_docker_engine_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    assert f"no Docker engine answers at unix://{tmp_path}/none.sock" in str(availability.missing("worker-docker"))


KUBECONFIG = """
current-context: test
contexts: [{name: test, context: {cluster: far}}]
clusters: [{name: far, cluster: {server: "https://127.0.0.1:%d"}}]
"""


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (port,) = ports.free_ports(1)
    (tmp_path / "config").write_text(KUBECONFIG % port)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert f"no Kubernetes API answers at https://127.0.0.1:{port}" in str(availability.missing("worker-k8s"))


@pytest.mark.parametrize(
    "content", ["clusters: [", "current-context: test\ncontexts: [1]", KUBECONFIG.replace("%d", "x")]
)
def test_a_kubeconfig_that_cannot_be_read_leaves_its_worker_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    (tmp_path / "config").write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert f"no kubeconfig that can be read at {tmp_path}/config" in str(availability.missing("worker-k8s"))


def test_a_cluster_that_answers_has_its_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taken: int) -> None:
    (tmp_path / "config").write_text(KUBECONFIG % taken)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    assert availability.missing("worker-k8s") is None


def test_a_killed_part_leaves_no_child_that_holds_its_port(tmp_path: Path) -> None:
    """The launcher ends what an earlier life of its part left, and spares flow runs."""
    mark = {processes.MARK: identity(tmp_path), processes.PART: "worker-local"}
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    left = subprocess.Popen(command, env={**os.environ, **mark})
    run = subprocess.Popen(command, env={**os.environ, **mark, processes.RUN: "run"})
    (tmp_path / "ports.json").write_text(json.dumps({"s3": 1, "mlflow": 2, "prefect": 3}))
    launcher = subprocess.Popen(
        [sys.executable, "-m", "infra.parts", "worker-local"],
        env={**os.environ, **mark, "ADAPTERLINE_STACK": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: left.poll() is not None, "the leftover is ended")
        assert run.poll() is None
    finally:
        for process in (launcher, run):
            process.kill()
            process.wait()
