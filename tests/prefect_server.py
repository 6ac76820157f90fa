"""A real Prefect server for tests, with its services: schedules, events, automations."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra import local

START_S = 120
DRAIN_S = 10


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """What points clients at the server, also set in this process, for the length of the block.

    A process keeps one connection for its events, whatever the settings say later: it is closed at both ends of the
    block, or events would go to a server of other tests.
    """
    (port,) = local.free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    environment = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": url}
    with local.exported(environment), temporary_settings(updates={PREFECT_API_URL: url}):
        with (folder / "prefect.log").open("w") as log:
            command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
            server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(f"{url}/health", server)
            EventsWorker.drain_all(timeout=DRAIN_S)
            yield environment
        finally:
            EventsWorker.drain_all(timeout=DRAIN_S)
            server.terminate()
            server.wait(30)


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.poll() is None, "the Prefect server ended"
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310  # our own URL
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError("the Prefect server did not answer")
