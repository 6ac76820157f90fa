"""A model that is not in the table: what it is told, and that it works once its modules are named."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from components.adapters import places
from components.errors import ConfigError
from tests.adapters.architectures import LAYERS, inputs, tiny
from tests.adapters.sums import check, sums

NAMES: dict[str, Any] = {  # of GPT-Neo, which is not in the table
    "layers": "h",
    "attention": {"entry": "ln_1", "exit": "attn.attention.resid_dropout", "norm": None},
    "output": {"entry": "ln_2", "exit": "mlp.dropout"},
}


def unknown() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 40, "attention_types": [[["global"], 2]]}
    return AutoModel.from_config(AutoConfig.for_model("gpt_neo", **sizes)).eval()


def refusal(model: Any, named: list[dict[str, Any]] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        places.of_model(model, named)
    return str(error.value)


def changed(**fields: Any) -> list[dict[str, Any]]:
    return [{**NAMES, **fields}]


def test_an_unknown_family_is_told_what_the_model_has_and_how_to_name_it() -> None:
    message = refusal(unknown())
    parts = ["among bert, roberta", "family 'gpt_neo'", "nn.ModuleLists h (2)", "below h.0 ln_1, "]
    parts += ["attn.attention.out_proj", "mlp.c_fc", 'BottleneckConfig(places=[{"layers": ', '"attention": {"entry": ']
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message


def test_the_modules_shown_are_a_few() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1) for _ in range(500)]) for _ in range(3)])
    message = refusal(model)
    assert "layers (3), layers.* (500)" in message
    assert "and 460 more" in message


def test_a_model_without_layers_is_refused() -> None:
    assert "no nn.ModuleList" in refusal(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"encoder\.layer"):
        places.layers(nn.Linear(2, 2), places.FAMILIES["bert"])


def test_the_example_in_the_message_is_right() -> None:
    example = eval(places.EXAMPLE, {"BottleneckConfig": lambda places: places})  # noqa: S307  # our own text
    assert places.named(example) == places.FAMILIES["deberta-v2"]  # BERT's modules, its attention not named


def test_an_unknown_family_works_when_its_modules_are_named() -> None:
    model = unknown()
    (stack,) = places.of_model(model, [NAMES])
    found = sums(model, stack, inputs("gpt2"))
    check(found)
    assert len(found) == 2 * LAYERS


def test_named_places_stand_above_the_table() -> None:
    names = {"entry": "attention", "exit": "attention.output.dense", "norm": "attention.output.LayerNorm"}
    output = {"entry": "intermediate", "exit": "output.dense", "norm": "output.LayerNorm"}
    (stack,) = places.of_model(tiny("bert"), [{"layers": "encoder.layer", "attention": names, "output": output}])
    assert (stack.attention.exit, stack.output.exit) == ("attention.output.dense", "output.dense")


def test_cross_attention_can_be_named() -> None:
    decoder = places.FAMILIES["bart"][1]
    as_dicts = {name: asdict(s) for name, s in decoder.sites.items()}
    assert places.of_model(tiny("bart"), [{"layers": "decoder.layers", **as_dicts}]) == (decoder,)


def test_all_wrong_keys_are_told_at_once() -> None:
    wrong: Any = [
        {
            "layer": "h",
            "attention": {"entry": "ln_1", "exits": "attn"},
            "output": {"entry": 3, "exit": "", "norm": None},
        },
        "h",
        changed(cross=None, layers=7)[0],
    ]
    with pytest.raises(ConfigError) as error:
        places.named(wrong)
    assert error.value.found.split("; ") == [
        "places[0]: unknown key 'layer' (near: layers)",
        "places[0]: no 'layers'",
        "places[0].attention: unknown key 'exits' (near: exit)",
        "places[0].attention: no 'exit'",
        "places[0].output.entry: 3 is no path",
        "places[0].output.exit: '' is no path",
        "places[1]: 'h' is no dict",
        "places[2].layers: 7 is no path",
    ]


def test_all_missing_modules_are_told_at_once_with_names_alike() -> None:
    sites = {"attention": {"entry": "ln1", "exit": "attn.c_proj"}, "output": {"entry": "??", "exit": "mlp.drop"}}
    message = refusal(unknown(), changed(**sites))
    parts = [
        "places[0].attention.entry: no 'ln1' below h.0 (near: ln_1",
        "places[0].attention.exit: no 'attn.c_proj' below h.0 (near: mlp.c_proj",
        "places[0].output.entry: no '??' below h.0; ",
        "places[0].output.exit: no 'mlp.drop' below h.0 (near: mlp.dropout",
    ]
    assert [part for part in parts if part not in message] == []
    assert message.count("below") == len(parts)  # once for all layers


def test_a_module_that_only_the_first_layer_has_is_not_enough() -> None:
    model = unknown()
    del model.h[1].ln_2
    assert "output.entry: no 'ln_2' below h.1" in refusal(model, [NAMES])


def test_a_list_of_layers_that_is_not_there_is_told_with_names_alike() -> None:
    wanted = "places[0].layers: 'encoder.layers', not among the nn.ModuleLists encoder.layer (2) (near: encoder.layer)"
    assert wanted in refusal(tiny("bert"), changed(layers="encoder.layers"))


def test_a_list_of_layers_that_could_be_either_of_two_is_refused() -> None:
    assert "several: encoder.layers, decoder.layers" in refusal(tiny("bart"), changed(layers="layers"))
