"""Who is measured, and how one training of each is run: in a process of its own, on the same rows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components import base_model, forks
from components.config import BaseConfig, TrainingConfig
from components.methods import LearningRates, Schedule, settings_of
from components.training.spec import JobSpec, Limits, code_version
from tests.benchmarks.prepared import Prepared

TRAINER = Path(__file__).with_name("trainer.py")


@dataclass(frozen=True)
class Rival:
    """One way to train. `low` says that it computes in bfloat16 where the CPU can, `half` that the first half of the
    layers has no adapters."""

    title: str
    runs: str  # "peer": AdapterHub, "hf": transformers' Trainer, "ours": our job
    full: bool = False
    half: bool = False
    tuned: bool = False

    @property
    def low(self) -> bool:
        return self.tuned or self.runs == "ours"


RIVALS = {
    "peer": Rival("AdapterHub", "peer"),
    "peer_half": Rival("AdapterHub, upper half", "peer", half=True),
    "peer_tuned": Rival("AdapterHub tuned", "peer", tuned=True),
    "peer_half_tuned": Rival("AdapterHub tuned, upper half", "peer", half=True, tuned=True),
    "full_hf": Rival("HF Trainer, full", "hf", full=True),
    "ours": Rival("ours", "ours"),
    "ours_half": Rival("ours, upper half", "ours", half=True),
    "ours_full": Rival("ours, full", "ours", full=True),
}


@dataclass(frozen=True)
class Setup:
    """What is the same for all."""

    data: Prepared
    base: str
    layers: int
    max_tokens: int
    batch: int
    adapter_rate: float
    full_rate: float
    threads: int
    trunk_cache_gb: float
    bf16: bool
    python: str  # of the peer's virtual environment

    def rate(self, rival: Rival) -> float:
        return self.full_rate if rival.full else self.adapter_rate

    def left_out(self, rival: Rival) -> list[int]:
        return list(range(self.layers // 2)) if rival.half else []


def run(name: str, setup: Setup, epochs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train once. The sample: seconds and score of each epoch, and what the whole process took."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rival = RIVALS[name]
    command = (_job if rival.runs == "ours" else _request)(rival, setup, epochs, seed, folder)
    begin = time.perf_counter()
    with (folder / "log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(setup.threads), "TOKENIZERS_PARALLELISM": "false"}
        # A cache folder of its own, or a second seed would find the trunk that the first one computed.
        environment["ADAPTERLINE_CACHE"] = str((folder / "cache").resolve())
        if rival.runs == "ours":  # as `flows` starts them
            environment = {**forks.ALLOCATION, **environment}
        environment[base_model.PATH_VARIABLE] = str(base_model.find(BaseConfig(name=setup.base)).path)
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
    whole = {"seconds": time.perf_counter() - begin, "cpu_seconds": used.ru_utime + used.ru_stime}
    if status:
        raise SystemExit(f"expected {name} to train; found exit status {status}; see {folder / 'log'}")
    measured = (_of_job if rival.runs == "ours" else _of_trainer)(folder, setup)
    return {**measured, "process": {**whole, "peak_rss_bytes": used.ru_maxrss * 1024}}


def _request(rival: Rival, setup: Setup, epochs: int, seed: int, folder: Path) -> list[str]:
    request = {
        "base": str(base_model.find(BaseConfig(name=setup.base)).path),
        "tokens": setup.data.tokens,
        "labels": len(setup.data.labels),
        "padding": setup.data.padding,
        "adapter": not rival.full,
        "leave_out": setup.left_out(rival),
        "tuned": rival.tuned,
        "bf16": rival.low and setup.bf16,
        "epochs": epochs,
        "batch": setup.batch,
        "rate": setup.rate(rival),
        "seed": seed,
        "threads": setup.threads,
    }
    (folder / "request.json").write_text(json.dumps(request, indent=2))
    python = setup.python if rival.runs == "peer" else sys.executable
    return [python, str(TRAINER), str(folder / "request.json"), str(folder / "result.json")]


def _job(rival: Rival, setup: Setup, epochs: int, seed: int, folder: Path) -> list[str]:
    rate, method = setup.rate(rival), "full" if rival.full else "pfeiffer"
    spec = JobSpec(
        method=method,  # type: ignore[arg-type]  # one of two
        base=base_model.find(BaseConfig(name=setup.base)).pin,
        data=setup.data.ref,
        labels=setup.data.labels,
        settings=None if rival.full else settings_of(method, reduction_factor=16, leave_out=setup.left_out(rival)),
        schedule=Schedule(
            epochs=epochs, patience=epochs, learning_rates=LearningRates(body=rate, layer_norm=rate, head=rate)
        ),
        training=TrainingConfig(batch_size=setup.batch, max_tokens=setup.max_tokens),
        limits=Limits(threads=setup.threads, device="cpu", trunk_cache_gb=setup.trunk_cache_gb),
        seed=seed,
        code=code_version(),
    )
    (folder / "spec.json").write_text(spec.model_dump_json(indent=2))
    job = [str(folder / "spec.json"), str(folder / "bundle"), "--progress", "json"]
    return [sys.executable, "-m", "components.training.job", *job]


def _of_trainer(folder: Path, setup: Setup) -> dict[str, Any]:
    from sklearn.metrics import f1_score

    result, truth = json.loads((folder / "result.json").read_bytes()), setup.data.truth()
    epochs = []
    for epoch in result["epochs"]:
        predicted = np.asarray(epoch.pop("predicted"))
        macro = float(f1_score(truth, predicted, average="macro"))
        epochs.append({**epoch, "accuracy": float((truth == predicted).mean()), "macro_f1": macro})
    return {"epochs": epochs, "trained_parameters": result["trained_parameters"]}


def _of_job(folder: Path, setup: Setup) -> dict[str, Any]:
    metrics = json.loads((folder / "bundle" / "metrics.json").read_bytes())
    epochs = [
        {
            "seconds": epoch["seconds"],
            "cpu_seconds": epoch["cpu_seconds"],
            "accuracy": epoch["validation_accuracy"],
            "macro_f1": epoch["validation_macro_f1"],
        }
        for epoch in metrics["history"]
    ]
    told = {name: metrics[name] for name in ("cache_seconds", "peak_memory_bytes")}
    return {"epochs": epochs, "trained_parameters": metrics["trained_parameters"], "told_by_the_job": told}
