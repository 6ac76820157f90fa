"""The supervisor of a stack: supervisord, its configuration, and talking to it over a socket in the folder."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infra import processes
from infra.errors import StackError
from infra.folder import identity, write_private

ITSELF = "supervisord"
START_S = 20.0
STOP_S = 60.0
ANSWER_S = 10.0
# A part that ends is started again at once; one that ends within seconds waits 1 s, 2 s, …, and after so many times
# (about 80 minutes) is left for the next `up`.
RETRIES = 100
# The system's limit of a socket's name, less what supervisord appends while it makes one.
LONGEST = 95

HEAD = """\
; Written by `make up`. Variables and secrets come from elsewhere: infra/parts.py.
[supervisord]
logfile=%(here)s/logs/supervisord.log
logfile_maxbytes=10MB
logfile_backups=3
pidfile=%(here)s/supervisord.pid
umask=077
[unix_http_server]
file=%(here)s/supervisor.sock
chmod=0700
[supervisorctl]
serverurl=unix://%(here)s/supervisor.sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
PROGRAM = """\
[program:{name}]
command={python} -m infra.parts {name}
environment=ADAPTERLINE_STACK_PART="{name}"
autostart=false
autorestart=true
startsecs=2
startretries={retries}
stopasgroup=true
killasgroup=true
stopwaitsecs=20
priority={priority}
redirect_stderr=true
stdout_logfile=%(here)s/logs/{name}.log
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=3
"""


def alive(folder: Path) -> bool:
    """Does the supervisor of this stack live?"""
    import psutil

    try:
        environment = psutil.Process(int((folder / "supervisord.pid").read_text())).environ()
    except (OSError, ValueError, psutil.Error):
        return False
    return (environment.get(processes.MARK), environment.get(processes.PART)) == (identity(folder), ITSELF)


def ports(folder: Path) -> dict[str, int]:
    """The ports of the supervised servers."""
    found: dict[str, int] = json.loads((folder / "ports.json").read_text())
    return found


def start(folder: Path, names: Iterable[str]) -> None:
    """Start the supervisor with no part up yet. Raises StackError when it does not answer."""
    if len(os.fsencode(_socket(folder))) > LONGEST:
        raise StackError(
            f"expected a stack folder of at most {LONGEST - len('/supervisor.sock')} bytes, as a socket lies in it; "
            f"found {folder.resolve()}; name a shorter one in ADAPTERLINE_STACK"
        )
    logs = folder / "logs"
    logs.mkdir(mode=0o700, exist_ok=True)
    python = shlex.quote(sys.executable).replace("%", "%%")
    parts = [
        PROGRAM.format(name=name, python=python, retries=RETRIES, priority=100 * (place + 1))
        for place, name in enumerate(names)
    ]
    configuration = folder.resolve() / "supervisord.conf"
    write_private(configuration, "\n".join([HEAD, *parts]))
    environment = {
        **os.environ,
        processes.MARK: identity(folder),
        processes.PART: ITSELF,
        "ADAPTERLINE_STACK": str(folder.resolve()),
    }
    environment.pop(processes.RUN, None)  # when a flow run brings a stack up, the stack is not part of the run
    done = subprocess.run(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(configuration)],
        env=environment, umask=0o077, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        found = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise StackError(f"expected supervisord to start; found {found}; see {logs / 'supervisord.log'}")
    deadline = time.monotonic() + START_S
    while not _answers(folder):
        if time.monotonic() > deadline:
            raise StackError(f"expected supervisord to answer; found silence; see {logs / 'supervisord.log'}")
        time.sleep(0.05)


def _answers(folder: Path) -> bool:
    try:
        states(folder)
    except StackError:
        return False
    return alive(folder)


def states(folder: Path) -> dict[str, dict[str, Any]]:
    """By part what supervisord knows: `statename`, `pid`, `start` (s since 1970), `spawnerr`, `exitstatus`."""
    return {each["name"]: each for each in _call(folder, "getAllProcessInfo")}


def start_part(folder: Path, name: str) -> None:
    """Start a part unless it is up or on its way; one that waits for its next try is tried now."""
    state = states(folder)[name]["statename"]
    if state == "BACKOFF":
        stop_part(folder, name)
    if state in ("STOPPED", "EXITED", "FATAL", "BACKOFF"):
        _call(folder, "startProcess", name, False)


def stop_part(folder: Path, name: str) -> None:
    """Stop a part and wait for its end."""
    if states(folder)[name]["statename"] in ("STARTING", "RUNNING", "BACKOFF"):
        _call(folder, "stopProcess", name, True)


def shutdown(folder: Path) -> None:
    """Stop all parts, the last of the list first, then the supervisor; returns when it is gone or hangs."""
    _call(folder, "shutdown")
    deadline = time.monotonic() + STOP_S
    while alive(folder) and time.monotonic() < deadline:
        time.sleep(0.05)


def _socket(folder: Path) -> Path:
    return folder.resolve() / "supervisor.sock"


class _Transport(xmlrpc.client.Transport):
    """XML-RPC over a socket in the file system. The supervisor's own has no limit of time."""

    def __init__(self, path: Path, patience: float) -> None:
        super().__init__()
        self._path, self._patience = path, patience

    def make_connection(self, host: tuple[str, dict[str, str]] | str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        self._connection = (host, connection)  # what `close` closes
        connection.sock.settimeout(self._patience)
        connection.sock.connect(str(self._path))
        return connection


def _call(folder: Path, method: str, *arguments: object) -> Any:
    # A part may take its time to stop; all else is answered at once, unless the supervisor hangs.
    transport = _Transport(_socket(folder), STOP_S if method == "stopProcess" else ANSWER_S)
    server = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
    try:
        return getattr(server.supervisor, method)(*arguments)
    except xmlrpc.client.Fault as fault:
        if fault.faultString.startswith(("ALREADY_STARTED", "NOT_RUNNING")):  # it changed since we looked
            return None
        raise StackError(f"expected supervisord to {method}; found {fault.faultString}; see its log") from fault
    except (OSError, xmlrpc.client.ProtocolError) as error:
        raise StackError(f"expected supervisord to answer; found {error}; run `make down`, then `make up`") from error
    finally:
        transport.close()
