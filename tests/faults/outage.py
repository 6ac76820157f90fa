"""Servers of a supervised stack, killed for a moment or for a while."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra import supervision

# Ends the pause of a supervisor even where who began it was killed meanwhile.
LATER = "import os, signal, sys, time; time.sleep(float(sys.argv[2])); os.kill(int(sys.argv[1]), signal.SIGCONT)"


def kill(folder: Path, part: str) -> int:
    """kill -9 of one server, which had this process id; the supervisor starts it again."""
    pid = int(supervision.states(folder)[part]["pid"])
    if pid:
        os.kill(pid, signal.SIGKILL)
    return pid


def refuse(folder: Path, part: str, seconds: float) -> subprocess.Popen[bytes]:
    """kill -9 of one server, that stays away for so long. What is returned ends when it may come back."""
    supervisor = int((folder / "supervisord.pid").read_text())
    pid = supervision.states(folder)[part]["pid"]
    os.kill(supervisor, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    return subprocess.Popen([sys.executable, "-c", LATER, str(supervisor), str(seconds)], start_new_session=True)


@contextmanager
def away(folder: Path, part: str, seconds: float) -> Iterator[None]:
    """One server refuses connections for the length of the block, and at most for so long."""
    later = refuse(folder, part, seconds)
    try:
        yield
    finally:
        os.kill(int((folder / "supervisord.pid").read_text()), signal.SIGCONT)
        later.kill()
        later.wait()
