"""Registering while a server is killed or away, or the retrain itself is: one version in the end, and nothing half."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from components.config import RegistryConfig
from components.registry import tracking, versions
from tests.faults.felling import ITSELF, POINTS
from tests.flows.conftest import settings_in
from tests.infra.test_stack import PATIENCE_S

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.long, pytest.mark.xdist_group("stack")]

MODEL = "felled"
Configured = Callable[[str], str]


@pytest.fixture(scope="module")
def configured(stack: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Configured:
    """Writes a configuration like no other, whose jobs are done: what is left is to judge and to register."""
    folder = tmp_path_factory.mktemp("felled")
    make, written = settings_in(folder, folder / "work", tiny_base), []

    def write(name: str) -> str:
        written.append(name)
        path = folder / f"{len(written)}.yaml"
        path.write_text(yaml.safe_dump(make(MODEL, gate__seed=len(written)).model_dump(mode="json")))
        return str(path)

    assert retrain(write("first")).returncode == 0
    return write


def retrain(configuration: str) -> subprocess.CompletedProcess[str]:
    """By hand; again where the last one was killed and holds the model for another minute."""
    deadline = time.monotonic() + PATIENCE_S + 60
    while True:
        done = run("flows.retrain", "--config", configuration)
        if "expected no other run" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(5)


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)


def registered() -> list[str]:
    """The numbers of all versions; every one of them is whole."""
    client = tracking.connect(RegistryConfig()).client
    found = client.search_model_versions(f"name = '{MODEL}'")
    assert {version.tags["state"] for version in found} == {"proven"}
    return sorted((str(version.version) for version in found), key=int)


def open_runs() -> list[str]:
    there = tracking.connect(RegistryConfig())
    runs = there.client.search_runs([there.experiment_id], "attributes.status = 'RUNNING'")
    return [run.info.run_name for run in runs]


def require_one_more(before: list[str]) -> None:
    after = registered()
    assert after[:-1] == before, "one version more"
    candidate = versions.with_alias(tracking.connect(RegistryConfig()), MODEL, versions.CANDIDATE)
    assert candidate is not None
    assert candidate.number == after[-1]


@pytest.mark.fault("kill -9 of S3, MLflow or the Prefect server during a registration", "tried again: one version")
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("who", ["s3", "mlflow", "prefect"])
def test_a_server_dies(stack: Path, configured: Configured, point: str, who: str) -> None:
    before = registered()
    # Longer than boto3 tries for, which is what loads the version that is proven.
    seconds = "20" if (who, point) == ("s3", "proof") else "0"
    done = run("tests.faults.felling", point, who, seconds, str(stack), configured(f"{who} {point}"))
    assert done.returncode == 0, done.stderr
    require_one_more(before)
    assert open_runs() == []


@pytest.mark.fault("S3 refusing for 60 s during a registration", "waited for: one version")
def test_s3_is_away_for_a_minute(stack: Path, configured: Configured) -> None:
    before = registered()
    done = run("tests.faults.felling", "artifact", "s3", "60", str(stack), configured("away"))
    assert done.returncode == 0, done.stderr
    require_one_more(before)


@pytest.mark.fault("kill -9 of a retrain while it registers", "the earlier candidate stands; run again: one version")
@pytest.mark.parametrize("point", POINTS)
def test_the_retrain_dies(stack: Path, configured: Configured, point: str) -> None:
    before, configuration = registered(), configured(f"itself {point}")
    done = run("tests.faults.felling", point, ITSELF, "0", str(stack), configuration)
    assert done.returncode == -signal.SIGKILL, done.stderr
    candidate = versions.with_alias(tracking.connect(RegistryConfig()), MODEL, versions.CANDIDATE)
    assert candidate is not None
    assert candidate.number == before[-1]

    assert retrain(configuration).returncode == 0
    require_one_more(before)
