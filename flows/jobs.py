"""Jobs as subprocesses: started, followed, ended with the flow. Jobs that run elsewhere: flows/elsewhere.py."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

import psutil
from prefect import Task
from prefect.futures import PrefectFuture

from components import forks
from components.config import ComputeConfig
from components.errors import JobCancelled, JobKilled, OutOfMemory, TrainingError
from components.registry.tracking import RUN_VARIABLE
from components.training import launch, progress
from components.training.spec import JobSpec, Limits
from flows.values import Run, Trained

T = TypeVar("T")

log = logging.getLogger("adapterline")

CANCEL_S = 10
# Where the kernel counts what it killed for want of memory, by version of control groups.
OOM_COUNTS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
CPU_QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us")

# How to end each job that runs, and whether the flow was interrupted, so that none is started any more.
_enders: set[Callable[[], None]] = set()
_interrupted = threading.Event()


def at_once(compute: ComputeConfig) -> int:
    """How many of the two jobs run side by side: what fits into free memory here; elsewhere the work pool decides."""
    free = psutil.virtual_memory().available
    return 2 if compute.deployment or free >= 2 * compute.job_memory_gb * 1e9 else 1


def limits(compute: ComputeConfig, jobs: int) -> Limits:
    """The cores shared among the jobs that run at once; 0 threads are for a place elsewhere to decide."""
    here = 0 if compute.deployment else max(1, len(os.sched_getaffinity(0)) // (jobs * compute.processes))
    return Limits(
        threads=compute.threads or here,
        device=compute.device,
        processes=compute.processes,
        trunk_cache_gb=compute.trunk_cache_gb,
        tokens_at_once=compute.tokens_at_once,
        compile=compute.compile,
    )


def cores() -> int:
    """Cores for one job where its flow runs: what its container is limited to, or half of the machine.

    The baseline and the adapter train at the same time, often on one machine, and threads of two jobs that want the
    same cores wait for each other in vain: measured, both took six times as long.
    """
    machine = len(os.sched_getaffinity(0))
    quotas = [quota for path in CPU_QUOTAS if (quota := _quota(Path(path)))]
    return min(machine, *quotas) if quotas else max(1, machine // 2)


def _quota(path: Path) -> int | None:
    """Whole cores that a control group allows, None without a limit."""
    try:
        words = path.read_text().split()
        period = words[1] if len(words) > 1 else path.with_name("cpu.cfs_period_us").read_text()
        return max(1, int(words[0]) // int(period)) if words[0] not in ("max", "-1") else None
    except (OSError, ValueError):
        return None


def side_by_side(
    train: Task[..., Trained], specs: Sequence[JobSpec], jobs: int, compute: ComputeConfig, run: Run
) -> list[Trained]:
    """Run the jobs as concurrent tasks, or one after the other when `jobs` is 1. Results in the order of specs."""
    if jobs < len(specs):
        _interrupted.clear()
        return [train(spec, compute, run) for spec in specs]
    return all_of(lambda: [train.submit(spec, compute, run) for spec in specs])


def all_of(submit: Callable[[], Sequence[PrefectFuture[T]]]) -> list[T]:
    """What the tasks that `submit` submits return. When the flow is interrupted, also before all are submitted, their
    jobs are ended with it: tasks run in threads that no signal reaches.
    """
    _interrupted.clear()
    try:
        futures = submit()
        for future in futures:
            future.wait()
    except BaseException:
        _interrupted.set()
        for end in list(_enders):
            end()
        raise
    return [future.result() for future in futures]


@contextlib.contextmanager
def ended_with_flow(end: Callable[[], None]) -> Iterator[None]:
    """Have a job ended when the flow is interrupted during the block; at once when it was before."""
    _enders.add(end)
    try:
        if _interrupted.is_set():
            end()
        yield
    finally:
        _enders.discard(end)


def require_flow(spec: JobSpec) -> None:
    """Raise JobCancelled when the flow was interrupted: no job may start after that."""
    if _interrupted.is_set():
        raise JobCancelled(f"job {spec.method} to start", "its flow interrupted", "run again: it resumes")


def follow(
    spec: JobSpec,
    out: Path,
    mlflow_run: str,
    tracking_uri: str,
    timeout_hours: float,
    report: Callable[[progress.Event], None],
) -> None:
    """Run one job in this folder to its end. Raises what `run` raises."""
    out.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".spec.json")
    path.write_text(spec.model_dump_json(indent=2))
    run(spec, str(path), str(out), mlflow_run, tracking_uri, timeout_hours, report)


def run(
    spec: JobSpec,
    path: str,
    out: str,
    mlflow_run: str,
    tracking_uri: str,
    timeout_hours: float,
    report: Callable[[progress.Event], None],
) -> None:
    """Run the job whose spec lies at `path` to its end, passing on its progress.

    Raises TrainingError with the job's own line, JobKilled when its process was killed, OutOfMemory when the limit of
    its container was reached. When this process is interrupted the job is ended with it.
    """
    require_flow(spec)

    def hear(line: str) -> None:
        if event := progress.parse(line):
            report(event)

    run_variables = {"MLFLOW_TRACKING_URI": tracking_uri, RUN_VARIABLE: mlflow_run}
    follow_process(launch.command(spec, path, out), f"job {spec.method}", run_variables, timeout_hours, hear)


def follow_process(
    command: Sequence[str], name: str, variables: Mapping[str, str], timeout_hours: float, hear: Callable[[str], None]
) -> None:
    """Run a process that trains to its end, passing on each line of its standard output, but for what it says beside
    its progress: that is logged. Raises what `run` raises.

    variables: in its environment, beside ours.
    """
    environment = {**os.environ, **variables, "TOKENIZERS_PARALLELISM": "false"}
    killed_before = _killed_for_memory()
    with tempfile.TemporaryFile("w+") as errors:
        process = _started(command, errors, environment)
        expired = _Alarm(process, timeout_hours * 3600)
        try:
            with ended_with_flow(process.terminate):
                for line in process.stdout or ():
                    if said := progress.note(line):
                        log.warning("warning   %s: %s", name, said)
                    else:
                        hear(line)
                code = process.wait()
        finally:
            expired.cancel()
            _end(process)
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no message"])[-1]
    if code == 0:
        return
    if expired.fired:
        raise TrainingError(
            f"{name} within {timeout_hours:g} h",
            "one that is still running",
            "raise compute.timeout_hours; it resumes",
        )
    if _killed_for_memory() > killed_before:
        raise OutOfMemory(
            f"{name} to fit into memory",
            "it was killed at the limit of its container",
            "raise its memory (compute.job_variables) or lower training.batch_size; it resumes",
        )
    if code - 128 in signal.valid_signals():  # as a shell and accelerate's launcher tell of a signal
        code = 128 - code
    if code == -signal.SIGKILL:  # what the kernel sends when memory of the machine runs out
        raise JobKilled(f"{name} to finish", "its process killed by SIGKILL", "give it memory; it resumes")
    if code < 0:
        ended_by = signal.Signals(-code).name
        raise TrainingError(f"{name} to finish", f"its process ended by {ended_by}", "run again: it resumes")
    raise _failed(name, last)


def _started(command: Sequence[str], errors: IO[str], environment: Mapping[str, str]) -> forks.Process:
    if command[:2] == [sys.executable, "-m"] and command[2] != launch.__name__:  # which starts processes of its own
        return forks.start(command[1:], errors, environment)
    environment = {**forks.ALLOCATION, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)


def _killed_for_memory() -> int:
    """How many processes of this container the kernel has killed at its memory limit; 0 where nobody counts."""
    for path in OOM_COUNTS:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return int(dict(line.split() for line in Path(path).read_text().splitlines())["oom_kill"])
    return 0


def _failed(name: str, line: str) -> TrainingError:
    return TrainingError(f"{name} to finish", f"its message: {line}", "correct that and run again: it resumes")


def _end(process: forks.Process) -> None:
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

    def __init__(self, process: forks.Process, seconds: float) -> None:
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
