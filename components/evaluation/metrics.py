"""Scores of class probabilities. All of one confusion matrix broadcast over leading dimensions, for resampling."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]

# Probabilities are float32: what is closer to 0 than its resolution counts as that close, not as impossible.
SMALLEST = float(np.finfo(np.float32).eps)
ECE_BINS = 15


def measure(labels: Ints, probabilities: Floats) -> dict[str, float]:
    """Accuracy, macro F1, Matthews correlation, log loss and expected calibration error.

    labels: (rows,).  probabilities: (rows, classes), each row summing to 1.
    """
    matrix = confusion(labels, probabilities.argmax(axis=1), probabilities.shape[1])
    scores = {name: float(value) for name, value in confusion_scores(matrix).items()}
    return {**scores, "log_loss": float(losses(labels, probabilities).mean()), "ece": ece(labels, probabilities)}


def score(measured: dict[str, float], metric: str) -> float:
    """The metric, turned so that higher is better."""
    return -measured[metric] if metric == "log_loss" else measured[metric]


def rank(measured: dict[str, float], metric: str) -> list[float]:
    """What picks the best epoch, higher is better: the metric and, since a small validation part has many ties, log
    loss among equals.
    """
    return [score(measured, metric), -measured["log_loss"]]


def confusion(labels: Ints, predicted: Ints, classes: int) -> Ints:
    """Counts, (classes, classes): true class by predicted class."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def confusion_scores(matrix: npt.NDArray[np.generic]) -> dict[str, Floats]:
    """Accuracy, macro F1 and Matthews correlation (Gorodkin 2004) of confusion matrices, (..., classes, classes)."""
    counts = matrix.astype(float)
    total = counts.sum(axis=(-2, -1))
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    true, predicted = counts.sum(axis=-1), counts.sum(axis=-2)
    f1 = _ratio(2 * right, true + predicted)
    covariance = right.sum(axis=-1) * total - (true * predicted).sum(axis=-1)
    spread = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (predicted**2).sum(axis=-1))
    return {
        "accuracy": _ratio(right.sum(axis=-1), total),
        "macro_f1": f1.mean(axis=-1),
        "mcc": _ratio(covariance, np.sqrt(spread)),
    }


def recalls(matrix: npt.NDArray[np.generic]) -> Floats:
    """Share of each class that was found, (..., classes)."""
    counts = matrix.astype(float)
    return _ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1))


def losses(labels: Ints, probabilities: Floats) -> Floats:
    """Negative log probability of the true class, nats, (rows,)."""
    chosen = probabilities[np.arange(len(labels)), labels].astype(float)
    negative: Floats = -np.log(np.maximum(chosen, SMALLEST))
    return negative


def ece(labels: Ints, probabilities: Floats) -> float:
    """Expected calibration error (Guo et al. 2017) over 15 bins of equal width: mean gap of confidence and accuracy."""
    return float(np.abs(calibration_gaps(labels, probabilities).mean(axis=0)).sum())


def calibration_gaps(labels: Ints, probabilities: Floats) -> Floats:
    """Confidence minus correctness of each row, in the column of its confidence bin, (rows, bins)."""
    confidence = probabilities.max(axis=1).astype(float)
    correct = probabilities.argmax(axis=1) == labels
    column = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.zeros((len(labels), ECE_BINS))
    gaps[np.arange(len(labels)), column] = confidence - correct
    return gaps


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, and 0 where bottom is 0."""
    return np.divide(top, bottom, out=np.zeros(np.broadcast(top, bottom).shape), where=bottom != 0)
