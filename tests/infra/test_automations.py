"""Automations on a real Prefect server, with a real receiver of notifications."""

from __future__ import annotations

import contextlib
import copy
import json
import queue
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.events import emit_event
from prefect.flows import Flow
from prefect.states import Completed, Crashed, Running, State

from components.config import parse
from components.evaluation.gate import GateReport, RuleVerdict, Verdict
from flows import events
from flows.values import Judged, Run
from infra import automations, local
from infra.errors import StackError

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("prefect")]

PATIENCE_S = 60
SECRET = "T0K3N"  # noqa: S105  # what a webhook's URL would hold
GATE, CRASH, SILENCE = (f"adapterline {what}" for what in ("gate did not pass", "run crashed", "run fell silent"))

Notification = dict[str, str]


class Receiver:
    """Takes notifications, as Slack would."""

    def __init__(self) -> None:
        self.taken: queue.Queue[Notification] = queue.Queue()
        self.heard = False
        taken, whole = self.taken, self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the name is http.server's
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                taken.put(json.loads(body))
                whole.heard = True
                self.send_response(204)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Nothing on the screen."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/{SECRET}"

    def until(self, word: str) -> list[Notification]:
        """All that came, up to the first whose text holds the word."""
        found: list[Notification] = []
        while not found or word not in found[-1]["text"]:
            found.append(self.taken.get(timeout=PATIENCE_S))
        return found


@pytest.fixture(scope="module")
def client(prefect: dict[str, str]) -> Iterator[SyncPrefectClient]:
    """Of a server without automations."""
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def receiver(client: SyncPrefectClient) -> Iterator[Receiver]:
    """Where the server notifies."""
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever, daemon=True)
    thread.start()
    automations.apply(client, automations.load(), automations.webhook(client, receiver.url))
    _awake(receiver)
    yield receiver
    receiver.server.shutdown()
    thread.join()
    receiver.server.server_close()


def _awake(receiver: Receiver) -> None:
    """Until the server heeds its new automations: it loads them a moment after they were made."""
    for _ in range(30):
        gate("awake", "fail")
        with contextlib.suppress(queue.Empty):
            receiver.taken.get(timeout=4)
            while True:  # what earlier calls led to, late
                receiver.taken.get(timeout=2)
        if receiver.heard:
            return
    raise AssertionError("no automation ever answered")


def gate(model: str, verdict: Verdict) -> None:
    """What a run emits once it has judged."""
    rules = (
        RuleVerdict("vs full fine-tuning", verdict, 0.1, 0.2, '2 points "worse"'),
        RuleVerdict("bundle size", "pass", 1, 2, "small enough"),
    )
    config = parse({"model": model, "data": {"source": "rows.csv"}}, "the test")
    run = Run(tracking=None, id="run", reports=Path(), store="")  # type: ignore[arg-type]  # of no interest here
    assert verdict in ("pass", "fail", "inconclusive")
    events.judged(config, Judged(GateReport(verdict, rules, {}), 0.0, 0), run)


def run_of(client: SyncPrefectClient, flow: str, *states: State[None]) -> UUID:
    """A flow run that went through these states."""

    def nothing() -> None:
        """Never called: the states are told to the server."""

    run = client.create_flow_run(Flow(nothing, name=flow), name=f"a-run-of-{flow}")
    for state in states:
        client.set_flow_run_state(run.id, state, force=True)
    return run.id


def heartbeat(client: SyncPrefectClient, run: UUID) -> None:
    """What Prefect's engine emits for a living run."""
    flow = client.read_flow(client.read_flow_run(run).flow_id)
    emit_event(
        "prefect.flow-run.heartbeat",
        resource={"prefect.resource.id": f"prefect.flow-run.{run}"},
        related=[
            {
                "prefect.resource.id": f"prefect.flow.{flow.id}",
                "prefect.resource.role": "flow",
                "prefect.resource.name": flow.name,
            }
        ],
    )


def test_a_failed_gate_notifies_once(receiver: Receiver) -> None:
    gate("tickets", "fail")
    found = receiver.until("tickets")
    gate("the-end-1", "fail")
    (failed,) = [each for each in found + receiver.until("the-end-1") if each.get("model") == "tickets"]
    assert failed["verdict"] == "fail"
    assert failed["text"] == 'tickets: gate fail; vs full fine-tuning: 2 points "worse"'


def test_an_inconclusive_gate_notifies(receiver: Receiver) -> None:
    gate("tickets", "inconclusive")
    assert receiver.until("tickets")[-1]["verdict"] == "inconclusive"


def test_a_passed_gate_notifies_nobody(receiver: Receiver) -> None:
    gate("tickets", "pass")
    gate("the-end-2", "fail")
    assert "tickets" not in [each.get("model") for each in receiver.until("the-end-2")]


def test_crashes_of_all_that_is_deployed_are_told() -> None:
    (crash,) = [each for each in automations.load() if each["name"] == CRASH]
    deployed = yaml.safe_load((automations.FILE.parent.parent / "prefect.yaml").read_text())["deployments"]
    entries = {each["entrypoint"].partition(".py:") for each in deployed}
    flows = {getattr(import_module(file.replace("/", ".")), name).name for file, _, name in entries}
    assert set(crash["trigger"]["match_related"]["prefect.resource.name"]) == flows


@pytest.mark.parametrize("flow", ["retrain", "train", "upgrade"])
def test_a_crashed_run_notifies_once(client: SyncPrefectClient, receiver: Receiver, flow: str) -> None:
    run = run_of(client, flow, Running(), Crashed(message='killed "9"'))
    found = receiver.until("crashed")
    gate("the-end-3", "fail")
    (crashed,) = [each for each in found + receiver.until("the-end-3") if "crashed" in each["text"]]
    assert crashed["text"] == f'{flow} a-run-of-{flow} crashed: killed "9"'
    assert str(run) in crashed["run"]


def test_crashed_runs_of_other_flows_are_not_ours(client: SyncPrefectClient, receiver: Receiver) -> None:
    run_of(client, "somebody-else", Running(), Crashed(message="boom"))
    run_of(client, "train", Running(), Crashed(message="the-end-4"))
    assert not [each for each in receiver.until("the-end-4") if "somebody-else" in each["text"]]


def test_a_run_that_fell_silent_is_marked_as_crashed_and_an_ended_one_is_not(
    client: SyncPrefectClient, receiver: Receiver
) -> None:
    quick = copy.deepcopy(automations.load())
    for each in quick:
        each["trigger"] |= {"within": 10} if each["name"] == SILENCE else {}
    automations.apply(client, quick, automations.webhook(client, None))
    silent, ended = (run_of(client, "retrain", Running()) for _ in range(2))
    heartbeat(client, ended)
    time.sleep(1)  # events of one run are taken in order of their time
    client.set_flow_run_state(ended, Completed(name="Waiting"))
    heartbeat(client, silent)
    deadline = time.monotonic() + PATIENCE_S
    while (state := state_of(client, silent)).is_running() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert state.is_crashed()
    assert "nothing was heard" in str(state.message)
    assert state_of(client, ended).name == "Waiting"
    assert receiver.until("nothing was heard")


def state_of(client: SyncPrefectClient, run: UUID) -> State[Any]:
    state = client.read_flow_run(run).state
    assert state is not None
    return state


def test_applied_again_nothing_doubles_and_what_was_switched_off_stays_off(
    client: SyncPrefectClient, receiver: Receiver
) -> None:
    before = {each.name: each.id for each in client.read_automations()}
    assert set(before) == {GATE, CRASH, SILENCE}
    client.pause_automation(before[CRASH])
    try:
        automations.apply(client, automations.load(), automations.webhook(client, receiver.url))
        after = client.read_automations()
        assert {each.name: each.id for each in after} == before
        assert {each.name for each in after if not each.enabled} == {CRASH}
    finally:
        client.resume_automation(before[CRASH])


def test_what_is_no_url_is_refused_and_not_shown(client: SyncPrefectClient) -> None:
    with pytest.raises(StackError, match="to begin with https") as caught:
        automations.webhook(client, f"ftp://{SECRET}")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("content", ["a: [", "name: x", "- {trigger: 1}"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "automations.yaml").write_text(content)
    with pytest.raises(StackError, match=r"^expected .+; found .+; correct it$"):
        automations.load(tmp_path / "automations.yaml")


@pytest.fixture
def bare(client: SyncPrefectClient, receiver: Receiver) -> SyncPrefectClient:
    """Without automations and without a webhook: for the last test of this file."""
    for each in client.read_automations():
        client.delete_automation(each.id)
    block = client.read_block_document_by_name(automations.BLOCK, automations.BLOCK_TYPE)
    client.delete_block_document(block.id)
    return client


def test_the_command_says_what_it_lacks_and_never_the_url(
    bare: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(automations.VARIABLE, raising=False)
    assert automations.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: expected ADAPTERLINE_WEBHOOK_URL; found it unset; ")
    assert bare.read_automations() == []
    assert automations.main(["--without-webhook"]) == 0
    assert [each.name for each in bare.read_automations()] == [SILENCE]
    with local.exported({automations.VARIABLE: f"https://example.org/{SECRET}"}):
        assert automations.main([]) == 0
    assert {each.name for each in bare.read_automations()} == {GATE, CRASH, SILENCE}
    assert automations.main([]) == 0, "the server keeps the URL"
    told = capsys.readouterr()
    assert SECRET not in told.out + told.err
