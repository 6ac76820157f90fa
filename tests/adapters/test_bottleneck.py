"""What any adapter must be, whatever the family: nothing at first, apart from the base, saved and loaded whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from components.adapters.config import METHODS
from components.adapters.places import of_family
from components.errors import ConfigError
from tests.adapters.adapted import FAMILIES, HIDDEN, adapted, classifier, logits, stir
from tests.conftest import make_base

LAYERS = 2
Bases = Callable[[str], Path]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = make_base(tmp_path_factory.mktemp(family), family)
        return made[family]

    return base


every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)


@every_family
@every_method
def test_starts_as_the_base(base_of: Bases, family: str, method: str) -> None:
    base = logits(classifier(base_of(family))[0])
    assert torch.equal(logits(adapted(base_of(family), method)), base)


@every_family
@every_method
def test_trained_weights_change_the_output(base_of: Bases, family: str, method: str) -> None:
    model = adapted(base_of(family), method)
    before = logits(model)
    stir(model)
    assert not torch.allclose(logits(model), before, atol=1e-3)


@every_family
@every_method
def test_bottlenecks_alone_change_the_output(base_of: Bases, family: str, method: str) -> None:
    model = adapted(base_of(family), method)
    before = logits(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name:
                parameter.normal_()
    assert not torch.allclose(logits(model), before, atol=1e-4)


@every_family
@every_method
def test_disabled_is_the_base(base_of: Bases, family: str, method: str) -> None:
    base = logits(classifier(base_of(family))[0])
    model = adapted(base_of(family), method)
    stir(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@every_family
@every_method
def test_enabled_again_after_being_disabled(base_of: Bases, family: str, method: str) -> None:
    model = adapted(base_of(family), method)
    stir(model)
    before = logits(model)
    with model.disable_adapter():
        logits(model)
    assert torch.equal(logits(model), before)


@every_family
@every_method
def test_saved_and_loaded_predicts_the_same(base_of: Bases, tmp_path: Path, family: str, method: str) -> None:
    model = adapted(base_of(family), method)
    stir(model)
    model.save_pretrained(tmp_path)
    other_head, _ = classifier(base_of(family), seed=99)
    loaded = PeftModel.from_pretrained(other_head, tmp_path / "task", adapter_name="task").eval()
    assert torch.equal(logits(loaded), logits(model))


def expected_names(base: Path, method: str, layers: range) -> set[str]:
    """Names of the parameters that a method trains in these layers, spelt out from its definition."""
    model, head = classifier(base)
    places = of_family(str(model.config.model_type))
    root = f"base_model.model.{model.base_model_prefix}.{places.layers}"
    bottleneck = ("down.weight", "down.bias", "up.weight", "up.bias")
    wrapped = {"pfeiffer": (places.output_norm,), "houlsby": (places.attention_dense, places.output_dense)}[method]
    norms = {"pfeiffer": (), "houlsby": (places.attention_norm, places.output_norm)}[method]
    names = {f"base_model.model.{name}.modules_to_save.task.{end}" for name in head for end in ("weight", "bias")}
    for layer in layers:
        names |= {f"{root}.{layer}.{place}.bottleneck_adapters.task.{end}" for place in wrapped for end in bottleneck}
        names |= {f"{root}.{layer}.{norm}.modules_to_save.task.{end}" for norm in norms for end in ("weight", "bias")}
    return names


@every_family
@every_method
def test_trains_what_the_method_says_and_no_more(base_of: Bases, family: str, method: str) -> None:
    model = adapted(base_of(family), method)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == expected_names(base_of(family), method, range(LAYERS))


@every_family
@every_method
def test_a_layer_left_out_carries_nothing(base_of: Bases, family: str, method: str) -> None:
    model = adapted(base_of(family), method, leave_out=[0])
    added = {name for name, _ in model.named_parameters() if ".task." in name}
    assert added == expected_names(base_of(family), method, range(1, LAYERS))


@every_method
def test_layers_left_out_of_a_deep_model_carry_nothing(tmp_path: Path, method: str) -> None:
    """PEFT rewrites lists of twenty and more module names: the places must survive that."""
    base = make_base(tmp_path, num_hidden_layers=14)
    model = adapted(base, method, leave_out=[0, 1, 12])
    layers = {
        int(name.split(".layer.")[1].split(".")[0])
        for name, _ in model.named_parameters()
        if ".task." in name and ".layer." in name
    }
    assert layers == {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13}


@every_method
def test_a_deep_model_trains_what_the_method_says(tmp_path: Path, method: str) -> None:
    base = make_base(tmp_path, num_hidden_layers=12)
    trained = {name for name, parameter in adapted(base, method).named_parameters() if parameter.requires_grad}
    assert trained == expected_names(base, method, range(12))


@every_family
@pytest.mark.parametrize("reduction", [1, 3, 4, 32])
@every_method
def test_parameter_count(base_of: Bases, family: str, method: str, reduction: int) -> None:
    model = adapted(base_of(family), method, reduction_factor=reduction)
    _, names = classifier(base_of(family))
    head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and any(f".{m}." in n for m in names))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    size = HIDDEN // reduction
    bottleneck = 2 * HIDDEN * size + HIDDEN + size
    assert trained - head == LAYERS * {"pfeiffer": bottleneck, "houlsby": 2 * bottleneck + 4 * HIDDEN}[method]


@pytest.mark.parametrize("reduction", [33, 64.0, 0, -4])
def test_impossible_reduction_factor(tiny_base: Path, reduction: float) -> None:
    with pytest.raises(ConfigError, match="reduction factor"):
        adapted(tiny_base, "pfeiffer", reduction_factor=reduction)


@pytest.mark.parametrize("leave_out", [[2], [-1], [0, 1], [0, 7]])
def test_impossible_layers_to_leave_out(tiny_base: Path, leave_out: list[int]) -> None:
    with pytest.raises(ConfigError, match="leave out among 0 to 1"):
        adapted(tiny_base, "houlsby", leave_out=leave_out)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh", "leakyrelu"])
def test_every_declared_non_linearity_works(tiny_base: Path, name: str) -> None:
    model = adapted(tiny_base, "pfeiffer", non_linearity=name)
    stir(model)
    assert torch.isfinite(logits(model)).all()


def test_dropout_acts_only_while_training(tiny_base: Path) -> None:
    model = adapted(tiny_base, "pfeiffer", dropout=0.5)
    stir(model)
    assert torch.equal(logits(model), logits(model))
