"""The local stack: S3 store, MLflow, Prefect and its workers in one folder, on loopback, without Docker.

    python -m infra.local up                   start all of it under a supervisor, or mend what is not up
    python -m infra.local status               exit code 0 when all is up, else 1
    python -m infra.local down                 end all of it; data stay
    python -m infra.local run -- COMMAND …     run a command with the stack's environment
    python -m infra.local mlflow [--port 5000] review runs in the MLflow UI until Ctrl-C
    python -m infra.local env                  what `run` sets, as shell lines; values of secrets are not printed

`run` and `stack()` use what `up` started. Without it they make do with a store on demand and MLflow's database without
a server: the first user starts the store, the last to leave stops it, and a store whose owner was killed is taken over
by the next. Both ways the data are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from infra import credentials, environment, health, processes, store
from infra import folder as place
from infra.environment import Stack, exported
from infra.errors import StackError
from infra.folder import FOLDER
from infra.ports import free_ports, is_free
from infra.store import BUCKET

__all__ = ["BUCKET", "FOLDER", "Stack", "StackError", "exported", "free_ports", "interrupt_on_sigterm", "stack"]

# How long a command may take to end when it is told to, s.
END_S = 30.0
# How long a supervised store that was killed may take to come back, s.
PATIENCE_S = 30.0


@contextlib.contextmanager
def stack(folder: Path = FOLDER) -> Iterator[Stack]:
    """The stack, up for the length of the block. Raises StackError when it does not come up."""
    with place.writing(folder):
        place.make(folder)
        users = place.open_private(folder / "users.lock")
    with users:
        found = _enter(folder, users)
        if found.mlflow is not None:  # not ours to stop
            _answering(found)
            yield found
            return
        try:
            yield found
        finally:
            with place.alone(folder), contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while anyone else uses the stack
                store.stop(folder)


def _enter(folder: Path, users: IO[str]) -> Stack:
    """The supervised stack if it is up; else become a user of the store, and start it if nobody has."""
    with place.writing(folder), place.alone(folder):
        up = environment.supervised(folder)
        if up is not None:
            return up
        fcntl.flock(users, fcntl.LOCK_SH)
        if place.record(folder):  # its supervisor was killed; what is left of it uses the same data
            processes.end(each.process for each in processes.marked(place.identity(folder)))
        return Stack(folder, store.running(folder) or store.start(folder))


def _answering(up: Stack) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not health.store(up.port):
        if time.monotonic() > deadline:
            raise StackError(f"expected the store of {up.folder} to answer; found silence; see `make status`")
        time.sleep(0.2)


def interrupt_on_sigterm() -> None:
    """Make `kill PID` end this process as Ctrl-C does, so that what it started is stopped with it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.local", description="The local stack.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("up", help="start the stack, or mend what is not up")
    verbs.add_parser("down", help="end all of it; data stay")
    verbs.add_parser("status", help="exit code 0 when all is up, else 1")
    run = verbs.add_parser("run", help="run a command with the stack's environment")
    run.add_argument("command", nargs=argparse.REMAINDER)
    ui = verbs.add_parser("mlflow", help="review runs in the MLflow UI")
    ui.add_argument("--port", type=int, default=5000)
    verbs.add_parser("env", help="what `run` sets, without secrets")
    options = parser.parse_args(arguments)
    interrupt_on_sigterm()
    try:
        if options.verb in ("up", "down", "status"):
            return _supervised(options.verb, options.folder)
        with stack(options.folder) as found:
            if options.verb == "run":
                command = options.command[1:] if options.command[:1] == ["--"] else options.command
                if not command:
                    parser.error("run needs a command")
                return _run(command, found.environment)
            if options.verb == "mlflow":
                return _mlflow(found, options.port)
            for name, value in found.environment.items():
                print(f"export {name}={'…' if name in credentials.SECRET else value}")
            return 0
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _supervised(verb: str, folder: Path) -> int:
    from infra import stack as whole

    def say(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody reads on; the work goes on
            print(line, flush=True)

    if verb == "status":
        return 0 if whole.status(folder, say) else 1
    if verb == "up":
        whole.up(folder, say)
    else:
        whole.down(folder, say)
    return 0


def _mlflow(found: Stack, port: int) -> int:
    if found.mlflow is not None:
        print(f"MLflow: http://127.0.0.1:{found.mlflow}   (user {credentials.USER}, password in "
              f"{credentials.path(found.folder)})")  # fmt: skip
        return 0
    if not is_free(port):
        raise StackError(f"expected port {port} to be free; found it in use; name another with --port")
    print(f"MLflow: http://127.0.0.1:{port}   (Ctrl-C ends it)", flush=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", found.environment["MLFLOW_TRACKING_URI"],
        "--artifacts-destination", f"s3://{BUCKET}/mlflow",
    ]  # fmt: skip
    # Would start eight more processes that nothing here uses.
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return _run(command, {**found.environment, **settings})


def _run(command: list[str], variables: Mapping[str, str]) -> int:
    """Run a command to its end; whatever interrupts us ends it too."""
    try:
        process = subprocess.Popen(command, env={**os.environ, **variables})
    except OSError as error:
        raise StackError(f"expected a program; found {command[0]!r} ({error.strerror}); check the command") from error
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    sys.exit(main())
