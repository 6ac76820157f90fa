"""The gate: rules over measurements. A verdict is data, and whatever could not be measured is a failure.

All rules must pass, so each is tested at the full level and none needs a correction for their number (an
intersection-union test, Berger 1982).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from components.config import GateConfig
from components.errors import GateFailed, GateInconclusive
from components.evaluation.statistics import Comparison, Estimate, estimates, non_inferiority

Floats = npt.NDArray[np.floating]
Verdict = Literal["pass", "fail", "inconclusive", "reported"]
CHAMPION_RULE = "vs champion"


@dataclass(frozen=True)
class Champion:
    """What is in production: its version, the rows of the test part it never learned from, its probabilities there.

    rows: indices into the test part.  probabilities: (len(rows), classes).
    """

    version: str
    rows: npt.NDArray[np.int64]
    probabilities: Floats


@dataclass(frozen=True)
class Evidence:
    """All that the gate looks at. Arrays are over the rows of the frozen test part, in one order.

    labels: (rows,).  lengths: (rows,) characters.  adapter, baseline, tfidf: (rows, classes) probabilities.
    """

    label_names: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    adapter: Floats
    baseline: Floats
    tfidf: Floats
    champion: Champion | None
    trainable_share: float
    bundle_bytes: int


@dataclass(frozen=True)
class RuleVerdict:
    """One rule: what was measured, against which bound, on how many rows, and what follows."""

    rule: str
    verdict: Verdict
    value: float
    bound: float
    reason: str
    rows: int | None = None
    low: float | None = None
    high: float | None = None
    rows_needed: int | None = None


@dataclass(frozen=True)
class GateReport:
    """The verdict with its reasons, and every score with its 95 % interval."""

    verdict: Literal["pass", "fail", "inconclusive"]
    rules: tuple[RuleVerdict, ...]
    scores: dict[str, dict[str, Estimate]]

    @property
    def reasons(self) -> list[str]:
        """Why it did not pass; empty when it did."""
        return [f"{rule.rule}: {rule.reason}" for rule in self.rules if rule.verdict in ("fail", "inconclusive")]

    def raise_unless_passed(self) -> None:
        """Raise GateFailed or GateInconclusive with all reasons."""
        if self.verdict == "fail":
            raise GateFailed("every rule of the gate to pass", "; ".join(self.reasons), "nothing was registered")
        if self.verdict == "inconclusive":
            needed = f" (about {self.rows_needed:,} for testing)" if self.rows_needed else ""
            advice = f"label more rows{needed} or widen the margin, as a policy"
            raise GateInconclusive("a test part that decides every rule", "; ".join(self.reasons), advice)

    @property
    def rows_needed(self) -> int | None:
        """Size of a test part that would probably decide every rule, a slice keeping its share of the rows."""
        rows = max((rule.rows or 0 for rule in self.rules), default=0)
        growths = [rule.rows_needed / rule.rows for rule in self.rules if rule.rows_needed and rule.rows]
        return math.ceil(rows * max(growths)) if growths else None

    def as_json(self) -> dict[str, Any]:
        """Values for JSON, which has no NaN: what could not be measured is None."""
        content = asdict(self)
        for rule in content["rules"]:
            rule["value"] = rule["value"] if math.isfinite(rule["value"]) else None
        return content


def from_json(content: Mapping[str, Any]) -> GateReport:
    """The report that `as_json` wrote. Raises LookupError, TypeError or AttributeError when it is something else."""
    rules = [RuleVerdict(**{**rule, "value": float("nan") if rule["value"] is None else rule["value"]})
             for rule in content["rules"]]  # fmt: skip
    scores = {
        who: {name: Estimate(**estimate) for name, estimate in measured.items()}
        for who, measured in content["scores"].items()
    }
    return GateReport(content["verdict"], tuple(rules), scores)


def judge(evidence: Evidence, config: GateConfig) -> GateReport:
    """Apply every rule."""
    broken = _broken(evidence)
    if broken:
        return GateReport("fail", (RuleVerdict("measured", "fail", float("nan"), 0.0, broken),), {})
    rng = np.random.default_rng(config.seed)
    rules = [
        _against_baseline(evidence, config, rng),
        _against_champion(evidence, config, rng),
        *_slices(evidence, config, rng),
        _trainable_share(evidence, config),
        _bundle_size(evidence, config),
        _against_tfidf(evidence, config, rng),
    ]
    measured = {"adapter": evidence.adapter, "full fine-tuning": evidence.baseline, "TF-IDF": evidence.tfidf}
    found = estimates(evidence.labels, list(measured.values()), 0.95, config.resamples, rng)
    scores = {name: _named(each, evidence.label_names) for name, each in zip(measured, found, strict=True)}
    return GateReport(overall(rules), tuple(rules), scores)


def overall(rules: Sequence[RuleVerdict]) -> Literal["pass", "fail", "inconclusive"]:
    """All rules must pass."""
    verdicts = {rule.verdict for rule in rules}
    if "fail" in verdicts:
        return "fail"
    return "inconclusive" if "inconclusive" in verdicts else "pass"


def _named(scores: dict[str, Estimate], labels: Sequence[str]) -> dict[str, Estimate]:
    """Scores with recalls under the names of their classes."""
    names = {f"recall_{code}": f"recall_{label}" for code, label in enumerate(labels)}
    return {names.get(name, name): estimate for name, estimate in scores.items()}


def _broken(evidence: Evidence) -> str | None:
    """Why nothing can be judged, or None."""
    rows, classes = len(evidence.labels), len(evidence.label_names)
    if rows == 0:
        return "the test part is empty"
    for name in ("adapter", "baseline", "tfidf"):
        probabilities = getattr(evidence, name)
        if probabilities.shape != (rows, classes):
            return f"{name} has predictions of shape {probabilities.shape}, expected {(rows, classes)}"
        if not np.isfinite(probabilities).all():
            return f"{name} has predictions that are not numbers"
    champion = evidence.champion
    if champion is not None:
        if champion.probabilities.shape != (len(champion.rows), classes):
            return f"champion has predictions of shape {champion.probabilities.shape}"
        if not np.isfinite(champion.probabilities).all():
            return "champion has predictions that are not numbers"
    if not (np.isfinite(evidence.trainable_share) and evidence.bundle_bytes > 0):
        return "trainable share or bundle size could not be measured"
    return None


def correct(probabilities: Floats, labels: npt.NDArray[np.int64]) -> Floats:
    """(rows,) 1 where the most probable class is the label, else 0."""
    right: Floats = (probabilities.argmax(axis=1) == labels).astype(float)
    return right


def _against_baseline(evidence: Evidence, config: GateConfig, rng: np.random.Generator) -> RuleVerdict:
    return _compared(
        "vs full fine-tuning",
        correct(evidence.adapter, evidence.labels),
        correct(evidence.baseline, evidence.labels),
        config.margin,
        config,
        rng,
    )


def _against_champion(evidence: Evidence, config: GateConfig, rng: np.random.Generator) -> RuleVerdict:
    champion = evidence.champion
    if champion is None:
        return nothing_in_production(config)
    labels = evidence.labels[champion.rows]
    return against_champion(
        champion.version,
        correct(evidence.adapter[champion.rows], labels),
        correct(champion.probabilities, labels),
        config,
        rng,
    )


def nothing_in_production(config: GateConfig) -> RuleVerdict:
    return RuleVerdict(CHAMPION_RULE, "pass", 0.0, -config.champion_margin, "nothing is in production yet")


def against_champion(
    version: str, adapter: Floats, champion: Floats, config: GateConfig, rng: np.random.Generator
) -> RuleVerdict:
    """Is the adapter about as good as what is in production? adapter, champion: (rows,), 1 where right, on rows that
    neither has learned from.
    """
    rule = f"{CHAMPION_RULE} (version {version})"
    if len(adapter) == 0:
        reason = "no test row that neither has learned from: no honest comparison"
        return RuleVerdict(rule, "inconclusive", 0.0, -config.champion_margin, reason, rows=0)
    return _compared(rule, adapter, champion, config.champion_margin, config, rng)


def _slices(evidence: Evidence, config: GateConfig, rng: np.random.Generator) -> list[RuleVerdict]:
    adapter, baseline = correct(evidence.adapter, evidence.labels), correct(evidence.baseline, evidence.labels)
    rules = []
    for name, rows in slices(evidence.labels, evidence.lengths, evidence.label_names, config.length_buckets):
        if len(rows) < max(config.slice_min_rows, 1):
            value = float(adapter[rows].mean() - baseline[rows].mean()) if len(rows) else 0.0
            if config.slice_min_rows > 0:
                reason = f"not judged: {len(rows)} rows, gate.slice_min_rows is {config.slice_min_rows}"
                rules.append(RuleVerdict(name, "reported", value, -config.slice_margin, reason, rows=len(rows)))
            else:
                reason = "no rows in the test part"
                rules.append(RuleVerdict(name, "inconclusive", value, -config.slice_margin, reason, rows=0))
            continue
        rules.append(_compared(name, adapter[rows], baseline[rows], config.slice_margin, config, rng))
    return rules


def slices(
    labels: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], label_names: Sequence[str], buckets: int
) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """Name and row numbers of every slice: each class, and length buckets of near-equal size."""
    named = [(f"class {name}", np.flatnonzero(labels == code)) for code, name in enumerate(label_names)]
    edges = np.quantile(lengths, np.linspace(0, 1, buckets + 1)[1:-1], method="nearest")
    bucket = np.searchsorted(np.unique(edges), lengths, side="left")
    for number in np.unique(bucket):
        rows = np.flatnonzero(bucket == number)
        named.append((f"length {lengths[rows].min():,}–{lengths[rows].max():,} characters", rows))
    return named


def _trainable_share(evidence: Evidence, config: GateConfig) -> RuleVerdict:
    share, bound = evidence.trainable_share, config.max_trainable_share
    reason = f"{share:.2%} of the parameters are trained, at most {bound:.0%} allowed"
    return RuleVerdict("trainable share", "pass" if share <= bound else "fail", share, bound, reason)


def _bundle_size(evidence: Evidence, config: GateConfig) -> RuleVerdict:
    size, bound = evidence.bundle_bytes / 1e6, config.max_bundle_mb
    reason = f"{size:.2f} MB, at most {bound:g} MB allowed"
    return RuleVerdict("bundle size", "pass" if size <= bound else "fail", size, bound, reason)


def _against_tfidf(evidence: Evidence, config: GateConfig, rng: np.random.Generator) -> RuleVerdict:
    rule = _compared(
        "better than TF-IDF",
        correct(evidence.adapter, evidence.labels),
        correct(evidence.tfidf, evidence.labels),
        0.0,
        config,
        rng,
    )
    if config.must_beat_tfidf:
        return rule
    return RuleVerdict(**{**asdict(rule), "verdict": "reported", "rows_needed": None})


def _compared(
    rule: str, adapter: Floats, other: Floats, margin: float, config: GateConfig, rng: np.random.Generator
) -> RuleVerdict:
    found = non_inferiority(adapter, other, margin, rng, config.confidence, config.resamples)
    return RuleVerdict(
        rule=rule,
        verdict=found.verdict,
        value=found.difference,
        bound=-margin,
        reason=_reason(found, margin, config),
        rows=found.rows,
        low=found.low,
        high=found.high,
        rows_needed=found.rows_needed,
    )


def _reason(found: Comparison, margin: float, config: GateConfig) -> str:
    """`-0.6 points (95 % bounds -1.9 and +0.7), at most 3 worse allowed`"""
    seen = f"{100 * found.difference:+.1f} points"
    bounds = f"one-sided {config.confidence:.0%} bounds {100 * found.low:+.1f} and {100 * found.high:+.1f}"
    allowed = f"at most {100 * margin:g} worse allowed" if margin else "must be above 0"
    needed = f"; {found.rows:,} rows cannot tell, about {found.rows_needed:,} would" if found.rows_needed else ""
    return f"{seen} ({bounds}), {allowed}{needed}"
