"""Checkpoints at the end of each epoch: single safetensors files, written aside and moved into place.

checkpoint/last.safetensors   trained weights, optimiser moments, and in the header where training is: to go on from
checkpoint/best.safetensors   trained weights of the best epoch so far: what the bundle will hold
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from components.errors import ConfigError
from components.training.loop import Learner, State

FOLDER = "checkpoint"
WEIGHT, MOMENT = "weight:", "moment:"


def save(out: Path, job: str, learner: Learner, state: State, best: bool) -> None:
    """Write the state after an epoch of the job with this digest; with `best`, keep its weights."""
    weights = {WEIGHT + name: _stored(parameter) for name, parameter in learner.trained.items()}
    if best:
        _write(out / FOLDER / "best.safetensors", weights, {})
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
    _write(out / FOLDER / "last.safetensors", {**weights, **moments}, about)


def resume(out: Path, job: str, learner: Learner) -> State:
    """Put the last checkpoint into the learner and say where training is; a new State when there is none.

    Raises ConfigError when it is that of another job.
    """
    last = out / FOLDER / "last.safetensors"
    if not last.is_file():
        return State()
    with safe_open(last, "pt") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items()}
    if about["job"] != job:
        raise ConfigError(
            f"checkpoints of job {job[:12]} in {out}", f"those of {about['job'][:12]}", "name another folder"
        )
    tensors = load_file(last)
    _load(learner, tensors)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key in (key for key in tensors if key.startswith(MOMENT)):
        index, _, name = key.removeprefix(MOMENT).partition(".")
        moments.setdefault(int(index), {})[name] = tensors[key]
    groups = learner.optimizer.state_dict()["param_groups"]
    rated = [{**group, "lr": rate} for group, rate in zip(groups, about["rates"], strict=True)]
    learner.optimizer.load_state_dict({"state": moments, "param_groups": rated})
    learner.scheduler.load_state_dict(about["scheduler"])
    return State(**about["state"])


def load_best(out: Path, learner: Learner) -> None:
    """Put the weights of the best epoch into the model."""
    _load(learner, load_file(out / FOLDER / "best.safetensors"))


def clear(out: Path) -> None:
    shutil.rmtree(out / FOLDER, ignore_errors=True)


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
