"""Forked processes are as those that `python` starts: arguments, environment, folder, output, exit codes, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from components import forks

PROGRAM = """
import gc, json, os, signal, sys, time
def imported(package): return sorted(name for name in sys.modules if name.split(".")[0] == package)
print(json.dumps({"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ), "path": sys.path,
                  "ours": imported("components") + imported("flows"), "torch": bool(imported("torch")),
                  "frozen": gc.get_freeze_count() > 0, "collects": gc.isenabled(),
                  "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler}), flush=True)
if "wait" in sys.argv: time.sleep(600)
print("said", file=sys.stderr)
"""
ENDINGS = {
    "pass": 0,
    "sys.exit(3)": 3,
    "sys.exit('a line')": 1,
    "raise ValueError": 1,
    "import os; os.kill(os.getpid(), 9)": -signal.SIGKILL,
}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def waiting(program: Path, tmp_path: Path) -> Iterator[forks.Process]:
    with (tmp_path / "errors").open("w") as errors:
        process = forks.start(["-P", str(program), "wait"], errors, os.environ)
        assert process.stdout is not None
        process.stdout.readline()  # it runs
        yield process
        process.kill()
        process.wait()


def said(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_is_as_if_python_had_started_it(program: Path, tmp_path: Path) -> None:
    arguments, environment = ["-P", str(program), "one", "two words"], {**os.environ, "ONLY_HERE": "1"}
    forked = forks.run(arguments, environment, str(tmp_path))
    straight = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert forked.stderr == straight.stderr == "said\n"
    one, other = said(forked), said(straight)
    assert one.pop("torch") and not other.pop("torch"), "the libraries were there, so nothing had to be imported"
    assert one.pop("frozen") and not other.pop("frozen"), "nobody looks for garbage among the libraries"
    assert one == other
    assert one["collects"]
    assert one["ours"] == [], "nothing of this checkout is there before a version brings its own code"


def test_it_takes_memory_as_what_trains_does(tmp_path: Path) -> None:
    code = "import pyarrow; print(open('/proc/self/environ').read().split('\\0')); print(pyarrow.default_memory_pool())"
    (tmp_path / "taking.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if name not in forks.ALLOCATION}
    begun, pool = forks.run(["-m", "taking"], environment, str(tmp_path)).stdout.splitlines()
    assert all(f"{name}={value}" in begun for name, value in forks.ALLOCATION.items())
    assert "backend_name=system" in pool


def test_a_module_is_found_in_the_folder_it_runs_in(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("if __name__ == '__main__': print(__spec__.name)")
    assert forks.run(["-m", "beside"], os.environ, str(tmp_path)).stdout == "beside\n"


@pytest.mark.parametrize("code", ENDINGS)
def test_exit_codes(tmp_path: Path, code: str) -> None:
    (tmp_path / "ends.py").write_text(f"import sys\n{code}")
    assert forks.run(["-P", str(tmp_path / "ends.py")], os.environ).returncode == ENDINGS[code]


def test_it_ends_as_python_does_but_takes_no_module_apart(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(
        "import atexit, threading, time\n"
        "class Global:\n"
        "    def __del__(self): print('taken apart')\n"
        "kept = Global()\n"
        "atexit.register(print, 'at exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "print('main')"
    )
    arguments = ["-m", "ends"]
    assert forks.run(arguments, os.environ, str(tmp_path)).stdout == "main\nthread\nat exit\n"


def test_it_can_be_waited_for_and_ended(waiting: forks.Process) -> None:
    assert waiting.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.1)
    waiting.terminate()
    assert waiting.wait(30) == -signal.SIGTERM
    waiting.kill()  # what has ended is left alone


def test_two_run_at_once(waiting: forks.Process, program: Path) -> None:
    assert said(forks.run(["-P", str(program)], os.environ))
    assert waiting.poll() is None


def test_when_the_process_that_forks_is_killed_another_takes_its_place(waiting: forks.Process, program: Path) -> None:
    parent = psutil.Process(waiting.pid).parent()
    assert parent is not None
    parent.kill()
    assert waiting.wait(30) == -signal.SIGKILL, "nobody can tell how it ended: it counts as killed, and is tried again"
    assert said(forks.run(["-P", str(program)], os.environ))
    assert psutil.Process(waiting.pid).is_running()
    os.kill(waiting.pid, signal.SIGKILL)


def test_nothing_is_left_when_its_starter_has_ended(program: Path) -> None:
    script = (
        "import os, psutil; from components import forks; forks.run(['-P', os.environ['PROGRAM']], os.environ); "
        "print(psutil.Process().children()[0].pid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PROGRAM": str(program)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not psutil.pid_exists(int(done.stdout))


def test_where_what_forks_is_killed_again_and_again_the_process_starts_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(self: Any, request: Any, stdout: int, stderr: int) -> Any:
        raise ConnectionResetError

    monkeypatch.setattr(forks._Parent, "fork", gone)
    done = forks.run(["-m", "platform"], os.environ)
    assert done.returncode == 0
    assert done.stdout.strip()
