"""Deciding what is in production: on the command line, with the form of a suspended run, by a tag in MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse

from components.config import RegistryConfig
from components.registry import history, promotion, versions
from components.registry.history import Record
from components.registry.promotion import Approval
from flows.promote import approvals
from tests.flows.conftest import Command
from tests.flows.deployed import PATIENCE_S, Prefect, message, until_ended
from tests.registry.registered import Shelf, shelf

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.xdist_group("servers-of-commands")]


@pytest.fixture(scope="module")
def shelved(servers: dict[str, str], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return shelf(tmp_path_factory.mktemp("shelf"), tiny_base, RegistryConfig())


@pytest.fixture
def model(shelved: Shelf, request: pytest.FixtureRequest) -> str:
    """A model with version 1 in production and version 2 as candidate."""
    name = "".join(sign if sign.isalnum() else "-" for sign in request.node.name)
    shelved.version(name)
    promotion.promote(shelved.registry, promotion.examine(shelved.registry, name, "1"), Approval("ada", "first"))
    shelved.version(name, champion="1")
    shelved.registry.versions.client.set_registered_model_alias(name, versions.CANDIDATE, "2")
    return name


def records(there: Shelf, model: str) -> list[Record]:
    return history.records(there.registry.store, model)


class TestCommand:
    def test_evidence_decision_way_back_and_history(self, shelved: Shelf, model: str, command: Command) -> None:
        shown = command("flows.promote", model)
        assert shown.returncode == 0, shown.stderr
        assert "✓ vs full fine-tuning" in shown.stdout
        assert "nothing was changed: add --yes --reviewer NAME" in shown.stdout
        assert shelved.production(model) == "1"

        done = command("flows.promote", model, "--yes", "--reviewer", "eve", "--comment", "better")
        assert done.returncode == 0, done.stderr
        assert shelved.production(model) == "2"

        back = command("flows.promote", "rollback", model, "--reviewer", "ada", "--reason", "complaints")
        assert back.returncode == 0, back.stderr
        assert shelved.production(model) == "1"

        shelved.by_hand(model, "2")
        table = command("flows.promote", "history", model).stdout.splitlines()
        cells = [" ".join(line.split()) for line in table[1:]]
        assert [cell.split(" ", 3)[3] for cell in cells[:3]] == [
            "– 1 promote ada first pass",
            "1 2 promote eve better pass",
            "2 1 roll back ada complaints pass",
        ]
        assert cells[3].startswith("– not recorded yet 1 2 by hand unknown")
        assert len(records(shelved, model)) == 3  # reading the history writes nothing

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (["nobody", "--yes", "--reviewer", "ada"], "a registered version nobody@candidate; found none"),
            (["MODEL", "--yes"], "the name of a reviewer; found none; say who decides: --reviewer NAME"),
            (["rollback", "MODEL", "--reviewer", "ada", "--reason", "no"], "that was in production before: none"),
        ],
    )
    def test_what_cannot_be_is_told_in_one_line(
        self, shelved: Shelf, model: str, command: Command, words: list[str], line: str
    ) -> None:
        done = command("flows.promote", *[model if word == "MODEL" else word for word in words])
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert line in done.stderr
        assert shelved.production(model) == "1"

    def test_the_verdict_is_the_exit_code(self, shelved: Shelf, model: str, command: Command) -> None:
        worse = shelved.version(model, accuracy=0.8)
        done = command("flows.promote", model, "--version", worse.number, "--yes", "--reviewer", "ada")
        assert done.returncode == 2
        assert "vs champion (version 1): -20.0 points" in done.stderr


class TestForm:
    """A deployed run, resumed through the API as the UI does."""

    @pytest.fixture
    def start(
        self, worker: None, client: SyncPrefectClient, deployed: dict[str, DeploymentResponse]
    ) -> Callable[[str], FlowRun]:
        def run(model: str) -> FlowRun:
            made = client.create_flow_run_from_deployment(deployed["promote/review"].id, parameters={"model": model})
            return suspended(client, made)

        return run

    def test_the_run_waits_and_does_what_the_reviewer_says(
        self, shelved: Shelf, model: str, client: SyncPrefectClient, start: Callable[[str], FlowRun]
    ) -> None:
        run = start(model)
        assert shelved.production(model) == "1"
        answer(client, run, reviewer="eve", decision="approve", comment="looks good")
        ended = until_ended(client, run)
        assert ended.state is not None
        assert ended.state.is_completed(), message(ended)
        assert shelved.production(model) == "2"
        assert (records(shelved, model)[-1].who, records(shelved, model)[-1].why) == ("eve", "looks good")

    def test_when_production_moved_it_asks_again_and_may_be_rejected(
        self, shelved: Shelf, model: str, client: SyncPrefectClient, start: Callable[[str], FlowRun]
    ) -> None:
        run = start(model)
        third = shelved.version(model, champion="1")
        case = promotion.examine(shelved.registry, model, third.number)
        promotion.promote(shelved.registry, case, Approval("ada", "faster"))
        first = run.state.state_details.pause_key if run.state else None

        answer(client, run, reviewer="eve", decision="approve")
        run = suspended(client, run, after=first)
        assert shelved.production(model) == third.number
        answer(client, run, reviewer="eve", decision="reject", comment="not any more")
        ended = until_ended(client, run)
        assert ended.state is not None
        assert ended.state.is_completed(), message(ended)
        assert shelved.production(model) == third.number
        tags = versions.find(shelved.registry.versions, f"{model}/2").tags
        assert tags["rejected"] == "eve: not any more"

    def test_the_way_back_is_a_deployment(self, shelved: Shelf, model: str, run: Prefect) -> None:
        case = promotion.examine(shelved.registry, model, "2")
        promotion.promote(shelved.registry, case, Approval("ada", "better"))
        done = run("roll-back/now", f"model={model}", "reviewer=eve", "reason=complaints")
        assert done.returncode == 0, done.stdout + done.stderr
        assert shelved.production(model) == "1"


class TestTags:
    def test_an_approved_version_is_promoted_and_the_others_are_not(self, shelved: Shelf, model: str) -> None:
        there = shelved.registry.versions
        worse = shelved.version(model, accuracy=0.8)
        versions.tag(there, versions.find(there, f"{model}/2"), {"approve": "eve", "comment": "as agreed"})
        versions.tag(there, worse, {"approve": "eve"})

        approvals()
        assert shelved.production(model) == "2"
        assert (records(shelved, model)[-1].who, records(shelved, model)[-1].why) == ("eve", "as agreed")
        approved, refused = (versions.find(there, f"{model}/{number}").tags for number in (2, worse.number))
        assert approved["approved"].startswith("eve ")
        assert "vs champion (version 2)" in refused["refused"]
        assert not {"approve"} & {*approved, *refused}

    @pytest.mark.parametrize("who", ["eve", "ada"])
    def test_an_approval_that_was_cut_off_before_its_tags_gets_them(self, shelved: Shelf, model: str, who: str) -> None:
        """Of the same reviewer only: for another it is in production already."""
        there = shelved.registry.versions
        case = promotion.examine(shelved.registry, model, "2")
        promotion.promote(shelved.registry, case, Approval("eve", "as agreed"))
        versions.tag(there, case.version, {"approve": who})

        approvals()
        found = {"approve", "approved", "refused"} & versions.find(there, f"{model}/2").tags.keys()
        assert found == {"approved" if who == "eve" else "refused"}
        assert len(records(shelved, model)) == 2

    def test_a_change_by_hand_is_recorded(self, shelved: Shelf, model: str) -> None:
        shelved.by_hand(model, "2")
        approvals()
        assert (records(shelved, model)[-1].action, records(shelved, model)[-1].after) == ("by hand", "2")


def suspended(client: SyncPrefectClient, run: FlowRun, after: str | None = None) -> FlowRun:
    """The run once it waits for a form, another than that of pause key `after`."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        run = client.read_flow_run(run.id)
        state = run.state
        if state is not None and state.is_paused() and state.state_details.pause_key != after:
            return run
        assert state is None or not state.is_final(), message(run)
        assert time.monotonic() < deadline, f"still {state}"
        time.sleep(0.5)


def answer(client: SyncPrefectClient, run: FlowRun, **form: Any) -> None:
    result = client.resume_flow_run(run.id, run_input=form)
    assert result.status.value == "ACCEPT", result
