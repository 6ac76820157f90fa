"""What an upgrade says of each model: order, exit, and old against new on the same rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.config import GateConfig
from components.errors import (
    AdapterlineError,
    BundleError,
    DataError,
    GateFailed,
    GateInconclusive,
    RegistryError,
    UpgradeError,
)
from components.evaluation.statistics import Comparison
from components.registry import bundle
from components.registry.versions import Version
from flows import outcomes
from flows.outcomes import Against, Came, Outcome, Prospect


def version(name: str, number: str = "1", **tags: str) -> Version:
    return Version(name, number, "", 0, {"method": "pfeiffer", "base": "old", "base_weights_sha256": "f" * 64, **tags})


def outcome(came: Came, name: str = "a", reason: str = "") -> Outcome:
    difference = Comparison(-0.021, -0.043, 0.002, 90, "inconclusive", None)
    against = None if came == "error" else Against(0.951, 0.93, difference, 28_000, 65_000)
    return Outcome(version(name, "3"), came, version(name, "4") if came == "registered" else None, against, reason)


def test_fusions_come_after_what_they_stand_on() -> None:
    names = ["b", "z", "c"]
    prospects = [Prospect(version("a", method="fusion"), None), *(Prospect(version(name), None) for name in names)]
    assert [each.version.name for each in outcomes.in_order(prospects)] == ["b", "c", "z", "a"]


@pytest.mark.parametrize(
    ("came", "code"), [("registered", 0), ("up to date", 0), ("error", 1), ("gate failed", 2), ("inconclusive", 3)]
)
def test_exit_codes_are_those_of_a_retrain(came: Came, code: int) -> None:
    assert outcome(came).exit_code == code


ENDS: dict[str, tuple[list[Came], type[AdapterlineError], int]] = {
    "an error is worst": (["inconclusive", "gate failed", "error"], UpgradeError, 1),
    "then a gate that failed": (["registered", "inconclusive", "gate failed"], GateFailed, 2),
    "then one that cannot tell": (["inconclusive", "up to date"], GateInconclusive, 3),
}


@pytest.mark.parametrize("case", ENDS)
def test_the_worst_decides_how_an_upgrade_ends(case: str) -> None:
    came, kind, code = ENDS[case]
    with pytest.raises(kind) as caught:
        outcomes.raise_unless_moved([outcome(each) for each in came], "new")
    assert type(caught.value) is kind
    assert caught.value.exit_code == code


def test_an_upgrade_whose_models_are_all_there_ends_well() -> None:
    outcomes.raise_unless_moved([outcome("registered"), outcome("up to date")], "new")


@pytest.mark.parametrize(
    ("error", "came"),
    [
        (GateFailed("a", "b", "c"), "gate failed"),
        (GateInconclusive("a", "b", "c"), "inconclusive"),
        (DataError("a", "b", "c"), "error"),
        (ValueError("a bug"), "error"),
    ],
)
def test_what_ended_a_retrain_is_told_apart(error: Exception, came: Came) -> None:
    assert outcomes.without_version(error) == came


def test_the_table_has_a_line_a_model_and_the_reasons_below() -> None:
    lines = outcomes.outcome_table([outcome("registered"), outcome("error", "longer-name", "expected x; found y; z")])
    (first,) = [line for line in lines if line.startswith("a ")]
    assert " ".join(first.split()) == "a 3 95.1 % 4 93.0 % -2.1 (-4.3 to +0.2) 28 → 65 kB registered"
    (second,) = [line for line in lines if line.startswith("longer-name")]
    assert second.split() == ["longer-name", "3", *"–––––", "error"]
    assert lines[-1] == "  longer-name: expected x; found y; z"


def test_names_of_any_length_and_kind_are_shown_whole() -> None:
    name = "[bold]" + "x" * 200
    assert any(name in line for line in outcomes.outcome_table([outcome("registered", name)]))


def test_a_listing_says_why_a_model_cannot_move() -> None:
    problem = RegistryError("config.json", "none", "retrain it once")
    lines = outcomes.plan_table([Prospect(version("a"), 0.5), Prospect(version("b"), None, problem=problem)])
    assert [line.split()[-1] for line in lines if line.startswith(("a ", "b "))] == ["already", "cannot"]
    assert lines[-1] == "  b: expected config.json; found none; retrain it once"


def saved(folder: Path, probabilities: list[list[float]], rows: list[str]) -> Path:
    folder.mkdir()
    labels = np.zeros(len(rows), dtype=np.int64)
    bundle.write_predictions(folder, bundle.Predictions(rows, labels, np.asarray(probabilities, dtype=np.float32)))
    pin = {"name": "b", "revision": None, "weights_sha256": "0" * 64, "tokenizer_sha256": "0" * 64}
    about = {"method": "pfeiffer", "job_digest": "0", "data_uri": "", "data_digest": "0", "code": "0", "seed": 0}
    sizes = {"max_tokens": 8, "trained_parameters": 1, "total_parameters": 10}
    bundle.write_manifest(folder, base=pin, labels=("a", "b"), **about, **sizes)
    return folder


ROWS = [f"{number:016x}" for number in range(40)]
RIGHT, WRONG = [0.9, 0.1], [0.1, 0.9]


def test_the_difference_is_new_less_old_over_the_same_rows(tmp_path: Path) -> None:
    old = saved(tmp_path / "old", [RIGHT] * 30 + [WRONG] * 10, ROWS)
    new = saved(tmp_path / "new", [RIGHT] * 34 + [WRONG] * 6, ROWS)
    found = outcomes.against(old, new, GateConfig())
    assert (found.old, found.new) == (0.75, 0.85)
    assert found.difference.difference == pytest.approx(0.1)
    assert found.difference.low < 0.1 < found.difference.high
    assert found.old_bytes == (old / bundle.PREDICTIONS).stat().st_size


def test_other_test_rows_are_not_compared(tmp_path: Path) -> None:
    old = saved(tmp_path / "old", [RIGHT] * 40, ROWS)
    new = saved(tmp_path / "new", [RIGHT] * 40, ROWS[::-1])
    with pytest.raises(BundleError, match="other rows"):
        outcomes.against(old, new, GateConfig())
