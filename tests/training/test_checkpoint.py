"""Interrupted jobs: what was learned before is kept, and the end is the same as without the interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from components.config import TrainingConfig
from components.errors import ConfigError
from components.registry import bundle
from components.training import checkpoint, job, loop
from components.training.loop import State
from components.training.progress import Event
from components.training.spec import DataRef, JobSpec
from tests.adapters.adapted import adapted, logits, stir
from tests.training.toy_jobs import silent, toy_spec


class Interrupted(Exception):
    """Stands for whatever ends a process."""


class Interrupting:
    """A progress report that raises at the end of an epoch, after its checkpoint was written."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, event: Event) -> None:
        if event.metrics is not None and event.epoch == self.after:
            raise Interrupted


def interrupted(spec: JobSpec, out: Path, after: int = 2) -> None:
    with pytest.raises(Interrupted):
        job.run(spec, str(out), Interrupting(after))


@pytest.mark.parametrize("method", ["pfeiffer", "houlsby", "full"])
@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_job_predicts_as_an_undisturbed_one(
    lively_base: Path, data: DataRef, tmp_path: Path, method: str, after: int
) -> None:
    spec = toy_spec(lively_base, data, method)
    job.run(spec, str(tmp_path / "whole"), silent)
    interrupted(spec, tmp_path / "parted", after)
    job.run(spec, str(tmp_path / "parted"), silent)
    whole, parted = (bundle.read_predictions(tmp_path / name) for name in ("whole", "parted"))
    assert np.array_equal(parted.probabilities, whole.probabilities)


def test_a_resumed_job_with_adapter_dropout_predicts_the_same(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    spec = toy_spec(lively_base, data, "pfeiffer", settings={"reduction_factor": 2, "dropout": 0.3})
    job.run(spec, str(tmp_path / "whole"), silent)
    interrupted(spec, tmp_path / "parted")
    job.run(spec, str(tmp_path / "parted"), silent)
    whole, parted = (bundle.read_predictions(tmp_path / name) for name in ("whole", "parted"))
    assert np.array_equal(parted.probabilities, whole.probabilities)


@pytest.mark.parametrize("step", [1, 15, 16, 20])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("full", None),
        ("pfeiffer", {"reduction_factor": 2, "dropout": 0.3, "drop_range": [0, 1]}),
        ("masked", {"reduction_factor": 2}),
    ],
)
def test_within_an_epoch_too(
    lively_base: Path,
    data: DataRef,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: object,
    step: int,
) -> None:
    """From any step, with all that is drawn; 15 steps are an epoch here."""
    spec = toy_spec(lively_base, data, method, epochs=2, settings=settings)
    job.run(spec, str(tmp_path / "whole"), silent)
    save = checkpoint.save

    def interrupting(out: Path, job: str, learner: loop.Learner, state: State, best: bool) -> None:
        save(out, job, learner, state, best)
        if state.step == step:
            raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(loop, "INTERVAL_S", 0.0)
        patched.setattr(loop, "WRITING_SHARE", 1.0)
        patched.setattr(checkpoint, "save", interrupting)
        job.run(spec, str(tmp_path / "parted"), silent)
    steps: list[int] = []
    job.run(spec, str(tmp_path / "parted"), lambda event: steps.append(event.step))
    assert min(steps) > step
    whole, parted = (bundle.read_predictions(tmp_path / name) for name in ("whole", "parted"))
    assert np.array_equal(parted.probabilities, whole.probabilities)


def test_epochs_before_the_interruption_are_not_repeated(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    spec = toy_spec(lively_base, data, "pfeiffer")
    interrupted(spec, tmp_path, after=3)
    epochs: list[int] = []
    job.run(spec, str(tmp_path), lambda event: epochs.append(event.epoch))
    assert set(epochs) == {4}


def test_an_interrupted_job_leaves_no_manifest(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    interrupted(toy_spec(lively_base, data, "pfeiffer"), tmp_path)
    assert not bundle.is_complete(tmp_path)


def test_a_finished_job_leaves_no_checkpoint(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    job.run(toy_spec(lively_base, data, "pfeiffer", epochs=1), str(tmp_path), silent)
    assert not (tmp_path / checkpoint.FOLDER).exists()


@pytest.mark.parametrize("cleared", [False, True])
def test_killed_as_it_finishes_a_job_is_not_trained_again(
    lively_base: Path, data: DataRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cleared: bool
) -> None:
    spec = toy_spec(lively_base, data, "pfeiffer", epochs=1)
    clear = checkpoint.clear

    def killed(out: Path) -> None:
        if cleared:
            clear(out)
        raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(checkpoint, "clear", killed)
        job.run(spec, str(tmp_path), silent)
    assert bundle.is_complete(tmp_path) == cleared  # or its files would not be those of the manifest
    manifest = job.run(spec, str(tmp_path), lambda event: pytest.fail("trained again"))
    assert bundle.read_manifest(tmp_path) == manifest
    assert not any(name.startswith(checkpoint.FOLDER) for name in manifest.files)


def test_another_job_does_not_resume_these_checkpoints(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    interrupted(toy_spec(lively_base, data, "pfeiffer"), tmp_path)
    with pytest.raises(ConfigError, match="checkpoints of job"):
        job.run(toy_spec(lively_base, data, "pfeiffer", seed=2), str(tmp_path), silent)


def learner_of(base: Path, seed: int) -> loop.Learner:
    model = adapted(base, "houlsby")
    stir(model, seed=seed)
    spec = toy_spec(base, DataRef(uri="", digest=""), "houlsby")
    return loop.learner(model, spec.schedule, TrainingConfig(), 100, torch.device("cpu"))


def test_the_state_is_read_as_it_was_written(tiny_base: Path, tmp_path: Path) -> None:
    state = State(
        epoch=3, step=21, best_epoch=2, best_rank=[0.75, -0.5], seconds=1.5, tokens=99, history=[{"epoch": 1}]
    )
    checkpoint.save(tmp_path, "a job", learner_of(tiny_base, 1), state, best=True)
    assert checkpoint.resume(tmp_path, "a job", learner_of(tiny_base, 2)) == state


def test_without_a_checkpoint_training_begins_anew(tiny_base: Path, tmp_path: Path) -> None:
    assert checkpoint.resume(tmp_path, "a job", learner_of(tiny_base, 1)) == State()


def test_the_best_weights_are_those_of_the_best_epoch_not_of_the_last(tiny_base: Path, tmp_path: Path) -> None:
    best, last, reader = (learner_of(tiny_base, seed) for seed in (1, 2, 3))
    checkpoint.save(tmp_path, "a job", best, State(epoch=1, best_epoch=1), best=True)
    checkpoint.save(tmp_path, "a job", last, State(epoch=2, best_epoch=1), best=False)
    checkpoint.load_best(tmp_path, reader, 1)
    assert torch.equal(logits(reader.model), logits(best.model))


def test_best_weights_that_were_surpassed_are_not_kept(tiny_base: Path, tmp_path: Path) -> None:
    for epoch in (1, 2):
        checkpoint.save(tmp_path, "a job", learner_of(tiny_base, epoch), State(epoch=epoch, best_epoch=epoch), True)
    names = {path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()}
    assert names == {checkpoint.LAST, checkpoint.best_name(2)}


def test_a_checkpoint_cut_short_between_its_files_leaves_the_one_before_it(tiny_base: Path, tmp_path: Path) -> None:
    first, second, reader = (learner_of(tiny_base, seed) for seed in (1, 2, 3))
    checkpoint.save(tmp_path, "a job", first, State(epoch=1, best_epoch=1), best=True)
    last = (tmp_path / checkpoint.FOLDER / checkpoint.LAST).read_bytes()
    first_best = (tmp_path / checkpoint.FOLDER / checkpoint.best_name(1)).read_bytes()
    checkpoint.save(tmp_path, "a job", second, State(epoch=2, best_epoch=2), best=True)
    (tmp_path / checkpoint.FOLDER / checkpoint.LAST).write_bytes(last)  # not yet replaced, nothing yet removed
    (tmp_path / checkpoint.FOLDER / checkpoint.best_name(1)).write_bytes(first_best)
    state = checkpoint.resume(tmp_path, "a job", reader)
    checkpoint.load_best(tmp_path, reader, state.best_epoch)
    assert torch.equal(logits(reader.model), logits(first.model))
