"""One training over several nodes, as a TrainJob of Kubeflow Trainer.

    python -m infra.trainjob SPEC OUT --nodes 2 [--gpus 4] [--spec FILE] [--image …] > trainjob.yaml

SPEC is the s3:// URI of a job spec, OUT the s3:// prefix for its bundle: every node reads and writes there. The spec
says how many processes there are (limits.processes, from compute.processes of the flow); they are shared evenly among
the nodes, one a GPU. Equal arguments give the same text, and the name comes from the spec, so that a second
`kubectl create` of one training is refused.

The torch runtime sets PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT; torchrun
reads them, so its command line names no host.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

NAMESPACE = "adapterline"
IMAGE = "adapterline:cuda"
RUNTIME = "torch-distributed"
# Names in infra/kubernetes: keys of the Secret and of the ConfigMap that training reads, and its service account.
SECRET = CONFIG = "adapterline"  # noqa: S105  # the name of the object, not what is in it
SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
CONFIG_KEYS = ("AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY")
ACCOUNT = "adapterline-training"
USER = 10001
# Replicated job and container of the runtime that trains.
NODE = "node"
URI = re.compile(r"s3://[a-z0-9][a-z0-9.-]+/\S+")
QUANTITY = re.compile(r"[1-9][0-9]*(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class TrainJobError(Exception):
    """No TrainJob comes of these arguments. The message says expected, found, and what to do."""


def render(spec: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The TrainJob of a spec. Raises TrainJobError.

    options: those of the command line.
    """
    for what, uri in (("SPEC", options.spec_uri), ("OUT", options.out_uri)):
        if not URI.fullmatch(uri):
            raise TrainJobError(f"expected {what} as s3://BUCKET/KEY; found {uri!r}; several nodes share no folder")
    method, processes, device = _read(spec)
    each = _each_node(processes, options.nodes)
    gpus = each if options.gpus is None and device != "cpu" else options.gpus or 0
    if gpus not in (0, each) or (gpus == 0 and device == "cuda"):
        raise TrainJobError(
            f"expected one GPU for each of the {each} processes on a node, or none on CPUs; found --gpus {gpus} "
            f"with device {device}; give --gpus {each}, or set compute.processes={options.nodes * max(gpus, 1)}"
        )
    if options.deadline_s < 1:
        raise TrainJobError(f"expected a deadline; found --deadline-s {options.deadline_s}; give seconds from 1 on")
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {
            "name": f"{method}-{digest[:12]}",
            "namespace": options.namespace,
            "labels": {"app.kubernetes.io/part-of": "adapterline", "adapterline/method": method},
            "annotations": {"adapterline/spec": options.spec_uri, "adapterline/spec-sha256": digest},
        },
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": options.runtime,
            },
            "activeDeadlineSeconds": options.deadline_s,
            "trainer": {
                "image": options.image,
                "command": ["torchrun"],
                "args": ["-m", "components.training.job", options.spec_uri, options.out_uri, "--progress", "json"],
                "numNodes": options.nodes,
                "numProcPerNode": each,
                "resourcesPerNode": _resources(options, gpus),
                "env": _environment(options.env),
            },
            "runtimePatches": [{"manager": "adapterline", "trainingRuntimeSpec": _patch(options, gpus)}],
        },
    }


def _read(spec: dict[str, Any]) -> tuple[str, int, str]:
    """Method, processes and device of a spec."""
    limits = spec.get("limits")
    method, processes, device = (
        spec.get("method"),
        limits.get("processes") if isinstance(limits, dict) else None,
        limits.get("device") if isinstance(limits, dict) else None,
    )
    wrong = [
        key
        for key, fits in (
            ("method", isinstance(method, str) and re.fullmatch(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?", method)),
            ("limits.processes", isinstance(processes, int) and processes > 0),
            ("limits.device", device in ("auto", "cpu", "cuda")),
        )
        if not fits
    ]
    if wrong:
        raise TrainJobError(
            f"expected a job spec; found wrong or missing: {', '.join(wrong)}; let flows/retrain.py write it"
        )
    return str(method), int(processes or 0), str(device)


def _each_node(processes: int, nodes: int) -> int:
    if nodes < 1:
        raise TrainJobError(f"expected at least 1 node; found --nodes {nodes}; give a whole number from 1 on")
    if processes % nodes:
        raise TrainJobError(
            f"expected limits.processes of the spec to be a multiple of {nodes} nodes; found {processes}; set "
            f"compute.processes={nodes * max(1, round(processes / nodes))} and let the flow write the spec again"
        )
    return processes // nodes


def _resources(options: argparse.Namespace, gpus: int) -> dict[str, dict[str, str]]:
    """Requests and limits of a node, equal, so that its pod is among the last to be evicted."""
    asked = {"cpu": options.cpu, "memory": options.memory, "ephemeral-storage": options.disk}
    for name, quantity in (*asked.items(), ("shared memory", options.shm)):
        if not QUANTITY.fullmatch(quantity):
            raise TrainJobError(f"expected a quantity for {name}; found {quantity!r}; write it like 500m, 8 or 16Gi")
    if gpus:
        asked["nvidia.com/gpu"] = str(gpus)
    return {"requests": asked, "limits": dict(asked)}


def _environment(further: list[str]) -> list[dict[str, Any]]:
    """Keys by reference, addresses by reference, what the image's read-only root asks for, then what was given."""
    found: dict[str, dict[str, Any]] = {}
    for key in SECRET_KEYS:
        found[key] = {"name": key, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": key}}}
    for key in CONFIG_KEYS:
        found[key] = {"name": key, "valueFrom": {"configMapKeyRef": {"name": CONFIG, "key": key}}}
    for pair in sorted(further):
        name, equals, value = pair.partition("=")
        if not equals or not VARIABLE.fullmatch(name):
            raise TrainJobError(f"expected --env NAME=VALUE; found {name!r}; give a variable's name and an equals sign")
        if name.startswith("PET_") or name in SECRET_KEYS:
            owner = "the torch runtime" if name.startswith("PET_") else f"Secret {SECRET}"
            raise TrainJobError(f"expected {name} to come from {owner}; found it in --env; leave it out")
        found[name] = {"name": name, "value": value}
    return list(found.values())


def _patch(options: argparse.Namespace, gpus: int) -> dict[str, Any]:
    """What the runtime's pods get on top: place, user, read-only root, and folders to write to."""
    mounts = {"shm": "/dev/shm", "tmp": "/tmp", "cache": "/cache"}  # noqa: S108  # places in the container
    cache = {"persistentVolumeClaim": {"claimName": options.cache}} if options.cache else {"emptyDir": {}}
    pod: dict[str, Any] = {
        "serviceAccountName": ACCOUNT,
        "terminationGracePeriodSeconds": 60,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "cache", **cache},
        ],
        "containers": [
            {
                "name": NODE,
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
            }
        ],
    }
    if gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if options.node_selector:
        pod["nodeSelector"] = _labels(options.node_selector)
    labels = {"app.kubernetes.io/part-of": "adapterline", "app.kubernetes.io/component": "training"}
    template = {"metadata": {"labels": labels}, "spec": pod}
    return {"template": {"spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": template}}}]}}}


def _labels(pairs: list[str]) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(found) or any("=" not in pair for pair in pairs):
        raise TrainJobError(f"expected --node-selector LABEL=VALUE; found {' '.join(pairs)!r}; add the equals sign")
    return dict(sorted(found.items()))


def read(uri: str, file: Path | None) -> dict[str, Any]:
    """The spec, from a local copy or from S3 as the environment says. Raises TrainJobError."""
    try:
        content = json.loads(file.read_bytes() if file else _fetch(uri))
    except (OSError, ValueError) as error:
        place = file or uri
        raise TrainJobError(
            f"expected a job spec at {place}; found {type(error).__name__}; check the place, and that it is JSON"
        ) from error
    if not isinstance(content, dict):
        raise TrainJobError(f"expected a job spec; found JSON of type {type(content).__name__}; name the spec's file")
    return content


def _fetch(uri: str) -> bytes:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    if not URI.fullmatch(uri):
        raise TrainJobError(f"expected SPEC as s3://BUCKET/KEY; found {uri!r}; several nodes share no folder")
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        content: bytes = boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    except (BotoCoreError, ClientError) as error:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
        raise TrainJobError(
            f"expected a job spec at {uri}; found {code}; set AWS_ENDPOINT_URL_S3 and keys, or give a copy by --spec"
        ) from error
    return content


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infra.trainjob", description="Render a training over several nodes for Kubeflow Trainer."
    )
    parser.add_argument("spec_uri", metavar="SPEC", help="s3:// object of the job spec")
    parser.add_argument("out_uri", metavar="OUT", help="s3:// prefix for the bundle")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="local copy of the spec, instead of reading SPEC")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, help="of each node; by default one a process, none when the spec says cpu")
    parser.add_argument("--image", default=IMAGE)
    parser.add_argument("--namespace", default=NAMESPACE)
    parser.add_argument("--runtime", default=RUNTIME, help="the ClusterTrainingRuntime")
    parser.add_argument("--cpu", default="8", help="of each node")
    parser.add_argument("--memory", default="32Gi", help="of each node, shared memory included")
    parser.add_argument("--disk", default="20Gi", help="ephemeral storage of each node")
    parser.add_argument("--shm", default="8Gi", help="size of /dev/shm")
    parser.add_argument("--cache", metavar="CLAIM", help="PersistentVolumeClaim with base models; by default empty")
    parser.add_argument("--node-selector", action="append", default=[], metavar="LABEL=VALUE")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="further variable, not secret")
    parser.add_argument("--deadline-s", type=int, default=46_800, metavar="S", help="Kubernetes ends it then")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    try:
        job = render(read(options.spec_uri, options.spec), options)
    except TrainJobError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(yaml.safe_dump(job, sort_keys=False, width=120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
