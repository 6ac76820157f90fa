"""Batches of many adapters: what is frozen runs once, adapters of one form at once, and none where it was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from components.adapters import stacked
from components.adapters.drop import drop
from components.adapters.layer import Site
from components.adapters.together import answers
from tests.adapters.adapted import config_of, stir
from tests.adapters.architectures import tiny

ROWS = 12
ALIKE = ("pfeiffer", "houlsby", "parallel", "adapter-plus", "compacter", "masked")


def many(family: str, methods: Sequence[str], **settings: Any) -> tuple[PeftModel, list[str]]:
    """A model with an adapter of random weights for each method, and their names."""
    torch.manual_seed(0)
    names = [f"t_{number}" for number in range(len(methods))]
    model = get_peft_model(tiny(family), config_of(methods[0], (), **settings), adapter_name=names[0])
    for name, method in zip(names[1:], methods[1:], strict=True):
        model.add_adapter(name, config_of(method, (), **settings))
    for seed, name in enumerate(names):
        stir(model, name, seed)
    return model.eval(), names


def batch(rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Rows of unequal length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (rows, 1), generator=generator)
    return {
        "input_ids": torch.randint(4, 40, (rows, 9), generator=generator),
        "attention_mask": (torch.arange(9) < lengths).long(),
    }


@torch.no_grad()
def hidden(model: Any, **more: Any) -> torch.Tensor:
    output: torch.Tensor = model(**batch(), **more).last_hidden_state
    return output


def alone(model: PeftModel, names: Sequence[str]) -> torch.Tensor:
    """Each row by its adapter, which is the only one in its pass."""
    passes = {}
    for name in dict.fromkeys(names):
        model.set_adapter(name)
        passes[name] = hidden(model)
    return torch.stack([passes[name][row] for row, name in enumerate(names)])


def spread(names: Sequence[str]) -> dict[str, list[str]]:
    """Ways to lay adapters over the rows: each in turn, in equal runs, in unequal ones."""
    runs = [name for name in names for _ in range(ROWS // len(names))]
    return {"turns": [names[row % len(names)] for row in range(ROWS)], "runs": runs,
            "unequal": [names[0]] * (ROWS - len(names) + 1) + list(names[1:])}  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "distilbert"])
@pytest.mark.parametrize("method", ALIKE)
def test_adapters_of_one_form_answer_as_each_alone(family: str, method: str) -> None:
    model, names = many(family, [method] * 4)
    for way, laid in spread(names).items():
        assert torch.allclose(hidden(model, adapter_names=laid), alone(model, laid), atol=1e-5), way


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling": "learned"},
        {"scaling": 0.5},
        {"use_gating": True},
        {"ln_before": True},
        {"ln_after": True},
        {"residual_before_ln": "post_add"},
        {"train_layer_norm": True},
        {"non_linearity": "gelu"},
    ],
)
def test_whatever_an_adapter_consists_of(settings: dict[str, Any]) -> None:
    model, names = many("bert", ["pfeiffer"] * 3, **settings)
    laid = spread(names)["unequal"]
    assert torch.allclose(hidden(model, adapter_names=laid), alone(model, laid), atol=1e-5)


def test_unequal_ones_stand_beside_those_of_one_form() -> None:
    model, names = many("bert", ["pfeiffer", "pfeiffer", "parallel", "houlsby"])
    model.add_adapter("small", config_of("pfeiffer", (), reduction_factor=8))
    stir(model.eval(), "small", 9)
    laid = [*names, "small", "__base__"] * 2
    with model.disable_adapter():
        base = hidden(model)
    expected = alone(model, [name if name != "__base__" else "small" for name in laid])
    expected[[5, 11]] = base[[5, 11]]
    assert torch.allclose(hidden(model, adapter_names=laid), expected, atol=1e-5)


def counted(model: nn.Module, kind: type[nn.Module]) -> dict[str, list[int]]:
    """From now on, the rows that each module of the frozen base reads, a number for each call."""
    calls: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if type(module) is kind and "bottleneck_" not in name:
            seen = calls.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
    return calls


def test_frozen_matrices_are_passed_once_by_all_rows() -> None:
    model, names = many("bert", ["pfeiffer", "pfeiffer", "pfeiffer", "houlsby"])
    calls = counted(model, nn.Linear)
    hidden(model, adapter_names=spread(names)["turns"])
    encoder = {name: seen for name, seen in calls.items() if "encoder" in name}
    assert len(encoder) == 12
    assert {tuple(seen) for seen in encoder.values()} == {(ROWS,)}


def test_adapters_of_one_form_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, names = many("bert", ["pfeiffer"] * 6)
    rows = []
    plain = stacked.output
    monkeypatch.setattr(stacked, "output", lambda parts, *rest: rows.append(len(parts)) or plain(parts, *rest))
    monkeypatch.setattr(Site, "_output", lambda *_: pytest.fail("one alone"))
    hidden(model, adapter_names=spread(names)["turns"])
    assert rows == [ROWS, ROWS]  # of two layers


def spoilt(model: PeftModel, name: str, layers: int) -> None:
    """Whatever of an adapter in the first layers is computed makes its rows NaN."""
    with torch.no_grad():
        for site in model.modules():
            if isinstance(site, Site) and site.index < layers:
                for parameter in site.bottleneck_adapters[name].parameters():
                    parameter.fill_(torch.nan)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method", ["pfeiffer", "houlsby", "parallel"])
def test_a_dropped_layer_is_not_computed_for_the_adapter_that_dropped_it(family: str, method: str) -> None:
    model, names = many(family, [method] * 3)
    laid = spread(names)["turns"]
    untouched = hidden(model, adapter_names=laid)
    drop(model, 1, names[1])
    expected = alone(model, laid)
    spoilt(model, names[1], 1)
    mixed = hidden(model, adapter_names=laid)
    assert torch.allclose(mixed, expected, atol=1e-5)
    others = [row for row, name in enumerate(laid) if name != names[1]]
    assert torch.allclose(mixed[others], untouched[others], atol=1e-6)
    assert not torch.allclose(mixed, untouched, atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_layers_that_all_have_dropped_are_computed_once_for_all(family: str) -> None:
    model, names = many(family, ["pfeiffer"] * 3)
    for name in names:
        drop(model, 1, name)
        spoilt(model, name, 1)
    expected = {name: alone(model, [name] * ROWS) for name in names}
    kind = nn.Linear if family == "bert" else type(model.base_model.model.h[0].attn.c_attn)
    calls = counted(model, kind)
    with torch.no_grad():
        found = answers(model, names, **batch())
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in names)
    first, second = ([seen for name, seen in calls.items() if f".{layer}." in name] for layer in (0, 1))
    assert {tuple(seen) for seen in first} == {(ROWS,)}
    assert {tuple(seen) for seen in second} == {(3 * ROWS,)}


@pytest.mark.parametrize("rows", [7, 8, 9])
def test_a_table_with_as_many_rows_as_all_inputs_is_none_of_them(rows: int) -> None:
    """DeBERTa's of distances: 16 rows, as 8 texts for two adapters."""
    model, names = many("deberta-v2", ["pfeiffer"] * 2, leave_out=[0])
    with torch.no_grad():
        found = answers(model, names, **batch(rows))
        for name in names:
            model.set_adapter(name)
            assert torch.allclose(found[name], model(**batch(rows)).last_hidden_state, atol=1e-5)
