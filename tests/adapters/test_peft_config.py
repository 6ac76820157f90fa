"""A method's name and settings as a PEFT config: on which bases, and what a bundle may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import get_peft_model

from components.adapters import bitfit
from components.adapters.config import METHODS, BottleneckConfig
from components.adapters.methods import IA3_FEEDFORWARD, LORA, PREFIX, load_config, misfits, peft_config
from components.errors import BundleError, ConfigError
from components.methods import SECTIONS, AdapterMethod, Bottleneck, settings_of
from tests.adapters.adapted import INPUTS, classifier
from tests.adapters.architectures import FAMILIES, inputs, tiny
from tests.conftest import make_base

ADAPTERS: tuple[str, ...] = get_args(AdapterMethod)


def trained_on(family: str, method: str) -> set[str]:
    """Names of the base's modules that the method works on."""
    model = tiny(family)
    adapted = get_peft_model(model, peft_config(method, settings_of(method), [], model), adapter_name="task")
    names = (name for name, parameter in adapted.named_parameters() if parameter.requires_grad)
    return {name.removeprefix("base_model.model.").split(".lora_")[0].split(".ia3_")[0] for name in names}


def test_every_bottleneck_method_can_be_named_and_only_those_read_that_section() -> None:
    assert {method for method, section in SECTIONS.items() if section == "bottleneck"} == set(METHODS)
    assert set(SECTIONS) - {"fusion"} <= set(ADAPTERS)  # which flows.fuse alone trains


def test_every_setting_of_a_bottleneck_is_one_of_its_peft_config() -> None:
    read_by_the_job = {"drop_margin"}
    assert set(Bottleneck.model_fields) - read_by_the_job <= set(BottleneckConfig.__dataclass_fields__)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_set_is_as_the_method_has_it(method: str) -> None:
    model: Any = tiny("bert")
    assert peft_config(method, settings_of(method), ["head"], model) == METHODS[method](modules_to_save=["head"])


def test_what_is_set_arrives() -> None:
    settings = settings_of("pfeiffer", reduction_factor={"0": 2, "default": 8}, leave_out=[1], scaling="learned")
    model: Any = tiny("bert")
    config = peft_config("pfeiffer", settings, [], model)
    assert (config.reduction_factor, config.leave_out, config.scaling) == ({"0": 2, "default": 8}, [1], "learned")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_every_layer_of_every_family_is_adapted_and_answers(family: str, method: str) -> None:
    model = tiny(family)
    layers = {".".join(name.split(".")[:-1]) for name in trained_on(family, method)}
    assert len(layers) >= getattr(model.config, "num_hidden_layers", 2) or family == "albert"  # shares its layers
    adapted = get_peft_model(model, peft_config(method, settings_of(method), [], model), adapter_name="task")
    adapted(**inputs(family)).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_leaves_keys_alone_where_they_are_apart(family: str) -> None:
    ends = {name.split(".")[-1] for name in trained_on(family, "lora")}
    assert not ends & {"key", "k", "k_proj", "k_lin", "key_proj"}
    assert len(ends) == 2 or ends in ({"c_attn"}, {"Wqkv"})


def test_ia3_rescales_the_inner_activations_in_every_family_it_knows() -> None:
    for family in FAMILIES:
        assert IA3_FEEDFORWARD[family], family


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix"])
def test_an_unknown_family_is_refused(method: str) -> None:
    class Strange:
        class config:  # noqa: N801  # as transformers calls it
            model_type = "strange"

    model: Any = Strange()
    with pytest.raises(ConfigError, match=r"family 'strange'; choose"):
        peft_config(method, settings_of(method), [], model)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_prefixes_change_the_answer_and_learn(tmp_path: Path, family: str) -> None:
    model, head = classifier(make_base(tmp_path, family))
    before = model(**INPUTS).logits.detach()
    adapted = get_peft_model(model, peft_config("prefix", settings_of("prefix"), list(head), model), "task").eval()
    after = adapted(**INPUTS).logits
    assert not torch.allclose(after, before, atol=1e-4)
    after.sum().backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    assert any("prompt_encoder" in name for name in trained)


@pytest.mark.parametrize("method", ADAPTERS)
def test_what_fits_has_no_misfits(tiny_base: Path, method: str) -> None:
    small = {"reduction_factor": 2} if SECTIONS.get(method) == "bottleneck" else {}
    assert misfits(tiny_base, method, settings_of(method, **small), 32) == []


@pytest.mark.parametrize(
    ("method", "settings", "tokens", "said"),
    [
        ("pfeiffer", {"reduction_factor": 99}, 32, "adapter.bottleneck.reduction_factor: 99"),
        ("adapter-plus", {}, 32, "hidden size, 32, found 96"),
        ("pfeiffer", {"residual_before_ln": "post_add", "original_ln_before": False}, 32, "post_add without"),
        ("lora", {}, 71, "training.max_tokens: 71, at most the base's 70"),
        ("prefix", {"length": 30}, 41, "training.max_tokens: 41 beside 30 of the prefix, at most the base's 70"),
    ],
)
def test_misfits_are_told(tiny_base: Path, method: str, settings: dict[str, Any], tokens: int, said: str) -> None:
    (problem,) = misfits(tiny_base, method, settings_of(method, **settings), tokens)
    assert said in problem


@pytest.mark.parametrize("family", ["distilbert", "mpnet"])
def test_prefixes_do_not_fit_a_family_without_a_cache(tmp_path: Path, family: str) -> None:
    assert family not in PREFIX
    (problem,) = misfits(make_base(tmp_path, family), "prefix", settings_of("prefix"), 32)
    assert f"family '{family}'" in problem
    assert "mam" in problem


def saved(folder: Path, **changes: Any) -> Path:
    model: Any = tiny("bert")
    peft_config("lora", settings_of("lora"), ["classifier"], model).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_a_config_as_jobs_write_it_is_read(tmp_path: Path) -> None:
    config = load_config(saved(tmp_path))
    assert (config.r, config.target_modules, config.inference_mode) == (8, set(LORA["bert"]), True)


@pytest.mark.parametrize(
    "change", [{"megatron_config": {}, "megatron_core": "os"}, {"use_dora": True}, {"init_lora_weights": "pissa"}]
)
def test_settings_that_no_job_writes_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=next(iter(change))):
        load_config(saved(tmp_path, **change))


def test_another_peft_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"BITFIT.*found VERA"):
        load_config(saved(tmp_path, peft_type="VERA"))


def test_biases_and_heads_are_of_one_type() -> None:
    assert bitfit.head_only(["classifier"]).peft_type == bitfit.BitFitConfig().peft_type == "BITFIT"
