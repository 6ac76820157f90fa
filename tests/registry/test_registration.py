"""Registration: what the page of a version says."""

from __future__ import annotations

from components.evaluation.gate import GateReport, RuleVerdict
from components.registry import registration
from flows import screen


def about(classes: int) -> str:
    reason = "recall of 91.2 % against 90.4 %, at least 0.0 points better with 95 % confidence"
    rules = (RuleVerdict(f"class {name}", "pass", 0.0, 0.0, reason) for name in range(classes))
    return screen.summary(GateReport("pass", tuple(rules), {}))


def test_a_report_on_few_classes_is_the_description() -> None:
    assert registration._fitting(about(2)) == about(2)


def test_of_many_classes_come_as_many_whole_lines_as_mlflow_holds() -> None:
    *kept, blank, last = registration._fitting(text := about(300)).split("\n")
    assert kept == text.split("\n")[: len(kept)]
    assert (blank, last) == ("", "The rest is in gate/gate.json of the run that the tag gate_run names.")
    assert 4800 < len("\n".join([*kept, blank, last])) <= 5000
