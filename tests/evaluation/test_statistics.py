"""Intervals that cover what they should, and comparisons that neither pass nor fail without cause."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from components.evaluation import metrics
from components.evaluation.statistics import NORMAL_FROM, Comparison, Estimate, estimates, non_inferiority

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def sample(rng: np.random.Generator, rows: int) -> tuple[Ints, Floats]:
    """Two classes, 80 % accuracy, confidence that says nothing about being right."""
    labels = rng.integers(2, size=rows)
    right = rng.random(rows) < 0.8
    sure = rng.uniform(0.5, 1.0, size=rows)
    chosen = np.where(right, labels, 1 - labels)
    found = np.where(np.arange(2) == chosen[:, None], sure[:, None], 1 - sure[:, None])
    return labels, found


def of_one(labels: Ints, found: Floats, resamples: int, rng: np.random.Generator) -> dict[str, Estimate]:
    return estimates(labels, [found], 0.95, resamples, rng)[0]


@pytest.mark.parametrize("name", ["accuracy", "log_loss", "recall_1", "macro_f1"])
def test_intervals_cover_the_truth_as_often_as_they_say(name: str) -> None:
    rng = np.random.default_rng(0)
    truth = of_one(*sample(rng, 400_000), 1_000, rng)[name].value
    trials = 150
    covered = 0
    for _ in range(trials):
        found = of_one(*sample(rng, 150), 500, rng)[name]
        covered += found.low <= truth <= found.high
    assert 0.87 <= covered / trials <= 0.995


def naive(labels: Ints, found: Floats, score: Callable[[Ints, Floats], float], resamples: int) -> Floats:
    """A score over rows drawn anew by their index."""
    rng = np.random.default_rng(1)
    drawn = (rng.integers(len(labels), size=len(labels)) for _ in range(resamples))
    return np.array([score(labels[rows], found[rows]) for rows in drawn])


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "mcc", "log_loss", "ece"])
def test_multinomial_resampling_is_resampling_of_rows(name: str) -> None:
    labels, found = sample(np.random.default_rng(2), 120)
    slow = naive(labels, found, lambda rows, shares: metrics.measure(rows, shares)[name], 3_000)
    fast = of_one(labels, found, 20_000, np.random.default_rng(3))[name]
    low, high = np.quantile(slow, [0.025, 0.975])
    width = high - low
    if name == "ece":  # its resamples are reflected at the estimate, for they lie above it
        low, high = max(0.0, 2 * fast.value - high), max(fast.value, 2 * fast.value - low)
    assert (fast.low, fast.high) == pytest.approx((low, high), abs=0.08 * width)


def test_estimates_carry_the_measured_values() -> None:
    labels, found = sample(np.random.default_rng(4), 300)
    values = {name: e.value for name, e in of_one(labels, found, 1_000, np.random.default_rng(0)).items()}
    recalls = metrics.recalls(metrics.confusion(labels, found.argmax(axis=1), 2))
    assert values == {**metrics.measure(labels, found), "recall_0": recalls[0], "recall_1": recalls[1]}


def test_models_are_measured_on_the_same_resamples_and_each_by_itself() -> None:
    labels, found = sample(np.random.default_rng(6), 300)
    rng = np.random.default_rng(0)
    one, other, same = estimates(labels, [found, found[:, ::-1], found], 0.95, 2_000, rng)
    assert [each["accuracy"].value for each in (one, other)] == [
        metrics.measure(labels, each)["accuracy"] for each in (found, found[:, ::-1])
    ]
    assert one["log_loss"] == same["log_loss"]
    assert one["log_loss"].high < other["log_loss"].low


def test_many_rows_give_the_interval_of_the_normal_distribution() -> None:
    labels, found = sample(np.random.default_rng(5), NORMAL_FROM + 1)
    losses = metrics.losses(labels, found)
    estimate = of_one(labels, found, 20_000, np.random.default_rng(0))["log_loss"]
    error = losses.std() / np.sqrt(len(losses))
    assert (estimate.low, estimate.high) == pytest.approx(
        (losses.mean() - 1.96 * error, losses.mean() + 1.96 * error), abs=0.1 * error
    )


def compared(better: int, worse: int, same: int, margin: float, seed: int = 0, confidence: float = 0.95) -> Comparison:
    """A comparison of scores of which so many are better, worse and the same."""
    adapter = np.concatenate([np.ones(better), np.zeros(worse), np.ones(same)])
    other = np.concatenate([np.zeros(better), np.ones(worse), np.ones(same)])
    return non_inferiority(adapter, other, margin, np.random.default_rng(seed), confidence)


@pytest.mark.parametrize(
    ("better", "worse", "same", "verdict"),
    [
        (20, 20, 1_960, "pass"),
        (100, 0, 900, "pass"),
        (0, 100, 900, "fail"),
        (5, 8, 87, "inconclusive"),
        (10, 30, 1_960, "inconclusive"),
    ],
)
def test_verdict_at_a_margin_of_one_point(better: int, worse: int, same: int, verdict: str) -> None:
    assert compared(better, worse, same, 0.01).verdict == verdict


def test_the_difference_is_that_of_the_means() -> None:
    assert compared(30, 10, 60, 0.01).difference == pytest.approx(0.2)


def test_bounds_lie_around_the_difference() -> None:
    found = compared(30, 40, 930, 0.01)
    assert found.low < found.difference < found.high


def test_bounds_change_places_with_the_two_sides() -> None:
    one, other = compared(30, 50, 920, 0.01), compared(50, 30, 920, 0.01)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.002)


def test_more_confidence_widens_the_bounds() -> None:
    assert compared(30, 40, 930, 0.01, confidence=0.99).low < compared(30, 40, 930, 0.01, confidence=0.9).low


@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05])
def test_too_few_rows_do_not_pass_even_without_a_disagreement(margin: float) -> None:
    fewest = int(np.ceil(np.log(0.05) / np.log(1 - margin)))
    assert compared(0, 0, fewest - 1, margin).verdict == "inconclusive"


@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05])
def test_agreement_on_many_rows_passes(margin: float) -> None:
    assert compared(0, 0, int(6 / margin), margin).verdict == "pass"


@pytest.mark.parametrize(
    ("counts", "margin"),
    [((0, 0, 50), 0.05), ((5, 8, 87), 0.05), ((10, 30, 1_960), 0.015), ((6, 2, 92), 0.0), ((3, 5, 92), 0.01)],
)
def test_as_many_rows_as_needed_decide(counts: tuple[int, int, int], margin: float) -> None:
    needed = compared(*counts, margin).rows_needed
    assert needed is not None
    times = math.ceil(needed / sum(counts))
    better, worse, same = (times * count for count in counts)
    assert compared(better, worse, same, margin).verdict != "inconclusive"


@pytest.mark.parametrize("counts", [(5, 8, 87), (0, 0, 50)])
def test_an_undecided_comparison_needs_more_rows_than_it_had(counts: tuple[int, int, int]) -> None:
    found = compared(*counts, 0.05)
    assert found.verdict == "inconclusive"
    assert found.rows_needed is not None
    assert found.rows_needed > found.rows


def test_a_decided_comparison_needs_no_rows() -> None:
    assert compared(0, 100, 900, 0.01).rows_needed is None


def test_an_adapter_worse_by_the_margin_seldom_passes() -> None:
    rng = np.random.default_rng(0)
    passed = 0
    for _ in range(300):
        worse, better = rng.multinomial(500, [0.15, 0.10, 0.75])[:2]
        found = non_inferiority(
            np.repeat([0.0, 1.0, 1.0], [worse, better, 500 - worse - better]),
            np.repeat([1.0, 0.0, 1.0], [worse, better, 500 - worse - better]),
            0.05,
            rng,
            resamples=1_000,
        )
        passed += found.verdict == "pass"
    assert passed / 300 <= 0.09


@pytest.mark.parametrize(("one", "other"), [(3, 4), (4, 3), (0, 0)])
def test_scores_of_different_examples_are_refused(one: int, other: int) -> None:
    with pytest.raises(ValueError, match=f"{one} and {other} scores"):
        non_inferiority(np.ones(one), np.ones(other), 0.01, np.random.default_rng(0))
