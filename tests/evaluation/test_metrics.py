"""Metrics against scikit-learn, calibration against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef, recall_score

from components.evaluation import metrics

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CASES = [(classes, seed) for classes in (2, 3, 7) for seed in range(4)]
every_case = pytest.mark.parametrize(("classes", "seed"), CASES)


def case(classes: int, seed: int, rows: int = 200) -> tuple[Ints, Floats]:
    """Labels and probabilities that know something of them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=rows)
    scores = rng.normal(size=(rows, classes)) + 1.5 * np.eye(classes)[labels]
    shares = np.exp(scores)
    return labels, shares / shares.sum(axis=1, keepdims=True)


@every_case
def test_accuracy(classes: int, seed: int) -> None:
    labels, found = case(classes, seed)
    assert metrics.measure(labels, found)["accuracy"] == pytest.approx(accuracy_score(labels, found.argmax(axis=1)))


@every_case
def test_macro_f1(classes: int, seed: int) -> None:
    labels, found = case(classes, seed)
    wanted = f1_score(labels, found.argmax(axis=1), average="macro")
    assert metrics.measure(labels, found)["macro_f1"] == pytest.approx(wanted)


@every_case
def test_matthews_correlation(classes: int, seed: int) -> None:
    labels, found = case(classes, seed)
    assert metrics.measure(labels, found)["mcc"] == pytest.approx(matthews_corrcoef(labels, found.argmax(axis=1)))


@every_case
def test_log_loss(classes: int, seed: int) -> None:
    labels, found = case(classes, seed)
    assert metrics.measure(labels, found)["log_loss"] == pytest.approx(log_loss(labels, found))


@every_case
def test_recalls(classes: int, seed: int) -> None:
    labels, found = case(classes, seed)
    predicted = found.argmax(axis=1)
    wanted = recall_score(labels, predicted, average=None)
    assert metrics.recalls(metrics.confusion(labels, predicted, classes)) == pytest.approx(wanted)


def test_a_class_never_seen_nor_predicted_counts_as_zero_in_macro_f1() -> None:
    labels, predicted = np.array([0, 1, 0, 1]), np.array([0, 1, 0, 1])
    scores = metrics.confusion_scores(metrics.confusion(labels, predicted, 3))
    assert scores["macro_f1"] == pytest.approx(
        f1_score(labels, predicted, labels=[0, 1, 2], average="macro", zero_division=0)
    )


def test_correlation_of_a_constant_prediction_is_zero() -> None:
    assert metrics.confusion_scores(metrics.confusion(np.array([0, 1, 1]), np.array([1, 1, 1]), 2))["mcc"] == 0


def test_confusion_has_true_classes_as_rows() -> None:
    assert metrics.confusion(np.array([0, 0, 1]), np.array([1, 1, 0]), 2).tolist() == [[0, 2], [1, 0]]


def test_scores_of_many_matrices_are_those_of_each() -> None:
    matrices = np.random.default_rng(0).integers(0, 30, size=(5, 3, 3))
    together = metrics.confusion_scores(matrices)
    for name, values in together.items():
        assert values == pytest.approx([float(metrics.confusion_scores(matrix)[name]) for matrix in matrices])


def test_an_impossible_true_class_costs_no_more_than_float32_can_tell() -> None:
    losses = metrics.losses(np.array([0]), np.array([[0.0, 1.0]], dtype=np.float32))
    assert losses == pytest.approx(-np.log(np.finfo(np.float32).eps))


def calibrated(confidence: float, right: int, rows: int) -> tuple[Ints, Floats]:
    """Rows that all claim `confidence` in class 0, of which `right` are."""
    return (np.arange(rows) >= right).astype(np.int64), np.tile([confidence, 1 - confidence], (rows, 1))


@pytest.mark.parametrize(
    ("confidence", "right", "gap"), [(0.8, 8, 0.0), (0.9, 5, 0.4), (0.6, 10, 0.4), (1.0, 10, 0.0), (1.0, 0, 1.0)]
)
def test_calibration_error_is_the_gap_of_confidence_and_accuracy(confidence: float, right: int, gap: float) -> None:
    assert metrics.ece(*calibrated(confidence, right, 10)) == pytest.approx(gap)


def test_gaps_in_different_bins_do_not_cancel() -> None:
    low, high = calibrated(0.6, 10, 10), calibrated(0.95, 6, 10)
    labels, found = (np.concatenate(parts) for parts in zip(low, high, strict=True))
    assert metrics.ece(labels, found) == pytest.approx((0.4 + 0.35) / 2)


def test_gaps_in_one_bin_cancel() -> None:
    low, high = calibrated(0.94, 10, 10), calibrated(0.98, 9, 10)
    labels, found = (np.concatenate(parts) for parts in zip(low, high, strict=True))
    assert metrics.ece(labels, found) == pytest.approx(0.96 - 0.95)


def test_of_equal_scores_the_surer_one_is_best() -> None:
    labels = np.array([0, 1, 1])
    unsure = np.array([[0.6, 0.4], [0.4, 0.6], [0.6, 0.4]])
    sure = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
    right = np.array([[0.51, 0.49], [0.49, 0.51], [0.49, 0.51]])
    ranks = [metrics.rank(metrics.measure(labels, found), "accuracy") for found in (unsure, sure, right)]
    assert ranks == sorted(ranks)
    assert ranks[0][0] == ranks[1][0] < ranks[2][0]
