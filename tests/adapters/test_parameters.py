"""What is trained, by kind, and what is in training mode: alike for every method."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

from components.adapters.methods import peft_config
from components.adapters.parameters import trainable_groups, training_mode
from components.methods import SECTIONS, AdapterMethod, settings_of
from tests.adapters.adapted import classifier

ADAPTERS: tuple[str, ...] = get_args(AdapterMethod)
# A part of the name of everything that a method adds to the base.
MARKS = {"lora": "lora_", "ia3": "ia3_", "prefix": "prompt_encoder", "bitfit": "bitfit_"}


def adapted(base: Path, method: str, **settings: object) -> PeftModel:
    small = {"reduction_factor": 4} if SECTIONS.get(method) == "bottleneck" else {}
    model, head = classifier(base)
    config = peft_config(method, settings_of(method, **{**small, **settings}), list(head), model)
    return get_peft_model(model, config, adapter_name="task")


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_trained_parameter_is_in_one_group(tiny_base: Path, method: str) -> None:
    model = adapted(tiny_base, method)
    grouped = [name for members in trainable_groups(model).values() for name, _ in members]
    assert sorted(grouped) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("method", ADAPTERS)
def test_what_a_method_adds_is_the_body_and_the_classifier_the_head(tiny_base: Path, method: str) -> None:
    groups = trainable_groups(adapted(tiny_base, method))
    assert all(MARKS.get(method, "bottleneck_") in name for name, _ in groups["body"])
    assert bool(groups["body"]) == (method != "head")
    assert {name.split(".modules_to_save.")[0].split(".")[-1] for name, _ in groups["head"]} == {"classifier"}


@pytest.mark.parametrize("method", ADAPTERS)
def test_houlsby_alone_trains_layer_norms_of_the_base(tiny_base: Path, method: str) -> None:
    norms = trainable_groups(adapted(tiny_base, method))["layer_norm"]
    assert bool(norms) == (method == "houlsby")
    assert all(".LayerNorm.modules_to_save.task." in name for name, _ in norms)


def test_a_layer_norm_of_the_adapter_is_of_its_body(tiny_base: Path) -> None:
    groups = trainable_groups(adapted(tiny_base, "pfeiffer", ln_before=True))
    assert groups["layer_norm"] == []
    assert any("ln_before" in name for name, _ in groups["body"])


@pytest.mark.parametrize("method", ADAPTERS)
def test_only_what_adapters_brought_is_in_training_mode(tiny_base: Path, method: str) -> None:
    model = adapted(tiny_base, method)
    training_mode(model)
    training = {name for name, module in model.named_modules() if module.training and not list(module.children())}
    assert all(MARKS.get(method, "bottleneck_") in name for name in training)


@pytest.mark.parametrize(("method", "own"), [("lora", "lora_dropout"), ("pfeiffer", "bottleneck_adapters")])
def test_dropout_of_the_adapter_acts_and_that_of_the_base_does_not(tiny_base: Path, method: str, own: str) -> None:
    model = adapted(tiny_base, method, dropout=0.3)
    training_mode(model)
    acting = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.training]
    assert acting
    assert all(f".{own}." in name for name in acting)


def test_without_adapter_all_is_in_training_mode(tiny_base: Path) -> None:
    model, _ = classifier(tiny_base)
    training_mode(model)
    assert all(module.training for module in model.modules())
