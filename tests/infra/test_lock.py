"""The lock files hold what pyproject.toml asks for, each package with hashes, and agree with one another."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = Path("infra/lock")
PINNED = re.compile(r"^([a-z0-9.-]+)==(\S+)(.*)$")
PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, Version]:
    lines = (LOCK / f"{name}.txt").read_text().splitlines()
    found = [match for line in lines if (match := PINNED.match(line))]
    return {canonicalize_name(match[1]): Version(match[2]) for match in found}


def wanted(lines: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines]


def unmet(requirements: list[Requirement], locked: dict[str, Version]) -> list[str]:
    return [
        f"{each} (locked: {locked.get(canonicalize_name(each.name))})"
        for each in requirements
        if canonicalize_name(each.name) not in locked
        or not each.specifier.contains(locked[canonicalize_name(each.name)], prereleases=True)
    ]


def servers() -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in (LOCK / "server.in").read_text().splitlines()]
    return wanted([line for line in lines if line])


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_job_lock_satisfies_the_project(name: str) -> None:
    assert unmet(wanted(PROJECT["dependencies"]), pins(name)) == [], "run make lock"


def test_the_server_lock_satisfies_its_requirements() -> None:
    assert unmet(servers(), pins("server")) == [], "run make lock"


def test_the_server_lock_stays_in_the_ranges_of_the_project() -> None:
    locked = pins("server")
    shared = [each for each in wanted(PROJECT["dependencies"]) if canonicalize_name(each.name) in locked]
    assert {"prefect", "fastapi", "sqlalchemy"} <= {each.name for each in shared}
    assert unmet(shared, locked) == [], "run make lock"


def test_ranges_of_servers_are_those_of_the_project() -> None:
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["stack"]
    ranges = {canonicalize_name(each.name): each.specifier for each in wanted(lines)}
    for each in servers():
        assert ranges.get(canonicalize_name(each.name), each.specifier) == each.specifier, each.name


@pytest.mark.parametrize("name", ["cpu", "server"])
def test_locks_agree_on_what_they_share(name: str) -> None:
    cuda, other = pins("cuda"), pins(name)
    differing = {package for package in cuda.keys() & other.keys() if cuda[package] != other[package]}
    assert differing <= {"torch"}


def test_the_cpu_lock_takes_the_cpu_build_and_nothing_of_cuda() -> None:
    cpu = pins("cpu")
    assert cpu["torch"].local == "cpu"
    assert not [package for package in cpu if package.startswith(("nvidia-", "cuda-"))]


def test_the_cuda_lock_brings_its_own_cuda() -> None:
    cuda = pins("cuda")
    assert cuda["torch"].local is None
    assert cuda["torch"].public == pins("cpu")["torch"].public
    assert "nvidia-nccl-cu13" in cuda


@pytest.mark.parametrize("name", ["cpu", "cuda", "server", "uv"])
def test_every_package_has_a_hash(name: str) -> None:
    text = (LOCK / f"{name}.txt").read_text()
    entries = [entry for entry in re.split(r"\n(?=[a-z0-9.-]+==)", text) if PINNED.match(entry.partition("\n")[0])]
    assert len(entries) == len(pins(name)) > 0
    assert [entry.partition(" ")[0] for entry in entries if "--hash=sha256:" not in entry] == []
