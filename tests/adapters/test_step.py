"""What a step draws: how many layers do without their adapters (AdapterDrop, Rücklé et al. 2021)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from components.adapters.config import BottleneckConfig
from components.adapters.layer import Site
from components.adapters.step import reseed, steps_of
from tests.adapters.adapted import config_of
from tests.adapters.architectures import inputs, tiny


def test_the_active_adapters_range_is_drawn_from() -> None:
    model = get_peft_model(tiny("bert", num_hidden_layers=6), config_of("pfeiffer", (), drop_range=[0, 1]), "anna")
    model.add_adapter("bruno", config_of("pfeiffer", (), drop_range=[4, 5]))
    model.train()
    step = model.base_model.model.shared_of_adapters.step
    for name, drawn in (("anna", {0, 1}), ("bruno", {4, 5})):
        model.set_adapter(name)
        seen = set()
        for _ in range(30):
            model(**inputs("bert"))
            seen.add(step.layers)
        assert seen == drawn


@pytest.mark.parametrize("other", [(0, 20), (1, 0)])
def test_each_step_of_each_seed_draws_anew(other: tuple[int, int]) -> None:
    model = get_peft_model(tiny("bert"), config_of("pfeiffer", (), drop_range=[0, 1])).train()
    step = model.base_model.model.shared_of_adapters.step

    def drawn(seed: int, first: int) -> list[int | None]:
        found = []
        for number in range(first, first + 20):
            reseed(steps_of(model), seed, number)
            model(**inputs("bert"))
            found.append(step.layers)
        return found

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(*other)
    assert drawn(0, 2) != drawn(1, 1)


def test_all_passes_of_a_step_draw_alike() -> None:
    """Those of the parts of its batch, and none draws that learns nothing, as where a trunk is computed."""
    model = get_peft_model(tiny("bert"), config_of("pfeiffer", (), drop_range=[0, 1])).train()
    step, seen = model.base_model.model.shared_of_adapters.step, set()
    for number in range(10):
        reseed(steps_of(model), 0, number)
        for learns in (True, True, False, False):
            with torch.set_grad_enabled(learns):
                model(**inputs("bert"))
            seen.add((number, step.layers))
    assert len(seen) == 10
    assert {layers for _, layers in seen} == {0, 1}


def test_layers_that_every_step_drops_stay_without_adapters() -> None:
    assert BottleneckConfig(drop_range=[1, 3]).drop_layers == 1
    assert BottleneckConfig(drop_range=[1, 3], drop_layers=2).drop_layers == 2


def test_where_nothing_learns_all_layers_have_their_adapters_whatever_was_drawn() -> None:
    model = get_peft_model(tiny("bert"), config_of("pfeiffer", (), drop_range=[0, 1])).train()
    site = next(each for each in model.modules() if isinstance(each, Site))
    model.base_model.model.shared_of_adapters.step.layers = 1
    assert not site.carries("default")
    with torch.no_grad():
        assert site.carries("default")


@pytest.mark.parametrize(("settings", "first"), [
    ({}, 0), ({"drop_layers": 1}, 1), ({"drop_range": [1, 1]}, 1), ({"drop_range": [0, 1], "drop_layers": 1}, 0),
])  # fmt: skip
def test_layers_whose_adapters_may_work_in_some_step(settings: dict[str, Any], first: int) -> None:
    model = get_peft_model(tiny("bert"), config_of("pfeiffer", (), **settings)).train()
    sites = [each for each in model.modules() if isinstance(each, Site)]
    assert [site.index for site in sites if site.may_work] == list(range(first, 2))
