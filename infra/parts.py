"""The parts of a stack: how each is started, and with which variables.

    python -m infra.parts NAME      what the supervisor runs; becomes the part's own program

Secrets are read from the credentials' file here, so that they are in no configuration and on no command line, and each
part gets only those that it needs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from infra import credentials, processes, store
from infra.environment import Stack
from infra.folder import write_private

SERVERS = ("s3", "mlflow", "prefect")
POOLS = ("local", "docker", "k8s")
WORKERS = tuple(f"worker-{pool}" for pool in POOLS)
# A worker asks for work this often, s. Prefect's 10 s would be most of a short run.
POLL_S = 2

# Who holds a slot of a limit is written below PREFECT_HOME. Prefect's default is the server's memory: a server that was
# killed would never free what was held.
LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
LEASES_FOLDER = "concurrency_leases"

# A checked password counts for a minute: each check takes 0.1 s of processor time, and a retrain makes some hundreds of
# requests. A changed password bites that much later.
AUTH = """\
[mlflow]
auth_cache_ttl_seconds = 60
default_permission = READ
database_uri = sqlite:///{database}
admin_username = {user}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Program:
    """A command, the variables that it gets besides the caller's, and its working directory."""

    command: list[str]
    environment: dict[str, str]
    directory: Path


def program(name: str, folder: Path, ports: Mapping[str, int]) -> Program:
    """How a part is started. `folder` is absolute."""
    if name == "s3":
        return Program(store.command(folder, ports), store.keys(folder), folder)
    if name == "mlflow":
        return _mlflow(folder, ports)
    if name == "prefect":
        return _prefect(folder, ports)
    return _worker(name.removeprefix("worker-"), folder, ports)


def _mlflow(folder: Path, ports: Mapping[str, int]) -> Program:
    known = credentials.read(folder)
    configuration = folder / "mlflow-auth.ini"
    escaped = str(folder / "mlflow-auth.db").replace("%", "%%")
    text = AUTH.format(database=escaped, user=known["MLFLOW_TRACKING_USERNAME"])
    if not configuration.is_file() or configuration.read_text() != text:
        write_private(configuration, text)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(ports["mlflow"]),
        "--workers", "1", "--app-name", "basic-auth",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", f"s3://{store.BUCKET}/mlflow",
        # Where commands find them that use the database without this server, once it is down.
        "--default-artifact-root", f"s3://{store.BUCKET}/mlflow",
    ]  # fmt: skip
    environment = {
        **Stack(folder, ports["s3"]).environment,
        # Would start eight more processes that nothing here uses.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_AUTH_CONFIG_PATH": str(configuration),
        "MLFLOW_AUTH_ADMIN_PASSWORD": known["MLFLOW_TRACKING_PASSWORD"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": known["MLFLOW_FLASK_SERVER_SECRET_KEY"],
    }
    environment.pop("MLFLOW_TRACKING_URI")  # of clients
    return Program(command, environment, folder)


def _prefect(folder: Path, ports: Mapping[str, int]) -> Program:
    port = str(ports["prefect"])
    # Names the process that holds it by its number, which may be another's once a server was killed.
    (folder / "prefect" / LEASES_FOLDER / "expirations.lock").unlink(missing_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    environment = {
        **prefect_home(folder),
        **LEASES,
        "PREFECT_SERVER_API_AUTH_STRING": credentials.read(folder)["PREFECT_API_AUTH_STRING"],
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",  # the page's default is port 4200
    }
    return Program(command, environment, folder)


def _worker(pool: str, folder: Path, ports: Mapping[str, int]) -> Program:
    types = {"local": "process", "k8s": "kubernetes"}
    command = [sys.executable, "-m", "infra.docker_worker", "--pool", pool]
    if pool in types:
        # Under one name, or each restart would leave a worker in the pool's list.
        command = [
            sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", types[pool],
            "--name", pool, "--install-policy", "never",
        ]  # fmt: skip
    clients = Stack(folder, ports["s3"], ports["mlflow"], ports["prefect"]).environment
    if pool == "k8s":  # what runs in pods gets its keys from the cluster
        clients = {name: value for name, value in clients.items() if name.startswith("PREFECT_")}
    environment = {**clients, **prefect_home(folder), "PREFECT_WORKER_QUERY_SECONDS": str(POLL_S)}
    return Program(command, environment, Path.cwd())


def prefect_home(folder: Path) -> dict[str, str]:
    """Keeps Prefect away from profiles and databases in the user's home, and quiet."""
    return {"PREFECT_HOME": str(folder.absolute() / "prefect"), "DO_NOT_TRACK": "1"}


def clean(environment: Mapping[str, str], keep: tuple[str, ...] = ()) -> dict[str, str]:
    """A caller's environment without what points clients elsewhere, and with no proxy on loopback."""
    others = ("AWS_", "MLFLOW_", "PREFECT_")
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith(others) or name.startswith(("PREFECT_LOGGING_", *keep))
    }
    around = ",".join(filter(None, [environment.get("NO_PROXY", ""), "127.0.0.1,localhost"]))
    paths = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    return {**kept, "NO_PROXY": around, "no_proxy": around, "PATH": paths}


def main(arguments: list[str] | None = None) -> int:
    (name,) = sys.argv[1:] if arguments is None else arguments
    folder = Path(os.environ["ADAPTERLINE_STACK"])
    # Children of an earlier life of this part, whose parent was killed, may hold its port. Flow runs go on.
    processes.end(
        each.process
        for each in processes.marked(os.environ[processes.MARK])
        if each.part == name and each.run is None
    )  # fmt: skip
    found = program(name, folder, json.loads((folder / "ports.json").read_text()))
    keep = ("AWS_",) if name == "worker-k8s" else ()  # a cluster's login may need them
    os.chdir(found.directory)
    environment = {**clean(os.environ, keep), **found.environment}
    os.execve(found.command[0], found.command, environment)  # noqa: S606  # a list, no shell
    return 1


if __name__ == "__main__":
    sys.exit(main())
