"""BitFit: a difference for every bias of the base, and nothing else; head-only: not even that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from components.adapters.bitfit import BitFitConfig, head_only
from components.errors import ConfigError
from tests.adapters.adapted import INPUTS, classifier, logits
from tests.adapters.architectures import inputs, tiny

WITH_BIASES = ("bert", "roberta", "distilbert", "electra", "albert", "mpnet", "gpt2", "bart")


def biased(base: Path, adapter: str = "task") -> PeftModel:
    model, head = classifier(base)
    return get_peft_model(model, BitFitConfig(modules_to_save=list(head)), adapter_name=adapter).eval()


@torch.no_grad()
def stir(model: nn.Module, seed: int = 1) -> None:
    """Move all that is trained at random, as training would."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def hidden(model: nn.Module, family: str) -> torch.Tensor:
    output: torch.Tensor = model(**inputs(family)).last_hidden_state
    return output


@pytest.mark.parametrize("family", WITH_BIASES)
def test_every_bias_of_the_base_and_no_other_parameter_is_trained(family: str) -> None:
    base = tiny(family)
    modules = [name for name, module in base.named_modules()
               if isinstance(module, nn.Linear | Conv1D | nn.LayerNorm) and module.bias is not None]  # fmt: skip
    model = get_peft_model(tiny(family), BitFitConfig(), adapter_name="task")
    assert trained_names(model) == {f"base_model.model.{name}.bitfit_deltas.task" for name in modules}


@pytest.mark.parametrize("family", WITH_BIASES)
def test_it_computes_what_the_base_with_moved_biases_computes(family: str) -> None:
    model = get_peft_model(tiny(family), BitFitConfig(), adapter_name="task").eval()
    assert torch.equal(hidden(model, family), hidden(tiny(family), family))
    stir(model)
    moved = tiny(family)
    with torch.no_grad():
        for name, delta in model.named_parameters():
            if delta.requires_grad:
                module = name.removeprefix("base_model.model.").removesuffix(".bitfit_deltas.task")
                moved.get_submodule(module).bias.add_(delta)
    assert torch.allclose(hidden(model, family), hidden(moved, family), atol=1e-5)


def test_the_head_is_trained_as_a_whole(tiny_base: Path) -> None:
    names = {name for name in trained_names(biased(tiny_base)) if "bitfit_" not in name}
    head = "base_model.model.classifier.modules_to_save.task"
    assert names == {f"{head}.weight", f"{head}.bias"}


def test_disabled_it_is_the_base(tiny_base: Path) -> None:
    model = biased(tiny_base)
    stir(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(classifier(tiny_base)[0]))
    assert not torch.allclose(logits(model), logits(classifier(tiny_base)[0]), atol=1e-2)


def test_steps_leave_the_base_as_it_was(tiny_base: Path) -> None:
    model = biased(tiny_base)
    frozen = {name: t.clone() for name, t in model.state_dict().items() if ".task" not in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(**INPUTS).logits.pow(2).sum().backward()
        optimizer.step()
    after = model.state_dict()
    assert [name for name, tensor in frozen.items() if not torch.equal(tensor, after[name])] == []


def test_loaded_under_another_name_it_answers_as_when_saved(tiny_base: Path, tmp_path: Path) -> None:
    model = biased(tiny_base)
    stir(model)
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "task" / "adapter_model.safetensors") if "task" in name]
    loaded = PeftModel.from_pretrained(classifier(tiny_base)[0], tmp_path / "task", adapter_name="other").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_adapters_side_by_side_do_not_touch_each_other(tiny_base: Path) -> None:
    model = biased(tiny_base)
    stir(model)
    first = logits(model)
    model.add_adapter("second", BitFitConfig(modules_to_save=["classifier"]))
    model.set_adapter("second")
    stir(model, seed=2)
    assert trained_names(model) == {name.replace(".task", ".second") for name in trained_names(biased(tiny_base))}
    assert not torch.allclose(logits(model), first, atol=1e-2)
    model.set_adapter("task")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_merged_it_answers_the_same_and_unmerged_the_base_is_back(tiny_base: Path) -> None:
    model = biased(tiny_base)
    stir(model)
    biases = {name: t.clone() for name, t in model.state_dict().items() if name.endswith("base_layer.bias")}
    before = logits(model)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(model), before, atol=1e-6)
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[name], bias) for name, bias in biases.items())
    assert torch.equal(logits(model), before)


def test_merged_into_the_base_it_is_a_plain_model(tiny_base: Path) -> None:
    model = biased(tiny_base)
    stir(model)
    before = logits(model)
    plain = model.merge_and_unload()
    assert not [name for name in plain.state_dict() if "bitfit" in name]
    assert torch.allclose(logits(plain), before, atol=1e-6)


def test_what_is_no_number_is_not_merged(tiny_base: Path) -> None:
    model = biased(tiny_base)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter(safe_merge=True)


def test_a_base_without_biases_is_refused() -> None:
    with pytest.raises(ConfigError, match="a base model with biases"):
        get_peft_model(tiny("llama"), BitFitConfig())


def test_a_module_without_bias_is_refused(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="word_embeddings, Embedding"):
        get_peft_model(classifier(tiny_base)[0], BitFitConfig(target_modules=["word_embeddings"]))


def test_head_only_trains_the_head_alone(tiny_base: Path, tmp_path: Path) -> None:
    model, head = classifier(tiny_base)
    only = get_peft_model(model, head_only(list(head)), adapter_name="task").eval()
    assert {name.split(".modules_to_save.")[0] for name in trained_names(only)} == {"base_model.model.classifier"}
    stir(only)
    only.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(tiny_base)[0], tmp_path / "task").eval()
    assert torch.equal(logits(loaded), logits(only))
