"""The services of infra/compose.yaml really start, find each other, and are closed to strangers.

As far as an engine without a bridge and without a registry allows: every container on the host's network, under the
names that it has in the project; PostgreSQL is Debian's, as a process; the images are those for CPUs. Everything else
(commands, secrets, users, confinement, order, health checks) is what the file says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from infra.ports import free_ports
from tests.conftest import toy_rows, write_csv
from tests.container.composed import Up
from tests.container.conftest import ROOT
from tests.infra.test_compose import project

pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.xdist_group("container")]

PATIENCE_S = 420
NEEDED = {"docker-compose": "docker-compose", "initdb": "postgresql"}


def program(name: str) -> str:
    """Path of a program; the test is skipped, or fails in CI, where it is not installed."""
    places = [os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        message = f"THE COMPOSE PROJECT DID NOT RUN: expected {name}; found none; install Debian's {NEEDED[name]}"
        if os.environ.get("ADAPTERLINE_REQUIRE_ENGINE") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def secrets() -> Iterator[Path]:
    """Secrets as prepare.sh makes them."""
    if os.geteuid() != 0:
        pytest.skip("gives files to user 10001: needs root")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        (folder / "compose").mkdir()
        shutil.copy(ROOT / "infra/compose/prepare.sh", folder / "compose")
        environment = {**os.environ, "DOCKER_SOCKET": engine_socket()}
        subprocess.run([str(folder / "compose/prepare.sh")], check=True, env=environment, capture_output=True)
        yield folder / "compose/secrets"


def engine_socket() -> str:
    return os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")


@pytest.fixture(scope="module")
def database(secrets: Path) -> Iterator[int]:
    """Port of Debian's PostgreSQL with the databases of the project."""
    programs = Path(program("initdb")).resolve().parent
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        password = folder / "password"
        password.write_text((secrets / "POSTGRES_PASSWORD").read_text())
        for path in (folder, password):
            shutil.chown(path, "postgres", "postgres")
        as_postgres: dict[str, Any] = {"user": "postgres", "group": "postgres", "cwd": folder, "check": True}
        cluster = ["-D", folder / "data", "-U", "adapterline"]
        subprocess.run(
            [programs / "initdb", *cluster, "-A", "scram-sha-256", "--pwfile", password],
            capture_output=True, **as_postgres,
        )  # fmt: skip
        server = subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, "-h", "127.0.0.1"],
            user="postgres", group="postgres", cwd=folder, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            environment = {**os.environ, "PGPASSWORD": password.read_text()}
            where = ["-h", "127.0.0.1", "-p", str(port), "-U", "adapterline"]
            while subprocess.run([programs / "pg_isready", *where], capture_output=True, check=False).returncode != 0:
                assert server.poll() is None
                time.sleep(0.2)
            sql = ROOT / "infra/compose/databases.sql"
            subprocess.run([programs / "psql", *where, "-q", "-d", "postgres", "-f", sql], check=True, env=environment)
            yield port
        finally:
            server.terminate()
            server.wait()


def on_the_host(ports: dict[str, int], secrets: Path, image: str, toy: Path) -> dict[str, Any]:
    """The project without networks: its services on the host's, on other ports; `toy` for its flows at /toy."""
    found = project(DOCKER_GID=str(Path(engine_socket()).stat().st_gid), DOCKER_SOCKET=engine_socket())
    usual = {"s3": 8333, "mlflow": 5000, "prefect": 4200}
    text = json.dumps(found).replace("adapterline:cuda", image).replace("./compose/secrets", str(secrets))
    for service, port in usual.items():
        text = text.replace(f":{port}", f":{ports[service]}")
    found = json.loads(text)
    del found["name"], found["networks"], found["services"]["postgres"], found["services"]["worker-docker"]["deploy"]
    names = [*found["services"], "postgres"]
    for name, service in found["services"].items():
        service.pop("ports", None)
        service.pop("networks")
        service["network_mode"] = "host"
        service["extra_hosts"] = [f"{each}:127.0.0.1" for each in names]
        service.get("depends_on", {}).pop("postgres", None)
        health = ports.get(name)
        service["environment"] |= {
            "S3_PORT": str(ports["s3"]), "MLFLOW_PORT": str(ports["mlflow"]), "PREFECT_PORT": str(ports["prefect"]),
            "POSTGRES_ADDRESS": f"postgres:{ports['postgres']}", "NO_PROXY": "*", "LISTEN": "127.0.0.1",
        }  # fmt: skip
        if name.startswith("worker") and health:
            service["environment"] |= {
                "PREFECT_WORKER_WEBSERVER_PORT": str(health), "HEALTH_URL": f"http://127.0.0.1:{health}/health"
            }  # fmt: skip
    found["services"]["setup"]["environment"] |= {"ADAPTERLINE_NETWORK": "host", "TRAIN_ON": "train/cpu"}
    # What this worker is told it passes on to jobs, whose containers do not get the names.
    told = found["services"]["worker-docker"]["environment"]
    told |= {key: re.sub("//(s3|mlflow|prefect):", "//127.0.0.1:", str(value)) for key, value in told.items()}
    parts = zip(("master", "volume", "filer", "admin"), free_ports(4), strict=True)
    options = " ".join(f"-{part}.port={port}" for part, port in parts)
    found["services"]["s3"]["environment"]["STORE_OPTIONS"] = options
    # New volumes, not those of a project that is up.
    found["volumes"] = dict.fromkeys(found["volumes"].keys() - {"postgres"})
    found["services"]["worker-local"]["volumes"].append(f"{toy}:/toy:ro")
    return dict(found)


@pytest.fixture(scope="module")
def toy(tiny_base: Path) -> Iterator[Path]:
    """A folder that user 10001 may read: rows.csv and a tiny model, base."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copytree(tiny_base, folder / "base")
        write_csv(folder / "rows.csv", toy_rows(600))
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield folder


@pytest.fixture(scope="module")
def up(
    engine: docker.DockerClient, worker_image: str, server_image: str, secrets: Path, database: int, toy: Path
) -> Iterator[Up]:
    compose = program("docker-compose")
    names = ("s3", "mlflow", "prefect", "worker-local", "worker-docker")
    ports = {**dict(zip(names, free_ports(len(names)), strict=True)), "postgres": database}
    values = {path.name: path.read_text() for path in secrets.iterdir()}
    name = f"test{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "compose.yaml"
        file.write_text(yaml.safe_dump(on_the_host(ports, secrets, worker_image.removesuffix("-worker"), toy)))
        command = [compose, "--file", str(file), "--project-name", name]
        try:
            done = subprocess.run(
                [*command, "up", "--detach"], capture_output=True, text=True, check=False, timeout=PATIENCE_S
            )
            running = Up(ports, values, name, engine)
            if done.returncode != 0 or not settled(running):
                logs = subprocess.run([*command, "logs", "--tail", "30"], capture_output=True, text=True, check=False)
                pytest.fail(f"{done.stderr[-1000:]}\n{logs.stdout[-6000:]}", pytrace=False)
            yield running
        finally:
            subprocess.run([*command, "down", "--volumes", "--timeout", "10"], capture_output=True, check=False)


def settled(up: Up) -> bool:
    """Wait until everything that stays up is healthy."""
    deadline = time.monotonic() + PATIENCE_S
    for service in ("s3", "mlflow", "prefect", "worker-docker", "worker-local"):
        while up.container(service).attrs["State"]["Health"]["Status"] != "healthy":
            if time.monotonic() > deadline:
                return False
            time.sleep(1)
    return True


def test_setup_ends_well(up: Up) -> None:
    assert up.container("setup").attrs["State"]["ExitCode"] == 0


PROTECTED = {
    "prefect": "/api/admin/version",
    "mlflow": "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default",
}


@pytest.mark.parametrize(("service", "path"), PROTECTED.items())
def test_a_stranger_is_refused(up: Up, service: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        up.get(service, path)
    assert refused.value.code == 401
    login = {
        "prefect": up.secrets["PREFECT_API_AUTH_STRING"],
        "mlflow": f"admin:{up.secrets['MLFLOW_TRACKING_PASSWORD']}",
    }
    assert up.get(service, path, login[service])


def test_workers_serve_their_pools(up: Up) -> None:
    login = up.secrets["PREFECT_API_AUTH_STRING"]
    for pool in ("local", "docker"):
        assert up.get("prefect", f"/api/work_pools/{pool}", login)["status"] == "READY"


def test_everything_is_deployed(up: Up) -> None:
    found = up.get("prefect", "/api/deployments/filter", up.secrets["PREFECT_API_AUTH_STRING"], {})
    written = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {each["name"] for each in found} == {each["name"] for each in written}


def test_artifacts_go_to_the_store_by_way_of_mlflow(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", up.secrets["MLFLOW_TRACKING_PASSWORD"])
    client = mlflow.MlflowClient(f"http://127.0.0.1:{up.ports['mlflow']}")
    run = client.create_run(client.create_experiment("compose"))
    client.log_text(run.info.run_id, "by way of MLflow", "note.txt")
    keys = {
        "aws_access_key_id": up.secrets["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": up.secrets["AWS_SECRET_ACCESS_KEY"],
    }
    store = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{up.ports['s3']}", region_name="us-east-1", **keys)
    (found,) = store.list_objects_v2(Bucket="adapterline", Prefix="mlflow/")["Contents"]
    assert store.get_object(Bucket="adapterline", Key=found["Key"])["Body"].read() == b"by way of MLflow"


def test_no_secret_shows_in_what_the_engine_tells(up: Up) -> None:
    shown = [json.dumps(each.attrs) + each.logs().decode() for each in containers(up)]
    for name, value in up.secrets.items():
        assert not value or not any(value in text for text in shown), name


def test_every_container_is_confined(up: Up) -> None:
    for each in containers(up):
        host = each.attrs["HostConfig"]
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False)
        assert each.attrs["Config"]["User"] == "10001:10001"
        assert host["Memory"] > 0


def containers(up: Up) -> list[Any]:
    found: list[Any] = up.client.containers.list(all=True, filters={"label": f"com.docker.compose.project={up.name}"})
    assert len(found) == len(project()["services"]) - 1
    return found


def finished(up: Up, name: str, parameters: dict[str, Any]) -> dict[str, str]:
    """State in which a run of a deployment ended."""
    login = up.secrets["PREFECT_API_AUTH_STRING"]
    filters = {"deployments": {"name": {"any_": [name]}}}
    (deployment,) = up.get("prefect", "/api/deployments/filter", login, filters)
    path = f"/api/deployments/{deployment['id']}/create_flow_run"
    run = up.get("prefect", path, login, {"parameters": parameters})
    deadline = time.monotonic() + PATIENCE_S
    while True:
        state: dict[str, str] = up.get("prefect", f"/api/flow_runs/{run['id']}", login)["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CRASHED"):
            return state
        assert time.monotonic() < deadline, state
        time.sleep(1)


def test_a_flow_in_the_local_pool_reaches_the_store(up: Up) -> None:
    """The sensor looks at a prefix where nothing is yet, and ends well."""
    state = finished(up, "on-new-data", {})
    assert state["type"] == "COMPLETED", state["message"]


def test_a_flow_in_a_container_of_its_own_reaches_the_store(up: Up) -> None:
    """A job whose spec is not there says so: only the store can have told it."""
    missing = {"spec": "s3://adapterline/no-spec.json", "digest": "0", "out": "s3://adapterline/no-job"}
    state = finished(up, "cpu", missing)
    assert (state["type"], state["name"]) == ("FAILED", "StorageError"), state["message"]
    assert "no such key" in state["message"]


def test_a_retrain_in_the_local_pool_registers(up: Up) -> None:
    """Its workspace is the one of the presets, below a root that is read-only; its jobs are processes of its own."""
    rates = {"body": 1e-2, "layer_norm": 1e-2, "head": 1e-2}
    config = {
        "model": "toy",
        "data": {"source": "/toy/rows.csv"},
        "split": {"test": 0.3},
        "base": {"name": "/toy/base"},
        "adapter": {"bottleneck": {"reduction_factor": 2}, "schedule": {"epochs": 8, "learning_rates": rates}},
        "baseline": {"schedule": {"epochs": 4, "learning_rates": {**rates, "body": 3e-3}}},
        "training": {"max_tokens": 16},
        "gate": {"margin": 0.2, "champion_margin": 0.2, "slice_margin": 0.4, "max_trainable_share": 0.2},
        "compute": {"job_memory_gb": 1},
    }
    state = finished(up, "nightly", {"config": config, "preset": None, "overrides": {}})
    assert state["type"] == "COMPLETED", state["message"]
    (version,) = registered(up, "toy")
    assert version["version"] == "1"


def registered(up: Up, name: str) -> list[dict[str, str]]:
    path = f"/api/2.0/mlflow/model-versions/search?filter=name%3D%27{name}%27"
    answer = up.get("mlflow", path, f"admin:{up.secrets['MLFLOW_TRACKING_PASSWORD']}")
    found: list[dict[str, str]] = answer["model_versions"]
    return found
