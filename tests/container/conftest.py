"""A real Docker engine and the images of this checkout.

Where no engine answers the tests are skipped, and say how to get one; with ADAPTERLINE_REQUIRE_ENGINE=1, as in CI, they
fail instead.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import DockerException

ROOT = Path(__file__).parents[2]
IMAGE = "adapterline:cpu"
WORKER = "adapterline:cpu-worker"
SERVER = "adapterline:server"
NO_ENGINE = (
    "NO CONTAINER TEST RAN: expected a Docker engine; found {found}; "
    "run `export DOCKER_HOST=$(infra/engine.sh start FOLDER)`, or start Docker"
)
# How every container of ours can be run: nothing may need more than this.
CONFINED: dict[str, Any] = {
    "read_only": True,
    "tmpfs": {"/tmp": "rw,exec,mode=1777"},  # noqa: S108  # inside the container
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "init": True,
    "mem_limit": "4g",
    "pids_limit": 1024,
    "network_mode": "none",
}

Run = Callable[..., str]


@pytest.fixture(scope="session")
def engine() -> docker.DockerClient:
    """A client of the engine that DOCKER_HOST names, or of the machine's own."""
    try:
        client = docker.from_env(timeout=120)
        client.ping()
    except DockerException as error:
        message = NO_ENGINE.format(found=f"none ({type(error).__name__})")
        if os.environ.get("ADAPTERLINE_REQUIRE_ENGINE") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return client


def build(*targets: str) -> None:
    """Build images from this checkout. What did not change since the last time is in the engine's cache."""
    done = subprocess.run(
        ["make", "--no-print-directory", "image", f"TARGETS={' '.join(targets)}"],  # noqa: S607
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)


@pytest.fixture(scope="session")
def image(engine: docker.DockerClient) -> str:
    """Name of the image for jobs, built from this checkout."""
    build("job")
    return IMAGE


@pytest.fixture(scope="session")
def worker_image(image: str) -> str:
    build("worker")
    return WORKER


@pytest.fixture(scope="session")
def server_image(engine: docker.DockerClient) -> str:
    build("server")
    return SERVER


@pytest.fixture(scope="session")
def inside(engine: docker.DockerClient, image: str) -> Run:
    """Run a command in a confined container of the job image; its standard output. Raises when it does not exit 0."""

    def run(*command: str, **options: Any) -> str:
        output: bytes = engine.containers.run(image, list(command), remove=True, **{**CONFINED, **options})
        return output.decode().strip()

    return run
