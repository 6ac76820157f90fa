"""Several processes in one job: they make the bundle that one makes, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset

from components.config import SplitConfig, TrainingConfig
from components.data import ledger, rows
from components.data.split import split
from components.errors import ConfigError, TrainingError
from components.registry import bundle
from components.training import distributed, job, launch, progress
from components.training.distributed import NO_LABEL, Group
from components.training.spec import DataRef, JobSpec, Limits
from tests.conftest import make_base, toy_rows
from tests.training.toy_jobs import LABELS, silent, toy_spec

TRAINING = TrainingConfig(max_tokens=32, precision="fp32", class_weights="balanced")
TWO = Limits(threads=1, device="cpu", processes=2)
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def calm_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout: its masks are drawn for the rows of a process, so they depend on how many there are."""
    return make_base(tmp_path_factory.mktemp("calm"), hidden_dropout_prob=0.0)


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> DataRef:
    """Three good rows for a bad one, and a last batch of a single row: one process gets none of it."""
    folder = tmp_path_factory.mktemp("lopsided")
    chosen = [row for number, row in enumerate(toy_rows(322)) if row[1] == "good" or number % 6 == 0]
    texts, labels = zip(*chosen, strict=True)
    table = rows.clean(Dataset.from_dict({"text": list(texts), "label": list(labels)}), LABELS)
    made = split(table, SplitConfig(validation=0.15, test=0.25))
    assert len(made.parts["train"]) % TRAINING.batch_size == 1
    ledger.save(made, str(folder))
    return DataRef(uri=str(folder), digest=made.digest)


MakeSpec = Callable[..., JobSpec]


@pytest.fixture
def make_spec(calm_base: Path, lopsided: DataRef) -> MakeSpec:
    def make(method: str = "pfeiffer", **changes: Any) -> JobSpec:
        return toy_spec(calm_base, lopsided, method, **{"training": TRAINING, "limits": TWO, **changes})

    return make


def by_launch(spec: JobSpec, path: str, out: str) -> list[str]:
    return launch.command(spec, path, out)


def by_accelerate(spec: JobSpec, path: str, out: str) -> list[str]:
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    return [str(BIN / "accelerate"), "launch", *options, "-m", launch.JOB, path, out, "--progress", "json"]


def by_torchrun(spec: JobSpec, path: str, out: str) -> list[str]:
    options = ["--standalone", "--nproc-per-node", "2"]
    return [str(BIN / "torchrun"), *options, "-m", launch.JOB, path, out, "--progress", "json"]


Launcher = Callable[[JobSpec, str, str], list[str]]


def start(spec: JobSpec, folder: Path, launcher: Launcher = by_launch) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    path = folder / "spec.json"
    path.write_text(spec.model_dump_json())
    return run(launcher(spec, str(path), str(folder / "out")))


def run(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


def events_of(output: str) -> list[progress.Event]:
    return [event for line in output.splitlines() if (event := progress.parse(line))]


def metrics_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


@pytest.mark.parametrize(("method", "launcher"), [("full", by_accelerate), ("pfeiffer", by_torchrun)])
def test_two_processes_make_the_bundle_of_one(
    make_spec: MakeSpec, tmp_path: Path, method: str, launcher: Launcher
) -> None:
    spec = make_spec(method)
    one = job.run(spec, str(tmp_path / "one"), silent)
    process = start(spec, tmp_path / "two", launcher)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    two = bundle.read_manifest(tmp_path / "two" / "out")
    assert (two.job_digest, set(two.files)) == (one.job_digest, set(one.files))
    alone, together = (bundle.read_predictions(tmp_path / name) for name in ("one", "two/out"))
    assert together.rows == alone.rows
    assert together.probabilities == pytest.approx(alone.probabilities, abs=1e-4)
    wanted, found = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two" / "out")
    assert found["best_epoch"] == wanted["best_epoch"]
    losses = [[entry["train_loss"] for entry in measured["history"]] for measured in (wanted, found)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    ends = [event.epoch for event in events_of(output) if event.metrics is not None]
    assert ends == [1, 2, 3, 4], "one process tells, and no other"


@pytest.mark.fault("kill -9 of one of a job's processes", "all end; the next try goes on from the last checkpoint")
def test_a_killed_process_ends_the_job_and_the_next_try_resumes(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(epochs=50)
    process = start(spec, tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if (event := progress.parse(line)) and event.metrics is not None:
            ranks = [each for each in psutil.Process(process.pid).children() if launch.JOB in each.cmdline()]
            next(each for each in ranks if each.environ()["RANK"] == "1").send_signal(signal.SIGKILL)
            break
    errors = process.stderr.read()
    assert process.wait(120) == 128 + signal.SIGKILL
    assert errors.splitlines()[-1].startswith("expected every process of the job to finish; found one ended by SIGKILL")
    assert not [each for each in ranks if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    again = start(spec, tmp_path)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert events_of(output)[0].epoch > 1
    start(spec, tmp_path / "undisturbed").communicate(timeout=300)
    resumed, undisturbed = (bundle.read_predictions(tmp_path / name) for name in ("out", "undisturbed/out"))
    assert resumed.probabilities == pytest.approx(undisturbed.probabilities, abs=1e-4)


def test_ending_the_launcher_ends_its_processes(make_spec: MakeSpec, tmp_path: Path) -> None:
    process = start(make_spec(epochs=500), tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    ranks = psutil.Process(process.pid).children()
    process.kill()  # which leaves it no time to end them
    process.communicate(timeout=60)
    assert len(ranks) == 2
    assert psutil.wait_procs(ranks, timeout=60)[1] == []


def unlike(spec: JobSpec, folder: Path, name: str, value: str) -> tuple[int, list[str]]:
    """Exit code and lines of a job whose second process differs."""
    (folder / "spec.json").write_text(spec.model_dump_json())
    command = launch.command(spec, str(folder / "spec.json"), str(folder / "out"))
    at = command.index(launch.JOB)
    process = run([*command[:at], "tests.training.second_differs", name, value, *command[at + 1 :]])
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors.splitlines()


def test_an_error_of_one_process_ends_the_job_with_its_line(make_spec: MakeSpec, tmp_path: Path) -> None:
    code, lines = unlike(make_spec(), tmp_path, "ADAPTERLINE_BASE", "./nowhere")
    assert code == 1
    assert [line.partition(";")[2].split(";")[0] for line in lines] == [" found './nowhere'"]


def test_processes_with_unlike_specs_are_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(make_spec(seed=2).model_dump_json())
    code, lines = unlike(make_spec(), tmp_path, "spec", str(tmp_path / "other.json"))
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("expected the same job on every process; found job ")


def test_an_error_of_every_process_is_said_once(make_spec: MakeSpec, tmp_path: Path) -> None:
    process = start(make_spec(limits=Limits(threads=1, device="cuda", processes=2)), tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    wanted = "a CUDA device for each of 2 processes" if torch.cuda.is_available() else "a CUDA device; found none"
    assert errors.count("\n") == 1
    assert wanted in errors


def test_one_process_needs_no_launcher(make_spec: MakeSpec) -> None:
    spec = make_spec(limits=Limits(threads=1, device="cpu"))
    command = launch.command(spec, "s3://bucket/spec.json", "s3://bucket/out")
    job_alone = ["-m", launch.JOB, "s3://bucket/spec.json", "s3://bucket/out", "--progress", "json"]
    assert command == [sys.executable, *job_alone]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 16])
def test_every_row_of_a_batch_counts_once(size: int, count: int) -> None:
    batch, labels = np.arange(100, 100 + count), np.arange(200)
    shares = [Group(rank, size).share(batch, labels) for rank in range(size)]
    counted = [row for mine, target in shares for row, label in zip(mine, target, strict=True) if label != NO_LABEL]
    assert sorted(counted) == batch.tolist()
    assert all(len(mine) > 0 for mine, _ in shares)


def test_rows_keep_their_labels() -> None:
    labels = np.random.default_rng(0).integers(0, 2, 200)
    mine, target = Group(1, 3).share(np.arange(50, 66), labels)
    assert target.tolist() == labels[mine].tolist()


def test_processes_and_epochs_draw_unlike_masks() -> None:
    seeds = {Group(rank, 8).seed(job_seed, epoch) for rank in range(8) for epoch in range(50) for job_seed in (0, 7)}
    assert len(seeds) == 8 * 50 * 2


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.from_environment() == distributed.ALONE


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="RANK, WORLD_SIZE"):
        distributed.from_environment()


@pytest.mark.parametrize(
    ("count", "processes", "message"), [(0, 1, "found none"), (1, 2, "found 1 on this machine"), (3, 4, "at most 3")]
)
def test_missing_devices_are_named(monkeypatch: pytest.MonkeyPatch, count: int, processes: int, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(TrainingError, match=message):
        distributed.find_device("cuda", Group(0, processes, 0, processes))
