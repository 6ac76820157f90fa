"""A sweep on real servers: what it trains, what it chooses by, what it leaves; and over a local Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from components import config as configs
from components.config import RegistryConfig, RetrainConfig
from components.data import ledger
from components.errors import ConfigError
from components.evaluation import choice
from components.registry import bundle, tracking
from components.training.spec import DataRef
from flows import groups, steps
from flows.sweep import sweep
from tests.flows.conftest import Command, Settings
from tests.training.toy_jobs import toy_spec

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("servers"), pytest.mark.usefixtures("servers")]

MODEL = "swept"
PATIENCE_S = 300
TRIED = {"methods": ["pfeiffer", "lora"], "learning_rates": [1e-4, 1e-2], "seeds": [0, 1]}


def connect() -> tracking.Tracking:
    return tracking.connect(RegistryConfig())


def swept(settings: Settings, model: str = MODEL, **changes: Any) -> RetrainConfig:
    return settings(model, 300, sweep={**TRIED, **changes}, adapter__schedule__epochs=3)


def parents(model: str = MODEL) -> list[Any]:
    there = connect()
    return list(there.client.search_runs([there.experiment_id], f"attributes.run_name = 'sweep {model}'"))


def children(parent: Any) -> list[Any]:
    there = connect()
    return list(there.client.search_runs([there.experiment_id], f"tags.`{tracking.PARENT}` = '{parent.info.run_id}'"))


def manifests(workspace: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in workspace.glob("jobs/*/manifest.json")}


@pytest.fixture
def chosen(settings: Settings) -> dict[str, Any]:
    """What the sweep has chosen; the first test that asks trains."""
    return sweep(swept(settings))


@pytest.mark.slow
class TestASweep:
    def test_chooses_the_best_mean_on_the_validation_part(
        self, chosen: dict[str, Any], settings: Settings, workspace: Path
    ) -> None:
        means: dict[tuple[str, float], list[float]] = {}
        (parent,) = parents()
        for run in children(parent):
            spec = json.loads((_bundle(run, workspace) / "job.json").read_text())
            measured = json.loads((_bundle(run, workspace) / "metrics.json").read_text())
            key = (spec["method"], spec["schedule"]["learning_rates"]["body"])
            means.setdefault(key, []).append(choice.validation(measured)["accuracy"])
        assert {len(each) for each in means.values()} == {2}
        best = max(sum(each) for each in means.values())
        assert sum(means[(chosen["adapter.method"], chosen[_RATE])]) == best

    def test_trains_nothing_again(self, chosen: dict[str, Any], settings: Settings, workspace: Path) -> None:
        before = manifests(workspace)
        assert sweep(swept(settings)) == chosen
        assert manifests(workspace) == before
        assert len(parents()) == 1

    def test_with_one_more_seed_trains_only_that(
        self, chosen: dict[str, Any], settings: Settings, workspace: Path
    ) -> None:
        before = set(manifests(workspace))
        sweep(swept(settings, seeds=[0, 1, 2]))
        assert len(set(manifests(workspace)) - before) == 4

    def test_leaves_a_nested_run_for_each_job_without_test_scores(self, chosen: dict[str, Any]) -> None:
        parent = parents()[-1]
        runs = children(parent)
        assert len(runs) == 8
        assert parent.info.status == "FINISHED"
        assert set(parent.data.tags["jobs_0"].split()) == {run.data.tags["job_digest"][:16] for run in runs}
        for run in (parent, *runs):
            assert "best_validation_accuracy" in run.data.metrics
            assert not [name for name in run.data.metrics if name.startswith("test")]

    def test_registers_nothing(self, chosen: dict[str, Any]) -> None:
        assert not connect().client.search_model_versions(f"name = '{MODEL}'")

    def test_a_retrain_with_the_chosen_settings_finds_its_adapter_trained(
        self, chosen: dict[str, Any], settings: Settings, workspace: Path
    ) -> None:
        given = swept(settings)
        config = configs.settle(given, None, chosen)
        rows = steps.fetch.fn(config)
        (record, *_) = ledger.records(config.registry.store, MODEL)
        spec = steps.plan.fn(config, rows).adapter(record)
        assert bundle.read_manifest(groups.job_folder(spec, config.compute)).job_digest == spec.digest


_RATE = "adapter.schedule.learning_rates.body"


def _bundle(run: Any, workspace: Path) -> Path:
    digest = run.data.tags["job_digest"]
    (found,) = workspace.glob(f"jobs/*-{digest[:16]}")
    return found


@pytest.mark.slow
def test_a_variant_that_cannot_train_is_not_chosen(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    config = swept(settings, "wild", methods=["pfeiffer"], learning_rates=[1e38, 1e-2], seeds=[0])
    with caplog.at_level("INFO", "adapterline"):
        assert sweep(config)[_RATE] == 1e-2
    assert "expected a finite loss" in caplog.text
    (parent,) = parents("wild")
    assert sorted(run.info.status for run in children(parent)) == ["FAILED", "FINISHED"]


def test_everything_that_cannot_be_done_is_reported_before_anything_is_trained(settings: Settings) -> None:
    config = swept(
        settings, "misfit", methods=["pfeiffer"], reduction_factors=[2, 4], learning_rates=[], seeds=[],
        task_runner="threads",
    ).model_copy(update={"training": configs.TrainingConfig(max_tokens=500)})  # fmt: skip
    several = config.model_copy(update={"compute": config.compute.model_copy(update={"processes": 2})})
    with pytest.raises(ConfigError) as error:
        sweep(several)
    for wrong in ("compute.processes", "pfeiffer /2", "pfeiffer /4"):
        assert wrong in str(error.value)
    assert not parents("misfit")


def test_jobs_of_like_settings_are_dealt_to_the_same_group(tiny_base: Path) -> None:
    data = DataRef(uri="nowhere", digest="0")
    specs = [toy_spec(tiny_base, data, method, seed=seed) for seed in (0, 1) for method in ("pfeiffer", "lora")]
    dealt = groups.deal(specs, 2)
    assert [[spec.method for spec in group] for group in dealt] == [["lora", "lora"], ["pfeiffer", "pfeiffer"]]
    assert [len(group) for group in groups.deal(specs, 3)] == [1, 2, 1]


@pytest.mark.slow
class TestOnRay:
    """A Ray of this machine, which starts with the run and ends with it."""

    def test_groups_are_spread_and_nothing_is_left_behind(
        self,
        settings: Settings,
        workspace: Path,
        command: Command,
        tmp_path: Path,
    ) -> None:
        pytest.importorskip("prefect_ray")
        config = swept(settings, "spread", task_runner="ray", learning_rates=[1e-2])
        path = tmp_path / "spread.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        ended = command("flows.sweep", "--config", str(path), ADAPTERLINE_CACHE=str(tmp_path / "cache"))
        assert ended.returncode == 0, ended.stderr
        assert "best      " in ended.stdout
        (parent,) = parents("spread")
        runs = children(parent)
        assert [run.info.status for run in runs] == ["FINISHED"] * 4
        assert all(bundle.is_complete(_bundle(run, workspace)) for run in runs)
        assert not _processes(str(tmp_path / "cache"))

    @pytest.mark.long
    def test_ctrl_c_ends_all_that_was_started(
        self, settings: Settings, workspace: Path, servers: dict[str, str], tmp_path: Path
    ) -> None:
        pytest.importorskip("prefect_ray")
        config = swept(settings, "stopped", task_runner="ray")
        path, cache = tmp_path / "stopped.yaml", str(tmp_path / "cache")
        content = config.model_dump(mode="json")
        content["adapter"]["schedule"] |= {"epochs": 10_000, "patience": 10_000}
        path.write_text(yaml.safe_dump(content))
        environment = {**os.environ, **servers, "ADAPTERLINE_CACHE": cache}
        before = set(workspace.glob("jobs/*/"))
        flow = subprocess.Popen([sys.executable, "-m", "flows.sweep", "--config", str(path)], env=environment)
        try:
            _until(lambda: set(workspace.glob("jobs/*/")) > before, flow)  # what trains is forked: it has no name
            flow.send_signal(signal.SIGINT)
            assert flow.wait(PATIENCE_S) == 130
            _until(lambda: not _processes(cache))
        finally:
            for each in _processes(cache):
                each.kill()


def _processes(cache: str) -> list[psutil.Process]:
    """Those of the command with this cache: its children have the same environment."""
    every = psutil.process_iter(["environ"])
    return [each for each in every if (each.info["environ"] or {}).get("ADAPTERLINE_CACHE") == cache]


def _until(holds: Callable[[], bool], flow: subprocess.Popen[Any] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        assert flow is None or flow.poll() is None
        time.sleep(0.5)
