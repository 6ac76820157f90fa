"""kill -9 of a promotion, wherever it is: production is the old version or the new one, and the history says which."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from components import forks
from components.registry import history, promotion
from components.registry.promotion import Approval
from tests.faults.dying import POINTS
from tests.registry.registered import Shelf, shelf

UNDONE = ("before its run", "before the record")


@pytest.fixture(scope="module")
def shelved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return shelf(tmp_path_factory.mktemp("registry"), tiny_base)


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 of a promotion, at six points",
    "before its record nothing has changed; after it, the next command finishes it; no run stays open",
)
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_promotion_is_not_done_or_finished_by_the_next(shelved: Shelf, point: str) -> None:
    model = point.replace(" ", "-")
    shelved.version(model)
    promotion.promote(shelved.registry, promotion.examine(shelved.registry, model, "1"), Approval("ada", "first"))
    shelved.version(model, champion="1")

    uri = shelved.registry.versions.uri
    command = ["-m", "tests.faults.dying", point, shelved.registry.store, uri, model, "2"]
    assert forks.run(command, os.environ).returncode == -signal.SIGKILL

    after = "1" if point in UNDONE else "2"
    found = promotion.settle(shelved.registry, model)
    assert shelved.production(model) == found[-1].after == after
    assert [record.action for record in found] == ["promote"] * int(after)
    assert history.is_done(shelved.registry.store, found[-1])

    shelved.version(model, champion=after)  # and work goes on
    promotion.promote(shelved.registry, promotion.examine(shelved.registry, model, "3"), Approval("eve", "next"))
    assert shelved.production(model) == "3"
    assert {run.info.status for run in shelved.runs(model)} <= {"FINISHED", "KILLED"}
