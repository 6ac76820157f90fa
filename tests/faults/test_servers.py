"""Promotions on a supervised stack whose servers are killed meanwhile, and by a user who may only read."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from components.config import RegistryConfig
from components.errors import AdapterlineError, RegistryError
from components.registry import history, promotion, versions
from components.registry.promotion import Approval
from infra import local, supervision
from tests.infra.test_stack import PATIENCE_S, stack_command, until
from tests.registry.registered import Shelf, shelf

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("stack")]

FOR_S = 30.0
READER, PASSWORD = "reader", "only-for-this-test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("stack")
    done = stack_command("up", place / "stack", place)
    assert done.returncode == 0, done.stderr
    yield place / "stack"
    stack_command("down", place / "stack", place)


@pytest.fixture(scope="module")
def shelved(folder: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    torch.set_num_threads(1)
    with local.stack(folder) as stack, local.exported(stack.environment):
        yield shelf(tmp_path_factory.mktemp("shelf"), tiny_base, RegistryConfig())


def examined(shelved: Shelf, model: str, number: str) -> promotion.Case:
    return promotion.examine(shelved.registry, model, number)


@pytest.mark.fault("an MLflow user who may only read promotes", "refused (403), in one line; nothing has changed")
def test_a_reader_cannot_promote(shelved: Shelf) -> None:
    from mlflow.server import get_app_client

    shelved.version("guarded")
    promotion.promote(shelved.registry, examined(shelved, "guarded", "1"), Approval("ada", "first"))
    shelved.version("guarded", champion="1")
    there = shelved.registry
    auth = get_app_client("basic-auth", tracking_uri=there.versions.uri)
    auth.create_user(READER, PASSWORD)
    auth.create_registered_model_permission("guarded", READER, "READ")
    for experiment in (there.versions, there.promotions):
        auth.create_experiment_permission(experiment.experiment_id, READER, "READ")

    login = {"MLFLOW_TRACKING_USERNAME": READER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    with local.exported(login), pytest.raises(RegistryError, match="PERMISSION_DENIED"):
        promotion.promote(there, examined(shelved, "guarded", "2"), Approval(READER, "why not"))
    assert shelved.production("guarded") == "1"
    assert len(history.records(there.store, "guarded")) == 1


@pytest.mark.fault(
    "kill -9 of S3 and MLflow, again and again, during promotions and roll backs",
    "each is done or not, none half; history and alias agree, nothing that was told as done is lost",
)
def test_promotions_while_servers_die(folder: Path, shelved: Shelf) -> None:
    model = "shaken"
    for number in range(4):
        shelved.version(model, champion=str(number) if number else None)
    promotion.promote(shelved.registry, examined(shelved, model, "1"), Approval("ada", "first"))
    over, rng = threading.Event(), random.Random(0)  # noqa: S311  # no secret

    def kill() -> None:
        while not over.wait(rng.uniform(2, 6)):
            part = supervision.states(folder)[rng.choice(("s3", "mlflow"))]
            if part["pid"]:
                os.kill(part["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    told, failed, end = [], 0, time.monotonic() + FOR_S
    while time.monotonic() < end:
        try:
            if told and rng.random() < 0.3:
                told.append(promotion.roll_back(shelved.registry, model, Approval("eve", "back")).sequence)
            else:
                number = str(rng.randint(1, 4))
                told.append(
                    promotion.promote(
                        shelved.registry, examined(shelved, model, number), Approval("ada", "on")
                    ).sequence
                )
        except AdapterlineError:
            failed += 1
    over.set()
    killer.join()
    until(lambda: stack_command("status", folder, folder.parent).returncode == 0, f"all up again in {PATIENCE_S} s")

    found = promotion.settle(shelved.registry, model)
    assert failed
    assert told
    assert {*told} <= {record.sequence for record in found}
    assert shelved.production(model) == found[-1].after
    assert {record.action for record in found} <= {"promote", "roll back"}, "what was cut off is not taken for by hand"


@pytest.mark.fault("a roll back while a client loads production in a loop", "it gets the old version or the new one")
def test_a_client_sees_the_old_or_the_new_version(shelved: Shelf, tmp_path: Path) -> None:
    model, there = "watched", shelved.registry.versions
    for number in range(2):
        shelved.version(model, accuracy=1.0 - number / 50, champion=str(number) if number else None)
        promotion.promote(shelved.registry, examined(shelved, model, str(number + 1)), Approval("ada", "next"))
    seen, errors, over = [], [], threading.Event()

    def load() -> None:
        while not over.is_set():
            try:
                version = versions.find(there, f"{model}@{versions.PRODUCTION}")
                versions.bundle_of(there, version, tmp_path / str(len(seen)))
                seen.append(version.number)
            except AdapterlineError as error:
                errors.append(error)

    client = threading.Thread(target=load)
    client.start()
    until(lambda: len(seen) > 2, "the client loads")
    promotion.roll_back(shelved.registry, model, Approval("eve", "complaints"))
    until(lambda: "1" in seen, "the client sees the roll back")
    over.set()
    client.join()
    assert errors == []
    assert seen == sorted(seen, reverse=True), "never forth again"
    assert {*seen} == {"1", "2"}
