"""A pytest plugin: of every fault what was to follow, and whether it did in all tests that try it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

ORDER = ("failed", "skipped", "passed")
WORDS = {"failed": "NO", "skipped": "not tried here", "passed": "yes"}


@dataclass(eq=False)  # a plugin is known by itself
class Table:
    """Filled by reports, which come from other processes too."""

    rows: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        item.user_properties += [("fault", mark.args) for mark in item.iter_markers("fault")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            for name, fault in report.user_properties:
                if name == "fault":
                    self.rows.setdefault(tuple(fault), []).append(report.outcome)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write(f"\n{self}\n")

    def __str__(self) -> str:
        lines = ["| what happens | what follows | tests | seen |", "|---|---|---:|---|"]
        for (what, follows), outcomes in sorted(self.rows.items()):
            worst = next(each for each in ORDER if each in outcomes)
            lines.append(f"| {what} | {follows} | {len(outcomes)} | {WORDS[worst]} |")
        return "\n".join(lines)
