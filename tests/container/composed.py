"""A Compose project that is up, as its tests speak to it."""

from __future__ import annotations

import base64
import json
import urllib.request
from dataclasses import dataclass
from typing import Any

import docker


@dataclass(frozen=True)
class Up:
    """The running project: ports by service, its secrets, and how to speak to it."""

    ports: dict[str, int]
    secrets: dict[str, str]
    name: str
    client: docker.DockerClient

    def get(self, service: str, path: str, login: str | None = None, body: object = None) -> Any:
        """JSON answer of a service. Raises HTTPError."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports[service]}{path}")
        if login is not None:
            request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return json.load(answer)

    def container(self, service: str) -> Any:
        label = [f"com.docker.compose.project={self.name}", f"com.docker.compose.service={service}"]
        (found,) = self.client.containers.list(all=True, filters={"label": label})
        return found
