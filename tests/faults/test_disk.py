"""A disk that is full: one line, nothing half, and the same command goes on once there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from components import base_model, forks
from components.config import BaseConfig
from components.registry import bundle
from components.training.spec import DataRef
from tests.flows.conftest import settings_in
from tests.training.toy_jobs import finished, saved_split, toy_spec

pytestmark = pytest.mark.slow

FULL = "expected space left on the disk; found none"


@dataclass
class Disk:
    """A file system of its own."""

    folder: Path

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)  # noqa: S607

    @property
    def files(self) -> list[str]:
        return [path.name for path in self.folder.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)],  # noqa: S607
        check=False,
        capture_output=True,
    )
    if made.returncode != 0:
        pytest.skip("this user may not mount a small file system")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607


@pytest.mark.fault("disk full while a job trains", "one line; with room, it goes on to the same predictions")
def test_a_job_goes_on_once_there_is_room(disk: Disk, tiny_base: Path, tmp_path: Path) -> None:
    data = saved_split(tmp_path / "split")
    spec = toy_spec(tiny_base, DataRef(uri=data.uri, digest=data.digest), "full")
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    out = disk.folder / "out"

    command = ["-m", "components.training.job", str(tmp_path / "spec.json"), str(out), "--progress", "json"]
    done = forks.run(command, os.environ)
    assert done.returncode == 1
    assert done.stderr.startswith(FULL), done.stderr
    assert done.stderr.count("\n") == 1
    assert not bundle.is_complete(out)

    disk.resize("50m")
    done = forks.run(command, os.environ)
    assert done.returncode == 0, done.stderr
    undisturbed = finished(tiny_base, data, "full", tmp_path / "undisturbed")
    one, other = (bundle.read_predictions(folder) for folder in (out, undisturbed))
    assert (one.probabilities == other.probabilities).all()


@pytest.mark.integration
@pytest.mark.xdist_group("servers")
@pytest.mark.fault("disk full in the cache folder", "one line, nothing half is left there; with room, it is fetched")
def test_a_base_is_fetched_once_there_is_room(
    disk: Disk, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path, tmp_path / "work", tiny_base)("full", base__name="minilm")
    path = tmp_path / "full.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    own = {
        "ADAPTERLINE_CACHE": str(disk.folder),
        "ADAPTERLINE_STACK": str(tmp_path / "stack"),
        "MLFLOW_TRACKING_URI": "",
    }

    command = [sys.executable, "-m", "flows.retrain", "--config", str(path)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {FULL}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert disk.files == []

    disk.resize("500m")
    monkeypatch.setenv("ADAPTERLINE_CACHE", str(disk.folder))
    assert base_model.find(BaseConfig(name="minilm")).path.is_relative_to(disk.folder)
