"""Ports on loopback: free ones, well-known ones, and those that a stack had before."""

from __future__ import annotations

import json
import os
import secrets
import socket
from itertools import chain, combinations
from pathlib import Path

from infra.errors import StackError
from infra.folder import write_private

# SeaweedFS takes each port + 10000 for gRPC. None of these is among the ports themselves, and all stay below 32768,
# where Linux begins to take ports for outgoing connections: one could have a port between our look and the start.
GRPC = 10_000
FREE = range(10_000, 20_000)
WELL_KNOWN = {"prefect": 4200, "mlflow": 5000, "s3": 8333}
# What else the store opens. Nobody but the store uses these.
STORE = ("s3-master", "s3-volume", "s3-filer", "s3-admin")


def choose(folder: Path) -> dict[str, int]:
    """A port for each server: the configured one, else the one it had before, else the well-known one, else a free one.

    Raises StackError when a configured port is taken or is none, or two are the same.
    """
    try:
        before = json.loads((folder / "ports.json").read_text())
    except (OSError, ValueError):
        before = {}
    chosen = {name: port for name in WELL_KNOWN if (port := _configured(name)) is not None}
    _expect_distinct(chosen)
    for name in (*WELL_KNOWN, *STORE):
        if name not in chosen:
            taken = {each for other, port in chosen.items() for each in _needed(other, port)}
            wishes = filter(None, (before.get(name), WELL_KNOWN.get(name)))
            others = iter(lambda: free_ports(1)[0], 0)
            chosen[name] = next(port for port in chain(wishes, others) if _usable(name, port, taken))
    write_private(folder / "ports.json", json.dumps(chosen))
    return chosen


def _expect_distinct(configured: dict[str, int]) -> None:
    """Raises StackError when two servers were given the same port."""
    for one, other in combinations(configured, 2):
        for port in _needed(one, configured[one]) & _needed(other, configured[other]):
            raise StackError(
                f"expected {_variable(one)} and {_variable(other)} to need different ports; found {port} in both; "
                "name another port in one"
            )


def _needed(name: str, port: int) -> set[int]:
    return {port} if name in ("prefect", "mlflow") else {port, port + GRPC}


def _variable(name: str) -> str:
    return f"ADAPTERLINE_{name.upper()}_PORT"


def _configured(name: str) -> int | None:
    variable = _variable(name)
    text = os.environ.get(variable)
    if not text:
        return None
    highest = 65_535 - GRPC if name == "s3" else 65_535
    if not text.isdecimal() or not 0 < int(text) <= highest:
        raise StackError(f"expected a port of 1 to {highest} in {variable}; found {text!r}; correct or remove it")
    for port in sorted(_needed(name, int(text))):
        if not is_free(port):
            also = "" if port == int(text) else f" (taken with {text} for gRPC)"
            raise StackError(
                f"expected port {port} of {variable} to be free{also}; found it in use; "
                "end what uses it, or name another port"
            )
    return int(text)


def _usable(name: str, port: int, taken: set[int]) -> bool:
    needed = _needed(name, port)
    return needed.isdisjoint(taken) and all(is_free(each) for each in needed)


def free_ports(count: int) -> list[int]:
    """Ports that are free, and whose gRPC twins are too."""
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(FREE)
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
