"""What clients of a stack need: as variables, as a file to source, and as the `.env` that Prefect reads."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from infra import credentials, supervision
from infra.folder import FOLDER, write_private

OURS = "# written by `make up` for the stack in "
DOTENV = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")


@dataclass(frozen=True)
class Stack:
    """A running stack: the folder it lives in, and the ports of its servers. Without MLflow's and Prefect's, it is only
    the store and MLflow's database."""

    folder: Path
    port: int
    mlflow: int | None = None
    prefect: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What clients need: addresses and logins of the servers."""
        known = credentials.read(self.folder)
        endpoint = f"http://127.0.0.1:{self.port}"
        found = {name: known[name] for name in credentials.STORE} | {
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": endpoint,
            "MLFLOW_TRACKING_URI": f"sqlite:///{(self.folder / 'mlflow.db').resolve()}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        if self.mlflow is not None:
            found["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{self.mlflow}"
            for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
                found[name] = known[name]
        if self.prefect is not None:
            found["PREFECT_API_URL"] = f"http://127.0.0.1:{self.prefect}/api"
            found["PREFECT_API_AUTH_STRING"] = known["PREFECT_API_AUTH_STRING"]
        return found


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


def supervised(folder: Path) -> Stack | None:
    """The stack that `up` started, while its supervisor lives."""
    ports = supervision.ports(folder) if supervision.alive(folder) else None
    return Stack(folder, ports["s3"], ports["mlflow"], ports["prefect"]) if ports else None


def write(stack: Stack, dotenv: Path) -> bool:
    """Write `env.sh` in the folder, and the `.env` unless somebody else's is there: then the answer is False."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in stack.environment.items()]
    write_private(stack.folder / "env.sh", "\n".join(lines) + "\n")
    owner = _owner(dotenv)
    stale = owner is not None and (owner == stack.folder.resolve() or not supervision.alive(owner))
    if os.path.lexists(dotenv) and not stale:
        return False
    first = f"{OURS}{stack.folder.resolve()}\n# `make down` removes it; Prefect reads it in this folder\n"
    write_private(dotenv, first + "".join(f"{name}={stack.environment[name]}\n" for name in DOTENV))
    return True


def remove(folder: Path, dotenv: Path) -> None:
    """Take back what `write` wrote."""
    (folder / "env.sh").unlink(missing_ok=True)
    if _owner(dotenv) == folder.resolve():
        dotenv.unlink(missing_ok=True)


def _owner(dotenv: Path) -> Path | None:
    """The stack folder that a `.env` of ours was written for; None when it is somebody else's, or there is none."""
    try:
        first = "" if dotenv.is_symlink() else dotenv.read_text(errors="replace").partition("\n")[0]
    except OSError:
        return None
    return Path(first.removeprefix(OURS)) if first.startswith(OURS) else None


def adopt(variables: MutableMapping[str, str], folder: Path = FOLDER, dotenv: Path = Path(".env")) -> None:
    """To be called before Prefect is imported: point it at the running stack, unless it points somewhere already.

    A `.env` that a killed stack left is removed, as Prefect would wait for a server that is gone.
    """
    owner = _owner(dotenv)
    if owner is not None and not supervision.alive(owner):
        dotenv.unlink(missing_ok=True)
    if "PREFECT_API_URL" not in variables and (stack := supervised(folder)):
        variables.update({name: stack.environment[name] for name in DOTENV})
