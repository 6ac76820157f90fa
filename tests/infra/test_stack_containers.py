"""Containers of a stack, by a real engine where one answers, and what `down` says of those that stay."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, NoReturn

import pytest

from infra import availability, containers, stack
from infra.errors import StackError
from infra.folder import identity, write_private

pytestmark = pytest.mark.integration


def test_containers_of_the_stack_are_removed_and_no_others(tmp_path: Path) -> None:
    import docker
    from docker.errors import NotFound

    if availability.missing("worker-docker"):
        _without("no Docker engine answers")
    client = docker.from_env()
    tags = {tag for image in client.images.list() for tag in image.tags}
    image = next((each for each in ("adapterline:cpu", "python:3.11-slim-bookworm") if each in tags), None)
    if image is None:
        _without("the image adapterline:cpu is not there, `make image` builds it")
    ours, other = (
        client.containers.run(
            image, ["sleep", "600"], detach=True, init=True, network_mode="host", labels={containers.LABEL: label}
        )
        for label in (identity(tmp_path), identity(tmp_path / "other"))
    )
    try:
        assert containers.remove(identity(tmp_path), containers.engine()) == []
        with pytest.raises(NotFound):
            ours.reload()
        other.reload()
    finally:
        other.remove(force=True)


def _without(reason: str) -> NoReturn:
    if os.environ.get("ADAPTERLINE_REQUIRE_ENGINE") == "1":
        pytest.fail(reason)
    pytest.skip(f"{reason}: containers of a stack are not tested")


class Engine(BaseHTTPRequestHandler):
    """An engine with three containers: one that is being removed, one that it fails to remove, one that it removes."""

    names = ("going", "stuck", "fine")
    removed: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        name = self.path.split("/")[-2]
        if "/containers/json" in self.path:
            self._answer(200, [{"Id": each, "Names": [f"/{each}"], "State": "running"} for each in self.names])
        elif name in self.names:
            self._answer(200, {"Id": name, "Name": f"/{name}", "State": {"Status": "running"}, "Config": {}})
        else:
            self._answer(200, {"ApiVersion": "1.44"})

    def do_POST(self) -> None:
        self._answer(204)

    def do_DELETE(self) -> None:
        name = self.path.split("/")[-1].partition("?")[0]
        self.removed.append(name)
        self._answer({"going": 409, "stuck": 500, "fine": 204}[name], {"message": f"{name} is in the way"})

    def _answer(self, status: int, content: object = None) -> None:
        body = b"" if status == 204 else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[dict[str, str]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Engine.removed.clear()
        yield {"DOCKER_HOST": f"tcp://127.0.0.1:{server.server_port}"}
        server.shutdown()


def test_a_container_that_stays_is_named_and_keeps_no_other(tmp_path: Path, engine: dict[str, str]) -> None:
    write_private(tmp_path / "stack.json", json.dumps({"engine": engine}))
    with pytest.raises(StackError) as raised:
        stack.down(tmp_path, print)
    assert str(raised.value).startswith(f"expected all of {tmp_path} to end; found container stuck (500 ")
    assert str(raised.value).count("container ") == 1
    assert Engine.removed == list(Engine.names)
