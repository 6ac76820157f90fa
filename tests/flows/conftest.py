"""One real S3 store, MLflow database and Prefect server for all flow tests, and settings that train in seconds."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from components import forks
from components.config import RetrainConfig, parse
from infra import local
from tests import prefect_server
from tests.conftest import toy_rows, write_csv
from tests.flows.deployed import client, deployed, environment, run, worker

__all__ = ["client", "deployed", "environment", "run", "worker"]  # fixtures

Settings = Callable[..., RetrainConfig]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="package")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a running stack and Prefect server, also set in this process.

    They end with the tests of this folder: a Prefect server and a worker that nobody uses take a tenth of a core.
    """
    folder = tmp_path_factory.mktemp("servers")
    with (
        local.stack(folder / "stack") as stack,
        local.exported(stack.environment),
        prefect_server.running(folder) as environment,
    ):
        yield {**stack.environment, **environment}


@pytest.fixture(scope="package")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture
def settings(tmp_path: Path, workspace: Path, tiny_base: Path) -> Settings:
    """Makes configurations: toy rows on the tiny base, dotted overrides with `__` for the dots."""
    return settings_in(tmp_path, workspace, tiny_base)


def settings_in(folder: Path, workspace: Path, base: Path) -> Settings:
    """The same with rows in this folder, on another base."""

    def make(model: str, rows: int = 600, **overrides: Any) -> RetrainConfig:
        path = folder / f"{model}-{rows}.csv"
        if not path.exists():
            write_csv(path, toy_rows(rows))
        content: dict[str, Any] = {
            "model": model,
            "data": {"source": str(path)},
            "split": {"test": 0.3},
            "base": {"name": str(base)},
            "adapter": {
                "bottleneck": {"reduction_factor": 2},
                "schedule": {"epochs": 8, "learning_rates": {"body": 1e-2, "layer_norm": 1e-2, "head": 1e-2}},
            },
            "baseline": {"schedule": {"epochs": 4, "learning_rates": {"body": 3e-3, "layer_norm": 3e-3, "head": 1e-2}}},
            "training": {"max_tokens": 16},
            "gate": {"margin": 0.2, "champion_margin": 0.2, "slice_margin": 0.4, "max_trainable_share": 0.2},
            "compute": {"workspace": str(workspace), "job_memory_gb": 1},
        }
        for dotted, value in overrides.items():
            section = content
            *parents, last = dotted.split("__")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return parse(content, "the test")

    return make


@pytest.fixture(scope="package")
def command(servers: dict[str, str]) -> Command:
    """Runs `python -m MODULE …` with the servers in its environment, forked: it need not import the libraries again."""

    def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return forks.run(["-m", module, *arguments], {**os.environ, **servers, **environment})

    return run


@pytest.fixture
def own_logging() -> Iterator[None]:
    """What a command that runs in this process does to logging, and sets for it, is undone after the test."""
    log, root = logging.getLogger("adapterline"), logging.getLogger()
    handlers, levels = [*log.handlers], [(handler, handler.level) for handler in root.handlers]
    with mock.patch.dict(os.environ):
        yield
    log.handlers = handlers
    for handler, level in levels:
        handler.setLevel(level)
