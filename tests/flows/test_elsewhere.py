"""Following a job that runs elsewhere: waiting for a turn, silence, nobody there. Real Prefect server and store."""

from __future__ import annotations

import contextvars
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import LogCreate, WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Running

from components import base_model, storage
from components.config import BaseConfig, ComputeConfig
from components.errors import ComputeError, JobCancelled, JobKilled, ModelBusy, StorageError
from components.registry import bundle
from components.training.progress import Event
from components.training.spec import DataRef, JobSpec, Limits, code_version
from flows import elsewhere, jobs, pulse, training, turns
from flows.train import train
from tests.flows.conftest import Settings

pytestmark = [
    pytest.mark.integration,
    pytest.mark.xdist_group("servers-of-commands"),
    pytest.mark.usefixtures("servers"),
]

STORE = "s3://adapterline"
ROOT = Path(__file__).parents[2]
EVENT = Event(step=1, steps=2, epoch=1, epochs=1, loss=0.5, tokens_per_s=1.0, eta_s=1.0)


@pytest.fixture
def spec(settings: Settings) -> JobSpec:
    """A job that is never trained."""
    config = settings("elsewhere")
    return JobSpec(
        method="pfeiffer",
        base=base_model.find(BaseConfig(name=config.base.name)).pin,
        data=DataRef(uri="s3://adapterline/nothing", digest=uuid4().hex),
        labels=("bad", "good"),
        settings=config.adapter.settings,
        schedule=config.adapter.schedule,
        training=config.training,
        limits=Limits(threads=1, device="cpu"),
        seed=0,
        code=code_version(),
    )


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as found:
        yield found


def waits_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def attend(client: SyncPrefectClient, spec: JobSpec, run: FlowRun) -> None:
    elsewhere._attend(client, spec, run, f"{STORE}/jobs/{spec.digest[:16]}", lambda event: None)


def test_a_job_that_waits_for_its_turn_gives_signs_of_life(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "BEAT_S", 0.1)
    client.upsert_global_concurrency_limit_by_name("one-gpu", 1)
    out = f"{STORE}/jobs/{uuid4().hex}"
    place = pulse.place(out)
    ended: list[str | None] = []

    def run() -> None:
        ended.append(train(f"{out}.spec.json", "0" * 64, out, turn="one-gpu", return_state=True).name)

    waiting = threading.Thread(target=contextvars.copy_context().run, args=(run,))
    with turns.turn("one-gpu"):
        waiting.start()
        waits_for(lambda: storage.exists(place) and json.loads(storage.read(place))["beat"] > 2)
        assert ended == []
    waiting.join(60)
    assert ended == ["StorageError"], "after its turn it looks for its spec, and there is none"


@pytest.mark.parametrize("lies_there", [b"", json.dumps({"event": {**asdict(EVENT), "step": 0}}).encode()])
def test_what_lies_there_when_the_store_is_back_is_no_sign_of_life(
    monkeypatch: pytest.MonkeyPatch, lies_there: bytes
) -> None:
    found = [lies_there, lies_there, json.dumps({"event": asdict(EVENT)}).encode()]

    def away(uri: str) -> bool:
        raise StorageError("the store", "none", "wait")

    monkeypatch.setattr(storage, "exists", away)
    listener = pulse.Listener("s3://bucket/jobs/one")
    monkeypatch.setattr(storage, "exists", lambda uri: bool(found[0] or found.pop(0)))
    monkeypatch.setattr(storage, "read", lambda uri: found.pop(0))
    assert [listener.listen() for _ in range(3)] == [None, None, EVENT]


def test_what_the_log_of_a_job_tells_after_its_end_is_heard(
    client: SyncPrefectClient, spec: JobSpec, caplog: pytest.LogCaptureFixture
) -> None:
    """A short job's whole log may come so late."""
    run = client.create_flow_run(train, parameters={"spec": "", "digest": "", "out": ""}, state=Completed())

    def tell() -> None:
        with get_client(sync_client=True) as its_own:
            line = LogCreate(
                name="adapterline", level=logging.INFO, message="late", timestamp=datetime.now(UTC), flow_run_id=run.id
            )
            its_own.create_logs([line])

    late = threading.Timer(elsewhere.POLL_S / 2, contextvars.copy_context().run, (tell,))
    late.start()
    with caplog.at_level(logging.INFO, "adapterline"):
        attend(client, spec, run)
    late.join()
    assert "pfeiffer | late" in caplog.text


def test_a_silent_job_is_declared_dead(
    client: SyncPrefectClient, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "SILENCE_S", 1.0)
    run = client.create_flow_run(train, parameters={"spec": "", "digest": "", "out": ""}, state=Running())
    with pytest.raises(JobKilled, match="none for 1 s"):
        attend(client, spec, run)
    state = client.read_flow_run(run.id).state
    assert state is not None
    assert state.is_crashed()


def test_a_pool_without_a_worker_is_named(
    client: SyncPrefectClient, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "UNATTENDED_S", 1.0)
    monkeypatch.setattr(elsewhere, "CANCEL_S", 1.0)
    client.create_work_pool(WorkPoolCreate(name="nobody", type="process"))
    flow = client.create_flow(train)
    deployment = client.create_deployment(flow_id=flow, name="nobody", work_pool_name="nobody")
    run = client.create_flow_run_from_deployment(deployment, parameters={"spec": "", "digest": "", "out": ""})
    with pytest.raises(ComputeError, match="a worker on work pool nobody; found none"):
        attend(client, spec, run)


def test_time_without_a_server_counts_against_no_job_that_waits(
    client: SyncPrefectClient, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "SILENCE_S", 0.5)
    monkeypatch.setattr(elsewhere, "POLL_S", 0.1)
    run = client.create_flow_run(train, parameters={"spec": "", "digest": "", "out": ""})
    back, read = time.monotonic() + 1.5, SyncPrefectClient.read_flow_run

    def away(self: SyncPrefectClient, run_id: UUID) -> FlowRun:
        if time.monotonic() < back:
            raise httpx.ConnectError("away")
        client.set_flow_run_state(run_id, Completed(), force=True)
        return read(self, run_id)

    monkeypatch.setattr(SyncPrefectClient, "read_flow_run", away)
    attend(client, spec, run)


def test_a_server_that_cannot_be_told_ends_no_training(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise httpx.ConnectError("away")

    told: list[Event] = []

    def follow(*given: Any) -> None:
        given[-1](EVENT)
        told.append(EVENT)

    monkeypatch.setattr(training, "update_progress_artifact", away)
    monkeypatch.setattr(training, "create_progress_artifact", lambda *_, **__: None)
    monkeypatch.setattr(jobs, "follow", follow)
    run: Any = SimpleNamespace(reports=SimpleNamespace(name="away"), tracking=SimpleNamespace(uri=""))
    training._follow(spec, Path("nowhere"), run, "", ComputeConfig())
    assert told == [EVENT]


def test_a_run_that_was_deleted_is_cancelled(client: SyncPrefectClient, spec: JobSpec) -> None:
    run = client.create_flow_run(train, parameters={"spec": "", "digest": "", "out": ""}, state=Running())
    client.delete_flow_run(run.id)
    with pytest.raises(JobCancelled, match="that run was deleted"):
        attend(client, spec, run)


@pytest.mark.parametrize("pool", ["local", "docker", "k8s"])
def test_job_variables_that_the_pool_does_not_know_are_named(
    settings: Settings, client: SyncPrefectClient, spec: JobSpec, pool: str
) -> None:
    template = json.loads((ROOT / "infra" / "work-pools" / f"{pool}.json").read_text())
    client.create_work_pool(WorkPoolCreate(name=f"strict-{pool}", type="process", base_job_template=template))
    flow = client.create_flow(train)
    client.create_deployment(flow_id=flow, name=f"strict-{pool}", work_pool_name=f"strict-{pool}")
    compute = settings(
        "elsewhere", compute__deployment=f"train/strict-{pool}", compute__job_variables={"memroy": "32g"}
    ).compute
    with pytest.raises(ComputeError, match="memroy"):
        elsewhere._start(client, spec, f"{STORE}/jobs/none", "", compute)


def test_a_missing_deployment_is_named(settings: Settings, client: SyncPrefectClient, spec: JobSpec) -> None:
    compute = settings("elsewhere", compute__deployment="train/nowhere").compute
    with pytest.raises(ComputeError, match="deployment train/nowhere"):
        elsewhere._start(client, spec, f"{STORE}/jobs/none", "", compute)


def test_nothing_starts_once_the_flow_is_interrupted(
    settings: Settings, client: SyncPrefectClient, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = threading.Event()
    interrupted.set()
    monkeypatch.setattr(jobs, "_interrupted", interrupted)
    with pytest.raises(JobCancelled):
        jobs.run(spec, "nowhere.json", "nowhere", "", "", 1, lambda event: None)
    called: list[bool] = []
    with jobs.ended_with_flow(lambda: called.append(True)):
        assert called == [True]


def test_a_checkpoint_of_the_job_from_when_it_ran_here_gives_way_to_its_bundle(
    settings: Settings, spec: JobSpec, tmp_path: Path
) -> None:
    out = tmp_path / spec.digest[:16]
    (out / bundle.CHECKPOINT).mkdir(parents=True)
    storage.write(f"{STORE}/jobs/{out.name}/{bundle.MANIFEST}", b"{}")
    elsewhere.follow(spec, out, STORE, "", settings("elsewhere").compute, lambda event: None)
    assert bundle.is_complete(out)


def test_one_run_a_model(client: SyncPrefectClient) -> None:
    with turns.alone("only"), turns.alone("another"), pytest.raises(ModelBusy, match="model only"), turns.alone("only"):
        pass
    with turns.alone("only"):
        pass
