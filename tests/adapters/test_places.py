"""Where adapters sit: the table of families against what the models compute, and the formulas of the papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from components.adapters import places
from components.config import Bottleneck
from components.errors import ConfigError
from tests.adapters.adapted import FAMILIES, HIDDEN, INPUTS, adapted, classifier, logits, stir
from tests.conftest import make_base


def seen(model: nn.Module, name: str) -> dict[str, Any]:
    """What goes into a module and what comes out, filled by the next forward pass."""
    record: dict[str, Any] = {}

    def look(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        record["inputs"], record["output"] = inputs, output

    model.get_submodule(name).register_forward_hook(look)
    return record


@pytest.mark.parametrize("part", ["attention", "output"])
@pytest.mark.parametrize("family", FAMILIES)
def test_norm_reads_dense_plus_the_input_of_the_sub_layer(tmp_path: Path, family: str, part: str) -> None:
    model, _ = classifier(make_base(tmp_path, family))
    spots = places.of_family(family)
    layer = f"{places.layer_names(model, spots)[0]}."
    dense = seen(model, layer + getattr(spots, f"{part}_dense"))
    norm = seen(model, layer + getattr(spots, f"{part}_norm"))
    whole, attended = seen(model, layer.rstrip(".")), seen(model, layer + spots.attention_norm)
    logits(model)
    residual = whole["inputs"][0] if part == "attention" else attended["output"]
    assert torch.allclose(norm["inputs"][0], dense["output"] + residual, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_in_order(tmp_path: Path, family: str) -> None:
    model, _ = classifier(make_base(tmp_path, family))
    names = places.layer_names(model, places.of_family(family))
    assert [name.rpartition(".")[2] for name in names] == ["0", "1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_positions_as_are_said_can_be_read(tmp_path: Path, family: str) -> None:
    model, _ = classifier(make_base(tmp_path, family, pad_token_id=1))  # as the published models of RoBERTa's kin
    tokens = torch.full((1, places.positions(model.config)), 5)
    with torch.no_grad():
        result = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_position_more_cannot_be_read(tmp_path: Path, family: str) -> None:
    model, _ = classifier(make_base(tmp_path, family, pad_token_id=1))  # as the published models of RoBERTa's kin
    tokens = torch.full((1, places.positions(model.config) + 1), 5)
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))


def test_a_family_without_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bert, roberta.*'gpt2'"):
        places.of_family("gpt2")


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.layer"):
        places.layer_names(nn.Linear(2, 2), places.of_family("bert"))


LAYER = "base_model.model.bert.encoder.layer.1"


def trained(base: Path, method: str) -> PeftModel:
    model = adapted(base, method)
    stir(model)
    return model


def bottleneck(weights: dict[str, Tensor], place: str, x: Tensor) -> Tensor:
    """up(relu(down(x))) in plain torch."""
    prefix = f"{place}.bottleneck_adapters.task"
    down = functional.linear(x, weights[f"{prefix}.down.weight"], weights[f"{prefix}.down.bias"])
    return functional.linear(functional.relu(down), weights[f"{prefix}.up.weight"], weights[f"{prefix}.up.bias"])


@pytest.mark.parametrize("part", ["attention.output", "output"])
def test_houlsby_is_before_the_residual_sum_and_the_trained_norm(tiny_base: Path, part: str) -> None:
    model = trained(tiny_base, "houlsby")
    block = seen(model, f"{LAYER}.{part}")
    with torch.no_grad():
        model(**INPUTS)
    inner, x = block["inputs"]
    weights = model.state_dict()
    dense, norm = f"{LAYER}.{part}.dense", f"{LAYER}.{part}.LayerNorm.modules_to_save.task"
    h = functional.linear(inner, weights[f"{dense}.base_layer.weight"], weights[f"{dense}.base_layer.bias"])
    total = h + bottleneck(weights, dense, h) + x
    wanted = functional.layer_norm(total, (HIDDEN,), weights[f"{norm}.weight"], weights[f"{norm}.bias"], 1e-12)
    assert torch.allclose(block["output"], wanted, atol=1e-6)


def test_pfeiffer_reads_the_norm_and_is_added_to_the_residual_sum(tiny_base: Path) -> None:
    model = trained(tiny_base, "pfeiffer")
    block = seen(model, f"{LAYER}.output")
    with torch.no_grad():
        model(**INPUTS)
    inner, x = block["inputs"]
    weights = model.state_dict()
    dense, norm = f"{LAYER}.output.dense", f"{LAYER}.output.LayerNorm"

    def normed(s: Tensor) -> Tensor:
        scale, shift = weights[f"{norm}.base_layer.weight"], weights[f"{norm}.base_layer.bias"]
        return functional.layer_norm(s, (HIDDEN,), scale, shift, 1e-12)

    s = functional.linear(inner, weights[f"{dense}.weight"], weights[f"{dense}.bias"]) + x
    assert torch.allclose(block["output"], normed(s + bottleneck(weights, norm, normed(s))), atol=1e-6)


def test_pfeiffer_leaves_attention_alone(tiny_base: Path) -> None:
    model = trained(tiny_base, "pfeiffer")
    first = seen(model, "base_model.model.bert.encoder.layer.0.attention")
    with torch.no_grad():
        model(**INPUTS)
        adapted_output = first["output"][0]
        with model.disable_adapter():
            model(**INPUTS)
    assert torch.equal(adapted_output, first["output"][0])


def test_all_that_does_not_fit_is_told_at_once(tiny_base: Path) -> None:
    problems = places.misfits(tiny_base, Bottleneck(reduction_factor=99, leave_out=(0, 5)), 1_000)
    assert [problem.split(":")[0] for problem in problems] == [
        "adapter.bottleneck.reduction_factor",
        "adapter.bottleneck.leave_out",
        "training.max_tokens",
    ]
    assert places.misfits(tiny_base, Bottleneck(leave_out=(0,)), 64) == []


def test_an_unknown_family_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (problem,) = places.misfits(tmp_path, Bottleneck(), 64)
    assert "family 'gpt2'" in problem
