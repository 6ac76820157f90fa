"""Jobs whose bundle goes to S3: resumed on another machine, through outages, and nothing else is left there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from components import storage
from components.errors import ConfigError, StorageUnavailable
from components.registry import bundle
from components.training import checkpoint, job, launch, mirror
from components.training.loop import State
from components.training.mirror import Mirror
from components.training.progress import Event, parse
from components.training.spec import DataRef, JobSpec
from infra import local
from tests.training.test_checkpoint import Interrupted, Interrupting, learner_of
from tests.training.toy_jobs import silent, toy_spec

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("stack")]

NOBODY = "http://127.0.0.1:1"  # no server listens on this port
ENDPOINT = "AWS_ENDPOINT_URL_S3"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with local.stack(tmp_path_factory.mktemp("stack")) as stack, local.exported(stack.environment):
        yield stack.environment[ENDPOINT]


@pytest.fixture
def out(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh place in S3. Until a test moves, it is on the first machine."""
    monkeypatch.setenv("ADAPTERLINE_CACHE", str(tmp_path / "first machine"))
    monkeypatch.setenv(ENDPOINT, store)  # what a test makes of it is undone after it
    return f"s3://{local.BUCKET}/{tmp_path.name}"


@pytest.fixture
def spec(lively_base: Path, data: DataRef) -> JobSpec:
    return toy_spec(lively_base, data, "pfeiffer", epochs=6)


def on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADAPTERLINE_CACHE", str(tmp_path / "second machine"))


def broken_off(spec: JobSpec, out: str, after: int) -> None:
    with pytest.raises(Interrupted):
        job.run(spec, out, Interrupting(after))


def predictions(out: str, folder: Path) -> np.ndarray:  # type: ignore[type-arg]
    return bundle.read_predictions(storage.download_folder(out, folder)).probabilities


def test_a_job_goes_on_elsewhere_to_the_same_predictions(
    spec: JobSpec, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_off(spec, out, after=3)
    on_another_machine(monkeypatch, tmp_path)
    epochs: list[int] = []
    job.run(spec, out, lambda event: epochs.append(event.epoch))
    assert epochs[0] > 1
    job.run(spec, str(tmp_path / "undisturbed"), silent)
    undisturbed = bundle.read_predictions(tmp_path / "undisturbed").probabilities
    assert np.array_equal(predictions(out, tmp_path / "back"), undisturbed)


def test_two_machines_that_share_no_disk_go_on_from_s3(
    spec: JobSpec, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_off(spec, out, after=3)
    storage.write(f"{out}.spec.json", spec.model_dump_json().encode())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    processes = []
    for rank in ("0", "1"):
        command = [str(Path(sys.executable).parent / "torchrun"), *shared, "--node-rank", rank, "-m", launch.JOB]
        environment = {**os.environ, "ADAPTERLINE_CACHE": str(tmp_path / f"machine {rank}"), "GLOO_SOCKET_IFNAME": "lo"}
        words = [*command, f"{out}.spec.json", out, "--progress", "json"]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment))
    outputs = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[1] == []
    first = parse(outputs[0][0])
    assert first is not None
    assert first.epoch > 1
    job.run(spec, str(tmp_path / "undisturbed"), silent)
    undisturbed = bundle.read_predictions(tmp_path / "undisturbed").probabilities
    assert predictions(out, tmp_path / "back") == pytest.approx(undisturbed, abs=1e-4)


def test_a_finished_bundle_lies_alone(spec: JobSpec, out: str, tmp_path: Path) -> None:
    broken_off(spec, out, after=2)
    assert any(name.startswith(checkpoint.FOLDER) for name in storage.names(out))
    manifest = job.run(spec, out, silent)
    assert set(storage.names(out)) == {bundle.MANIFEST, *manifest.files}
    assert bundle.read_manifest(storage.download_folder(out, tmp_path / "back")) == manifest


def test_a_finished_job_keeps_no_scratch(spec: JobSpec, out: str, tmp_path: Path) -> None:
    job.run(spec, out, silent)
    assert [path for path in (tmp_path / "first machine" / "jobs").iterdir() if path.is_dir()] == []


def test_another_jobs_checkpoints_are_refused(spec: JobSpec, out: str) -> None:
    broken_off(spec, out, after=1)
    with pytest.raises(ConfigError, match=f"checkpoints of job .* in {out}"):
        job.run(spec.model_copy(update={"seed": 9}), out, silent)


class Machine:
    """A scratch folder with a learner, and its mirror; the seed says whose weights these are."""

    def __init__(self, base: Path, folder: Path, out: str, seed: int) -> None:
        self.folder, self.learner = folder, learner_of(base, seed)
        self.mirror = Mirror("a job", folder, out)

    def reach(self, epoch: int) -> None:
        checkpoint.save(self.folder, "a job", self.learner, State(epoch=epoch, step=epoch, best_epoch=epoch), best=True)

    def epoch(self) -> int:
        return checkpoint.resume(self.folder, "a job", self.learner).epoch


@pytest.mark.parametrize(("here", "wins"), [(0, 3), (2, 3), (4, 4)])
def test_the_checkpoint_that_is_further_wins(tiny_base: Path, out: str, tmp_path: Path, here: int, wins: int) -> None:
    there, machine = Machine(tiny_base, tmp_path / "there", out, 1), Machine(tiny_base, tmp_path / "here", out, 2)
    there.reach(3)
    there.mirror.copy(3)
    if here:
        machine.reach(here)
    machine.mirror.fetch()
    assert machine.epoch() == wins
    checkpoint.load_best(tmp_path / "here", machine.learner, wins)


def test_best_weights_without_their_last_epoch_do_no_harm(tiny_base: Path, out: str, tmp_path: Path) -> None:
    """As when a job was killed between the two uploads."""
    there, machine = Machine(tiny_base, tmp_path / "there", out, 1), Machine(tiny_base, tmp_path / "here", out, 2)
    there.reach(3)
    there.mirror.copy(3)
    storage.write(storage.join(out, checkpoint.FOLDER, checkpoint.best_name(4)), b"of epoch 4")
    machine.mirror.fetch()
    assert machine.epoch() == 3
    checkpoint.load_best(tmp_path / "here", machine.learner, 3)


def test_weights_that_were_surpassed_leave_s3(tiny_base: Path, out: str, tmp_path: Path) -> None:
    machine = Machine(tiny_base, tmp_path / "here", out, 1)
    for epoch in (1, 2):
        machine.mirror = Mirror("a job", machine.folder, out)  # which has not copied just now
        machine.reach(epoch)
        machine.mirror.copy(epoch)
    assert storage.names(storage.join(out, checkpoint.FOLDER)) == [checkpoint.best_name(2), checkpoint.LAST]


def test_copies_pause_in_proportion_to_what_they_take(
    tiny_base: Path, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "COPY_SHARE", 1e-6)
    machine = Machine(tiny_base, tmp_path / "here", out, 1)
    for epoch in (1, 2):
        machine.reach(epoch)
        machine.mirror.copy(epoch)
    assert checkpoint.best_name(1) in storage.names(storage.join(out, checkpoint.FOLDER))


class Outage:
    """A progress report that cuts the way to S3 at the end of one epoch, and mends it at the end of another."""

    def __init__(self, store: str, begins: int, ends: int) -> None:
        self.store, self.begins, self.ends = store, begins, ends

    def __call__(self, event: Event) -> None:
        if event.metrics is not None and event.epoch in (self.begins, self.ends):
            os.environ[ENDPOINT] = NOBODY if event.epoch == self.begins else self.store


@pytest.mark.fault("S3 away while a job trains", "it trains on; checkpoints are copied when S3 is back")
def test_training_goes_on_while_s3_is_away(
    spec: JobSpec,
    out: str,
    store: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mirror, "COPY_SHARE", 1.0)  # a slow first copy must not leave out those of the outage
    job.run(spec, out, Outage(store, 2, 4))
    assert "checkpoint not copied, the next one is tried again" in caplog.text
    assert len(predictions(out, tmp_path / "back"))


@pytest.mark.fault("S3 away when a job ends", "the bundle is delivered when S3 is back")
def test_the_bundle_waits_until_s3_is_back(
    spec: JobSpec, out: str, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    back = threading.Timer(3, lambda: os.environ.update({ENDPOINT: store}))

    def cut(event: Event) -> None:
        if event.metrics is not None and event.epoch == 6:
            os.environ[ENDPOINT] = NOBODY
            back.start()

    manifest = job.run(spec, out, cut)
    back.join()
    assert "bundle not uploaded" in caplog.text
    assert set(storage.names(out)) == {bundle.MANIFEST, *manifest.files}


@pytest.mark.fault(
    "S3 away for longer than 3 minutes when a job ends", "one line; the next try delivers the bundle without training"
)
def test_a_bundle_that_could_not_be_delivered_is_the_next_time(
    spec: JobSpec, out: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "DELIVERY_S", 0.0)
    with pytest.raises(StorageUnavailable, match="an S3 server that answers"):
        job.run(spec, out, Outage(store, 6, 7))
    os.environ[ENDPOINT] = store
    assert not storage.exists(storage.join(out, bundle.MANIFEST))

    def never(event: Event) -> None:
        raise AssertionError("it trained again")

    job.run(spec, out, never)
    assert storage.exists(storage.join(out, bundle.MANIFEST))


def test_a_job_that_cannot_reach_s3_says_so_in_one_line(
    out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENDPOINT, NOBODY)
    assert job.main([storage.join(out, "spec.json"), out]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("expected an S3 server that answers for s3://")
