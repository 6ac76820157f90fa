"""Jobs as subprocesses and over S3: followed, killed, resumed, ended with their flow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil
import pytest
import yaml
from prefect.futures import PrefectFuture

from components import base_model, forks, storage
from components.config import BaseConfig, Columns, DataConfig, RetrainConfig
from components.data import ledger, rows, sources
from components.data.split import split
from components.errors import JobKilled, TrainingError
from components.registry import bundle
from components.training import job, progress
from components.training.spec import DataRef, JobSpec, Limits
from flows import jobs
from flows.command import INTERRUPTED
from flows.values import Plan
from tests.conftest import toy_rows, write_csv
from tests.flows.conftest import Settings

STORE = "s3://adapterline/jobs-test"
servers = [pytest.mark.integration, pytest.mark.xdist_group("servers-of-commands"), pytest.mark.usefixtures("servers")]

PATIENCE_S = 10


class MakeSpec(Protocol):
    """Makes the adapter job of the toy task, its data saved in a store; `epochs`: how many, for who stops it early."""

    def __call__(self, store: str, epochs: int | None = None) -> JobSpec: ...


@pytest.fixture
def spec(settings: Settings, tmp_path: Path) -> MakeSpec:
    def make(store: str, epochs: int | None = None) -> JobSpec:
        long = {} if epochs is None else {"adapter__schedule__epochs": epochs, "adapter__schedule__patience": epochs}
        config: RetrainConfig = settings("jobs", rows=300, **long)
        read = sources.read(config.data)
        labels = rows.label_names(read.table, None)
        record = ledger.accept(
            store, "jobs", split(rows.clean(read.table, labels), config.split), "data", "settings", 1
        )
        base = base_model.find(BaseConfig(name=config.base.name))
        return Plan(config, base.pin, "data", labels, 1, Limits(threads=1, device="cpu")).adapter(record)

    return make


def ignore(event: progress.Event) -> None:
    """Progress that nobody looks at."""


def follow(spec: JobSpec, out: Path, report: Callable[[progress.Event], None] = ignore) -> None:
    jobs.follow(spec, out, "", "", 600, report)


def children(flow: psutil.Process) -> list[psutil.Process]:
    """The jobs of a flow: what the process that forks for it has forked."""
    parents = [each for each in flow.children() if forks.__file__ in each.cmdline()]
    return [each for parent in parents for each in parent.children()]


def child() -> psutil.Process:
    (found,) = children(psutil.Process())
    return found


@pytest.mark.fault(
    "kill -9 of a training process",
    "told as such; the next try goes on from the last checkpoint to the same predictions",
)
def test_a_killed_job_is_told_apart_and_resumes_to_the_same_predictions(spec: MakeSpec, tmp_path: Path) -> None:
    task = spec(str(tmp_path / "store"), 25)
    epochs: list[int] = []

    def kill_after_two_epochs(event: progress.Event) -> None:
        if event.metrics is not None:
            epochs.append(event.epoch)
            if len(epochs) == 2:
                child().send_signal(signal.SIGKILL)

    with pytest.raises(JobKilled, match="SIGKILL"):
        follow(task, tmp_path / "killed", kill_after_two_epochs)
    assert not bundle.is_complete(tmp_path / "killed")
    resumed: list[int] = []
    follow(task, tmp_path / "killed", lambda event: resumed.append(event.epoch) if event.metrics else None)
    assert resumed[0] > 1, "it went on from a checkpoint"

    follow(task, tmp_path / "undisturbed")
    one, other = (bundle.read_predictions(tmp_path / name) for name in ("killed", "undisturbed"))
    assert (one.probabilities == other.probabilities).all()


def test_a_job_ends_with_the_flow_that_started_it(spec: MakeSpec, tmp_path: Path) -> None:
    started: list[psutil.Process] = []

    def interrupt(event: progress.Event) -> None:
        started.append(child())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(spec(str(tmp_path / "store"), 100_000), tmp_path / "out", interrupt)
    assert not started[0].is_running()


def test_jobs_end_with_a_flow_that_is_interrupted_while_it_submits_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_interrupted", threading.Event())  # or no job of the tests after this one would start
    runs, ended = threading.Event(), threading.Event()

    def job() -> None:
        with jobs.ended_with_flow(ended.set):
            runs.set()
            ended.wait(PATIENCE_S)

    thread = threading.Thread(target=job)

    def submit() -> list[PrefectFuture[None]]:
        thread.start()
        assert runs.wait(PATIENCE_S)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.all_of(submit)
    assert ended.is_set()
    thread.join()


def test_a_job_beyond_its_time_is_ended_and_says_so(spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="still running"):
        jobs.follow(spec(str(tmp_path / "store"), 100_000), tmp_path / "out", "", "", 0.5 / 3600, ignore)


def test_a_failing_job_gives_its_own_line(spec: MakeSpec, tmp_path: Path) -> None:
    task = spec(str(tmp_path / "store"))
    broken = task.model_copy(update={"data": DataRef(uri=str(tmp_path / "nowhere"), digest="0" * 64)})
    with pytest.raises(TrainingError, match="nothing there") as caught:
        follow(broken, tmp_path / "out")
    assert not caught.value.retry_can_help


def test_what_a_job_has_to_say_is_logged_and_is_no_progress(
    spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(jobs.log, "warning", lambda line, *values: told.append(line % values))
    monkeypatch.setenv("ADAPTERLINE_CACHE", str(tmp_path / "cache"))
    tight = Limits(threads=1, device="cpu", trunk_cache_gb=1e-6)
    epochs: list[int] = []
    follow(spec(str(tmp_path / "store")).model_copy(update={"limits": tight}), tmp_path / "out", of_epochs(epochs))
    assert epochs == list(range(1, len(epochs) + 1))
    trains, validates = told
    for line in told:
        assert line.startswith("warning   job pfeiffer: of ")
        assert line.endswith(
            "of the texts 0 are kept, the rest is computed in each step: raise compute.trunk_cache_gb (1e-06)"
        )
    assert trains != validates


def of_epochs(seen: list[int]) -> Callable[[progress.Event], None]:
    return lambda event: seen.append(event.epoch) if event.metrics is not None else None


class TestOverS3:
    pytestmark = servers

    def test_data_and_bundle_travel_by_uri(
        self, spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ADAPTERLINE_CACHE", str(tmp_path / "cache"))
        task = spec(STORE)
        out = f"{STORE}/bundle"
        first = job.run(task, out, ignore)
        assert storage.names(out)[-2:] == ["metrics.json", "predictions.safetensors"]
        assert storage.exists(f"{out}/{bundle.MANIFEST}")
        assert job.run(task, out, ignore) == first
        local = storage.download_folder(out, tmp_path / "back")
        assert bundle.read_manifest(local) == first

    def test_rows_are_read_from_s3(self, tmp_path: Path) -> None:
        path = write_csv(tmp_path / "rows.csv", toy_rows(50), ("body", "queue"))
        storage.write(f"{STORE}/rows.csv", path.read_bytes())
        columns = Columns(text="body", label="queue")
        there, here = (
            sources.read(DataConfig(source=source, columns=columns)).table
            for source in (f"{STORE}/rows.csv", str(path))
        )
        assert rows.data_digest(there) == rows.data_digest(here)


@pytest.mark.slow
class TestInterrupted:
    pytestmark = servers

    @pytest.mark.parametrize("by", ["SIGTERM", "Ctrl-C"])
    def test_ending_the_flow_ends_its_jobs_and_says_one_line(
        self, settings: Settings, servers: dict[str, str], tmp_path: Path, by: str
    ) -> None:
        slow = settings("interrupted", rows=2000, adapter__schedule__epochs=500, adapter__schedule__patience=500)
        path = tmp_path / "slow.yaml"
        path.write_text(yaml.safe_dump(slow.model_dump(mode="json")))
        environment = {**os.environ, **servers}
        if by == "Ctrl-C":  # of what it started itself too, Prefect's temporary server
            del environment["PREFECT_API_URL"]
            environment["PREFECT_HOME"] = str(tmp_path / "prefect")
        flow = subprocess.Popen(
            [sys.executable, "-m", "flows.retrain", "--config", str(path)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        found: list[psutil.Process] = []
        while len(found) < 2 and flow.poll() is None:
            time.sleep(0.5)
            found = children(psutil.Process(flow.pid))
        if by == "Ctrl-C":
            os.killpg(flow.pid, signal.SIGINT)  # a terminal tells everyone
        else:
            flow.send_signal(signal.SIGTERM)
        _, errors = flow.communicate(timeout=60)
        assert (flow.returncode, errors) == (130, f"{INTERRUPTED}\n")
        assert not [each for each in found if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
