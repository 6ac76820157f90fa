"""A whole stack with its docker worker, a deployed checkout, and jobs that run in containers of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker import DockerClient
from docker.models.containers import Container
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from components import base_model
from components.config import BaseConfig, RetrainConfig, parse
from components.data import ledger, rows, sources
from components.data.split import split
from components.training.spec import JobSpec
from flows import elsewhere, jobs
from flows.values import Plan
from infra import environment, local
from tests.conftest import toy_rows, write_csv

ROOT = Path(__file__).parents[2]
STORE = "s3://adapterline"


@dataclass(frozen=True)
class Running:
    """The stack and what its containers are given."""

    folder: Path
    variables: dict[str, str]
    engine: DockerClient
    base: Path

    def command(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a Python module in the checkout with the stack's environment."""
        return subprocess.run(
            [sys.executable, "-m", *words],
            capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **self.variables, **more},
        )  # fmt: skip

    def config(self, model: str, seed: int | None = None, **job_variables: Any) -> RetrainConfig:
        """A toy task on the tiny base, trained in containers without GPU. Each model has its own seed, so that no two
        tests share a job."""
        path = self.folder / f"{model}.csv"
        if not path.exists():
            write_csv(path, toy_rows(600))
        rates = {"body": 1e-2, "layer_norm": 1e-2, "head": 1e-2}
        content = {
            "model": model,
            "data": {"source": str(path)},
            "split": {"test": 0.3},
            "base": {"name": str(self.base)},
            "adapter": {"bottleneck": {"reduction_factor": 2}, "schedule": {"epochs": 8, "learning_rates": rates}},
            "baseline": {"schedule": {"epochs": 4, "learning_rates": {**rates, "body": 3e-3}}},
            "training": {"max_tokens": 16},
            "seed": zlib.crc32(model.encode()) if seed is None else seed,
            "gate": {"margin": 0.2, "champion_margin": 0.2, "slice_margin": 0.4, "max_trainable_share": 0.2},
            "compute": {
                "deployment": "train/cpu",
                "job_variables": {"volumes": [f"{self.base}:/base:ro"], "base": "/base", **job_variables},
                "threads": 1,
                "workspace": str(self.folder / "work"),
            },
        }  # fmt: skip
        return parse(content, "the test")

    def spec(self, config: RetrainConfig, epochs: int | None = None) -> JobSpec:
        """The adapter job of a configuration, its data saved in the store."""
        read = sources.read(config.data)
        labels = rows.label_names(read.table, None)
        parts = split(rows.clean(read.table, labels), config.split)
        number = len(ledger.records(STORE, config.model)) + 1
        record = ledger.accept(STORE, config.model, parts, "data", "settings", number)
        base = base_model.find(BaseConfig(name=config.base.name))
        job = Plan(config, base.pin, "data", labels, 1, jobs.limits(config.compute, 1)).adapter(record)
        if epochs is None:
            return job
        schedule = job.schedule.model_copy(update={"epochs": epochs, "patience": epochs})
        return job.model_copy(update={"schedule": schedule})

    def follow(self, config: RetrainConfig, job: JobSpec, report: Callable[[Any], None] = lambda event: None) -> Path:
        """Run a job where its configuration says; the folder with its bundle."""
        out = self.folder / "out" / f"{job.method}-{job.digest[:16]}"
        elsewhere.follow(job, out, STORE, "", config.compute, report)
        return out

    def containers(self, *, every: bool = False) -> list[Container]:
        """This stack's containers: running ones, or all."""
        label = f"adapterline.stack={self.variables['ADAPTERLINE_STACK_ID']}"
        found: list[Container] = self.engine.containers.list(all=every, filters={"label": label}, ignore_removed=True)
        return found

    def client(self) -> SyncPrefectClient:
        return get_client(sync_client=True)

    def runs(self, job: JobSpec) -> list[FlowRun]:
        """The runs of a job, newest first."""
        which = FlowRunFilter.model_validate({"tags": {"all_": [elsewhere.tag(job)]}})
        with self.client() as client:
            return client.read_flow_runs(flow_run_filter=which, sort=FlowRunSort.EXPECTED_START_TIME_DESC)


@contextmanager
def running(folder: Path, engine: DockerClient, base: Path) -> Iterator[Running]:
    """Bring a stack up in `folder`, deploy this checkout to it, and take it down again."""
    from infra import folder as place

    names = ("ADAPTERLINE_S3_PORT", "ADAPTERLINE_MLFLOW_PORT", "ADAPTERLINE_PREFECT_PORT")
    ports = dict(zip(names, map(str, local.free_ports(len(names))), strict=True))  # other tests take the usual ones
    stack, here = folder / "stack", {**os.environ, **ports, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "infra.local", "--folder", str(stack)]
    up = subprocess.run([*command, "up"], cwd=folder, env=here, capture_output=True, text=True, check=False)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        found = environment.supervised(stack)
        assert found is not None
        variables = {**found.environment, "ADAPTERLINE_STACK_ID": place.identity(stack)}
        settings = {
            PREFECT_API_URL: variables["PREFECT_API_URL"],
            PREFECT_API_AUTH_STRING: variables["PREFECT_API_AUTH_STRING"],
        }
        with local.exported(variables), temporary_settings(updates=settings):
            whole = Running(folder, variables, engine, base)
            deployed = whole.command("prefect", "--no-prompt", "deploy", "--all")
            assert deployed.returncode == 0, deployed.stdout + deployed.stderr
            yield whole
    finally:
        subprocess.run([*command, "down"], cwd=folder, env=here, check=False, capture_output=True)


def until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait for something that must happen; how soon is not what is tested."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.3)
