"""What every bottleneck method must be on every family: nothing at first, apart from the base, whole when loaded."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

from components.adapters import METHODS
from components.adapters.layer import Site
from components.errors import ConfigError
from tests.adapters.adapted import config_of
from tests.adapters.architectures import FAMILIES, HIDDEN, LAYERS, SEQ2SEQ, inputs, tiny

OWN_ATTENTION = ("mpnet", "deberta-v2")  # their attention does not go through transformers' interface
every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)


def adapted(family: str, method: str = "pfeiffer", name: str = "task", **settings: Any) -> PeftModel:
    """A tiny model with a fresh adapter."""
    if method == "mam" and family in OWN_ATTENTION:
        pytest.skip(f"{family} computes attention by code of its own")
    torch.manual_seed(1)
    return get_peft_model(tiny(family), config_of(method, (), **settings), adapter_name=name).eval()


def stir(model: torch.nn.Module, seed: int = 2) -> None:
    """Random values for all that is trained."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))


@torch.no_grad()
def hidden(model: torch.nn.Module, family: str, **more: Any) -> torch.Tensor:
    output: torch.Tensor = model(**inputs(family), **more).last_hidden_state
    return output


@every_family
@every_method
def test_starts_as_the_base(family: str, method: str) -> None:
    """Prefixes take part in attention from the start: they cannot."""
    model = adapted(family, method)
    same = torch.equal(hidden(model, family), hidden(tiny(family), family))
    assert same != (method == "mam")


@every_family
@every_method
def test_trained_it_differs_and_disabled_it_is_the_base(family: str, method: str) -> None:
    base = hidden(tiny(family), family)
    model = adapted(family, method)
    stir(model)
    assert not torch.allclose(hidden(model, family), base, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(hidden(model, family), base)


@every_family
@every_method
def test_steps_leave_the_base_as_it_was(family: str, method: str) -> None:
    model = adapted(family, method)
    untouched = tiny(family).state_dict()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    before = hidden(model, family)
    for _ in range(2):
        model(**inputs(family)).last_hidden_state.pow(2).sum().backward()
        assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
        optimizer.step()
    assert not torch.allclose(hidden(model, family), before, atol=1e-3)
    wrapped = {re.sub(r"base_model\.model\.|\.base_layer|\.original_module", "", name): tensor
               for name, tensor in model.state_dict().items()}  # fmt: skip
    assert all(torch.equal(wrapped[name], tensor) for name, tensor in untouched.items())


@every_family
@every_method
def test_saved_and_loaded_it_is_the_same(family: str, method: str, tmp_path: Path) -> None:
    model = adapted(family, method)
    stir(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path / "task", adapter_name="other").eval()
    assert torch.equal(hidden(loaded, family), hidden(model, family))


@every_family
@every_method
def test_a_copy_of_the_model_is_the_same(family: str, method: str) -> None:
    model = adapted(family, method)
    stir(model)
    assert torch.equal(hidden(copy.deepcopy(model), family), hidden(model, family))


@every_family
@every_method
def test_adapters_do_not_touch_each_other(family: str, method: str) -> None:
    """Added, switched and deleted, an adapter leaves the others' outputs alone."""
    model = adapted(family, method, name="first")
    stir(model)
    first = hidden(model, family)
    model.add_adapter("second", METHODS["pfeiffer"](reduction_factor=8))
    assert torch.equal(hidden(model, family), first)
    model.set_adapter("second")
    stir(model, seed=3)
    second = hidden(model, family)
    assert not torch.allclose(second, first, atol=1e-2)
    model.set_adapter("first")
    assert torch.equal(hidden(model, family), first)
    model.delete_adapter("first")
    model.set_adapter("second")
    assert torch.equal(hidden(model, family), second)


@every_family
@every_method
def test_unloaded_it_is_the_base(family: str, method: str) -> None:
    """PEFT hands over what is in modules_to_save, so norms are left out."""
    model = adapted(family, method, train_layer_norm=False)
    stir(model)
    bare = model.unload()
    assert torch.equal(hidden(bare, family), hidden(tiny(family), family))


def expected(family: str, method: str) -> set[str]:
    """Ends of the names that a method trains in one site, spelt out from its definition."""
    dense = {f"{half}.{part}" for half in ("down", "up") for part in ("weight", "bias")}
    phm = {f"{half}.{part}" for half in ("down", "up") for part in ("left", "right", "bias")}
    return {
        "pfeiffer": dense,
        "houlsby": dense,
        "parallel": dense,
        "adapter-plus": dense | {"scaling"},
        "compacter": phm,
        "compacter-plus": phm,
        "mam": dense,
        "masked": dense | {"which_masked.weight", "which_masked.bias"},
    }[method]


@every_family
@every_method
def test_trains_what_the_method_says_and_no_more(family: str, method: str) -> None:
    model = adapted(family, method)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = 1 if family == "albert" else LAYERS * (1 + (family in SEQ2SEQ))
    sites = layers * (2 if method in ("houlsby", "compacter") else 1)
    ends = sorted(name.split(".bottleneck_adapters.task.")[1] for name in trained if ".bottleneck_adapters." in name)
    assert ends == sorted(end for end in expected(family, method) for _ in range(sites))
    others = {name for name in trained if ".bottleneck_adapters." not in name}
    parts = {name.split(".bottleneck_parts.task.")[1] for name in others if ".bottleneck_parts." in name}
    if method.startswith("compacter"):
        assert parts == {"rule.factors"}
    elif method == "mam":
        assert {name.split(".", 1)[1] for name in parts} == {
            "inputs", "inner_layer.weight", "inner_layer.bias", "outer_layer.weight", "outer_layer.bias"
        }  # fmt: skip
    else:
        assert not parts
    norms = {name for name in others if ".modules_to_save.task." in name}
    assert bool(norms) == (method == "houlsby")
    assert others == norms | {name for name in others if ".bottleneck_parts." in name}


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_layers_left_out_carry_nothing(family: str) -> None:
    model = adapted(family, "houlsby", leave_out=[0])
    sites = {module.index for module in model.modules() if isinstance(module, Site)}
    assert sites == set(range(1, LAYERS * (1 + (family in SEQ2SEQ))))


def test_layers_left_out_of_a_deep_model_carry_nothing() -> None:
    """PEFT rewrites lists of twenty and more module names: the places must survive that."""
    model = get_peft_model(tiny("bert", num_hidden_layers=24), METHODS["pfeiffer"](leave_out=[0, 1, 12]))
    sites = {module.index for module in model.modules() if isinstance(module, Site)}
    assert sites == set(range(24)) - {0, 1, 12}


def test_the_reduction_factor_may_differ_by_layer() -> None:
    model = adapted("bert", reduction_factor={"1": 4, "default": 8})
    sizes = {
        module.index: module.bottleneck_adapters["task"].down.out_features
        for module in model.modules()
        if isinstance(module, Site)
    }
    assert sizes == {0: HIDDEN // 8, 1: HIDDEN // 4}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@every_method
def test_parameter_count(family: str, method: str) -> None:
    trained = sum(parameter.numel() for parameter in adapted(family, method).parameters() if parameter.requires_grad)
    size = HIDDEN // 4
    dense = 2 * HIDDEN * size + HIDDEN + size
    phm = (HIDDEN + size) + (size + HIDDEN) + HIDDEN + size  # n pairs of a column and a row, each 1 / n as long
    norm = 2 * HIDDEN
    network = 3 * HIDDEN + (HIDDEN + 1) * 5 + (5 + 1) * LAYERS * 2 * HIDDEN
    assert (
        trained
        == {
            "pfeiffer": LAYERS * dense,
            "houlsby": LAYERS * 2 * (dense + norm),
            "parallel": LAYERS * dense,
            "adapter-plus": LAYERS * (dense + HIDDEN),
            "compacter": LAYERS * 2 * phm + 4**3,
            "compacter-plus": LAYERS * phm + 4**3,
            "mam": LAYERS * dense + network,
            "masked": LAYERS * (dense + (HIDDEN + 1) * size),
        }[method]
    )


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_new", "silu", "swish", "tanh", "leakyrelu"])
def test_every_declared_non_linearity_works(name: str) -> None:
    model = adapted("bert", non_linearity=name)
    stir(model)
    assert torch.isfinite(hidden(model, "bert")).all()


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"stochastic_depth": 0.5}, {"mask_rate": 0.5}])
def test_chance_acts_only_while_training(settings: dict[str, float]) -> None:
    model = adapted("bert", **settings)
    stir(model)
    assert torch.equal(hidden(model, "bert"), hidden(model, "bert"))
    model.train()
    assert not torch.equal(hidden(model, "bert"), hidden(model, "bert"))


@pytest.mark.parametrize("kind", ["bert", "houlsby"])
def test_other_initialisations_start_near_the_base(kind: str) -> None:
    base, model = hidden(tiny("bert"), "bert"), adapted("bert", init_weights=kind)
    assert not torch.equal(hidden(model, "bert"), base)
    assert torch.allclose(hidden(model, "bert"), base, atol=0.1)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"reduction_factor": 17}, "reduction factor"),
        ({"reduction_factor": 0}, "reduction factor"),
        ({"reduction_factor": {"0": 2}}, "layer 1"),
        ({"non_linearity": "relux"}, "activation"),
        ({"scaling": "much"}, "scaling"),
        ({"init_weights": "zero"}, "init_weights"),
        ({"leave_out": [0, 1]}, "leave out"),
        ({"leave_out": [2]}, "leave out"),
        ({"output_adapter": False}, "mh_adapter"),
        ({"residual_before_ln": "post_add", "original_ln_before": False}, "post_add"),
        ({"phm_layer": True, "phm_dim": 3}, "phm_dim"),
        ({"stochastic_depth": 1.0}, "stochastic_depth"),
        ({"prefix_length": 3, "drop_layers": 1}, "AdapterDrop"),
        ({"drop_range": [0, 2]}, "drop_range"),
        ({"drop_range": [1, 0]}, "drop_range"),
        ({"drop_layers": 2}, "drop_layers up to 1; found 2"),
        ({"drop_range": [0, 1], "leave_out": [1]}, "drop_range up to 0; found 0, 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        get_peft_model(tiny("bert"), METHODS["pfeiffer"](**{"reduction_factor": 4, **settings}))


def parts_of(model: torch.nn.Module) -> tuple[list[str], list[tuple[str, bool]]]:
    """Names of modules and parameters, and which of these learn."""
    return (
        [name for name, _ in model.named_modules()],
        [(name, each.requires_grad) for name, each in model.named_parameters()],
    )


# The latter two are refused when the first layer has its adapter.
@pytest.mark.parametrize("factor", [99, {"0": 4}, {"0": 4, "1": 99}], ids=str)
def test_a_refused_adapter_leaves_the_model_as_it_was(factor: Any) -> None:
    base = tiny("bert")
    before = parts_of(base)
    with pytest.raises(ConfigError, match="reduction"):
        get_peft_model(base, METHODS["pfeiffer"](reduction_factor=factor), "anna")
    assert parts_of(base) == before
    model = get_peft_model(base, METHODS["pfeiffer"](reduction_factor=4, leave_out=[0]), "anna")
    assert torch.equal(hidden(model.eval(), "bert"), hidden(tiny("bert"), "bert"))

    before = parts_of(model)
    with pytest.raises(ConfigError, match="reduction"):
        model.add_adapter("bruno", METHODS["pfeiffer"](reduction_factor=factor))
    assert parts_of(model) == before
    model.add_adapter("bruno", METHODS["pfeiffer"](reduction_factor=4))


@pytest.mark.parametrize("method", METHODS)
def test_merging_is_refused_before_anything_changes(method: str) -> None:
    model = adapted("bert", method)
    stir(model)
    before = hidden(model, "bert")
    with pytest.raises(ConfigError, match="merge"):
        model.merge_and_unload()
    assert torch.equal(hidden(model, "bert"), before)


@pytest.mark.parametrize("method", METHODS)
def test_on_a_base_of_half_precision(method: str) -> None:
    """PEFT keeps the adapter in float32."""
    base = tiny("bert").to(torch.bfloat16)
    model = get_peft_model(base, config_of(method, ()), adapter_name="task").eval()
    stir(model)
    assert hidden(model, "bert").dtype == torch.bfloat16
    assert torch.isfinite(hidden(model, "bert")).all()


@pytest.mark.parametrize("method", METHODS)
def test_loaded_without_a_second_copy_in_memory(method: str, tmp_path: Path) -> None:
    model = adapted("bert", method)
    stir(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path / "task", adapter_name="task", low_cpu_mem_usage=True)
    weights, found = (get_peft_model_state_dict(each, adapter_name="task") for each in (model, loaded))
    assert weights.keys() == found.keys()
    assert all(torch.equal(weights[name], found[name]) for name in weights)
    # Where equal weights lie in memory decides on some processors how sums are rounded.
    assert torch.allclose(hidden(loaded.eval(), "bert"), hidden(model, "bert"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["layer", "encoder", "down", "weight", "rule", "self_0", "dropout"])
def test_names_of_modules_are_no_names_of_adapters(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        adapted("bert", name=name)


def test_one_configuration_makes_two_adapters() -> None:
    config = config_of("pfeiffer", ())
    model = get_peft_model(tiny("bert"), config, adapter_name="first")
    model.add_adapter("second", config)
    model.peft_config["first"].drop_layers = 1
    assert model.peft_config["second"].drop_layers == 0


def test_after_a_deletion_one_adapter_is_active_everywhere() -> None:
    model = adapted("bert", "pfeiffer", name="first")
    model.add_adapter("second", config_of("houlsby", ()))
    model.add_adapter("a_third", config_of("pfeiffer", ()))
    stir(model)
    model.delete_adapter("first")
    active = {tuple(module.active_adapters) for module in model.modules() if isinstance(module, Site)}
    assert active == {("second",)}


def test_all_wrong_settings_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"init_weights.*scaling"):
        METHODS["pfeiffer"](init_weights="zero", scaling="much")
