"""TrainJobs, as far as it goes without a cluster: by the published schema of Kubeflow Trainer and that of pods."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from pydantic import ValidationError

from infra import local, trainjob
from tests.infra import rendering, schema

NAMES = list(rendering.TRAINJOBS)


def problems(job: dict[str, Any]) -> list[str]:
    """What Kubeflow Trainer's API would refuse or drop. Its models skip unknown fields, so they are looked for."""
    found = schema.wrong_quantities(job)
    try:
        known = TrainerV1alpha1TrainJob.from_dict(job)
    except ValidationError as error:
        return [*found, *(f"{detail['loc']}: {detail['msg']}" for detail in error.errors())]
    assert known is not None
    return found + lost(job, known.to_dict())


def lost(given: Any, kept: Any, place: str = "") -> list[str]:
    """The places whose value the models did not keep."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [each for key in given for each in lost(given[key], kept.get(key), f"{place}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [each for pair in zip(given, kept, strict=True) for each in lost(*pair, f"{place}[]")]
    return [] if given == kept else [f"{place}: unknown, or of another type"]


def pod(job: dict[str, Any]) -> dict[str, Any]:
    """The pod that the runtime would make of a TrainJob."""
    trainer = job["spec"]["trainer"]
    (replicated,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    template = copy.deepcopy(replicated["template"]["spec"]["template"])
    (container,) = template["spec"]["containers"]
    container |= {key: trainer[key] for key in ("image", "command", "args", "env")}
    container["resources"] = trainer["resourcesPerNode"]
    return {"apiVersion": "v1", "kind": "Pod", **template}


def run(*words: str, spec: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "infra.trainjob", *words, "--spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=rendering.ROOT, check=False)


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    return rendering.trainjobs()


@pytest.mark.parametrize("name", NAMES)
def test_trainjob_is_the_expected_one(jobs: dict[str, Any], name: str) -> None:
    """After a wanted change: python -m tests.infra.rendering, and read the difference."""
    assert rendering.text(jobs[name]) == (rendering.EXPECTED / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_trainjob_is_valid(jobs: dict[str, Any], name: str) -> None:
    assert problems(jobs[name]) == []


def unknown_field(job: dict[str, Any]) -> None:
    job["spec"]["trainer"]["nodes"] = 2


def unknown_field_deep_inside(job: dict[str, Any]) -> None:
    replicated = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    replicated["template"]["spec"]["template"]["spec"]["automountServiceAccountToken"] = False


def wrong_type(job: dict[str, Any]) -> None:
    job["spec"]["trainer"]["numNodes"] = "two"


def no_runtime(job: dict[str, Any]) -> None:
    del job["spec"]["runtimeRef"]


def no_quantity(job: dict[str, Any]) -> None:
    job["spec"]["trainer"]["resourcesPerNode"]["limits"]["memory"] = "much"


@pytest.mark.parametrize("spoil", [unknown_field, unknown_field_deep_inside, wrong_type, no_runtime, no_quantity])
def test_a_wrong_trainjob_is_found_out(jobs: dict[str, Any], spoil: Callable[[dict[str, Any]], None]) -> None:
    job = copy.deepcopy(jobs["trainjob-gpu"])
    spoil(job)
    assert problems(job) != []


@pytest.mark.parametrize("name", NAMES)
def test_its_pods_are_valid(jobs: dict[str, Any], name: str) -> None:
    assert schema.problems(pod(jobs[name])) == []


@pytest.mark.parametrize("name", NAMES)
def test_its_pods_ask_for_no_right(jobs: dict[str, Any], name: str) -> None:
    spec = pod(jobs[name])["spec"]
    (account,) = (
        each
        for each in rendering.manifests("accounts.yaml")
        if each["kind"] == "ServiceAccount" and each["metadata"]["name"] == spec["serviceAccountName"]
    )
    assert account["automountServiceAccountToken"] is False
    of_pool = yaml.safe_load((rendering.EXPECTED / "job-gpu.yaml").read_text())["spec"]["template"]["spec"]
    assert spec["securityContext"] == of_pool["securityContext"]
    assert spec["containers"][0]["securityContext"] == of_pool["containers"][0]["securityContext"]


def test_every_process_has_a_gpu(jobs: dict[str, Any]) -> None:
    trainer = jobs["trainjob-gpu"]["spec"]["trainer"]
    assert trainer["numNodes"] * trainer["numProcPerNode"] == rendering.SPEC["limits"]["processes"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == str(trainer["numProcPerNode"])


def test_no_gpu_is_named_on_cpus(jobs: dict[str, Any]) -> None:
    assert "gpu" not in json.dumps(jobs["trainjob-cpu"])


def test_the_runtime_s_own_variables_are_left_to_it(jobs: dict[str, Any]) -> None:
    names = {variable["name"] for job in jobs.values() for variable in job["spec"]["trainer"]["env"]}
    assert not {name for name in names if name.startswith("PET_")}


def test_equal_specs_give_equal_names_and_others_do_not(tmp_path: Path) -> None:
    reordered = dict(reversed(rendering.SPEC.items()))
    outputs = [
        run(*rendering.URIS, spec=spec, folder=tmp_path).stdout
        for spec in (rendering.SPEC, reordered, {**rendering.SPEC, "seed": 1})
    ]
    names = [yaml.safe_load(output)["metadata"]["name"] for output in outputs]
    assert outputs[0] == outputs[1]
    assert names[0] != names[2]
    # What the CRD asks of a name.
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in names)


@pytest.mark.parametrize(
    ("words", "limits", "named"),
    [
        ([*rendering.URIS, "--nodes", "0"], {}, "--nodes 0"),
        ([*rendering.URIS, "--nodes", "3"], {}, "compute.processes=9"),
        ([*rendering.URIS, "--gpus", "3"], {}, "--gpus 3"),
        ([*rendering.URIS, "--gpus", "0"], {"device": "cuda"}, "--gpus 0"),
        ([*rendering.URIS], {"processes": "many"}, "limits.processes"),
        (["/tmp/spec.json", rendering.URIS[1]], {}, "s3://BUCKET/KEY"),  # noqa: S108
        ([rendering.URIS[0], "out"], {}, "s3://BUCKET/KEY"),
        ([*rendering.URIS, "--memory", "much"], {}, "memory"),
        ([*rendering.URIS, "--env", "PET_NNODES=4"], {}, "PET_NNODES"),
        ([*rendering.URIS, "--env", "AWS_SECRET_ACCESS_KEY=x"], {}, "AWS_SECRET_ACCESS_KEY"),
        ([*rendering.URIS, "--deadline-s", "0"], {}, "--deadline-s 0"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    words: list[str], limits: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({**rendering.SPEC, "limits": {**rendering.SPEC["limits"], **limits}}))
    assert trainjob.main([*words, "--spec", str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"error: expected .+; found .+; .+\n", output.err)
    assert named in output.err


def test_a_missing_spec_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainjob.main([*rendering.URIS, "--spec", str(tmp_path / "none.json")]) == 1
    assert re.fullmatch(r"error: expected .+; found FileNotFoundError; .+\n", capsys.readouterr().err)


def test_the_spec_of_a_flow_will_do(tiny_base: Path, tmp_path: Path) -> None:
    """infra knows nothing of components; that the fields are there which it reads is held here."""
    from components.training.spec import DataRef, Limits
    from tests.training.toy_jobs import toy_spec

    data = DataRef(uri="s3://adapterline/data", digest="0")
    spec = toy_spec(tiny_base, data, "full", limits=Limits(threads=2, device="auto", processes=8))
    done = run(*rendering.URIS, "--nodes", "2", spec=spec.model_dump(mode="json"), folder=tmp_path)
    assert done.stderr == ""
    job = yaml.safe_load(done.stdout)
    assert (job["metadata"]["labels"]["adapterline/method"], job["spec"]["trainer"]["numProcPerNode"]) == ("full", 4)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.xdist_group("stack")
def test_its_command_trains_on_two_nodes(tiny_base: Path, tmp_path: Path) -> None:
    """The container's own command, once a node, with the variables that the torch runtime sets and a real S3 store."""
    from components import storage
    from components.registry import bundle
    from components.training.spec import Limits
    from tests.training.toy_jobs import saved_split, toy_spec

    limits = Limits(threads=1, device="cpu", processes=2)
    spec = toy_spec(tiny_base, saved_split(tmp_path / "split"), "pfeiffer", limits=limits)
    uri, out = f"s3://{local.BUCKET}/1.spec.json", f"s3://{local.BUCKET}/1"
    job = trainjob.render(spec.model_dump(mode="json"), trainjob.arguments([uri, out, "--nodes", "2"]))
    command = [str(Path(sys.executable).parent / job["spec"]["trainer"]["command"][0]), *job["spec"]["trainer"]["args"]]
    (port,) = local.free_ports(1)
    with local.stack(tmp_path / "stack") as stack:
        with local.exported(stack.environment):
            storage.write(uri, spec.model_dump_json().encode())
        nodes = [
            subprocess.Popen(
                command,
                cwd=rendering.ROOT,
                env={
                    **os.environ,
                    **stack.environment,
                    "ADAPTERLINE_CACHE": str(tmp_path / f"cache-{rank}"),  # pods share no folder
                    "PET_NNODES": "2",
                    "PET_NPROC_PER_NODE": str(job["spec"]["trainer"]["numProcPerNode"]),
                    "PET_NODE_RANK": str(rank),
                    "PET_MASTER_ADDR": "127.0.0.1",
                    "PET_MASTER_PORT": str(port),
                },
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            errors = [node.communicate(timeout=300)[1] for node in nodes]
        finally:
            for node in nodes:
                node.kill()
        assert [node.returncode for node in nodes] == [0, 0], errors
        with local.exported(stack.environment):
            manifest = bundle.read_manifest(storage.download_folder(out, tmp_path / "bundle"))
    assert manifest.job_digest == spec.digest
