"""Ports on loopback: free ones, well-known ones, and those that a stack had before."""

from __future__ import annotations

import json
import os
import secrets
import socket
from pathlib import Path

from infra.errors import StackError
from infra.folder import write_private

# SeaweedFS takes each port + 10000 for gRPC, so ports end below this.
HIGHEST_PORT = 50_000
GRPC = 10_000
WELL_KNOWN = {"prefect": 4200, "mlflow": 5000, "s3": 8333}
# What else the store opens. Nobody but the store uses these.
STORE = ("s3-master", "s3-volume", "s3-filer", "s3-admin")


def choose(folder: Path) -> dict[str, int]:
    """A port for each server: the configured one, else the one it had before, else the well-known one, else a free one.

    Raises StackError when a configured port is taken or is none.
    """
    try:
        before = json.loads((folder / "ports.json").read_text())
    except (OSError, ValueError):
        before = {}
    chosen: dict[str, int] = {}
    for name, well_known in WELL_KNOWN.items():
        port = _configured(name)
        if port is None:
            port = next((each for each in (before.get(name), well_known) if each and _usable(name, each)), None)
        if port in chosen.values():
            port = None
        chosen[name] = port or free_ports(1)[0]
    for name in STORE:
        port = before.get(name)
        chosen[name] = port if port and port not in chosen.values() and _usable(name, port) else free_ports(1)[0]
    write_private(folder / "ports.json", json.dumps(chosen))
    return chosen


def _configured(name: str) -> int | None:
    variable = f"ADAPTERLINE_{name.upper()}_PORT"
    text = os.environ.get(variable)
    if not text:
        return None
    highest = 65_535 - GRPC if name == "s3" else 65_535
    if not text.isdecimal() or not 0 < int(text) <= highest:
        raise StackError(f"expected a port of 1 to {highest} in {variable}; found {text!r}; correct or remove it")
    for port in (int(text), int(text) + GRPC)[: 2 if name == "s3" else 1]:
        if not is_free(port):
            also = "" if port == int(text) else f" (taken with {text} for gRPC)"
            raise StackError(
                f"expected port {port} of {variable} to be free{also}; found it in use; "
                "end what uses it, or name another port"
            )
    return int(text)


def _usable(name: str, port: int) -> bool:
    return is_free(port) and (name in ("prefect", "mlflow") or is_free(port + GRPC))


def free_ports(count: int) -> list[int]:
    """Ports that are free, and whose gRPC twins are too."""
    found: list[int] = []
    while len(found) < count:
        port = 20_000 + secrets.randbelow(HIGHEST_PORT - 20_000)
        if port not in found and is_free(port) and is_free(port + GRPC):
            found.append(port)
    return found


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
