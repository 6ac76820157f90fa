"""Checkpoints, within epochs and at their ends: single safetensors files, written aside and moved into place.

checkpoint/last.safetensors     trained weights, optimiser moments, and in the header where training is: to go on from
checkpoint/best-3.safetensors   trained weights of the best epoch so far: what the bundle will hold

The best weights are written first and older ones removed last, so that at any moment those of which `last` speaks are
there.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from components.errors import ConfigError
from components.registry import bundle
from components.training.loop import Learner, State

FOLDER = bundle.CHECKPOINT
LAST = "last.safetensors"
WEIGHT, MOMENT = "weight:", "moment:"


def best_name(epoch: int | str) -> str:
    return f"best-{epoch}.safetensors"


def save(out: Path, job: str, learner: Learner, state: State, best: bool) -> None:
    """Write the state of the job with this digest; with `best`, keep its weights: an epoch ended that is the best."""
    folder = out / FOLDER
    weights = {WEIGHT + name: _stored(parameter) for name, parameter in learner.trained.items()}
    if best:
        _write(folder / best_name(state.epoch), weights, {})
    optimizer = learner.optimizer.state_dict()
    moments = {
        f"{MOMENT}{index}.{name}": _stored(value)
        for index, entry in optimizer["state"].items()
        for name, value in entry.items()
    }
    about = {
        "job": json.dumps(job),
        "state": json.dumps(asdict(state)),
        "rates": json.dumps([group["lr"] for group in optimizer["param_groups"]]),
        "scheduler": json.dumps(learner.scheduler.state_dict()),
    }
    _write(folder / LAST, {**weights, **moments}, about)
    for path in folder.glob(best_name("*")):
        if path.name != best_name(state.best_epoch):
            path.unlink()


def resume(out: Path, job: str, learner: Learner) -> State:
    """Put the last checkpoint into the learner and say where training is; a new State when there is none.

    Of several processes the main one reads it for all. Raises ConfigError when it is that of another job.
    """
    last = out / FOLDER / LAST
    content = learner.group.from_main(lambda: last.read_bytes() if last.is_file() else None)
    if content is None:
        return State()
    about = _about(content[8 : 8 + int.from_bytes(content[:8], "little")])
    state = _state(about, job, str(out))
    tensors = load(content)
    _load(learner, tensors)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key in (key for key in tensors if key.startswith(MOMENT)):
        index, _, name = key.removeprefix(MOMENT).partition(".")
        moments.setdefault(int(index), {})[name] = tensors[key]
    groups = learner.optimizer.state_dict()["param_groups"]
    rated = [{**group, "lr": rate} for group, rate in zip(groups, about["rates"], strict=True)]
    learner.optimizer.load_state_dict({"state": moments, "param_groups": rated})
    learner.scheduler.load_state_dict(about["scheduler"])
    return state


def state_of(last: Path, job: str, place: str) -> State:
    """Where the training of a checkpoint is. Raises ConfigError when it is that of another job."""
    with last.open("rb") as file:
        return _state(_about(file.read(int.from_bytes(file.read(8), "little"))), job, place)


def load_best(out: Path, learner: Learner, epoch: int) -> None:
    """Put the weights of the best epoch into the model."""
    path = out / FOLDER / best_name(epoch)
    _load(learner, load(learner.group.from_main(path.read_bytes)))


def clear(out: Path) -> None:
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _about(header: bytes) -> dict[str, Any]:
    """What `save` wrote beside the tensors: a safetensors file opens with its header's length and JSON."""
    return {name: json.loads(value) for name, value in json.loads(header)["__metadata__"].items()}


def _state(about: dict[str, Any], job: str, place: str) -> State:
    if about["job"] != job:
        raise ConfigError(
            f"checkpoints of job {job[:12]} in {place}", f"those of {about['job'][:12]}", "name another folder"
        )
    return State(**about["state"])


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _load(learner: Learner, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in learner.trained.items():
            parameter.copy_(tensors[WEIGHT + name])


def _write(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    save_file(tensors, fresh, metadata=about)
    fresh.replace(path)
