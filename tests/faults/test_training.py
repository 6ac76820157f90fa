"""A retrain whose jobs train while a server is killed, or it is itself: the same version as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from components.config import RegistryConfig
from components.registry import bundle, tracking, versions
from components.training import checkpoint
from tests.faults import outage
from tests.faults.test_registration import retrain
from tests.flows.conftest import settings_in
from tests.infra.test_stack import until

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.long, pytest.mark.xdist_group("stack")]

# Enough for a job to be killed before it ends.
EPOCHS = 80


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def configured(tiny_base: Path, work: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Writes a configuration for a model of the test's own, or of another name, with its jobs in `workspace`."""

    def write(name: str = "", workspace: Path = work) -> str:
        model = name or "".join(sign if sign.isalnum() else "-" for sign in request.node.name)
        schedules = {
            f"{job}__schedule__{word}": EPOCHS for job in ("adapter", "baseline") for word in ("epochs", "patience")
        }
        settings = settings_in(tmp_path, workspace, tiny_base)(model, **schedules)
        path = tmp_path / f"{model}.yaml"
        path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        return str(path)

    return write


def started(configuration: str, work: Path) -> subprocess.Popen[str]:
    """A retrain by hand of which a job has left a checkpoint."""
    command = [sys.executable, "-m", "flows.retrain", "--config", configuration]
    process = subprocess.Popen(
        command,
        env={**os.environ},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    until(lambda: any(work.glob(f"jobs/*/{checkpoint.FOLDER}/{checkpoint.LAST}")), "a job has left a checkpoint")
    return process


def predictions(work: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in work.glob(f"jobs/*/{bundle.PREDICTIONS}")}


def candidate(configuration: str) -> str:
    model = yaml.safe_load(Path(configuration).read_text())["model"]
    found = versions.with_alias(tracking.connect(RegistryConfig()), model, versions.CANDIDATE)
    assert found is not None
    return found.number


@pytest.mark.fault("kill -9 of S3, MLflow or the Prefect server while jobs train", "they train on: one version")
@pytest.mark.parametrize("who", ["s3", "mlflow", "prefect"])
def test_a_server_dies(stack: Path, configured: Callable[..., str], work: Path, who: str) -> None:
    configuration = configured()
    with started(configuration, work) as flow:
        outage.kill(stack, who)
        _, errors = flow.communicate()
    assert flow.returncode == 0, errors
    assert candidate(configuration) == "1"


@pytest.mark.usefixtures("stack")
@pytest.mark.fault("kill -9 of a retrain and its jobs", "run again it goes on from their checkpoints: same predictions")
def test_the_retrain_dies(configured: Callable[..., str], work: Path, tmp_path: Path) -> None:
    configuration = configured()
    with started(configuration, work) as flow:
        os.killpg(flow.pid, signal.SIGKILL)
    assert predictions(work) == {}
    assert retrain(configuration).returncode == 0
    assert candidate(configuration) == "1"

    assert retrain(configured("undisturbed", tmp_path / "elsewhere")).returncode == 0
    assert len(predictions(work)) == 2
    assert predictions(work) == predictions(tmp_path / "elsewhere")
