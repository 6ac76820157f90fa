"""infra/compose.yaml: valid by the Compose Specification, and closed, pinned, limited as it promises.

That its services start and find each other is tested in tests/container/test_compose_up.py.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from components.config import ComputeConfig
from infra import pools
from infra.compose.setup import joined

INFRA = Path("infra")
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def interpolated(text: str, **settings: str) -> str:
    """As Docker Compose fills in variables."""
    return VARIABLE.sub(lambda found: settings.get(found[1], found[2] or ""), text)


def project(**settings: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(interpolated((INFRA / "compose.yaml").read_text(), **settings))
    return loaded


SERVICES = project()["services"]
STAYING = [name for name in SERVICES if name != "setup"]


def test_the_file_is_valid_by_the_compose_specification() -> None:
    PyCompose.from_json(json.dumps(project()))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("pids_limit", "pid_limits"), ("service_healthy", "service_fine"), ("mem_limit: 1g", "mem_limit: much")],
)
def test_the_validation_would_notice(right: str, wrong: str) -> None:
    text = interpolated((INFRA / "compose.yaml").read_text()).replace(right, wrong)
    with pytest.raises(ValueError, match=re.escape(wrong.split()[-1])):
        PyCompose.from_json(json.dumps(yaml.safe_load(text)))


def test_ports_are_open_on_loopback_only_unless_asked() -> None:
    for listen, settings in (("127.0.0.1", {}), ("0.0.0.0", {"ADAPTERLINE_LISTEN": "0.0.0.0"})):  # noqa: S104
        ports = [port for service in project(**settings)["services"].values() for port in service.get("ports", [])]
        assert len(ports) == 3
        assert all(port.startswith(f"{listen}:") for port in ports)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "10001:10001"
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["logging"]["options"]["max-size"]
    assert not service.get("privileged")


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_pinned_or_built_here(name: str) -> None:
    assert re.fullmatch(r"adapterline:(server|cuda-worker)|postgres:\d+\.\d+-bookworm", SERVICES[name]["image"])


def test_only_the_docker_worker_reaches_the_engine() -> None:
    assert [name for name in SERVICES if "docker.sock" in json.dumps(SERVICES[name])] == ["worker-docker"]


def test_no_secret_stands_in_the_file() -> None:
    secret = set(project()["secrets"])
    assert secret == {path["file"].rpartition("/")[2] for path in project()["secrets"].values()}
    for service in SERVICES.values():
        assert not secret & set(service.get("environment", {}))
        assert set(service.get("secrets", [])) <= secret


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_up_is_restarted_and_has_a_health_check(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    if name == "postgres":
        assert service["healthcheck"]["test"]
    else:  # the images bring theirs
        assert "healthcheck" not in service
        assert service["image"].endswith(("server", "worker"))


def test_only_the_docker_worker_sees_gpus_and_the_cpu_file_takes_that_away() -> None:
    assert [name for name, service in SERVICES.items() if "deploy" in service] == ["worker-docker"]
    cpu = (INFRA / "compose" / "cpu.yaml").read_text()
    assert "deploy: !reset null" in cpu
    assert "cuda" not in cpu


def test_jobs_join_the_network_of_the_project() -> None:
    template = json.loads(pools.templates()["docker"])
    variables = joined(template, "adapterline", "adapterline:cuda")["variables"]["properties"]
    assert project()["networks"]["adapterline"]["name"] == "adapterline"
    assert (variables["network_mode"]["default"], variables["networks"]["default"]) == (None, ["adapterline"])
    assert variables["image"]["default"] == "adapterline:cuda"


def test_jobs_find_the_cache_by_its_name() -> None:
    template = json.loads(pools.templates()["docker"])
    assert template["variables"]["properties"]["cache"]["default"] == project()["volumes"]["cache"]["name"]


def test_the_workspace_of_a_retrain_is_a_volume() -> None:
    """The root of its container is read-only."""
    targets = [volume.split(":")[1] for volume in SERVICES["worker-local"]["volumes"]]
    workspace = Path("/app", ComputeConfig().workspace)
    assert any(workspace.is_relative_to(target) for target in targets)


def test_named_volumes_are_declared() -> None:
    mounted = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert {name for name in mounted if name[0] not in "./"} == project()["volumes"].keys()


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A copy of infra/compose whose `prepare.sh` has run, as root."""
    if os.geteuid() != 0:
        pytest.skip("gives files to user 10001: needs root")
    folder = tmp_path / "compose"
    folder.mkdir()
    (folder / "prepare.sh").write_bytes((INFRA / "compose" / "prepare.sh").read_bytes())
    prepare(folder)
    return folder


def prepare(folder: Path) -> None:
    import socket

    engine = folder / "docker.sock"
    if not engine.exists():
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(engine))
    environment = {**os.environ, "DOCKER_SOCKET": str(engine)}
    subprocess.run(["/bin/sh", str(folder / "prepare.sh")], check=True, env=environment, capture_output=True)


def test_secrets_are_private_and_all_there(prepared: Path) -> None:
    files = {path.name: path for path in (prepared / "secrets").iterdir()}
    assert files.keys() == project()["secrets"].keys()
    for path in files.values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_uid == 10001
        assert len(path.read_text()) >= 20 or path.name == "ADAPTERLINE_WEBHOOK_URL"


def test_secrets_stay_when_prepared_again(prepared: Path) -> None:
    before = {path.name: path.read_text() for path in (prepared / "secrets").iterdir()}
    prepare(prepared)
    assert {path.name: path.read_text() for path in (prepared / "secrets").iterdir()} == before


def test_no_two_preparations_make_the_same_secrets(prepared: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "prepare.sh").write_bytes((prepared / "prepare.sh").read_bytes())
    prepare(other)
    for path in (prepared / "secrets").iterdir():
        assert path.name == "ADAPTERLINE_WEBHOOK_URL" or path.read_text() != (other / "secrets" / path.name).read_text()
