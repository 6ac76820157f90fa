"""Containers that a stack's docker worker started, known by a label."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from docker.models.containers import Container

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
    found = _all(identity, where)
    return None if found is None else {run for each in found if (run := each.labels.get(RUN_LABEL))}


def _all(identity: str, where: Mapping[str, str]) -> list[Container] | None:
    """The stack's containers, running or ended; None when no engine answers."""
    if importlib.util.find_spec("docker") is None:
        return None
    import docker
    from docker.errors import DockerException
    from requests import RequestException

    try:
        client = docker.from_env(environment=dict(where), timeout=ANSWER_S)
        found: list[Container] = client.containers.list(
            all=True, filters={"label": f"{LABEL}={identity}"}, ignore_removed=True
        )
    except (DockerException, RequestException):
        return None
    return found


def remove(identity: str, where: Mapping[str, str]) -> list[str] | None:
    """Stop and remove all containers of the stack. Returns what stays, and why; None when no engine answers."""
    found = _all(identity, where)
    if found is None:
        return None
    from docker.errors import APIError, DockerException
    from requests import RequestException

    left = []
    for container in found:
        try:
            # One that cannot be stopped is killed by its removal.
            with contextlib.suppress(APIError, RequestException):
                container.stop(timeout=STOP_S)
            container.remove(v=True, force=True)
        except (DockerException, RequestException) as error:
            # Removed already, or by somebody else just now.
            if not (isinstance(error, APIError) and error.status_code in (404, 409)):
                left.append(f"container {container.name} ({error})")
    return left
