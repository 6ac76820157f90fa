"""Variants of Compacter and of prefixes: a fresh one is the base; saved and loaded, or copied, it is the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from components.adapters import METHODS
from components.errors import ConfigError
from tests.adapters.architectures import inputs, tiny

PHM: list[dict[str, Any]] = [
    {"shared_phm_rule": False},
    {"factorized_phm_rule": True},
    {"shared_phm_rule": False, "factorized_phm_rule": True},
    {"learn_phm": False},
    {"shared_W_phm": True},
    {"shared_W_phm": True, "factorized_phm_W": False},
    {"factorized_phm_W": False},
    {"phm_rank": 2},
]
every_phm = pytest.mark.parametrize("settings", PHM, ids=str)


def compacter(**settings: Any) -> PeftModel:
    torch.manual_seed(1)
    config = METHODS["compacter"](**{"reduction_factor": 4, **settings})
    return get_peft_model(tiny("bert"), config, "task").eval()


def stir(model: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bottleneck_" in name:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=draw))


@torch.no_grad()
def hidden(model: torch.nn.Module, family: str = "bert") -> torch.Tensor:
    found: torch.Tensor = model(**inputs(family)).last_hidden_state
    return found


@every_phm
def test_compacter_starts_as_the_base(settings: dict[str, Any]) -> None:
    assert torch.equal(hidden(compacter(**settings)), hidden(tiny("bert")))


@every_phm
def test_compacter_saved_and_loaded_is_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    model = compacter(**settings)
    stir(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path / "task", adapter_name="other").eval()
    assert torch.equal(hidden(loaded), hidden(model))


@every_phm
def test_a_copy_of_compacter_shares_nothing_with_it(settings: dict[str, Any]) -> None:
    model = compacter(**settings)
    before = hidden(model)
    twin = copy.deepcopy(model)
    stir(twin)
    assert torch.equal(hidden(model), before)
    assert not torch.allclose(hidden(twin), before, atol=1e-3)


def test_factors_that_are_not_learned_are_no_parameters() -> None:
    learned = {name for name, _ in compacter().named_parameters() if name.endswith("rule.factors")}
    fixed = {name for name, _ in compacter(learn_phm=False).named_parameters() if name.endswith("rule.factors")}
    assert (len(learned), len(fixed)) == (1, 0)


def test_factors_of_all_layers_have_one_size() -> None:
    with pytest.raises(ConfigError, match="shared_W_phm"):
        compacter(shared_W_phm=True, reduction_factor={"0": 2, "default": 4})


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, {"self_0", "self_1", "cross_1"}),
        ({"encoder_prefix": False}, {"self_1", "cross_1"}),
        ({"cross_prefix": False}, {"self_0", "self_1"}),
    ],
)
def test_prefixes_are_where_they_are_wanted(settings: dict[str, Any], kinds: set[str]) -> None:
    config = METHODS["mam"](reduction_factor=4, prefix_length=3, prefix_bottleneck=4, **settings)
    names = [name for name, _ in get_peft_model(tiny("bart"), config, "task").named_parameters()]
    assert {name.split(".bottleneck_parts.task.")[1].split(".")[0] for name in names if "_parts." in name} == kinds


def test_an_only_stack_keeps_its_prefixes() -> None:
    config = METHODS["mam"](reduction_factor=4, prefix_length=3, prefix_bottleneck=4, encoder_prefix=False)
    model = get_peft_model(tiny("bert"), config, "task")
    assert any(".bottleneck_parts.task.self_0." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("family", "differs"), [("t5", True), ("bart", False)])
def test_prefixes_may_take_positions_in_t5(family: str, differs: bool) -> None:
    """The other families have no positions in attention that they could take."""
    found = []
    for positions in (False, True):
        torch.manual_seed(1)
        config = METHODS["mam"](reduction_factor=4, prefix_length=3, prefix_bottleneck=4, prefix_positions=positions)
        found.append(hidden(get_peft_model(tiny(family), config, "task").eval(), family))
    assert torch.allclose(*found, atol=1e-4) != differs
