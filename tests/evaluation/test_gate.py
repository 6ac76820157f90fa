"""The gate on constructed evidence: what passes, what fails, what cannot be told, and that nothing slips through."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from components.config import GateConfig
from components.errors import GateFailed, GateInconclusive
from components.evaluation.gate import Champion, Evidence, GateReport, RuleVerdict, judge, slices

Floats = npt.NDArray[np.floating]

ROWS = 2_000
LABELS = np.arange(ROWS) % 2
NAMES = ("bad", "good")
BASELINE, CHAMPION, TFIDF, SHARE, SIZE = (
    "vs full fine-tuning", "vs champion (version 3)", "better than TF-IDF", "trainable share", "bundle size"
)  # fmt: skip


def predictions(wrong: npt.NDArray[np.int64] | slice, labels: npt.NDArray[np.int64] = LABELS) -> Floats:
    """Probabilities that are right everywhere but in the rows `wrong`."""
    chosen = labels.copy()
    chosen[wrong] = 1 - chosen[wrong]
    return np.where(np.arange(2) == chosen[:, None], 0.9, 0.1)


def errors(count: int, seed: int) -> Floats:
    """Predictions with so many errors, at random places."""
    return predictions(np.random.default_rng(seed).choice(ROWS, count, replace=False))


def evidence(**changes: Any) -> Evidence:
    """What passes every rule: adapter and baseline wrong in the same 100 rows, a champion as good as they are."""
    good = errors(100, seed=0)
    plain = Evidence(
        label_names=NAMES,
        labels=LABELS,
        lengths=np.random.default_rng(1).integers(10, 500, ROWS),
        adapter=good,
        baseline=good,
        tfidf=errors(300, seed=2),
        champion=Champion("3", np.arange(ROWS), good),
        trainable_share=0.02,
        bundle_bytes=2_000_000,
    )
    return dataclasses.replace(plain, **changes)


def judged(config: GateConfig | None = None, **changes: Any) -> GateReport:
    return judge(evidence(**changes), config or GateConfig(resamples=1_000))


def rule_of(report: GateReport, name: str) -> RuleVerdict:
    return next(rule for rule in report.rules if rule.rule == name)


def failing(report: GateReport) -> set[str]:
    return {rule.rule for rule in report.rules if rule.verdict == "fail"}


def test_an_adapter_as_good_as_all_others_passes() -> None:
    assert judged().verdict == "pass"


def test_passing_gives_no_reasons() -> None:
    assert judged().reasons == []


def test_an_adapter_worse_than_the_baseline_by_more_than_the_margin_fails() -> None:
    report = judged(baseline=predictions(slice(0, 0)), champion=None)
    assert BASELINE in failing(report)
    assert report.verdict == "fail"


def test_a_difference_near_the_margin_is_inconclusive_and_says_how_many_rows_would_tell() -> None:
    report = judged(adapter=errors(110, seed=3), champion=None, config=GateConfig(resamples=1_000, slice_margin=0.5))
    rule = rule_of(report, BASELINE)
    assert report.verdict == "inconclusive"
    assert rule.rows_needed is not None
    assert f"2,000 rows cannot tell, about {rule.rows_needed:,} would" in report.reasons[0]


def test_a_better_champion_fails_the_candidate() -> None:
    report = judged(champion=Champion("3", np.arange(ROWS), predictions(slice(0, 0))))
    assert failing(report) == {CHAMPION}


def test_the_champion_is_compared_on_the_rows_it_never_saw() -> None:
    unseen = np.arange(0, ROWS, 2)
    report = judged(champion=Champion("3", unseen, evidence().adapter[unseen]))
    assert rule_of(report, CHAMPION).rows == ROWS // 2
    assert rule_of(report, CHAMPION).value == 0


def test_a_champion_that_saw_every_row_leaves_it_undecided() -> None:
    report = judged(champion=Champion("3", np.array([], dtype=np.int64), np.zeros((0, 2))))
    assert report.verdict == "inconclusive"
    assert rule_of(report, CHAMPION).rows == 0


def test_without_a_champion_that_rule_passes() -> None:
    assert rule_of(judged(champion=None), "vs champion").verdict == "pass"


def test_a_class_that_collapses_fails_although_all_in_all_it_passes() -> None:
    labels = (np.arange(ROWS) < 20).astype(np.int64)
    report = judged(
        labels=labels,
        adapter=predictions(np.arange(10), labels),
        baseline=predictions(slice(0, 0), labels),
        tfidf=predictions(slice(0, 0), labels),
        champion=None,
    )
    assert rule_of(report, BASELINE).verdict == "pass"
    assert failing(report) == {"class good"}


def test_a_bucket_of_lengths_that_collapses_fails() -> None:
    lengths = np.sort(evidence().lengths)
    report = judged(lengths=lengths, adapter=predictions(slice(0, 300)), baseline=errors(300, seed=0), champion=None)
    assert f"length {lengths[0]}–{lengths[ROWS // 3 - 1]} characters" in failing(report)


def test_small_slices_are_reported_where_the_config_says_so() -> None:
    labels = (np.arange(ROWS) < 20).astype(np.int64)
    wrong = predictions(np.arange(10), labels)
    fine = predictions(slice(0, 0), labels)
    config = GateConfig(resamples=1_000, slice_min_rows=21)
    report = judged(config, labels=labels, adapter=wrong, baseline=fine, tfidf=fine, champion=None)
    assert rule_of(report, "class good").verdict == "reported"


def test_a_class_without_rows_is_undecided() -> None:
    report = judged(labels=np.zeros(ROWS, dtype=np.int64), champion=None)
    assert rule_of(report, "class good").verdict == "inconclusive"


def test_slices_by_length_part_all_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    buckets = [rows for name, rows in slices(LABELS[:500], lengths, NAMES, 3) if name.startswith("length")]
    assert sorted(np.concatenate(buckets).tolist()) == list(range(500))
    assert all(120 < len(rows) < 220 for rows in buckets)


@pytest.mark.parametrize("lengths", [np.full(10, 7), np.array([1] * 9 + [50])])
def test_rows_of_one_length_share_a_bucket(lengths: npt.NDArray[np.int64]) -> None:
    buckets = [rows for name, rows in slices(LABELS[:10], lengths, NAMES, 3) if name.startswith("length")]
    assert [len(set(lengths[rows].tolist())) for rows in buckets] == [1] * len(set(lengths.tolist()))


@pytest.mark.parametrize(("share", "verdict"), [(0.05, "pass"), (0.0501, "fail"), (1.0, "fail")])
def test_trainable_share(share: float, verdict: str) -> None:
    assert rule_of(judged(trainable_share=share), SHARE).verdict == verdict


@pytest.mark.parametrize(("size", "verdict"), [(16_000_000, "pass"), (16_000_001, "fail")])
def test_bundle_size(size: int, verdict: str) -> None:
    assert rule_of(judged(bundle_bytes=size), SIZE).verdict == verdict


def test_tfidf_is_reported_and_decides_nothing() -> None:
    report = judged(tfidf=predictions(slice(0, 0)))
    assert rule_of(report, TFIDF).verdict == "reported"
    assert report.verdict == "pass"


def test_tfidf_must_be_beaten_where_the_config_says_so() -> None:
    report = judged(GateConfig(resamples=1_000, must_beat_tfidf=True), tfidf=predictions(slice(0, 0)))
    assert failing(report) == {TFIDF}


def with_nan(values: Floats) -> Floats:
    spoilt = values.copy()
    spoilt[17, 0] = np.nan
    return spoilt


BROKEN: dict[str, dict[str, Any]] = {
    "NaN of the adapter": {"adapter": with_nan(evidence().adapter)},
    "NaN of the baseline": {"baseline": with_nan(evidence().adapter)},
    "NaN of TF-IDF": {"tfidf": with_nan(evidence().adapter)},
    "infinite": {"adapter": evidence().adapter * np.inf},
    "too few rows": {"adapter": evidence().adapter[:-1]},
    "too many classes": {"baseline": np.full((ROWS, 3), 1 / 3)},
    "no rows": {"labels": LABELS[:0]},
    "NaN of the champion": {"champion": Champion("3", np.arange(ROWS), with_nan(evidence().adapter))},
    "champion of other rows": {"champion": Champion("3", np.arange(5), evidence().adapter)},
    "share not measured": {"trainable_share": float("nan")},
    "no bundle": {"bundle_bytes": 0},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_could_not_be_measured_fails(broken: str) -> None:
    assert judged(**BROKEN[broken]).verdict == "fail"


@pytest.mark.parametrize("changes", [{}, {"champion": None}, BROKEN["no rows"]])
def test_a_report_is_strict_json(changes: dict[str, Any]) -> None:
    report = judged(**changes)
    read = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert (read["verdict"], len(read["rules"])) == (report.verdict, len(report.rules))


def test_the_same_evidence_gives_the_same_report() -> None:
    assert judged() == judged()


@pytest.mark.parametrize("name", ["adapter", "full fine-tuning", "TF-IDF"])
def test_every_score_lies_in_its_interval(name: str) -> None:
    found = judged().scores[name]
    assert all(e.low <= e.value <= e.high for key, e in found.items() if key != "ece")


def test_a_passed_gate_raises_nothing() -> None:
    judged().raise_unless_passed()


def test_a_failed_gate_ends_with_2_and_names_every_failed_rule() -> None:
    with pytest.raises(GateFailed, match=rf"{SHARE}: .*{SIZE}: ") as caught:
        judged(trainable_share=0.5, bundle_bytes=10**9).raise_unless_passed()
    assert caught.value.exit_code == 2


def test_an_undecided_gate_ends_with_3() -> None:
    with pytest.raises(GateInconclusive, match="neither has learned from") as caught:
        judged(champion=Champion("3", np.array([], dtype=np.int64), np.zeros((0, 2)))).raise_unless_passed()
    assert caught.value.exit_code == 3


def test_failing_outweighs_being_undecided() -> None:
    empty = Champion("3", np.array([], dtype=np.int64), np.zeros((0, 2)))
    assert judged(champion=empty, trainable_share=0.5).verdict == "fail"


def undecided(**rule: Any) -> GateReport:
    whole = RuleVerdict(BASELINE, "pass", 0.0, -0.01, "", rows=1_000)
    return GateReport("inconclusive", (whole, RuleVerdict("class bad", "inconclusive", 0.0, -0.05, "why", **rule)), {})


def test_rows_needed_for_a_slice_are_counted_in_rows_of_the_whole() -> None:
    with pytest.raises(GateInconclusive, match=r"about 3,000 for testing"):
        undecided(rows=100, rows_needed=300).raise_unless_passed()


def test_where_no_number_of_rows_is_known_none_is_given() -> None:
    with pytest.raises(GateInconclusive, match="label more rows or widen"):
        undecided(rows=0).raise_unless_passed()
