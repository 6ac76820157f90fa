"""What is to become of each version that moves to another base, and what did: the tables of an upgrade."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from components.config import GateConfig, RetrainConfig
from components.errors import AdapterlineError, BundleError, GateFailed, GateInconclusive, UpgradeError
from components.evaluation.gate import correct
from components.evaluation.statistics import Comparison, non_inferiority
from components.registry import bundle
from components.registry.versions import Version

CONFIDENCE = 0.95
Came = Literal["registered", "up to date", "gate failed", "inconclusive", "error"]


@dataclass(frozen=True)
class Prospect:
    """A version under the alias. accuracy: as the gate measured it.

    config: what it will be retrained with; None when it stands on the new base already, or cannot be: `problem` says.
    answer: what that has given before.
    """

    version: Version
    accuracy: float | None
    config: RetrainConfig | None = None
    problem: AdapterlineError | None = None
    answer: Version | None = None

    @property
    def is_fusion(self) -> bool:
        return self.version.tags.get("method") == "fusion"

    @property
    def then(self) -> str:
        if self.problem:
            return "cannot"
        if self.config is None:
            return "stands on the new base already"
        if self.answer:
            return f"up to date: version {self.answer.number}"
        return "retrain, after its members" if self.is_fusion else "retrain"


@dataclass(frozen=True)
class Against:
    """The new bundle beside the old one: accuracy on the same test rows, bytes of their files."""

    old: float
    new: float
    difference: Comparison
    old_bytes: int
    new_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What came of one version. new: the version that answers for the new base, if there is one."""

    old: Version
    came: Came
    new: Version | None = None
    against: Against | None = None
    reason: str = ""

    @property
    def exit_code(self) -> int:
        return {"gate failed": 2, "inconclusive": 3, "error": 1}.get(self.came, 0)


def in_order(prospects: Sequence[Prospect]) -> list[Prospect]:
    """Fusions last, for they stand on the others; by name among themselves."""
    return sorted(prospects, key=lambda each: (each.is_fusion, each.version.name))


def without_version(error: object) -> Came:
    """How a retrain ended that this error ended."""
    if isinstance(error, GateFailed):
        return "gate failed"
    return "inconclusive" if isinstance(error, GateInconclusive) else "error"


def against(old: Path, new: Path, config: GateConfig) -> Against:
    """The bundles in these folders, by their predictions for the test part, paired over its rows.

    Raises BundleError when they are not for the same rows.
    """
    theirs, ours = bundle.read_predictions(old), bundle.read_predictions(new)
    if theirs.rows != ours.rows or not np.array_equal(theirs.labels, ours.labels):
        raise BundleError("predictions for the same test rows", "other rows", "retrain it alone")
    before, now = (correct(each.probabilities, each.labels) for each in (theirs, ours))
    # The verdict is the gate's; here only the difference and its bounds are of interest.
    rng = np.random.default_rng(config.seed)
    difference = non_inferiority(now, before, 0.0, rng, CONFIDENCE, config.resamples)
    sizes = (bundle.read_manifest(folder).bytes for folder in (old, new))
    return Against(float(before.mean()), float(now.mean()), difference, *sizes)


def raise_unless_moved(outcomes: Sequence[Outcome], base: str) -> None:
    """Raise UpgradeError when a model met an error, else GateFailed or GateInconclusive when a gate did not pass."""
    codes = {each.exit_code for each in outcomes} - {0}
    if not codes:
        return
    kind = {1: UpgradeError, 2: GateFailed, 3: GateInconclusive}[min(codes)]
    left = [f"{each.old.name}: {each.came}" for each in outcomes if each.exit_code]
    todo = "see the reasons above, correct, and run the same command again: what is done stays"
    raise kind(f"{len(outcomes)} models registered on {base}", f"{len(left)} that are not ({', '.join(left)})", todo)


def plan_table(prospects: Sequence[Prospect]) -> list[str]:
    """What stands where, and what would be done."""
    rows = [
        (
            each.version.name,
            each.version.number,
            _base(each.version),
            each.version.tags.get("method", ""),
            _points(each.accuracy),
            each.then,
        )
        for each in prospects
    ]
    lines = _table(("model", "version", "stands on", "method", "accuracy", "then"), rows)
    return lines + [f"  {each.version.name}: {each.problem}" for each in prospects if each.problem]


def outcome_table(outcomes: Sequence[Outcome]) -> list[str]:
    """Old against new, and below it the reasons of what was not registered."""
    names = ("model", "old", "accuracy", "new", "accuracy", "difference (bounds)", "bundle", "")
    lines = _table(names, [_cells(each) for each in outcomes])
    note = f"difference: points on the same test rows, with one-sided {CONFIDENCE:.0%} bounds by paired bootstrap"
    reasons = [f"  {each.old.name}: {each.reason}" for each in outcomes if each.reason]
    return [*lines, *([note] if any(each.against for each in outcomes) else []), *reasons]


def outcome_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The same as a table for Prefect."""
    names = ("model", "old", "old accuracy", "new", "new accuracy", "difference", "bundle", "outcome")
    return [{**dict(zip(names, _cells(each), strict=True)), "reason": each.reason} for each in outcomes]


def _cells(outcome: Outcome) -> tuple[str, ...]:
    against = outcome.against
    difference = bundle = "–"
    if against:
        found = against.difference
        difference = f"{100 * found.difference:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
        bundle = f"{against.old_bytes / 1e3:,.0f} → {against.new_bytes / 1e3:,.0f} kB"
    return (
        outcome.old.name,
        outcome.old.number,
        _points(against.old if against else None),
        outcome.new.number if outcome.new else "–",
        _points(against.new if against else None),
        difference,
        bundle,
        outcome.came,
    )


def _base(version: Version) -> str:
    return f"{version.tags.get('base', '?')} {version.tags.get('base_weights_sha256', '')[:8]}".strip()


def _points(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="")
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number == 0 else "default", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    # As wide as it is: a reason to look at another screen, none to cut a name.
    width = sum(max(map(len, column)) + 2 for column in zip(names, *rows, strict=True))
    out = Console(file=io.StringIO(), width=width, color_system=None)
    out.print(table)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return ["", *(line.rstrip() for line in text.splitlines())]
