"""Processes forked from one that has imported the heavy libraries, and nothing of ours.

torch, transformers and peft take six seconds of CPU to import, without bytecode fourteen. A retrain needs them in a
process for each job and in one for each version that it asks for predictions: here they are imported once, in a process
that does nothing else, and what it forks runs as `python ARGUMENTS` would, with its own environment and folder.

Run as a file it is that process; it ends when whoever started it does, and what it has forked goes on, as a
subprocess would.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

# What jobs and versions import first or last; what is not listed here is imported by whoever needs it.
LIBRARIES = (
    "mlflow.pyfunc",
    "datasets",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "transformers.models.bert.modeling_bert",  # brings what all models of transformers import
    "peft",
)
# Where a driver is, CUDA may have been touched by an import, and a fork could not use it.
CUDA = Path("/dev/nvidiactl")
TRIES = 2
# How what trains takes memory, which only a process that begins can be told. The small pieces that glibc keeps for each
# thread lie between the large ones that a step frees, and so hold them apart: a job took a sixth more. Arrow's own
# allocator takes 45 MB at once.
ALLOCATION = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", "ARROW_DEFAULT_MEMORY_POOL": "system"}


class Fork:
    """A running process, to be used as `subprocess.Popen`. stdout: what it writes, as text."""

    def __init__(self, pid: int, stdout: IO[str], ending: int) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._ending, self._lock = ending, threading.Lock()

    def poll(self) -> int | None:
        """The exit code, None while it runs; the negative number of the signal that ended it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired after that many seconds."""
        if self.returncode is None and not select.select([self._ending], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        with self._lock:
            if self.returncode is None:
                told = os.read(self._ending, 16)
                os.close(self._ending)
                # Nobody is left to tell: the process that forked it was killed, and it may be running still.
                self.returncode = int(told) if told else -signal.SIGKILL
            return self.returncode

    def send_signal(self, sign: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sign)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = Fork | subprocess.Popen[str]


class _Parent:
    """The process that forks, and the line to it."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # As a file, so that nothing of this checkout is imported: a version brings its own code.
            command = [sys.executable, "-P", __file__, str(theirs.fileno())]
            environment = {**ALLOCATION, **os.environ}
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        self._lock = threading.Lock()

    def fork(self, request: Mapping[str, Any], stdout: int, stderr: int) -> tuple[int, int]:
        """Process id, and a pipe that tells of its end. Raises OSError when the process that forks is gone."""
        ending, tells = os.pipe()
        try:
            with os.fdopen(os.memfd_create("request"), "wb") as file, os.fdopen(tells, "w"):
                file.write(json.dumps(request).encode())
                file.flush()
                with self._lock:
                    socket.send_fds(self._line, [b"fork"], [file.fileno(), stdout, stderr, tells])
                    answer = self._line.recv(16)
            if not answer:
                raise ConnectionResetError
        except OSError:
            os.close(ending)
            raise
        return int(answer), ending

    def end(self) -> None:
        self._line.close()
        self._process.wait()


_parents: list[_Parent] = []  # one, or none yet
_changing = threading.Lock()


def _parent(gone: _Parent | None = None) -> _Parent:
    """The one there is; a new one where there is none, or only the one that is gone."""
    with _changing:
        if gone in _parents:
            _end()
        if not _parents:
            _parents.append(_Parent())
        return _parents[0]


@atexit.register
def _end() -> None:
    while _parents:
        _parents.pop().end()


def start(arguments: Sequence[str], stderr: IO[Any], environment: Mapping[str, str], folder: str = "") -> Process:
    """Run `python ARGUMENTS`, which are `-m MODULE …` or `-P FILE …`.  folder: to run in."""
    folder = folder or str(Path.cwd())
    request = {"arguments": list(arguments), "environment": dict(environment), "folder": folder}
    gone = None
    for _ in range(0 if CUDA.exists() else TRIES):
        out, end = os.pipe()
        with os.fdopen(end, "w"):
            try:
                pid, ending = (parent := _parent(gone)).fork(request, end, stderr.fileno())
            except OSError:  # it was killed
                os.close(out)
                gone = parent
                continue
        return Fork(pid, os.fdopen(out), ending)
    # What kills the one that forks, too little memory say, is then told of the process that it is about.
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**ALLOCATION, **environment},
        cwd=folder,
    )


def run(arguments: Sequence[str], environment: Mapping[str, str], folder: str = "") -> subprocess.CompletedProcess[str]:
    """The same to its end, with all that it wrote."""
    with tempfile.TemporaryFile("w+") as errors:
        process = start(arguments, errors, environment, folder)
        assert process.stdout is not None  # noqa: S101  # it is a pipe
        with process.stdout as stdout:
            written = stdout.read()
        code = process.wait()
        errors.seek(0)
        return subprocess.CompletedProcess(list(arguments), code, written, errors.read())


def _serve(line: socket.socket) -> dict[str, Any] | None:
    """Fork until the line ends. Returns None then, and in a forked process what that is to do."""
    tells: dict[int, int] = {}  # process id: the pipe to tell its end
    woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    with selectors.DefaultSelector() as selector:
        for file in (line.fileno(), woken):
            selector.register(file, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if woken in ready:
                os.read(woken, 4096)
                _tell_ends(tells)
            if line.fileno() not in ready:
                continue
            message, files, _, _ = socket.recv_fds(line, 16, 4)
            if not message:
                return None
            request, stdout, stderr, tell = files
            if pid := os.fork():
                tells[pid] = tell
                for file in (request, stdout, stderr):
                    os.close(file)
                with contextlib.suppress(OSError):  # who asked is gone
                    line.send(str(pid).encode())
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            for file in (stdout, stderr, tell, woken, wakes, *tells.values()):
                os.close(file)
            line.close()
            with os.fdopen(request, "rb") as asked:
                asked.seek(0)
                return dict(json.load(asked))


def _tell_ends(tells: dict[int, int]) -> None:
    while tells:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with os.fdopen(tells.pop(pid), "w") as tell, contextlib.suppress(BrokenPipeError):
            tell.write(str(os.waitstatus_to_exitcode(status)))
            tell.flush()


def _become(request: Mapping[str, Any]) -> int:
    """Run as `python ARGUMENTS` does, to the end. Returns the exit code, or raises what Python knows to tell of."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    kind, name, *arguments = request["arguments"]
    sys.argv = [name, *arguments]
    try:
        if kind == "-m":
            sys.path.insert(0, request["folder"])
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, int | None):  # a line to print
            raise
        return end.code or 0
    return 0


def _leave(code: int) -> NoReturn:
    """End as Python does, but leave the modules to the kernel.

    Python takes them apart one by one, and each touch copies a page that is shared until then: half a second.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as multiprocessing does where it forked
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it was closed
            stream.flush()
    os._exit(code)


def main() -> None:
    # Ctrl-C reaches all. This process ends with the one it serves; what it forks hears it as what that one starts does.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    gc.disable()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # noqa: PTH123
        for name in LIBRARIES:
            with contextlib.suppress(Exception):  # whoever needs it will say so
                importlib.import_module(name)
        with contextlib.suppress(Exception):
            # With a process's first model transformers compiles patterns for all families: a fifth of a second.
            importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("bert")
    # Modules are no garbage: to look for any among them takes half a second, each time and in each that is forked.
    gc.freeze()
    gc.enable()
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        signal.signal(signal.SIGINT, interrupt)
    _leave(0 if request is None else _become(request))


if __name__ == "__main__":
    main()
