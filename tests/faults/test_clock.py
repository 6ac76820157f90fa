"""A clock that jumps by a day, there and back: nothing is decided by what time it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.registry import bundle, history
from components.training.progress import parse
from tests.registry.registered import Shelf, shelf
from tests.training.toy_jobs import finished, saved_split, toy_spec

pytestmark = pytest.mark.slow

# From Debian's package `faketime`: tells a process another time, read from a file as often as it asks.
LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
needs_faketime = pytest.mark.skipif(LIBRARY is None, reason="faketime is not installed: apt-get install faketime")


class Clock:
    """What time it is for the processes that are given `variables`; others keep the true one."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "clock"
        self.jump("+0")

    def jump(self, offset: str) -> None:
        """offset: from the true time, e.g. -1d."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(offset)
        fresh.replace(self.file)

    @property
    def variables(self) -> dict[str, str]:
        return {
            **os.environ,
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # as in the kernel, where only the time of day jumps
        }


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


def today(clock: Clock) -> str:
    command = [sys.executable, "-c", "import datetime; print(datetime.date.today())"]
    return subprocess.run(command, env=clock.variables, capture_output=True, text=True, check=True).stdout


@needs_faketime
@pytest.mark.fault("the clock jumps a day, there and back, while a job trains", "the same predictions")
def test_a_job_does_not_mind(clock: Clock, tiny_base: Path, tmp_path: Path) -> None:
    spec = toy_spec(tiny_base, saved_split(tmp_path / "split"), "pfeiffer", epochs=6)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    true_day = today(clock)
    command = [sys.executable, "-m", "components.training.job", str(tmp_path / "spec.json"), str(tmp_path / "out")]
    with subprocess.Popen(
        [*command, "--progress", "json"], env=clock.variables, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if (event := parse(line)) and event.metrics:
                clock.jump(("+1d", "-1d")[event.epoch % 2])
                assert today(clock) != true_day
    assert job.returncode == 0
    undisturbed = finished(tiny_base, spec.data, "pfeiffer", tmp_path / "undisturbed", epochs=6)
    one, other = (bundle.read_predictions(folder) for folder in (tmp_path / "out", undisturbed))
    assert (one.probabilities == other.probabilities).all()


@pytest.fixture(scope="module")
def shelved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return shelf(tmp_path_factory.mktemp("registry"), tiny_base)


@needs_faketime
@pytest.mark.fault("the clock jumps a day between promotions", "the history keeps its order, roll back its target")
def test_history_is_ordered_by_what_happened(clock: Clock, shelved: Shelf) -> None:
    model, there = "timeless", shelved.registry
    variables = {**clock.variables, "MLFLOW_TRACKING_URI": there.versions.uri}

    def decide(*arguments: str) -> None:
        command = [sys.executable, "-m", "flows.promote", *arguments, "--reviewer", "ada", "--store", there.store]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    for number, offset in enumerate(("+1d", "-1d", "+0"), start=1):
        shelved.version(model, champion=str(number - 1) if number > 1 else None)
        clock.jump(offset)
        decide(model, "--version", str(number), "--yes")
    clock.jump("-1d")
    decide("rollback", model, "--reason", "complaints")

    found = history.records(there.store, model)
    assert [(record.before, record.after) for record in found] == [(None, "1"), ("1", "2"), ("2", "3"), ("3", "2")]
    assert [record.when for record in found] != sorted(record.when for record in found)
    assert shelved.production(model) == "2"
