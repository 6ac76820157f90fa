"""The supervised stack: up, down, and what state it is in."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from infra import (
    availability,
    containers,
    credentials,
    environment,
    health,
    parts,
    pools,
    ports,
    processes,
    store,
    supervision,
)
from infra import folder as place
from infra.environment import Stack
from infra.errors import StackError

# All parts take about 35 s of processor time; a busy or slow machine may take its time.
START_S = 300.0
LOOK_S = 0.1
# A process that is being ended may start another. What is left after so many rounds cannot be ended.
ROUNDS = 3

Say = Callable[[str], None]


def up(folder: Path, say: Say) -> None:
    """Bring up what is not up yet. Raises StackError, and then leaves nothing that it started."""
    begun = time.monotonic()
    with place.writing(folder):
        if not folder.is_dir():
            place.check_space(folder)
            place.make(folder)
        with place.alone(folder):
            if supervision.alive(folder):
                _bring_up(folder, say)
            else:
                place.check_space(folder)
                with _unused(folder):
                    try:
                        _start(folder)
                        _bring_up(folder, say)
                    except BaseException:  # also when we are interrupted
                        try:
                            _tear_down(folder)
                        except StackError as left:  # besides what went wrong
                            say(str(left))
                        raise
            stack = _stack(folder)
    say(f"up in {time.monotonic() - begun:.0f} s")
    _show(stack, say)


@contextlib.contextmanager
def _unused(folder: Path) -> Iterator[None]:
    """Nobody uses the store that was started on demand, and it is gone."""
    with place.open_private(folder / "users.lock") as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(
                f"expected {folder} to be unused; found a command at work in it (`make demo` or `infra.local run`); "
                "wait for its end, then `make up`"
            ) from None
        store.stop(folder)
        yield


def _start(folder: Path) -> None:
    """The supervisor, with nothing of an earlier stack alive except flow runs, which go on."""
    for leftover in ("supervisord.pid", "stack.json"):
        (folder / leftover).unlink(missing_ok=True)
    processes.end(each.process for each in processes.marked(place.identity(folder)) if each.run is None)
    ports.choose(folder)
    credentials.read(folder)
    record = {"dotenv": str(Path(".env").absolute()), "engine": containers.engine()}
    place.write_private(folder / "stack.json", json.dumps(record))
    supervision.start(folder, (*parts.SERVERS, *parts.WORKERS))


def _bring_up(folder: Path, say: Say) -> None:
    stack = _stack(folder)
    for name in parts.SERVERS:
        supervision.start_part(folder, name)
    off = {name: reason for name in parts.WORKERS if (reason := availability.missing(name))}
    _await(folder, ("s3", "prefect"), say)
    record = {"dotenv": str(Path(".env").absolute()), "engine": {}, **place.record(folder)}
    wanted = _digest(stack)
    if record.get("configured") != wanted:
        _configure(folder, stack, first="configured" not in record)
    _await(folder, ("mlflow",), say)  # slowest to start, so Prefect is told its things meanwhile
    workers = [name for name in parts.WORKERS if name not in off]
    for name in workers:
        supervision.start_part(folder, name)
    for name in off:
        supervision.stop_part(folder, name)
    _await(folder, ("worker-local",), say)
    for name in workers[1:]:
        try:
            _await(folder, (name,), say)
        except StackError:  # the rest is of use without it
            supervision.stop_part(folder, name)
            off[name] = f"it did not start, see {folder}/logs/{name}.log: mend what it says, then `make up`"
    record |= {
        "off": off,
        "configured": wanted,
        "engine": containers.engine() or record["engine"],
        "has_dotenv": environment.write(stack, Path(record["dotenv"])),
    }
    place.write_private(folder / "stack.json", json.dumps(record))


def _await(folder: Path, names: tuple[str, ...], say: Say) -> None:
    """Until each part is healthy. Raises StackError when one ends instead, or takes too long."""
    waiting, pids = list(names), dict[str, int]()
    deadline = time.monotonic() + START_S
    while waiting:
        states = supervision.states(folder)
        for name in list(waiting):
            log = folder / "logs" / f"{name}.log"
            state, pid = states[name]["statename"], states[name]["pid"]
            restarted = pid and pids.setdefault(name, pid) != pid
            if restarted or state in ("BACKOFF", "FATAL", "EXITED"):
                raise StackError(f"expected {name} to stay up; found it ended; see the end of {log}")
            if time.monotonic() > deadline:
                raise StackError(f"expected {name} to answer within {START_S:.0f} s; found silence; see {log}")
            if state == "RUNNING" and _healthy(folder, name, states[name]):
                waiting.remove(name)
                say(f"  {name} is up")
        time.sleep(LOOK_S if waiting else 0)


def _healthy(folder: Path, name: str, state: dict[str, Any], thoroughly: bool = True) -> bool:
    numbers, known = supervision.ports(folder), credentials.read(folder)
    if name == "s3":
        return health.store(numbers["s3"]) and (not thoroughly or store.has_bucket(folder, numbers["s3"]))
    if name == "mlflow":
        return health.mlflow(numbers["mlflow"], known)
    if name == "prefect":
        return health.prefect(numbers["prefect"], known)
    return health.worker(numbers["prefect"], known, name.removeprefix("worker-"), state["start"])


def _digest(stack: Stack) -> str:
    """Of all that Prefect is told: equal digests mean that it need not be told again."""
    content = [pools.templates(), stack.environment]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _configure(folder: Path, stack: Stack, first: bool) -> None:
    """Tell the Prefect server of pools and the rest. At first, runs of an earlier life are settled too."""
    wanted: pools.Wanted = {"living": [], "settle": []}
    if first:
        found = processes.marked(place.identity(folder))
        in_containers = containers.runs(place.identity(folder), containers.engine())
        wanted["living"] = sorted({each.run for each in found if each.run} | (in_containers or set()))
        wanted["settle"] = ["local"] if in_containers is None else ["local", "docker"]
    log = folder / "logs" / "pools.log"
    variables = {**parts.clean(os.environ), **stack.environment, **parts.prefect_home(folder)}
    with place.open_private(log, os.O_TRUNC) as output:
        done = subprocess.run(
            [sys.executable, "-m", "infra.pools"], env=variables, check=False,
            input=json.dumps(wanted), text=True, stdout=output, stderr=output,
        )  # fmt: skip
    if done.returncode:
        raise StackError(f"expected Prefect to take pools and secrets; found a refusal; see the end of {log}")


def down(folder: Path, say: Say) -> None:
    """End everything of this stack: servers, workers, flow runs, containers. Data stay.

    Raises StackError, all else ended, when something stays.
    """
    if not folder.is_dir():
        say("nothing was up")
        return
    with place.alone(folder):
        found = _tear_down(folder)
    say("down; data are kept" if found else "nothing was up")


def _tear_down(folder: Path) -> bool:
    """Workers first, so that nothing new begins; then what they began; then the servers. Was anything there?"""
    identity, record = place.identity(folder), place.record(folder)
    living = supervision.alive(folder)
    if living:
        with contextlib.suppress(StackError):  # a supervisor that hangs is ended below
            for name in parts.WORKERS:
                supervision.stop_part(folder, name)
        # They still reach Prefect, and tell it how they ended.
        processes.end(each.process for each in processes.marked(identity) if each.run)
    left = _remove_containers(identity, record) if record else []
    if living:
        with contextlib.suppress(StackError):
            supervision.shutdown(folder)
    for _ in range(ROUNDS):
        if found := processes.marked(identity):
            living = True
            processes.end(each.process for each in found)
    left += [f"process {each.process.pid}" for each in processes.marked(identity)]
    environment.remove(folder, Path(record.get("dotenv", ".env")))
    for name in ("supervisord.pid", "supervisor.sock"):
        (folder / name).unlink(missing_ok=True)
    if left:  # the record stays for the next try
        raise StackError(f"expected all of {folder} to end; found {', '.join(left)}; end it, then `make down`")
    (folder / "stack.json").unlink(missing_ok=True)
    return living


def _remove_containers(identity: str, record: dict[str, Any]) -> list[str]:
    """What stays of the containers that the docker worker started."""
    left = containers.remove(identity, record["engine"])
    if left is not None:
        return left
    worked = "worker-docker" not in record.get("off", parts.WORKERS)
    return ["that no Docker engine answers, which had containers of its runs"] if worked else []


def status(folder: Path, say: Say) -> bool:
    """Show each part; the answer is whether all that should be up is healthy."""
    stack = environment.supervised(folder)
    if stack is None:
        orphans = bool(place.record(folder)) and bool(processes.marked(place.identity(folder)))
        say("down: its supervisor was killed; `make up` mends it" if orphans else "down: `make up` starts it")
        return False
    states, off = supervision.states(folder), place.record(folder).get("off", {})
    good = True
    for name in (*parts.SERVERS, *parts.WORKERS):
        if name in off:
            say(f"{name:<14} off      {off[name]}")
            continue
        healthy = states[name]["statename"] == "RUNNING" and _healthy(folder, name, states[name], thoroughly=False)
        good = good and healthy
        found = "up" if healthy else states[name]["statename"].lower().replace("running", "no answer")
        say(f"{name:<14} {found:<8} {_address(stack, name) if healthy else f'see {folder}/logs/{name}.log'}")
    say(f"credentials in {credentials.path(folder)}, logs in {folder}/logs")
    return good


def _stack(folder: Path) -> Stack:
    numbers = supervision.ports(folder)
    return Stack(folder, numbers["s3"], numbers["mlflow"], numbers["prefect"])


def _address(stack: Stack, name: str) -> str:
    port = {"s3": stack.port, "mlflow": stack.mlflow, "prefect": stack.prefect}.get(name)
    return f"http://127.0.0.1:{port}" if port else f"pool {name.removeprefix('worker-')}"


def _show(stack: Stack, say: Say) -> None:
    folder, record = stack.folder, place.record(stack.folder)
    say("")
    for name, what in (("prefect", "Prefect"), ("mlflow", "MLflow"), ("s3", "S3")):
        say(f"{what:<9} {_address(stack, name)}{f'   bucket {store.BUCKET}' if name == 's3' else ''}")
    for name in parts.WORKERS:
        reason = record["off"].get(name)
        say(f"{name:<13} {f'off: {reason}' if reason else 'on'}")
    say(f"user {credentials.USER}; passwords and keys are in {credentials.path(folder)}, logs in {folder}/logs")
    say(f"other clients: `. {folder}/env.sh`")
    if not record["has_dotenv"]:
        say(f"{record['dotenv']} is yours and was left alone: before `prefect`, source {folder}/env.sh")
    prefect = os.path.relpath(Path(sys.executable).parent / "prefect")
    say(f"next: {prefect} deploy --all && {prefect} deployment run retrain/nightly --watch")
