"""What the worker of the `docker` pool does with containers that nobody watches, and when the engine is away."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import docker
import pytest
from docker.errors import NotFound
from docker.models.containers import Container
from prefect_docker.worker import DockerWorker
from requests import ConnectionError as EngineGone

from infra import docker_worker
from infra.docker_worker import RUN_LABEL, STACK_LABEL, STACK_VARIABLE, RemovingWorker
from tests import prefect_server

pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.xdist_group("container")]

NOWHERE = "unix:///nowhere.sock"
Make = Callable[..., Container]


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with prefect_server.running(tmp_path_factory.mktemp("server")):
        yield


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> str:
    identity = f"test-{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv(STACK_VARIABLE, identity)
    return identity


@pytest.fixture
def make(engine: docker.DockerClient, image: str, stack: str) -> Iterator[Make]:
    """Creates containers of this stack, of a run that the server does not know."""
    made: list[Container] = []

    def create(*command: str, of: str = "") -> Container:
        labels = {STACK_LABEL: of or stack, RUN_LABEL: str(uuid.uuid4())}
        made.append(engine.containers.create(image, list(command), labels=labels, network_mode="none"))
        return made[-1]

    yield create
    for container in made:
        if exists(container):
            container.remove(force=True)


def ended(container: Container) -> Container:
    container.start()
    container.wait()
    return container


def exists(container: Container) -> bool:
    try:
        container.reload()
    except NotFound:
        return False
    return True


@asynccontextmanager
async def working() -> AsyncIterator[RemovingWorker]:
    async with RemovingWorker(work_pool_name="docker") as worker:
        yield worker


def look() -> None:
    async def once() -> None:
        async with working() as worker:
            await worker.look_once()

    asyncio.run(once())


@pytest.mark.parametrize("status", ["0", "3"])
def test_what_ended_unwatched_is_removed(make: Make, status: str) -> None:
    container = ended(make("sh", "-c", f"exit {status}"))
    look()
    assert not exists(container)


def test_what_is_of_another_stack_stays(make: Make) -> None:
    container = ended(make("true", of="another"))
    look()
    assert exists(container)


def test_what_may_be_about_to_start_stays_for_a_while(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    container = make("true")
    look()
    assert exists(container)
    monkeypatch.setattr(docker_worker, "STARTS_WITHIN", timedelta(0))
    look()
    assert not exists(container)


def test_looking_goes_on_when_the_engine_is_back(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(docker_worker, "LOOK_S", 0.05)
    container = ended(make("true"))

    async def away_and_back() -> None:
        async with working() as worker:
            monkeypatch.setattr(worker, "_logger", logging.getLogger("looking"))
            with monkeypatch.context() as away:
                away.setenv("DOCKER_HOST", NOWHERE)
                looking = asyncio.create_task(worker.look())
                while "looking again" not in caplog.text:
                    assert not looking.done(), looking.exception()
                    await asyncio.sleep(0.05)
            while await asyncio.to_thread(exists, container):
                assert not looking.done(), looking.exception()
                await asyncio.sleep(0.05)
            looking.cancel()

    asyncio.run(asyncio.wait_for(away_and_back(), 60))


@pytest.mark.parametrize("engine_stays_away", [False, True])
def test_a_container_that_is_no_longer_watched_runs_on_and_is_settled_later(
    make: Make, monkeypatch: pytest.MonkeyPatch, engine_stays_away: bool
) -> None:
    container = make("sleep", "600")
    container.start()
    away = pytest.MonkeyPatch()

    async def lose(*_: Any) -> None:
        if engine_stays_away:
            away.setenv("DOCKER_HOST", NOWHERE)
        raise EngineGone("in the middle")

    async def lost_and_found() -> None:
        run: Any = SimpleNamespace(id=uuid.UUID(container.labels[RUN_LABEL]))
        nothing: Any = None
        async with working() as worker:
            with pytest.raises(EngineGone):
                await worker.run(run, nothing)
            away.undo()
            await worker.look_once()
            assert exists(container)
            assert container.status == "running"
            container.kill()
            container.wait()
            await worker.look_once()
            assert not exists(container)

    monkeypatch.setattr(DockerWorker, "run", lose)
    try:
        asyncio.run(lost_and_found())
    finally:
        away.undo()


def test_the_worker_ends_when_looking_does(monkeypatch: pytest.MonkeyPatch, stack: str) -> None:
    async def fail(worker: RemovingWorker) -> None:
        raise ValueError("no longer looking")

    monkeypatch.setattr(RemovingWorker, "look", fail)
    monkeypatch.setattr(docker_worker, "setup_signal_handlers_worker", lambda *_: None)  # they are pytest's
    with pytest.raises(ExceptionGroup) as ended_with:
        asyncio.run(asyncio.wait_for(docker_worker.serve("docker"), 60))
    assert ended_with.group_contains(ValueError, match="no longer looking")


def test_a_worker_started_by_hand_has_an_identity_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    async def note(worker: RemovingWorker) -> None:
        found.append(os.environ[STACK_VARIABLE])
        raise ValueError

    monkeypatch.setenv(STACK_VARIABLE, "")
    monkeypatch.setattr(RemovingWorker, "look", note)
    monkeypatch.setattr(docker_worker, "setup_signal_handlers_worker", lambda *_: None)
    with pytest.raises(ExceptionGroup):
        asyncio.run(asyncio.wait_for(docker_worker.serve("docker"), 60))
    assert found[0].startswith("docker on ")
