"""The table of families against what the models compute: each row's sums are the sums that the model makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    T5EncoderModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from components.adapters import places
from components.config import Bottleneck
from components.errors import ConfigError
from tests.adapters.architectures import FAMILIES, LAYERS, POSITIONS, SEQ2SEQ, inputs, tiny
from tests.adapters.sums import check, sums

TABLES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "mpnet", "albert", "gpt2", "bart", "marian")
ROTARY = ("modernbert", "llama", "qwen2", "qwen3")
LATE_DROPOUT = ("bart", "marian", "vit")  # drop out after the last module of their own that computes h

every_family = pytest.mark.parametrize("family", FAMILIES)


ROWS = [(family, index) for family, stacks in places.FAMILIES.items() for index in range(len(stacks))]
every_row = pytest.mark.parametrize(("family", "index"), ROWS)


def test_there_is_a_tiny_model_of_every_family() -> None:
    assert set(FAMILIES) == set(places.FAMILIES)


@every_row
def test_each_sum_is_h_plus_x_and_goes_on_as_the_next_x(family: str, index: int) -> None:
    model = tiny(family)
    check(sums(model, places.of_model(model)[index], inputs(family)))


@every_row
def test_sub_layers_are_met_once_a_layer_and_in_order(family: str, index: int) -> None:
    model = tiny(family)
    stack = places.of_model(model)[index]
    names = [name for name, _ in places.layers(model, (stack,))] * (LAYERS if family == "albert" else 1)
    found = sums(model, stack, inputs(family))
    assert [(one.layer, one.site) for one in found] == [(name, site) for name in names for site in stack.sites]


@pytest.mark.parametrize(("family", "index"), [row for row in ROWS if row[0] not in LATE_DROPOUT])
def test_h_is_computed_after_dropout(family: str, index: int) -> None:
    model = tiny(family, **({"attention_dropout": 0.5} if family == "modernbert" else {}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    torch.manual_seed(0)
    check(sums(model.train(), places.of_model(model)[index], inputs(family)))


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
def test_x_and_h_are_of_one_chunk_where_the_feed_forward_is_chunked(family: str) -> None:
    model = tiny(family, chunk_size_feed_forward=1)
    (stack,) = places.of_model(model)
    found = [one for one in sums(model, stack, inputs(family)) if one.site == "output"]
    assert {one.x.shape[1] for one in found} == {one.h.shape[1] for one in found if one.h is not None} == {1}


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_layers_are_counted_from_the_encoder_to_the_decoder(family: str) -> None:
    model = tiny(family)
    found = [(name, stack.cross is not None) for name, stack in places.layers(model, places.of_model(model))]
    kind = "block" if family == "t5" else "layers"
    assert found == [
        (f"{part}.{kind}.{i}", part == "decoder") for part in ("encoder", "decoder") for i in range(LAYERS)
    ]


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*SEQ2SEQ, "albert"}))
def test_layers_are_found_in_order(family: str) -> None:
    model = tiny(family, num_hidden_layers=12)  # ten and more: the order is not that of the names
    names = [name for name, _ in places.layers(model, places.of_model(model))]
    assert [int(name.rpartition(".")[2]) for name in names] == list(range(12))


def test_layers_are_found_below_a_head() -> None:
    model = AutoModelForSequenceClassification.from_config(tiny("bert").config)
    names = [name for name, _ in places.layers(model, places.of_model(model))]
    assert names == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def test_layers_of_both_stacks_are_found_below_a_head() -> None:
    model = AutoModelForSeq2SeqLM.from_config(tiny("bart").config)
    assert places.layers(model, places.of_model(model))[2][0] == "model.decoder.layers.0"


def test_albert_has_the_layers_of_all_its_groups() -> None:
    model = tiny("albert", num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2)
    names = [name for name, _ in places.layers(model, places.of_model(model))]
    groups = "encoder.albert_layer_groups"
    assert names == [f"{groups}.{group}.albert_layers.{layer}" for group in (0, 1) for layer in (0, 1)]


def test_a_model_with_one_of_two_stacks_has_the_places_of_that_one() -> None:
    model = T5EncoderModel(tiny("t5").config)
    assert places.of_model(model) == places.FAMILIES["t5"][:1]


# --- attention

OWN_ATTENTION = ("deberta-v2", "mpnet")


def attended(model: Any, batch: dict[str, Tensor]) -> set[str]:
    """Names of the modules that call transformers' attention function."""
    names = {module: name for name, module in model.named_modules()}
    seen: set[str] = set()

    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.add(names[module])
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("watched", watched)
    AttentionMaskInterface.register("watched", sdpa_mask)
    model.set_attn_implementation("watched")
    with torch.no_grad():
        model(**batch)
    return seen


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OWN_ATTENTION])
def test_the_modules_that_attend_call_the_attention_function(family: str) -> None:
    model = tiny(family)
    found = places.attentions(model, places.of_model(model))
    assert {name for part in found.values() for _, name in part} == attended(model, inputs(family))


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_attention_by_code_of_its_own_is_told(family: str) -> None:
    model = tiny(family)
    assert attended(model, inputs(family)) == set()
    with pytest.raises(ConfigError, match="prefixes"):
        places.attentions(model, places.of_model(model))


def test_attention_is_sorted_by_what_it_attends_to() -> None:
    model = tiny("t5")
    found = places.attentions(model, places.of_model(model))
    assert {part: [index for index, _ in modules] for part, modules in found.items()} == {
        "self_0": [0, 1],
        "self_1": [2, 3],
        "cross_1": [2, 3],
    }


# --- positions

WITH_PADS = [(family, {}) for family in TABLES] + [
    ("roberta", {"pad_token_id": 1}),
    ("xlm-roberta", {"pad_token_id": 3}),
]


def read(model: Any, count: int) -> Tensor:
    tokens = torch.full((1, count), 5)
    decoder = {"decoder_input_ids": tokens[:, :2]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **decoder).last_hidden_state
    return result


@pytest.mark.parametrize(("family", "settings"), WITH_PADS)
def test_as_many_positions_as_are_said_can_be_read(family: str, settings: dict[str, int]) -> None:
    model = tiny(family, **settings)
    assert torch.isfinite(read(model, places.positions(model.config))).all()


@pytest.mark.parametrize(("family", "settings"), WITH_PADS)
def test_one_position_more_cannot_be_read(family: str, settings: dict[str, int]) -> None:
    model = tiny(family, **settings)
    with pytest.raises((IndexError, RuntimeError)):
        read(model, places.positions(model.config) + 1)


@pytest.mark.parametrize("family", ["t5", "deberta-v2"])
def test_relative_positions_have_no_end(family: str) -> None:
    model = tiny(family)
    assert places.positions(model.config) > 1_000_000
    assert torch.isfinite(read(model, 10 * POSITIONS)).all()


def test_deberta_with_a_table_of_positions_ends_with_it() -> None:
    model = tiny("deberta-v2", position_biased_input=True)
    assert torch.isfinite(read(model, places.positions(model.config))).all()
    with pytest.raises((IndexError, RuntimeError)):
        read(model, places.positions(model.config) + 1)


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_positions_end_where_training_did(family: str) -> None:
    assert places.positions(tiny(family).config) == POSITIONS


@pytest.mark.parametrize("size", [8, (12, 4)])
def test_positions_of_an_image_are_its_patches_and_the_class_token(size: int | tuple[int, int]) -> None:
    model = tiny("vit", image_size=size)
    height, width = size if isinstance(size, tuple) else (size, size)
    with torch.no_grad():
        read = model(pixel_values=torch.zeros(1, 3, height, width)).last_hidden_state
    assert read.shape[1] == places.positions(model.config)


# --- misfits


def test_all_that_does_not_fit_is_told_at_once(tiny_base: Path) -> None:
    problems = places.misfits(tiny_base, Bottleneck(reduction_factor=99, leave_out=(0, 5)), 1_000)
    assert [problem.split(":")[0] for problem in problems] == [
        "adapter.bottleneck.reduction_factor",
        "adapter.bottleneck.leave_out",
        "training.max_tokens",
    ]
    assert places.misfits(tiny_base, Bottleneck(leave_out=(0,)), 64) == []


@every_family
def test_a_fitting_adapter_has_no_misfits(tmp_path: Path, family: str) -> None:
    tiny(family).config.save_pretrained(tmp_path)
    assert places.misfits(tmp_path, Bottleneck(), max_tokens=5) == []


@pytest.mark.parametrize(("family", "count"), [("bert", 2), ("t5", 4), ("bart", 4), ("albert", 1)])
def test_layers_to_leave_out_are_counted_over_all_stacks(tmp_path: Path, family: str, count: int) -> None:
    tiny(family).config.save_pretrained(tmp_path)
    assert places.misfits(tmp_path, Bottleneck(leave_out=tuple(range(count - 1))), 8) == []
    for leave_out in (tuple(range(count)), (count,)):
        (problem,) = places.misfits(tmp_path, Bottleneck(leave_out=leave_out), 8)
        assert f"some of the layers 0 to {count - 1}" in problem


@pytest.mark.parametrize("dropped", [{"drop_layers": 2}, {"drop_layers": 1}, {"drop_range": (0, 1)}])
def test_some_layer_keeps_its_adapter(tmp_path: Path, dropped: dict[str, Any]) -> None:
    tiny("bert").config.save_pretrained(tmp_path)
    (problem,) = places.misfits(tmp_path, Bottleneck(leave_out=(1,), **dropped), 8)
    assert "at most 0: the last layer keeps its adapter" in problem
    assert places.misfits(tmp_path, Bottleneck(drop_layers=1, drop_range=(0, 1)), 8) == []


def test_reduction_factors_by_layer_fit_layers_and_size(tmp_path: Path) -> None:
    tiny("bert").config.save_pretrained(tmp_path)
    assert places.misfits(tmp_path, Bottleneck(reduction_factor={"1": 16, "default": 2}), 8) == []
    assert places.misfits(tmp_path, Bottleneck(reduction_factor={"2": 4, "default": 17}), 8) == [
        "adapter.bottleneck.reduction_factor: for layer 2, some of the layers 0 to 1",
        "adapter.bottleneck.reduction_factor: 17, at most the hidden size, 16",
    ]


def test_an_unknown_family_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neo"}')
    (problem,) = places.misfits(tmp_path, Bottleneck(), 64)
    assert "family 'gpt_neo'" in problem
