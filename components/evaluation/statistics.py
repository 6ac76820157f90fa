"""Intervals and comparisons by resampling (Efron & Tibshirani 1993). Pure functions of arrays and a generator."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from components.evaluation import metrics

Floats = npt.NDArray[np.floating]
Verdict = Literal["pass", "fail", "inconclusive"]

# Above this many rows the bootstrap distribution of a mean is the normal one to more digits than are ever shown.
NORMAL_FROM = 5_000
# Numbers held at once while resampling: 40 MB of float64.
BLOCK = 5_000_000
# The chance to find a true effect of the size seen, for which the number of rows needed is computed.
POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A score and its two-sided interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A paired difference, its two one-sided bounds, and what follows for the bound asked for.

    rows_needed: how many rows would probably decide an inconclusive comparison, if the difference is what was seen.
    """

    difference: float
    low: float
    high: float
    rows: int
    verdict: Verdict
    rows_needed: int | None


def estimates(
    labels: npt.NDArray[np.int64],
    probabilities: Sequence[Floats],
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> list[dict[str, Estimate]]:
    """Of each model, every score of `metrics.measure`, and `recall_CLASS` by class number, with percentile intervals.

    labels: (rows,).  probabilities: (rows, classes) of each model.  Means of losses and gaps are resampled for all
    models at once: to draw the rows takes longer than what is then done with them.
    """
    columns = [
        np.column_stack([metrics.losses(labels, each), metrics.calibration_gaps(labels, each)])
        for each in probabilities
    ]
    means = np.concatenate(list(_means(np.hstack(columns), resamples, rng)))
    parts = np.split(means, len(columns), axis=1)
    return [
        _estimates(labels, each, part, confidence, resamples, rng)
        for each, part in zip(probabilities, parts, strict=True)
    ]


def _estimates(
    labels: npt.NDArray[np.int64],
    probabilities: Floats,
    means: Floats,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> dict[str, Estimate]:
    """means: (resamples, 1 + bins), of the losses and of each bin's calibration gaps."""
    classes = probabilities.shape[1]
    matrix = metrics.confusion(labels, probabilities.argmax(axis=1), classes)
    drawn: dict[str, list[Floats]] = {}
    for block in _confusions(matrix, resamples, rng):
        scores = metrics.confusion_scores(block)
        scores |= {f"recall_{code}": found for code, found in enumerate(metrics.recalls(block).T)}
        for name, values in scores.items():
            drawn.setdefault(name, []).append(values)
    samples = {name: np.concatenate(parts) for name, parts in drawn.items()}
    samples["log_loss"], samples["ece"] = means[:, 0], np.abs(means[:, 1:]).sum(axis=1)
    point = metrics.measure(labels, probabilities)
    point |= {f"recall_{code}": float(value) for code, value in enumerate(metrics.recalls(matrix))}
    tail = (1 - confidence) / 2
    found = {}
    for name, value in point.items():
        low, high = (float(bound) for bound in np.quantile(samples[name], [tail, 1 - tail]))
        if name == "ece":
            # Noise adds to a sum of absolute gaps: resamples lie above the estimate, so reflect them (basic bootstrap).
            low, high = max(0.0, 2 * value - high), max(value, 2 * value - low)
        found[name] = Estimate(value, low, high)
    return found


def non_inferiority(
    adapter: Floats,
    baseline: Floats,
    margin: float,
    rng: np.random.Generator,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Comparison:
    """Is the adapter at most `margin` worse than the baseline on the same examples?

    Paired bootstrap over examples (Efron & Tibshirani 1993, ch. 16) of mean(adapter) - mean(baseline).
    adapter, baseline: (examples,) scores in [0, 1], same order.  margin: in score units, e.g. 0.01; 0 asks whether
    the adapter is better.
    Passes when the one-sided lower bound lies above -margin, fails when the upper one lies below, else inconclusive.

    Two safeguards keep small samples from looking certain: each resample also draws from one imagined example of
    either extreme (after Agresti & Min 2005), and no fewer rows pass than would show a disagreement as rare as the
    margin, ln(1 - confidence) / ln(1 - margin).
    """
    if len(adapter) != len(baseline) or len(adapter) == 0:
        raise ValueError(f"expected the same examples twice, found {len(adapter)} and {len(baseline)} scores")
    differences = adapter.astype(float) - baseline.astype(float)
    rows, seen = len(differences), float(differences.mean())
    values, counts = np.unique(np.append(differences, [1.0, -1.0]), return_counts=True)
    shares = counts / counts.sum()
    size = max(1, BLOCK // len(values))
    drawn = np.concatenate(
        [
            rng.multinomial(rows, shares, size=min(size, resamples - done)) @ values / rows
            for done in range(0, resamples, size)
        ]
    )
    low, high = (float(bound) for bound in np.quantile(drawn, [1 - confidence, confidence]))
    fewest = math.ceil(math.log(1 - confidence) / math.log(1 - margin)) if margin > 0 else 1
    verdict: Verdict = "inconclusive"
    if low > -margin and rows >= fewest:
        verdict = "pass"
    elif high < -margin:
        verdict = "fail"
    needed = (
        None
        if verdict != "inconclusive"
        else max(fewest, rows + 1, _rows_needed(values, shares, seen, margin, confidence))
    )
    return Comparison(seen, low, high, rows, verdict, needed)


def _rows_needed(values: Floats, shares: Floats, seen: float, margin: float, confidence: float) -> int:
    """Rows for which a true difference as seen would be told from the margin four times in five."""
    variance = float(shares @ values**2 - (shares @ values) ** 2)
    normal = NormalDist()
    quantiles = normal.inv_cdf(confidence) + normal.inv_cdf(POWER)
    distance = max(abs(seen + margin), 1e-4)  # right at the margin no number would do
    return math.ceil(variance * (quantiles / distance) ** 2)


def _confusions(
    matrix: npt.NDArray[np.int64], resamples: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Blocks of resampled confusion matrices: resampling rows is a multinomial draw over the cells they fall into."""
    cells = np.flatnonzero(matrix)
    counts = matrix.flat[cells]
    size = max(1, BLOCK // matrix.size)
    for done in range(0, resamples, size):
        block = np.zeros((min(size, resamples - done), matrix.size), dtype=np.int64)
        block[:, cells] = rng.multinomial(counts.sum(), counts / counts.sum(), size=len(block))
        yield block.reshape(-1, *matrix.shape)


def _means(columns: Floats, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Blocks of column means over resampled rows. columns: (rows, k).  Each block: (≤ resamples, k)."""
    rows = len(columns)
    if rows > NORMAL_FROM:
        covariance = np.cov(columns, rowvar=False) / rows
        yield rng.multivariate_normal(columns.mean(axis=0), covariance, size=resamples, method="eigh")
        return
    size = max(1, BLOCK // rows)
    for done in range(0, resamples, size):
        # To count rows that were drawn takes a quarter of the time of drawing the counts, one binomial a row.
        drawn = rng.integers(rows, size=(min(size, resamples - done), rows), dtype=np.uint16)
        yield np.array([np.bincount(each, minlength=rows) for each in drawn]) @ columns / rows
