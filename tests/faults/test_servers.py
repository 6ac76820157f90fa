"""Promotions on a supervised stack whose servers are killed meanwhile, and by a user who may only read."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components import forks, storage
from components.errors import AdapterlineError, ProductionMoved, RegistryError, StorageUnavailable
from components.registry import history, promotion, versions
from components.registry.promotion import Approval
from infra import local, supervision
from tests.faults import outage
from tests.infra.test_stack import PATIENCE_S, stack_command, until
from tests.registry.registered import Shelf

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("stack")]

FOR_S = 30.0
READER, PASSWORD = "reader", "only-for-this-test"


def is_up(stack: Path) -> bool:
    return stack_command("status", stack, stack.parent).returncode == 0


def is_settled(stack: Path, shelved: Shelf, model: str) -> bool:
    """A worker of a killed server answers for a moment more, and S3 a moment before it can read."""
    try:
        return all(is_up(stack) and history.records(shelved.registry.store, model) for _ in range(3))
    except StorageUnavailable:
        return False


def running(stack: Path) -> set[int]:
    """Process ids, as far as the supervisor has heard."""
    return {part["pid"] for part in supervision.states(stack).values()}


def examined(shelved: Shelf, model: str, number: str) -> promotion.Case:
    return promotion.examine(shelved.registry, model, number)


@pytest.mark.fault("an MLflow user who may only read promotes", "refused (403), in one line; nothing has changed")
def test_a_reader_cannot_promote(shelved: Shelf) -> None:
    from mlflow.server import get_app_client

    shelved.version("guarded")
    promotion.promote(shelved.registry, examined(shelved, "guarded", "1"), Approval("ada", "first"))
    shelved.version("guarded", champion="1")
    there = shelved.registry
    # Who has been granted nothing may read everything: the stack's default.
    get_app_client("basic-auth", tracking_uri=there.versions.uri).create_user(READER, PASSWORD)

    login = {"MLFLOW_TRACKING_USERNAME": READER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    with local.exported(login), pytest.raises(RegistryError, match="PERMISSION_DENIED"):
        promotion.promote(there, examined(shelved, "guarded", "2"), Approval(READER, "why not"))
    assert shelved.production("guarded") == "1"
    assert len(history.records(there.store, "guarded")) == 1


@pytest.mark.long
@pytest.mark.fault(
    "kill -9 of S3 and MLflow, again and again, during promotions and roll backs",
    "each is done or not, none half; history and alias agree, nothing that was told as done is lost",
)
def test_promotions_while_servers_die(stack: Path, shelved: Shelf) -> None:
    model = "shaken"
    for number in range(4):
        shelved.version(model, champion=str(number) if number else None)
    promotion.promote(shelved.registry, examined(shelved, model, "1"), Approval("ada", "first"))
    over, rng, killed = threading.Event(), random.Random(0), set[int]()  # noqa: S311  # no secret

    def kill() -> None:
        while not over.wait(rng.uniform(2, 6)):
            killed.add(outage.kill(stack, rng.choice(("s3", "mlflow"))))

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
    until(
        lambda: not (killed - {0}) & running(stack) and is_settled(stack, shelved, model),
        f"all up again in {PATIENCE_S} s",
    )

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


@pytest.mark.long
@pytest.mark.fault("S3 refusing for 60 s while one promotes and goes back", "one line, nothing has changed; done after")
def test_a_promotion_without_s3_is_not_begun(stack: Path, shelved: Shelf) -> None:
    model, there = "patient", shelved.registry
    for number in range(3):
        shelved.version(model, champion=str(number) if number else None)
    for number in ("1", "2"):
        promotion.promote(there, examined(shelved, model, number), Approval("ada", "next"))
    case, before = examined(shelved, model, "3"), history.records(there.store, model)

    with outage.away(stack, "s3", 60):
        with pytest.raises(StorageUnavailable, match="an S3 server that answers"):
            promotion.promote(there, case, Approval("ada", "next"))
        with pytest.raises(StorageUnavailable, match="an S3 server that answers"):
            promotion.roll_back(there, model, Approval("eve", "back"))
        assert shelved.production(model) == "2"
    until(lambda: is_settled(stack, shelved, model), f"all up again in {PATIENCE_S} s")
    assert history.records(there.store, model) == before

    promotion.promote(there, case, Approval("ada", "next"))
    assert shelved.production(model) == "3"


@pytest.mark.fault("one byte of a bundle flipped in S3", "not promoted; the file is named")
def test_a_flipped_byte_in_s3_is_found(shelved: Shelf) -> None:
    model = "flipped"
    version = shelved.version(model)
    there = shelved.registry
    run, file = version.tags["gate_run"], "adapter_model.safetensors"
    name = next(name for name in storage.names(there.store) if f"/{run}/" in name and name.endswith(f"/{file}"))
    uri = storage.join(there.store, name)
    content = bytearray(storage.read(uri))
    content[len(content) // 2] ^= 1
    storage.write(uri, bytes(content))
    with pytest.raises(AdapterlineError, match=file):
        examined(shelved, model, version.number)
    assert shelved.production(model) is None
    assert history.records(there.store, model) == []


@pytest.mark.fault(
    "ten changes of production, two of them raced, one by hand in MLflow",
    "the history has each once, in order, and who lost is told who won",
)
def test_history_after_ten_changes(shelved: Shelf) -> None:
    model, there = "busy", shelved.registry
    for number in range(4):
        shelved.version(model, champion=str(number) if number else None)

    def promote(number: str) -> None:
        promotion.promote(there, examined(shelved, model, number), Approval("ada", f"version {number} is better"))

    def roll_back() -> None:
        promotion.roll_back(there, model, Approval("eve", "complaints"))

    def race(*numbers: str) -> None:
        cases = [examined(shelved, model, number) for number in numbers]
        with ThreadPoolExecutor(len(cases)) as pool:
            raced = [pool.submit(promotion.promote, there, case, Approval("bob", "at once")) for case in cases]
        lost = [error for error in (each.exception() for each in raced) if error]
        assert len(lost) == len(cases) - 1
        assert all(isinstance(error, ProductionMoved) and "by bob" in str(error) for error in lost)

    for number in "123":
        promote(number)
    roll_back()
    promote("4")
    race("1", "3")
    shelved.by_hand(model, "2")
    promote("4")
    race("1", "2", "3")
    roll_back()

    found = history.records(there.store, model)
    actions = [record.action for record in found]
    assert actions == [
        *["promote"] * 3,
        "roll back",
        "promote",
        "promote",
        "by hand",
        "promote",
        "promote",
        "roll back",
    ]
    assert [record.before for record in found[1:]] == [record.after for record in found[:-1]]
    assert shelved.production(model) == found[-1].after == "4"

    done = forks.run(["-m", "flows.promote", "history", model], os.environ)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if re.match(r" *\d+ +20\d\d-", line)]
    assert len(said) == len(found)
    assert [line for line in said if "by hand" in line and "unknown" in line], done.stdout
