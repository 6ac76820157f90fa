"""Containers that a stack's docker worker started, known by a label."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

LABEL = "adapterline.stack"
RUN_LABEL = "io.prefect.flow-run-id"
# How to reach the engine: `down` may be typed in a shell that does not know what `up` knew.
ENGINE = ("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH")
STOP_S = 10
ANSWER_S = 60


def engine() -> dict[str, str]:
    """How this process reaches the Docker engine."""
    return {name: os.environ[name] for name in ENGINE if os.environ.get(name)}


def runs(identity: str, where: Mapping[str, str]) -> set[str] | None:
    """Flow runs that have a container, running or ended; None when no engine answers."""
    if importlib.util.find_spec("docker") is None:
        return None
    import docker
    from docker.errors import DockerException

    try:
        client = docker.from_env(environment=dict(where), timeout=ANSWER_S)
        found = client.containers.list(all=True, filters={"label": f"{LABEL}={identity}"})
        return {run for container in found if (run := container.labels.get(RUN_LABEL))}
    except DockerException:
        return None


def remove(identity: str, where: Mapping[str, str]) -> int | None:
    """Stop and remove all containers of the stack. Returns how many; None when no engine answers."""
    if importlib.util.find_spec("docker") is None:
        return None
    import docker
    from docker.errors import DockerException, NotFound

    try:
        client = docker.from_env(environment=dict(where), timeout=ANSWER_S)
        found = client.containers.list(all=True, filters={"label": f"{LABEL}={identity}"})
        for container in found:
            try:
                container.stop(timeout=STOP_S)
                container.remove(v=True, force=True)
            except NotFound:
                continue
        return len(found)
    except DockerException:
        return None
