"""Which of several variants is the best, by what each scored on the validation part. Test scores are not asked."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from components.errors import TrainingError
from components.evaluation import metrics
from components.frozen import Frozen

SHOWN = ("accuracy", "macro_f1", "log_loss")


class Tried(Frozen):
    """A variant after all its seeds. scores: by metric, of each seed's best epoch on the validation part.

    seconds: of training, all seeds.  failure: why one of them could not train; then it is not in the running.
    """

    name: str
    changes: dict[str, Any]
    scores: dict[str, tuple[float, ...]] = Field({})
    trained_parameters: int = 0
    seconds: float = 0.0
    failure: str | None = None

    @property
    def means(self) -> dict[str, float]:
        return {name: statistics.fmean(values) for name, values in self.scores.items()}

    @property
    def spreads(self) -> dict[str, float]:
        """Standard deviations over the seeds; none with fewer than two."""
        return {name: statistics.stdev(values) for name, values in self.scores.items() if len(values) > 1}


class Choice(Frozen):
    """All variants, the best one first, those that failed last. metric: by which they were ranked."""

    metric: str
    tried: tuple[Tried, ...]
    seeds: tuple[int, ...]

    @property
    def best(self) -> Tried:
        return self.tried[0]


def validation(measured: Mapping[str, Any]) -> dict[str, float]:
    """Of a bundle's measurements the scores of its best epoch on the validation part."""
    (epoch,) = [each for each in measured["history"] if each["epoch"] == measured["best_epoch"]]
    prefix = "validation_"
    return {name.removeprefix(prefix): value for name, value in epoch.items() if name.startswith(prefix)}


def choose(tried: Sequence[Tried], metric: str, seeds: Sequence[int]) -> Choice:
    """By the mean over seeds, log loss among equals: as `metrics.rank` picks an epoch.

    Raises TrainingError when every variant failed.
    """
    ranked = sorted((each for each in tried if not each.failure), key=lambda each: metrics.rank(each.means, metric))
    failed = [each for each in tried if each.failure]
    if not ranked:
        raise TrainingError(
            "a variant that trains", f"{len(failed)} that failed, the first: {failed[0].failure}", "change the lists"
        )
    return Choice(metric=metric, tried=(*reversed(ranked), *failed), seeds=tuple(seeds))
