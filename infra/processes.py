"""Processes of a stack, known by a mark in their environment that children inherit."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "ADAPTERLINE_STACK_ID"
PART = "ADAPTERLINE_STACK_PART"
# Prefect sets it for the process of a flow run, and the jobs of the run inherit it.
RUN = "PREFECT__FLOW_RUN_ID"
TERMINATE_S = 10.0
KILL_S = 10.0


@dataclass(frozen=True)
class Marked:
    """A living process of a stack: the part it belongs to, and the flow run that it works for, if any."""

    process: psutil.Process
    part: str
    run: str | None


def marked(identity: str) -> list[Marked]:
    """All living processes of the stack, except this one and those that wait for it."""
    ours = psutil.Process()
    spared = {ours.pid, *(parent.pid for parent in ours.parents())}
    found = []
    for process in psutil.process_iter():
        # Another user's process, or one that ended meanwhile. A zombie has no environment.
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ() if process.pid not in spared else {}
            if environment.get(MARK) == identity:
                found.append(Marked(process, environment.get(PART, ""), environment.get(RUN)))
    return found


def end(processes: Iterable[psutil.Process]) -> None:
    """Ask each to end, and kill those that do not. Returns when all are gone."""
    left = list(processes)
    for sign, patience in ((signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, KILL_S)):
        deadline = time.monotonic() + patience
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sign)
        while (left := [process for process in left if _lives(process)]) and time.monotonic() < deadline:
            time.sleep(0.05)


def _lives(process: psutil.Process) -> bool:
    """A zombie does not: it only waits for a parent to look, and where that is a container's first process none may."""
    try:
        return process.is_running() and (process.status() != psutil.STATUS_ZOMBIE or dying(process.pid))
    except psutil.NoSuchProcess:
        return False


def dying(pid: int) -> bool:
    """Is this zombie still at it? Its first thread has ended, but others live a moment longer and hold its ports."""
    try:
        return len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except OSError:
        return False
