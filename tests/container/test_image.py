"""The images: what is in them, what is not, and that they work under the narrowest confinement."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from components.registry import bundle
from components.training.spec import code_version
from infra.ports import free_ports
from tests.container.conftest import CONFINED, ROOT, Run
from tests.infra.test_lock import pins
from tests.training.toy_jobs import saved_split, toy_spec

pytestmark = [pytest.mark.container, pytest.mark.xdist_group("container")]

# A server is up in 10 s; on a machine that does much else it may take far longer.
PATIENCE_S = 180


def python(inside: Run, code: str) -> Any:
    """What a Python expression gives inside, by way of JSON."""
    return json.loads(
        inside(
            "python",
            "-c",
            f"import hashlib, importlib.metadata, importlib.util, json, pathlib, shutil; print(json.dumps({code}))",
        )
    )


def test_runs_as_nobody_in_particular(inside: Run) -> None:
    assert inside("id", "--user") == inside("id", "--group") == "10001"


def test_a_real_job_leaves_its_bundle(inside: Run, tiny_base: Path, tmp_path: Path) -> None:
    data = saved_split(tmp_path / "data")
    spec = toy_spec(tiny_base, data, "pfeiffer", epochs=2)
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    for path in (tmp_path, *tmp_path.rglob("*"), tiny_base, *tiny_base.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    out.chmod(0o777)  # user 10001 is nobody here
    volumes = {str(path): {"bind": str(path), "mode": mode} for path, mode in ((tmp_path, "rw"), (tiny_base, "ro"))}

    inside("python", "-m", "components.training.job", f"{tmp_path}/spec.json", f"{out}/bundle", volumes=volumes)

    manifest = bundle.read_manifest(out / "bundle")
    assert manifest.job_digest == spec.digest


def test_the_code_is_the_checkouts(inside: Run) -> None:
    assert (
        inside("python", "-c", "from components.training.spec import code_version as v; print(v())") == code_version()
    )
    digests = "{str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in pathlib.Path().rglob('*.py')}"
    here = {
        str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("components", "flows", "infra")
        for path in (ROOT / part).rglob("*.py")
    }
    assert python(inside, digests) == here


def test_the_packages_are_those_of_the_lock(inside: Run) -> None:
    code = "{d.name: d.version for d in importlib.metadata.distributions()}"
    found = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in python(inside, code).items()}
    assert found == {name: str(version) for name, version in pins("cpu").items()}


@pytest.mark.parametrize("tool", ["pip", "pip3", "uv", "gcc", "cc", "g++", "make", "git", "docker"])
def test_nothing_that_builds_or_installs_is_left(inside: Run, tool: str) -> None:
    assert python(inside, f"shutil.which({tool!r})") is None


@pytest.mark.parametrize("module", ["pip", "uv", "ensurepip"])
def test_no_installer_can_be_imported(inside: Run, module: str) -> None:
    assert python(inside, f"importlib.util.find_spec({module!r}) is None") is True


def test_no_cache_is_left(inside: Run) -> None:
    find = r"find / -xdev \( -path /proc -o -path /tmp \) -prune -o \( {} \) -print 2>/dev/null || true"
    kinds = [
        "-path '*/.cache/*'",
        "-path '/var/lib/apt/lists/*_Packages*'",
        "-name '*.whl'",
        "-path /wheels",
        "-path /lock",
    ]
    found = inside("sh", "-c", find.format(" -o ".join(kinds)))
    assert found == ""


def test_bytecode_of_the_heavy_libraries_is_there(inside: Run) -> None:
    """A read-only root cannot write it, so each start would compile thousands of modules."""
    for library in ("torch", "transformers", "peft"):
        code = f"pathlib.Path(importlib.util.find_spec({library!r}).cached).exists()"
        assert python(inside, code) is True


def test_the_label_names_the_commit(engine: docker.DockerClient, image: str) -> None:
    labels = engine.images.get(image).labels
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607
    expected = commit.stdout.strip() or "unknown"
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == expected
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_no_secret_of_the_builder_is_in_the_image(engine: docker.DockerClient, image: str) -> None:
    """Build arguments show in the history of the stages that they reach."""
    index = os.environ.get("PIP_INDEX_URL", "pypi.org")
    assert not [layer["CreatedBy"] for layer in engine.images.get(image).history() if index in layer["CreatedBy"]]


@pytest.fixture
def started(engine: docker.DockerClient) -> Iterator[Any]:
    """Start containers on the host's network; they are removed afterwards."""
    containers: list[Container] = []

    def start(name: str, command: list[str] | None, environment: dict[str, str]) -> Container:
        options = {**CONFINED, "network_mode": "host"}
        container = engine.containers.run(name, command, detach=True, environment=environment, **options)
        containers.append(container)
        return container

    yield start
    for container in containers:
        container.remove(force=True, v=True)


def healthy(container: Container) -> bool:
    """Wait for the health check's word."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        container.reload()
        if container.attrs["State"]["Health"]["Status"] == "healthy":
            return True
        if container.status != "running":
            break
        time.sleep(1)
    pytest.fail(f"{container.attrs['State']}\n{container.logs().decode()[-2000:]}")
    return False


def test_a_server_and_a_worker_become_healthy(server_image: str, worker_image: str, started: Any) -> None:
    port, health = free_ports(2)
    server = started(
        server_image,
        ["prefect", "server", "start", "--port", str(port)],
        {"HEALTH_URL": f"http://127.0.0.1:{port}/api/health"},
    )
    assert healthy(server)
    worker = started(
        worker_image,
        None,
        {
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_WORKER_WEBSERVER_PORT": str(health),
            "HEALTH_URL": f"http://127.0.0.1:{health}/health",
        },
    )
    assert healthy(worker)
