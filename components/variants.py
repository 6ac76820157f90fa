"""What a sweep tries: configurations that differ in method, size or learning rate, each with several seeds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from typing import Any

from components.config import RetrainConfig, SweepConfig, parse
from components.errors import ConfigError
from components.methods import SECTIONS

SECTION = "bottleneck"  # which has the reduction factor
METHOD, FACTOR, RATE = "adapter.method", f"adapter.{SECTION}.reduction_factor", "adapter.schedule.learning_rates.body"


@dataclass(frozen=True)
class Variant:
    """One combination. changes: dotted keys that make it of the configuration that is swept.

    configs: by seed, as `flows/retrain.py` takes them.
    """

    changes: dict[str, Any]
    configs: dict[int, RetrainConfig]

    @property
    def name(self) -> str:
        adapter = next(iter(self.configs.values())).adapter
        factor = adapter.bottleneck.reduction_factor if adapter.bottleneck else None
        size = f" /{factor:g}" if isinstance(factor, float) else ""
        return f"{adapter.method}{size} at {adapter.schedule.learning_rates.body:g}"


def of(config: RetrainConfig) -> tuple[Variant, ...]:
    """Every combination of the lists in `config.sweep`; a reduction factor only for methods that have one.

    Raises ConfigError with everything that is wrong with any of them.
    """
    lists = config.sweep or SweepConfig()
    methods = lists.methods or (config.adapter.method,)
    if lists.reduction_factors and not any(SECTIONS.get(method) == SECTION for method in methods):
        raise ConfigError(
            "a method with a reduction factor among sweep.methods", ", ".join(methods), "remove sweep.reduction_factors"
        )
    found, problems = [], []
    for method in methods:
        factors = lists.reduction_factors if SECTIONS.get(method) == SECTION else ()
        for factor, rate in product(factors or (None,), lists.learning_rates or (None,)):
            given = {METHOD: method if lists.methods else None, FACTOR: factor, RATE: rate}
            changes = {**_foreign(config, method), **{key: value for key, value in given.items() if value is not None}}
            try:
                found.append(Variant(changes, _with_seeds(config, changes, lists.seeds or (config.seed,))))
            except ConfigError as error:
                problems.append(error.found)
    if problems:
        raise ConfigError("valid parameters", "; ".join(dict.fromkeys(problems)), "correct the lists of sweep")
    return tuple(found)


def _foreign(config: RetrainConfig, method: str) -> dict[str, Any]:
    """The sections that are given for another method are none for this one."""
    names = [name for name in dict.fromkeys(SECTIONS.values()) if name != SECTIONS.get(method)]
    return {f"adapter.{name}": None for name in names if getattr(config.adapter, name) is not None}


def _with_seeds(config: RetrainConfig, changes: dict[str, Any], seeds: tuple[int, ...]) -> dict[int, RetrainConfig]:
    content = config.model_dump_json(exclude={"sweep"})
    return {seed: parse(json.loads(content), "sweep", {**changes, "seed": seed}) for seed in seeds}
