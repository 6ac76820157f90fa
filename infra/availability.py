"""Which optional workers can work here, and what it takes where they cannot."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

CONNECT_S = 3.0


def missing(worker: str) -> str | None:
    """Why a worker stays off, and how to turn it on; None when it can work."""
    return {"worker-docker": _docker, "worker-k8s": _kubernetes}.get(worker, lambda: None)()


def _docker() -> str | None:
    if importlib.util.find_spec("prefect_docker") is None:
        return "prefect-docker is not installed: run `make install`, then `make up`"
    import docker
    from docker.errors import DockerException

    where = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    try:
        docker.from_env(timeout=CONNECT_S).ping()
    except DockerException:
        return f"no Docker engine answers at {where}: start one or set DOCKER_HOST, then `make up`"
    return None


def _kubernetes() -> str | None:
    if importlib.util.find_spec("prefect_kubernetes") is None:
        return "prefect-kubernetes is not installed: install the extra `kubernetes`, then `make up`"
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return None
    named = os.environ.get("KUBECONFIG")
    files = [Path(each) for each in named.split(os.pathsep) if each] if named else [Path.home() / ".kube" / "config"]
    found = [file for file in files if file.is_file()]
    if not found:
        return f"no kubeconfig at {' or '.join(map(str, files))}: set KUBECONFIG, then `make up`"
    names = " or ".join(map(str, found))
    try:
        address = _cluster(found)
        url = urlsplit(address or "")
        port = url.port or 443
    except Exception as error:  # noqa: BLE001  # closed to this user, no YAML, or YAML of something else
        return f"no kubeconfig that can be read at {names} ({type(error).__name__}): set KUBECONFIG, then `make up`"
    if address is None:
        return f"no current cluster in {names}: set current-context, then `make up`"
    try:
        socket.create_connection((url.hostname or "", port), CONNECT_S).close()
    except OSError:
        return f"no Kubernetes API answers at {address}: start the cluster or set KUBECONFIG, then `make up`"
    return None


def _cluster(files: list[Path]) -> str | None:
    """Address of the current context's cluster; of several files the first that names a thing counts, as in kubectl."""
    import yaml

    contents = [content for file in files if isinstance(content := yaml.safe_load(file.read_text()), dict)]
    current = next((each["current-context"] for each in contents if each.get("current-context")), None)

    def named(kind: str, name: object) -> dict[str, object]:
        of_kind = [each for content in contents for each in content.get(f"{kind}s") or []]
        return next((each[kind] for each in of_kind if each.get("name") == name), {})

    server = named("cluster", named("context", current).get("cluster")).get("server")
    return str(server) if server else None
