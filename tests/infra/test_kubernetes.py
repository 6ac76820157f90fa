"""Kubernetes, as far as it goes without a cluster: the jobs that Prefect's worker posts, and the manifests."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra import rendering, schema

KUBECTL = Path(sys.executable).parent / "kubectl"
EXAMPLE = "secrets.example.yaml"
TEMPLATE = json.loads(rendering.POOL.read_text(encoding="utf-8"))
VARIABLES = TEMPLATE["variables"]["properties"]


@pytest.fixture(scope="session")
def jobs() -> dict[str, Any]:
    """What the worker posts for each of the cases."""
    return rendering.posted(rendering.JOBS)


@pytest.fixture(scope="session")
def built() -> list[dict[str, Any]]:
    """What `kubectl apply --kustomize infra/kubernetes` sends."""
    done = subprocess.run([KUBECTL, "kustomize", rendering.MANIFESTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def workload(objects: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = (each for each in objects if each["metadata"]["name"] == name and "template" in each.get("spec", {}))
    return found


# Jobs of the pool


@pytest.mark.parametrize("name", rendering.JOBS)
def test_job_is_the_expected_one(jobs: dict[str, Any], name: str) -> None:
    """After a wanted change: python -m tests.infra.rendering, and read the difference."""
    assert rendering.text(jobs[name]) == (rendering.EXPECTED / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", rendering.JOBS)
def test_job_is_valid(jobs: dict[str, Any], name: str) -> None:
    assert schema.problems(jobs[name]) == []


def unknown_field(job: dict[str, Any]) -> None:
    job["spec"]["template"]["spec"]["tolerances"] = []


def wrong_type(job: dict[str, Any]) -> None:
    job["spec"]["backoffLimit"] = "none"


def unnamed_container(job: dict[str, Any]) -> None:
    del job["spec"]["template"]["spec"]["containers"][0]["name"]


def no_pod(job: dict[str, Any]) -> None:
    del job["spec"]["template"]


def no_quantity(job: dict[str, Any]) -> None:
    job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "much"


@pytest.mark.parametrize("spoil", [unknown_field, wrong_type, unnamed_container, no_pod, no_quantity])
def test_a_wrong_job_is_found_out(jobs: dict[str, Any], spoil: Callable[[dict[str, Any]], None]) -> None:
    job = copy.deepcopy(jobs["job-gpu"])
    spoil(job)
    assert schema.problems(job) != []


def test_no_gpu_is_asked_for_with_0(jobs: dict[str, Any]) -> None:
    pod = jobs["job-cpu"]["spec"]["template"]["spec"]
    asked = [each["nvidia.com/gpu"] for each in pod["containers"][0]["resources"].values()]
    assert (asked, pod["nodeSelector"]) == ([0, 0], {})


def test_no_password_stands_in_a_job(jobs: dict[str, Any]) -> None:
    assert rendering.SECRET_VALUE in rendering.worker_environment().values()  # or there is nothing to find
    assert rendering.SECRET_VALUE not in json.dumps(jobs)


def test_jobs_get_no_token_of_the_cluster(jobs: dict[str, Any]) -> None:
    assert {job["spec"]["template"]["spec"]["automountServiceAccountToken"] for job in jobs.values()} == {False}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_explains_itself(name: str) -> None:
    assert VARIABLES[name]["title"]
    assert VARIABLES[name]["description"].endswith(".")


def test_variables_and_placeholders_are_the_same() -> None:
    from prefect.utilities.templating import find_placeholders

    assert {each.name for each in find_placeholders(TEMPLATE["job_configuration"])} == set(VARIABLES) - {"env"}


# Manifests


def test_every_manifest_is_valid(built: list[dict[str, Any]]) -> None:
    objects = [*built, *rendering.manifests(EXAMPLE)]
    found = {f"{each['kind']} {each['metadata']['name']}": schema.problems(each) for each in objects}
    assert {name: problems for name, problems in found.items() if problems} == {}


def test_kustomization_names_every_file() -> None:
    (kustomization,) = rendering.manifests("kustomization.yaml")
    there = {path.name for path in rendering.MANIFESTS.iterdir()} - {"kustomization.yaml", EXAMPLE}
    assert set(kustomization["resources"]) == there


def test_everything_is_in_one_namespace(built: list[dict[str, Any]]) -> None:
    (space,) = (each["metadata"]["name"] for each in built if each["kind"] == "Namespace")
    spaces = {each["metadata"]["namespace"] for each in built if each["kind"] != "Namespace"}
    assert spaces == {space} == {VARIABLES["namespace"]["default"]}


def test_images_have_a_version(built: list[dict[str, Any]]) -> None:
    images = {container["image"] for pod in schema.pods(built).values() for container in pod["containers"]}
    assert images == {"adapterline:server", "adapterline:cpu-worker", "postgres:17.6-bookworm"}


def test_pods_ask_for_no_right(built: list[dict[str, Any]], jobs: dict[str, Any]) -> None:
    """What the namespace enforces (Pod Security Standard "restricted"), and a read-only root besides."""
    locked = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    for pod in [*schema.pods(built).values(), *(job["spec"]["template"]["spec"] for job in jobs.values())]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert [container["securityContext"] for container in pod["containers"]] == [locked]


def test_no_service_becomes_a_setting(built: list[dict[str, Any]], jobs: dict[str, Any]) -> None:
    """Service links would set MLFLOW_PORT and PREFECT_SERVER_PORT, which MLflow and Prefect read."""
    pods = [*schema.pods(built).values(), *(job["spec"]["template"]["spec"] for job in jobs.values())]
    assert {pod["enableServiceLinks"] for pod in pods} == {False}


def test_servers_are_watched_and_bounded(built: list[dict[str, Any]]) -> None:
    for name, pod in schema.pods(built).items():
        (container,) = pod["containers"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), name
        assert {"memory", "ephemeral-storage"} <= set(container["resources"]["limits"]), name
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["requests"]), name


def test_only_the_worker_has_rights_and_only_here(built: list[dict[str, Any]]) -> None:
    assert not [each for each in built if each["kind"].startswith("Cluster")]
    (role,) = (each for each in built if each["kind"] == "Role")
    assert {resource for rule in role["rules"] for resource in rule["resources"]} == {
        "jobs", "pods", "pods/log", "events",
    }  # fmt: skip
    assert not {"*", "escalate", "impersonate"} & {verb for rule in role["rules"] for verb in rule["verbs"]}
    with_token = {name for name, pod in schema.pods(built).items() if pod["automountServiceAccountToken"]}
    assert with_token == {"Deployment worker"}


def test_secrets_and_settings_asked_for_are_there(built: list[dict[str, Any]], jobs: dict[str, Any]) -> None:
    objects = [*built, *rendering.manifests(EXAMPLE)]
    there = {
        (each["kind"], each["metadata"]["name"], key)
        for each in objects
        if each["kind"] in ("Secret", "ConfigMap")
        for key in (*each.get("data", {}), *each.get("stringData", {}), "*")
    }
    asked = schema.references([built, jobs, rendering.trainjobs()])
    assert ("Secret", "adapterline", "AWS_ACCESS_KEY_ID") in asked
    assert asked - there == set()


def test_no_job_reads_what_is_for_servers(jobs: dict[str, Any]) -> None:
    assert {name for _, name, _ in schema.references([jobs, rendering.trainjobs()])} == {"adapterline"}


def test_the_example_of_secrets_holds_none() -> None:
    values = {value for each in rendering.manifests(EXAMPLE) for value in each["stringData"].values()}
    assert values == {""}


def test_services_and_network_rules_meet_a_pod(built: list[dict[str, Any]], jobs: dict[str, Any]) -> None:
    key = "app.kubernetes.io/component"
    there = {
        each["spec"]["template"]["metadata"]["labels"][key]
        for each in [*built, *jobs.values()]
        if "template" in each.get("spec", {})
    }
    rules = [each for each in built if each["kind"] in ("NetworkPolicy", "Service")]
    named = {node[key] for node in schema.nodes(rules) if key in node}
    named |= {value for node in schema.nodes(rules) if node.get("key") == key for value in node["values"]}
    assert named == there


def test_nothing_may_talk_unless_a_rule_says_so(built: list[dict[str, Any]]) -> None:
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in [
        each["spec"] for each in built if each["kind"] == "NetworkPolicy"
    ]


# The pool in Prefect


@pytest.mark.integration
@pytest.mark.xdist_group("prefect")
def test_prefect_checks_job_variables_by_the_template(prefect: dict[str, str]) -> None:
    """A real server takes the template as a pool, and refuses a variable out of range or misspelt."""
    script = """
import asyncio, json, sys
from prefect import flow, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import PrefectHTTPStatusError

@flow
def nothing(): ...

async def main(template, cases):
    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name="k8s", type="kubernetes", base_job_template=template))
        flow_id = await client.create_flow(nothing)
        statuses = {}
        for name, variables in cases.items():
            try:
                await client.create_deployment(flow_id, name, work_pool_name="k8s", job_variables=variables)
                statuses[name] = 200
            except PrefectHTTPStatusError as error:
                statuses[name] = error.response.status_code
        print(json.dumps(statuses))

asyncio.run(main(**json.loads(sys.stdin.read())))
"""
    good = rendering.JOBS
    bad = {
        "fewer than no GPUs": {"gpus": -1},
        "GPUs in words": {"gpus": "two"},
        "memory in words": {"memory": "much"},
        "misspelt": {"gpu": 1},
        "a cache without a name": {"cache_volume": {"emptyDir": {}}},
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps({"template": TEMPLATE, "cases": {**good, **bad}}),
        env={**os.environ, **prefect},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, status in statuses.items() if status == 200] == list(good)
    assert {statuses[name] for name in bad} == {422}
