"""Jobs as subprocesses: started, followed, ended with the flow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from prefect import Task

from components.config import ComputeConfig
from components.errors import JobKilled, TrainingError
from components.registry.tracking import RUN_VARIABLE
from components.training import progress
from components.training.spec import JobSpec, Limits
from flows.values import Run, Trained

CANCEL_S = 10


_running: set[subprocess.Popen[str]] = set()


def at_once(compute: ComputeConfig) -> int:
    """How many of the two jobs fit into free memory side by side."""
    return 2 if psutil.virtual_memory().available >= 2 * compute.job_memory_gb * 1e9 else 1


def limits(compute: ComputeConfig, jobs: int) -> Limits:
    """The cores shared among the jobs that run at once."""
    cores = len(os.sched_getaffinity(0))
    threads = compute.threads or max(1, cores // (jobs * compute.processes))
    return Limits(threads=threads, device=compute.device, processes=compute.processes)


def side_by_side(
    train: Task[..., Trained], specs: Sequence[JobSpec], jobs: int, compute: ComputeConfig, run: Run
) -> list[Trained]:
    """Run the jobs as concurrent tasks, or one after the other when `jobs` is 1. Results in the order of specs.

    When the flow is interrupted, the jobs are ended with it: tasks run in threads that no signal reaches.
    """
    if jobs < len(specs):
        return [train(spec, compute, run) for spec in specs]
    futures = [train.submit(spec, compute, run) for spec in specs]
    try:
        for future in futures:
            future.wait()
    except BaseException:
        for process in list(_running):
            process.terminate()
        raise
    return [future.result() for future in futures]


def follow(
    spec: JobSpec,
    out: Path,
    mlflow_run: str,
    tracking_uri: str,
    timeout_s: float,
    report: Callable[[progress.Event], None],
) -> None:
    """Run one job to its end, passing on its progress.

    Raises TrainingError with the job's own line, JobKilled when its process was killed. When this process is
    interrupted the job is ended with it.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".spec.json")
    path.write_text(spec.model_dump_json(indent=2))
    command = [sys.executable, "-m", "components.training.job", str(path), str(out), "--progress", "json"]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": tracking_uri,
        RUN_VARIABLE: mlflow_run,
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        _running.add(process)
        expired = _Alarm(process, timeout_s)
        try:
            for line in process.stdout or ():
                if event := progress.parse(line):
                    report(event)
            code = process.wait()
        finally:
            expired.cancel()
            _end(process)
            _running.discard(process)
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no message"])[-1]
    if expired.fired:
        raise TrainingError(
            f"job {spec.method} within {timeout_s / 3600:g} h",
            "one that is still running",
            "raise compute.timeout_hours; it resumes",
        )
    if code == -signal.SIGKILL:  # what the kernel sends when memory runs out
        raise JobKilled(f"job {spec.method} to finish", "its process killed by SIGKILL", "give it memory; it resumes")
    if code < 0:
        name = signal.Signals(-code).name
        raise TrainingError(f"job {spec.method} to finish", f"its process ended by {name}", "run again: it resumes")
    if code != 0:
        raise _failed(spec, last)


def _failed(spec: JobSpec, line: str) -> TrainingError:
    return TrainingError(
        f"job {spec.method} to finish", f"its message: {line}", "correct that and run again: it resumes"
    )


def _end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(CANCEL_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Alarm:
    """Ends a process after a time, and says whether it had to."""

    def __init__(self, process: subprocess.Popen[Any], seconds: float) -> None:
        import threading

        self.fired = False
        self._process = process
        self._timer = threading.Timer(seconds, self._fire)
        self._timer.daemon = True
        self._timer.start()

    def _fire(self) -> None:
        self.fired = True
        self._process.terminate()

    def cancel(self) -> None:
        self._timer.cancel()
