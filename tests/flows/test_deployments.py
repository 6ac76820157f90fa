"""`prefect deploy --all` and `prefect deployment run`, with a real worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.states import Cancelling

from components import config as configs
from components import forks
from components.config import RetrainConfig
from components.errors import ModelBusy
from flows.retrain import retrain
from tests.conftest import make_base, toy_rows, write_csv
from tests.flows.conftest import settings_in
from tests.flows.deployed import PATIENCE_S, Prefect, deploy, message, newest, until_ended

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.xdist_group("servers-of-commands")]

POOLS = {
    "retrain/nightly": "local",
    "retrain/on-demand": "local",
    "retrain/on-new-data": "local",
    "fuse/on-demand": "local",
    "upgrade/on-demand": "local",
    "score/on-demand": "local",
    "sweep/on-demand": "local",
    "promote/review": "local",
    "roll-back/now": "local",
    "approvals/tags": "local",
    "train/local": "local",
    "train/cpu": "docker",
    "train/gpu": "docker",
    "train/k8s": "k8s",
}


def given(config: RetrainConfig) -> tuple[str, str]:
    """As parameters, in place of the deployment's preset."""
    return "preset=null", f"config={config.model_dump_json()}"


class TestWhatIsDeployed:
    def test_all_are_there_in_their_pools(self, deployed: dict[str, DeploymentResponse]) -> None:
        assert {name: each.work_pool_name for name, each in deployed.items()} == POOLS

    @pytest.mark.parametrize(
        ("name", "schedule"),
        [
            ("retrain/nightly", CronSchedule(cron="0 2 * * *", timezone="UTC")),
            ("retrain/on-new-data", timedelta(minutes=5)),
        ],
    )
    def test_retrain_has_a_schedule(
        self, deployed: dict[str, DeploymentResponse], name: str, schedule: CronSchedule | timedelta
    ) -> None:
        (found,) = deployed[name].schedules
        assert found.active
        if isinstance(found.schedule, IntervalSchedule):
            assert found.schedule.interval == schedule
        else:
            assert found.schedule == schedule

    @pytest.mark.parametrize("name", ["retrain/nightly", "retrain/on-new-data"])
    def test_a_second_run_is_cancelled(self, deployed: dict[str, DeploymentResponse], name: str) -> None:
        limit, options = deployed[name].global_concurrency_limit, deployed[name].concurrency_options
        assert limit is not None
        assert options is not None
        assert (limit.limit, options.collision_strategy.value) == (1, "CANCEL_NEW")

    def test_on_demand_runs_any_number_at_once_and_never_by_itself(
        self, deployed: dict[str, DeploymentResponse]
    ) -> None:
        found = deployed["retrain/on-demand"]
        assert (found.schedules, found.global_concurrency_limit) == ([], None)

    def test_the_sensor_starts_runs_on_demand(self, deployed: dict[str, DeploymentResponse]) -> None:
        assert deployed["retrain/on-new-data"].parameters["starts"] == "retrain/on-demand"

    def test_the_server_makes_the_runs_of_schedules(
        self, client: SyncPrefectClient, deployed: dict[str, DeploymentResponse]
    ) -> None:
        nightly = deployed["retrain/nightly"].id
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            runs = [run for run in client.read_flow_runs() if run.deployment_id == nightly and run.auto_scheduled]
            if runs:
                break
            time.sleep(1)
        assert {(run.expected_start_time.hour, run.expected_start_time.minute) for run in runs} == {(2, 0)}  # type: ignore[union-attr]

    @pytest.mark.parametrize("name", ["retrain/nightly", "retrain/on-new-data"])
    def test_parameters_are_valid_and_train_in_subprocesses(
        self, deployed: dict[str, DeploymentResponse], name: str
    ) -> None:
        found = deployed[name].parameters
        config = configs.parse(found["config"], "prefect.yaml") if "config" in found else None
        assert configs.settle(config, found.get("preset"), found["overrides"]).compute.deployment is None

    def test_containers_have_their_image_and_code(self, deployed: dict[str, DeploymentResponse]) -> None:
        step = [{"prefect.deployments.steps.set_working_directory": {"directory": "/app"}}]
        assert all(deployed[f"train/{name}"].pull_steps == step for name in ("cpu", "gpu", "k8s"))
        assert deployed["train/cpu"].job_variables == {"image": "adapterline:cpu", "device_requests": []}
        assert deployed["train/gpu"].job_variables == {"image": "adapterline:cuda"}
        assert deployed["train/gpu"].parameters == {"turn": "gpu"}

    def test_where_jobs_train_is_chosen_by_the_environment(
        self, client: SyncPrefectClient, deployed: dict[str, DeploymentResponse], environment: dict[str, str]
    ) -> None:
        try:
            assert deploy({**environment, "TRAIN_ON": "train/gpu"}) == 0
            for name in ("retrain/nightly", "retrain/on-demand", "retrain/on-new-data"):
                assert client.read_deployment_by_name(name).parameters["overrides"] == {
                    "compute.deployment": "train/gpu"
                }
        finally:
            deploy(environment)


class TestRunning:
    """From the command line; the exit code tells."""

    @pytest.fixture(scope="class")
    def sensed(self, workspace: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RetrainConfig:
        """Of a folder without rows."""
        folder = tmp_path_factory.mktemp("sensed")
        (folder / "incoming").mkdir()
        return settings_in(folder, workspace, tiny_base)("sensed", data__source=str(folder / "incoming"))

    @pytest.fixture(scope="class")
    def trained(
        self, sensed: RetrainConfig, run: Prefect, client: SyncPrefectClient, deployed: dict[str, DeploymentResponse]
    ) -> FlowRun:
        """What the sensor started for the first rows, at its end."""
        write_csv(Path(sensed.data.source) / "1.csv", toy_rows(600))
        done = run("retrain/on-new-data", f"config={sensed.model_dump_json()}")
        assert "'Started'" in done.stdout, done.stdout + done.stderr
        return until_ended(client, newest(client, deployed["retrain/on-demand"]))

    def test_wrong_parameters_exit_1_with_our_line_on_the_run(
        self, run: Prefect, client: SyncPrefectClient, deployed: dict[str, DeploymentResponse]
    ) -> None:
        assert run("retrain/nightly", "preset=nope").returncode == 1
        line = message(newest(client, deployed["retrain/nightly"]))
        assert "ConfigError: expected a preset among" in line
        assert "found 'nope'" in line

    def test_the_sensor_waits_for_rows(self, run: Prefect, sensed: RetrainConfig) -> None:
        nothing = run("retrain/on-new-data", f"config={sensed.model_dump_json()}")
        assert nothing.returncode == 0, nothing.stdout + nothing.stderr
        assert "'Waiting'" in nothing.stdout

    def test_the_sensor_starts_a_run_of_the_deployment(self, trained: FlowRun) -> None:
        assert trained.parameters["preset"] is None
        assert trained.state is not None
        assert trained.state.is_completed(), message(trained)

    @pytest.mark.usefixtures("trained")
    def test_a_good_run_exits_0(self, run: Prefect, sensed: RetrainConfig) -> None:
        done = run("retrain/nightly", *given(sensed))
        assert done.returncode == 0, done.stdout + done.stderr


class TestAtOnce:
    """While a run of model `endless` trains."""

    @pytest.fixture(scope="class")
    def endless(
        self,
        worker: None,
        client: SyncPrefectClient,
        deployed: dict[str, DeploymentResponse],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Iterator[dict[str, Any]]:
        """The parameters of a nightly run that holds its model, and is cancelled in the end.

        Its jobs are stopped meanwhile, or they would take both cores of the machine from everything else.
        """
        folder = tmp_path_factory.mktemp("endless")
        schedule = {
            "epochs": 100_000,
            "patience": 100_000,
            "learning_rates": {"body": 1e-9, "layer_norm": 1e-9, "head": 1e-9},
        }
        config = {
            "model": "endless",
            "data": {"source": str(write_csv(folder / "rows.csv", toy_rows(400)))},
            "base": {"name": str(make_base(folder / "base"))},
            "adapter": {"bottleneck": {"reduction_factor": 2}, "schedule": schedule},
            "baseline": {"schedule": schedule},
            "training": {"max_tokens": 16},
            "compute": {"workspace": str(folder / "work"), "job_memory_gb": 1},
        }
        run = client.create_flow_run_from_deployment(
            deployed["retrain/nightly"].id, parameters={"preset": None, "config": config}
        )
        deadline = time.monotonic() + PATIENCE_S
        while len(jobs := training()) < 2:
            assert time.monotonic() < deadline, message(client.read_flow_run(run.id))
            time.sleep(1)
        for job in jobs:
            job.suspend()
        yield config
        for job in jobs:
            job.resume()
        client.set_flow_run_state(run.id, Cancelling())
        ended = until_ended(client, run)
        assert ended.state is not None
        assert ended.state.is_cancelled()

    @pytest.mark.fault("two nightly runs at once for one model", "the second is cancelled and says why")
    def test_a_second_nightly_run_is_cancelled(
        self,
        endless: dict[str, Any],
        run: Prefect,
        client: SyncPrefectClient,
        deployed: dict[str, DeploymentResponse],
    ) -> None:
        assert run("retrain/nightly").returncode == 1
        second = newest(client, deployed["retrain/nightly"])
        assert second.state is not None
        assert second.state.is_cancelled()
        assert "concurrency limit" in message(second)

    @pytest.mark.fault("the same retrain started twice", "the second ends at once and says why; one result")
    def test_a_run_of_the_same_model_from_elsewhere_fails_in_words(self, endless: dict[str, Any]) -> None:
        with pytest.raises(ModelBusy, match="expected no other run for model endless; found another"):
            retrain(configs.parse(endless, "the test"))

    @pytest.mark.parametrize(("model", "end"), [("endless", "ModelBusy"), ("other", "DataError")])
    def test_on_demand_only_a_run_of_the_same_model_is_turned_away(
        self,
        endless: dict[str, Any],
        run: Prefect,
        client: SyncPrefectClient,
        deployed: dict[str, DeploymentResponse],
        model: str,
        end: str,
    ) -> None:
        config = {**endless, "model": model, "data": {"source": "no-such-file.csv"}}  # read once the model is held
        assert run("retrain/on-demand", *given(configs.parse(config, "the test"))).returncode == 1
        assert f"exception: {end}: " in message(newest(client, deployed["retrain/on-demand"]))


def training() -> list[psutil.Process]:
    """The jobs of all runs below this process: what a process that forks has forked."""
    try:
        below = psutil.Process().children(recursive=True)
        forked = {each.pid for each in below if forks.__file__ in each.cmdline()}
        return [each for each in below if each.pid in forked and each.ppid() in forked]
    except psutil.NoSuchProcess:  # ended while it was looked at
        return []
