"""Try every fault and print what followed, as a table in Markdown.

python -m tests.faults                 # all: minutes, real servers; with an engine at DOCKER_HOST containers too
python -m tests.faults -k promotion
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import pytest

ORDER = ("failed", "skipped", "passed")
WORDS = {"failed": "NO", "skipped": "not tried here", "passed": "yes"}


@dataclass
class Table:
    """A pytest plugin: of every fault, what was expected to follow and whether it did, in all tests that try it."""

    rows: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> object:
        report = (yield).get_result()
        if report.when == "call" or report.outcome != "passed":
            for mark in item.iter_markers("fault"):
                self.rows.setdefault(mark.args, []).append(report.outcome)

    def __str__(self) -> str:
        lines = ["| what happens | what follows | tests | seen |", "|---|---|---:|---|"]
        for (what, follows), outcomes in sorted(self.rows.items()):
            worst = next(each for each in ORDER if each in outcomes)
            lines.append(f"| {what} | {follows} | {len(outcomes)} | {WORDS[worst]} |")
        return "\n".join(lines)


def main(arguments: list[str]) -> int:
    table = Table()
    code = pytest.main(["-m", "fault", "-n", "0", *arguments], plugins=[table])
    print(f"\n{table}")  # noqa: T201  # what it is for
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
