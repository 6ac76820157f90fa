"""What Kubernetes would be asked for: jobs of the pool `k8s` as Prefect's own worker posts them, and TrainJobs.

    python -m tests.infra.rendering          write tests/infra/expected anew; read the difference before committing it

The worker runs with the environment that infra/kubernetes/worker.yaml gives it, and posts to an API server of ours
that writes down what it gets. Nothing here needs a cluster.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from infra import trainjob

ROOT = Path(__file__).parent.parent.parent
EXPECTED = Path(__file__).parent / "expected"
POOL = ROOT / "infra" / "work-pools" / "k8s.json"
MANIFESTS = ROOT / "infra" / "kubernetes"
# Stands for whatever is in a Secret; must never come out.
SECRET_VALUE = "admin:never-to-be-seen"  # noqa: S105
RUN_ID, FLOW_ID, DEPLOYMENT_ID = (f"00000000-0000-4000-8000-00000000000{digit}" for digit in (1, 2, 3))

# File of tests/infra/expected: job variables, as a deployment or `compute.job_variables` gives them.
JOBS: dict[str, dict[str, Any]] = {
    "job-gpu": {},
    "job-cpu": {"gpus": 0, "image": "adapterline:cpu", "cpu": "2", "memory": "8Gi"},
    "job-placed": {
        "image": "registry.example/adapterline:cuda-1",
        "image_pull_secrets": [{"name": "registry"}],
        "gpus": 4,
        "shm_size": "16Gi",
        "node_selector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        "tolerations": [{"key": "team", "operator": "Equal", "value": "nlp", "effect": "NoExecute"}],
        "priority_class_name": "nightly",
        "cache_volume": {"name": "cache", "persistentVolumeClaim": {"claimName": "adapterline-cache"}},
        "env": {"ADAPTERLINE_BASE": "/cache/base", "NCCL_DEBUG": "WARN"},
        "labels": {"kueue.x-k8s.io/queue-name": "team"},
        "finished_job_ttl": 600,
    },
}
SPEC = {"method": "pfeiffer", "limits": {"threads": 2, "device": "auto", "processes": 8}, "seed": 0}
URIS = ["s3://adapterline/work/1.spec.json", "s3://adapterline/work/1"]
TRAINJOBS = {
    "trainjob-gpu": ["--nodes", "2", "--gpus", "4", "--image", "registry.example/adapterline:cuda-1"],
    "trainjob-cpu": ["--nodes", "4", "--gpus", "0", "--image", "adapterline:cpu", "--shm", "1Gi",
                     "--cache", "adapterline-cache", "--node-selector", "disk=ssd", "--env", "OMP_NUM_THREADS=2"],
}  # fmt: skip


def manifests(*names: str) -> list[dict[str, Any]]:
    """All objects of files of infra/kubernetes."""
    return [each for name in names for each in yaml.safe_load_all((MANIFESTS / name).read_text(encoding="utf-8"))]


def worker_environment() -> dict[str, str]:
    """What the worker's container is given, with SECRET_VALUE in place of secrets."""
    config = {each["metadata"]["name"]: each["data"] for each in manifests("config.yaml")}
    (deployment,) = manifests("worker.yaml")
    found = {}
    for variable in deployment["spec"]["template"]["spec"]["containers"][0]["env"]:
        source = variable.get("valueFrom", {})
        if reference := source.get("configMapKeyRef"):
            found[variable["name"]] = config[reference["name"]][reference["key"]]
        else:
            found[variable["name"]] = SECRET_VALUE if source else variable["value"]
    return found


def posted(cases: dict[str, dict[str, Any]], base_job_template: dict[str, Any] | None = None) -> dict[str, Any]:
    """The Job that the worker posts for each set of job variables, or the text of what it raises instead.

    In a process of its own: Prefect reads its settings once, from the environment.
    """
    with tempfile.TemporaryDirectory() as home, _api_server(Path(home) / "kubeconfig") as jobs:
        environment = {
            **worker_environment(),
            "PATH": os.environ["PATH"],
            "HOME": home,
            "PREFECT_HOME": home,
            "KUBECONFIG": f"{home}/kubeconfig",
        }
        given = json.dumps({"cases": cases, "template": base_job_template or json.loads(POOL.read_text())})
        done = subprocess.run(
            [sys.executable, "-m", "tests.infra.rendering", "worker"],
            input=given, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr)
        errors: dict[str, str | None] = json.loads(done.stdout)
        return {name: _steady(jobs.pop(0)) if error is None else error for name, error in errors.items()}


def trainjobs() -> dict[str, Any]:
    return {name: trainjob.render(SPEC, trainjob.arguments([*URIS, *words])) for name, words in TRAINJOBS.items()}


def text(manifest: dict[str, Any]) -> str:
    return yaml.safe_dump(manifest, width=120)


async def _post(cases: dict[str, dict[str, Any]], base_job_template: dict[str, Any]) -> dict[str, str | None]:
    """Let Prefect's worker start a run for each case. None where it did, else what it raised."""
    from prefect_kubernetes.worker import KubernetesWorker

    errors: dict[str, str | None] = {}
    for name, variables in cases.items():
        worker = KubernetesWorker(work_pool_name="k8s", name="worker")
        try:
            await worker._initiate_run(*await _prepared(worker, base_job_template, variables))
            errors[name] = None
        except ValueError as error:  # pydantic's too
            errors[name] = str(error)
    return errors


async def _prepared(worker: Any, base_job_template: dict[str, Any], variables: dict[str, Any]) -> tuple[Any, Any]:
    """A flow run with the configuration that the worker would make for it."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import Flow, FlowRun

    flow = Flow(id=FLOW_ID, name="train")
    run = FlowRun(id=RUN_ID, flow_id=FLOW_ID, deployment_id=DEPLOYMENT_ID, name="calm-otter")
    configuration = await worker.job_configuration.from_template_and_values(
        base_job_template, variables, client=PrefectClient("http://127.0.0.1:9/api")
    )
    configuration.prepare_for_flow_run(run, flow=flow, worker_name="worker")
    return run, configuration


@contextmanager
def _api_server(kubeconfig: Path) -> Iterator[list[dict[str, Any]]]:
    """An API server that keeps the Jobs that are posted, and a kubeconfig that leads to it."""
    kept: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            there = self.path == f"/apis/batch/v1/namespaces/{job['metadata']['namespace']}/jobs"
            kept.extend([job] if there else [])
            answer = json.dumps({**job, "metadata": {**job["metadata"], "name": "job", "uid": "1"}}).encode()
            self.send_response(201 if there else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "nobody"}}],
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "nobody", "user": {}}],
    }
    kubeconfig.write_text(yaml.safe_dump(config))
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()


def _steady(job: dict[str, Any]) -> dict[str, Any]:
    """Without what changes with a patch release of Prefect."""
    version = json.dumps(metadata.version("prefect"))
    steady: dict[str, Any] = json.loads(json.dumps(job).replace(version, '"PREFECT_VERSION"'))
    return steady


def main() -> None:
    if sys.argv[1:] == ["worker"]:
        given = json.loads(sys.stdin.read())
        print(json.dumps(asyncio.run(_post(given["cases"], given["template"]))))  # noqa: T201
        return
    EXPECTED.mkdir(exist_ok=True)
    for name, manifest in {**posted(JOBS), **trainjobs()}.items():
        (EXPECTED / f"{name}.yaml").write_text(text(manifest), encoding="utf-8")


if __name__ == "__main__":
    main()
