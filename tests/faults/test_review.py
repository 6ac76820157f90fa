"""A review that waits for its form while the servers it waits on are killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from components.registry import history, promotion
from components.registry.promotion import Approval
from infra import credentials, health, supervision
from tests.faults import outage
from tests.flows.deployed import HOME
from tests.infra.test_stack import PATIENCE_S
from tests.registry.registered import Shelf

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("stack")]


class Prefect:
    """The API of a stack's server, as its UI uses it."""

    def __init__(self, stack: Path) -> None:
        self.port = supervision.ports(stack)["prefect"]
        self.login = credentials.read(stack)["PREFECT_API_AUTH_STRING"]

    def ask(self, path: str, body: object = None) -> Any:
        """Again while it does not answer, or says that its database is not ready."""
        deadline = time.monotonic() + PATIENCE_S
        while (answer := health.ask(self.port, f"/api/{path}", self.login, body))[0] in (0, 503):
            assert time.monotonic() < deadline, path
            time.sleep(1)
        status, content = answer
        assert status in (200, 201), (path, status, content)
        return content

    def until(self, run: str, *states: str) -> None:
        deadline = time.monotonic() + 2 * PATIENCE_S
        while (state := self.ask(f"flow_runs/{run}")["state"])["type"] not in states:
            assert state["type"] not in ("FAILED", "CRASHED", "COMPLETED"), state
            assert time.monotonic() < deadline, state
            time.sleep(0.5)

    def until_form(self, run: str) -> None:
        """A run that is paused saves its form a moment later; without one nobody can answer it."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.ask(f"flow_runs/{run}/input/filter", {"prefix": ""}):
            assert time.monotonic() < deadline, run
            time.sleep(0.1)


@pytest.mark.fault("kill -9 of the Prefect server and a worker while a review waits", "it goes on when they are back")
def test_a_review_outlives_the_server(stack: Path, shelved: Shelf) -> None:
    model, there = "waiting", shelved.registry
    shelved.version(model)
    promotion.promote(there, promotion.examine(there, model, "1"), Approval("ada", "first"))
    shelved.version(model, champion="1")
    prefect = Prefect(stack)
    deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--name", "promote/review"]
    done = subprocess.run(deploy, cwd=HOME, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    deployment = prefect.ask("deployments/name/promote/review")["id"]
    parameters = {"model": model, "version": "2"}
    run = prefect.ask(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]
    prefect.until(run, "PAUSED")
    prefect.until_form(run)

    outage.kill(stack, "worker-local")
    outage.kill(stack, "prefect")
    assert shelved.production(model) == "1"
    form = {"reviewer": "eve", "decision": "approve", "comment": "looks good"}
    answer = prefect.ask(f"flow_runs/{run}/resume", {"run_input": form})
    assert answer["status"] == "ACCEPT", answer
    prefect.until(run, "COMPLETED")
    assert shelved.production(model) == "2"
    assert [(record.who, record.after) for record in history.records(there.store, model)] == [
        ("ada", "1"),
        ("eve", "2"),
    ]
