"""What a sweep tries follows from its lists, and what it chose can be pasted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components import config as configs
from components import variants
from components.config import RetrainConfig
from components.errors import ConfigError

TWEETS = "tweets"


def swept(preset: str = TWEETS, **lists: Any) -> RetrainConfig:
    return configs.load_preset(preset, {f"sweep.{name}": value for name, value in lists.items()})


def test_every_combination_with_every_seed() -> None:
    config = swept(
        methods=["pfeiffer", "parallel"], learning_rates=[1e-4, 1e-3], reduction_factors=[8, 16], seeds=[3, 4]
    )
    found = variants.of(config)
    adapters = [each.configs[3].adapter for each in found]
    assert {
        (a.method, a.schedule.learning_rates.body, a.bottleneck.reduction_factor) for a in adapters if a.bottleneck
    } == {(method, rate, factor) for method in ("pfeiffer", "parallel") for rate in (1e-4, 1e-3) for factor in (8, 16)}
    assert len(found) == 8
    assert all({seed: each.configs[seed].seed for seed in (3, 4)} == {3: 3, 4: 4} for each in found)


def test_without_lists_it_is_what_would_be_retrained() -> None:
    config = configs.load_preset(TWEETS)
    (only,) = variants.of(config)
    assert only.configs == {config.seed: config}
    assert only.changes == {}


@pytest.mark.parametrize("preset", ["tweets", "tweets+lora", "tweets+prefix"])
def test_its_changes_make_a_variant_of_the_preset(preset: str) -> None:
    config = swept(preset, methods=["houlsby", "lora", "bitfit"], learning_rates=["2e-4"], reduction_factors=[4])
    for variant in variants.of(config):
        assert configs.load_preset(preset, {**variant.changes, "seed": 0}) == variant.configs[0]


def test_reduction_factors_are_for_methods_that_have_one() -> None:
    found = variants.of(swept(methods=["pfeiffer", "lora"], reduction_factors=[8, 16]))
    assert [each.name for each in found] == ["pfeiffer /8 at 0.0005", "pfeiffer /16 at 0.0005", "lora at 0.0005"]


def test_names_differ() -> None:
    config = swept(methods=["pfeiffer", "lora"], reduction_factors=[8, 16], learning_rates=[1e-4, 2e-4])
    names = [each.name for each in variants.of(config)]
    assert len(set(names)) == len(names) == 6


def test_reduction_factors_without_such_a_method_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a method with a reduction factor .*; found lora, ia3"):
        variants.of(swept(methods=["lora", "ia3"], reduction_factors=[8]))


def test_all_wrong_lists_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        swept(methods=["pfeiffer", "nope"], learning_rates=[0, 1e-3], seeds=[1, 1], reductions=[2])
    unknown = "sweep.reductions: unknown key (did you mean reduction_factors?)"
    for wrong in ("sweep.methods.1", "sweep.learning_rates.0", unknown):
        assert wrong in str(error.value)


def test_what_is_wrong_with_variants_is_reported_together() -> None:
    config = configs.load_preset(TWEETS, {"adapter.bottleneck.drop_margin": 0.1, "sweep.methods": ["pfeiffer", "mam"]})
    with pytest.raises(ConfigError, match="drop_margin is for adapters without prefixes"):
        variants.of(config)


def test_the_same_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="seeds must be different"):
        swept(seeds=[1, 1])


def test_a_list_changes_no_retrain(tmp_path: Path) -> None:
    assert swept(seeds=[1, 2]).model_copy(update={"sweep": None}) == configs.load_preset(TWEETS)
