"""The command: what it prints, what it removes, and when it refuses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Pending

from components.config import RegistryConfig
from components.errors import StorageUnavailable
from components.registry import claim, removal, tracking
from components.registry.garbage import Thing
from flows import tidy
from tests.registry import populations as made

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("tidy")]


@pytest.fixture
def arguments(empty_mlflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Of a store in a folder with two left-over jobs, in a workspace too, and no Prefect server."""
    for name in ("mlflow.db", "other.db"):
        shutil.copy(empty_mlflow, tmp_path / name)
    store = str(tmp_path / "store")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("ADAPTERLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    connection = tracking.connect(RegistryConfig(store=store, tracking_uri=uri))
    claim.make(connection, store, str(tmp_path / "work"), str(tmp_path / "cache"))
    for number, area in enumerate(("store", "work")):
        made.write(tmp_path / area / "jobs" / made.job_name(str(number)) / "checkpoint/last.safetensors", "x" * 2000)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield ["--store", store, "--workspace", str(tmp_path / "work")]


def jobs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/jobs/*") if path.is_dir())


def test_it_lists_and_removes_nothing_unless_told_to(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = jobs(tmp_path)
    assert tidy.main(arguments) == 0
    assert jobs(tmp_path) == there
    said = capsys.readouterr().out
    for path in there:
        assert re.search(rf"^job +{path} +2 kB +\d+ d +its training was broken off", said, re.MULTILINE)
    assert "left over  2 things, 4 kB" in said
    assert said.splitlines()[-1].endswith(f"flows.tidy {' '.join(arguments)} --delete")


def test_it_removes_what_it_lists(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tidy.main([*arguments, "--delete"]) == 0
    assert jobs(tmp_path) == []
    assert "removed 2 things, 4 kB\n" in capsys.readouterr().out
    assert tidy.main([*arguments, "--delete"]) == 0
    assert "left over  0 things" in capsys.readouterr().out


def test_what_is_younger_than_asked_for_stays(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tidy.main([*arguments, "--older-than", "100000", "--delete"]) == 0
    assert len(jobs(tmp_path)) == 2


@pytest.mark.parametrize("days", ["-1", "0", "inf", "nan", "soon"])
def test_days_are_a_number(arguments: list[str], days: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tidy.main([*arguments, f"--older-than={days}"])
    assert f"expected a number of days, at least {tidy.SHORTEST:g}; found {days}" in capsys.readouterr().err


def test_jobs_stay_while_prefect_does_not_answer(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        assert tidy.main([*arguments, "--delete"]) == 0
    assert len(jobs(tmp_path)) == 2
    assert "Prefect did not say which jobs run" in capsys.readouterr().out


@pytest.mark.xdist_group("servers")
def test_jobs_stay_that_prefect_has_not_ended(servers: dict[str, str], arguments: list[str], tmp_path: Path) -> None:
    first, second = jobs(tmp_path)

    @flow(name="train")
    def train() -> None: ...

    def tag(path: Path) -> list[str]:
        return [f"job:{path.name.rpartition('-')[2]}"]

    with temporary_settings({PREFECT_API_URL: servers["PREFECT_API_URL"]}), get_client(sync_client=True) as client:
        client.create_flow_run(train, tags=tag(first), state=Pending())
        client.create_flow_run(train, tags=tag(second), state=Completed())
        assert tidy.main([*arguments, "--delete"]) == 0
    assert jobs(tmp_path) == [first]


def test_a_failure_says_what_was_removed_before(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = jobs(tmp_path)
    original = removal.remove

    def failing(thing: Thing, uri: str) -> bool:
        if thing.place == str(second):
            raise StorageUnavailable("an S3 server", "none", "start it")
        return original(thing, uri)

    monkeypatch.setattr(removal, "remove", failing)
    assert tidy.main([*arguments, "--delete"]) == 1
    said = capsys.readouterr()
    assert "removed 1 thing, 2 kB; 1 stay" in said.out
    assert said.err == "error: expected an S3 server; found none; start it\n"
    assert jobs(tmp_path) == [second] != [first]


def test_a_store_of_another_mlflow_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    assert tidy.main([*arguments, "--delete"]) == 1
    assert "correct MLFLOW_TRACKING_URI" in capsys.readouterr().err
    assert len(jobs(tmp_path)) == 2
