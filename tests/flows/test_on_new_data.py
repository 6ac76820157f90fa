"""The sensor on a real server: it starts one run for new data, and none for the same data again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from components import storage
from components.config import RetrainConfig
from components.data import ledger, rows, sources
from components.data.news import News
from components.data.split import split
from components.errors import AdapterlineError, ComputeError, ConfigError, GateFailed, JobKilled, ModelBusy, OutOfMemory
from flows import on_new_data as sensor
from flows.retrain import retrain
from tests.conftest import toy_rows, write_csv
from tests.flows.conftest import Settings

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("servers"), pytest.mark.usefixtures("servers")]

STARTS = "retrain/when-new"


class Started:
    """A deployment of `retrain` that no worker serves, so that what was started for it can be counted."""

    def __init__(self, client: SyncPrefectClient, deployment: UUID) -> None:
        self.client, self.deployment = client, deployment

    @property
    def runs(self) -> list[FlowRun]:
        return [run for run in self.client.read_flow_runs() if run.deployment_id == self.deployment]

    def end(self, state: State[Any], *, begun: bool) -> None:
        """Let the only run that has not ended come to this end."""
        (run,) = [run for run in self.runs if run.state and not run.state.is_final()]
        if begun:
            self.client.set_flow_run_state(run.id, Running(), force=True)
        self.client.set_flow_run_state(run.id, state, force=True)


@pytest.fixture
def started(servers: dict[str, str]) -> Iterator[Started]:
    with get_client(sync_client=True) as client:
        flow = client.create_flow(retrain)
        deployment = client.create_deployment(flow, STARTS.partition("/")[2], enforce_parameter_schema=False)
        yield Started(client, deployment)
        client.delete_deployment(deployment)


@pytest.fixture
def config(settings: Settings, tmp_path: Path) -> RetrainConfig:
    """Of a folder with 40 rows, and a store without accepted data."""
    (tmp_path / "incoming").mkdir()
    write_csv(tmp_path / "incoming" / "1.csv", toy_rows(40))
    # named after the test's folder: runs are found again by model and data
    return settings(
        f"sensed-{tmp_path.name}", data__source=str(tmp_path / "incoming"), registry__store=str(tmp_path / "store")
    )


def look(config: RetrainConfig, wanted: int = 30, **parameters: Any) -> State[None]:
    state: State[None] = sensor.on_new_data(config, min_new_rows=wanted, starts=STARTS, return_state=True, **parameters)
    return state


def failed(kind: type[AdapterlineError]) -> State[None]:
    """As Prefect words it."""
    error = kind("something", "something else", "do this")
    return Failed(message=f"Flow run encountered an exception: {kind.__name__}: {error}")


def accept(config: RetrainConfig) -> None:
    """What the step `split` of a retrain leaves behind."""
    table = sources.read(config.data).table
    parts = split(rows.clean(table, rows.label_names(table, None)), config.split)
    ledger.accept(config.registry.store, config.model, parts, rows.data_digest(table), "settings", 1)


def test_too_few_rows_start_nothing_and_are_counted(config: RetrainConfig, started: Started) -> None:
    state = look(config, wanted=100)
    assert state.is_completed()
    assert (state.name, state.message) == ("Waiting", "40 new rows, 100 wanted")
    assert started.runs == []


def test_enough_rows_start_one_run_with_the_same_parameters(config: RetrainConfig, started: Started) -> None:
    state = look(config, overrides={"gate.margin": 0.3})
    (run,) = started.runs
    assert state.name == "Started"
    assert run.name in str(state.message)
    given = {name: run.parameters[name] for name in ("config", "preset", "overrides")}
    assert given == {"config": config.model_dump(mode="json"), "preset": None, "overrides": {"gate.margin": 0.3}}


def test_a_second_look_starts_no_second_run(config: RetrainConfig, started: Started) -> None:
    look(config)
    assert look(config).name == "Tried"
    assert len(started.runs) == 1


def test_two_sensors_at_once_start_one_run(config: RetrainConfig, started: Started) -> None:
    found = News(data_digest="0" * 64, rows=40, new_rows=40)
    with ThreadPoolExecutor(4) as pool:
        looks = [  # threads know Prefect's settings by their context
            pool.submit(copy_context().run, sensor.start.fn, STARTS, config.model, found, {"config": None})
            for _ in range(4)
        ]
    assert {look.result()[0] for look in looks} <= {"Started", "Tried"}
    assert len(started.runs) == 1


@pytest.mark.parametrize(
    "end", [failed(GateFailed), failed(OutOfMemory), Completed(), Cancelled()], ids=["gate", "error", "ok", "hand"]
)
def test_rows_that_had_their_turn_are_not_tried_again(
    config: RetrainConfig, started: Started, end: State[None]
) -> None:
    look(config)
    started.end(end, begun=True)
    state = look(config)
    assert state.name == "Tried"
    assert str(end.name) in str(state.message)
    assert len(started.runs) == 1


def test_a_run_that_the_deployment_turned_away_is_started_again(config: RetrainConfig, started: Started) -> None:
    look(config)
    started.end(Cancelled(message="Deployment concurrency limit reached."), begun=False)
    assert look(config).name == "Started"
    assert len(started.runs) == 2


def test_a_run_that_found_the_model_busy_is_started_again(
    config: RetrainConfig, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often: Prefect tells of so many runs at once, and no more."""
    monkeypatch.setattr(sensor, "PAGE", 2)
    look(config)
    for _ in range(4):
        started.end(failed(ModelBusy), begun=True)
        assert look(config).name == "Started"
    assert len(started.runs) == 5


@pytest.mark.parametrize("end", [Crashed(), failed(JobKilled)], ids=["crashed", "killed"])
def test_a_run_that_was_cut_off_is_started_again(config: RetrainConfig, started: Started, end: State[None]) -> None:
    look(config)
    started.end(end, begun=True)
    assert look(config).name == "Started"
    assert len(started.runs) == 2


def test_after_three_runs_that_were_cut_off_it_gives_up_in_words(config: RetrainConfig, started: Started) -> None:
    for _ in range(3):
        assert look(config).name == "Started"
        started.end(Crashed(), begun=True)
    state = look(config)
    assert state.name == "Tried"
    assert "3 runs with these rows were cut off" in str(state.message)
    assert all(f"{run.name} (Crashed)" in str(state.message) for run in started.runs)
    assert len(started.runs) == 3


def test_rows_that_were_accepted_by_a_run_that_was_cut_off_are_given_to_another(
    config: RetrainConfig, started: Started
) -> None:
    look(config)
    accept(config)
    assert look(config).message == "0 new rows, 30 wanted"  # while it runs
    for _ in range(2):
        started.end(Crashed(), begun=True)
        assert look(config).name == "Started"
    started.end(Crashed(), begun=True)
    assert look(config).name == "Tried"
    assert len(started.runs) == 3


def test_accepted_rows_that_had_their_turn_are_not_news(config: RetrainConfig, started: Started) -> None:
    look(config)
    accept(config)
    started.end(failed(GateFailed), begun=True)
    assert look(config).message == "0 new rows, 30 wanted"
    assert len(started.runs) == 1


def test_further_rows_start_a_further_run(config: RetrainConfig, started: Started) -> None:
    look(config)
    started.end(Completed(), begun=True)
    write_csv(Path(config.data.source) / "2.csv", toy_rows(40, seed=1))
    assert look(config).name == "Started"
    assert len(started.runs) == 2


def test_while_the_deployment_runs_another_model_it_starts_this_one(config: RetrainConfig, started: Started) -> None:
    other = started.client.create_flow_run_from_deployment(started.deployment)
    started.client.set_flow_run_state(other.id, Running(), force=True)
    assert look(config).name == "Started"
    assert len(started.runs) == 2


def test_a_deployment_that_is_not_there_is_named(config: RetrainConfig) -> None:
    with pytest.raises(ComputeError, match="expected deployment retrain/none; found none of that name"):
        sensor.on_new_data(config, min_new_rows=1, starts="retrain/none")


def test_wrong_parameters_are_one_line() -> None:
    with pytest.raises(ConfigError, match="expected a preset among"):
        sensor.on_new_data(preset="nope")


def test_a_prefix_is_looked_at_as_a_folder_is(config: RetrainConfig, started: Started, tmp_path: Path) -> None:
    source = f"s3://adapterline/incoming/{tmp_path.name}/"
    there = config.model_copy(update={"data": config.data.model_copy(update={"source": source})})
    assert look(there).message == "0 new rows, 30 wanted"
    for name in ("b.csv", "a/1.csv", "_unfinished.csv"):
        path = write_csv(tmp_path / "rows.csv", toy_rows(20, seed=len(name)))
        storage.write(storage.join(source, name), path.read_bytes() if name[0] != "_" else b"?")
    texts = [text for name in ("a/1.csv", "b.csv") for text, _ in toy_rows(20, seed=len(name))]
    assert list(sources.read(there.data).table["text"]) == texts
    assert look(there).name == "Started"
