"""Importing is strict: what is not what AdapterHub would have saved for this model is refused, and nothing changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification

from components.adapters.adapterhub import heads, load, save, settings
from components.adapters.config import METHODS
from components.errors import BundleError, ConfigError
from tests.adapters.adapterhub.cases import HIDDEN, LABELS
from tests.adapters.adapterhub.test_conformance import GOLDEN, base_of, imported, named, outputs
from tests.adapters.architectures import inputs, tiny

Change = Callable[[dict[str, Any]], Any]


def copied(path: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / path, tmp_path / path))


def rewrite_weights(folder: Path, change: Change, file: str = "pytorch_adapter.bin") -> None:
    tensors = torch.load(folder / file, weights_only=True)
    change(tensors)
    torch.save(tensors, folder / file)


def rewrite_words(folder: Path, change: Change, file: str = "adapter_config.json") -> None:
    about = json.loads((folder / file).read_text())
    change(about)
    (folder / file).write_text(json.dumps(about))


UP = "bert.encoder.layer.1.output.adapters.task.adapter_up.bias"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tensors: tensors.pop(UP), f"no {UP.removeprefix('bert.')}"),
        (lambda tensors: tensors.update({f"{UP}.more": torch.zeros(1)}), "unexpected .*more"),
        (lambda tensors: tensors.update({UP: torch.zeros(HIDDEN + 1)}), r"\(17,\), not \(16,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_other_weights_are_refused_and_the_model_stays_as_it_was(change: Change, word: str, tmp_path: Path) -> None:
    folder = copied("bert/pfeiffer/task", tmp_path)
    rewrite_weights(folder, change)
    base = base_of(named("bert/pfeiffer"))
    before = {name: (module, module.training) for name, module in base.named_modules()}
    with pytest.raises(BundleError, match=word):
        load(base, folder)
    assert {name: (module, module.training) for name, module in base.named_modules()} == before
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("word", ["missing", "unexpected"])
def test_other_weights_of_a_head_are_refused(word: str, tmp_path: Path) -> None:
    folder = copied("bert/pfeiffer/task", tmp_path)
    change: dict[str, Change] = {
        "missing": lambda tensors: tensors.pop("heads.task.4.bias"),
        "unexpected": lambda tensors: tensors.update({"heads.task.5.bias": torch.ones(1)}),
    }
    rewrite_weights(folder, change[word], "pytorch_model_head.bin")
    with pytest.raises(BundleError, match=r"head of 'task'"):
        load(base_of(named("bert/pfeiffer")), folder)


def test_a_changed_copy_of_a_prefix_is_refused(tmp_path: Path) -> None:
    """AdapterHub holds prefixes under many names: they must agree."""
    folder = copied("bert/prefix/task", tmp_path)
    key = "encoder.layer.1.attention.self.prefix_tuning.pool.prefix_tunings.task.self_prefix.wte.weight"
    rewrite_weights(folder, lambda tensors: tensors.update({key: tensors[key] + 1}))
    with pytest.raises(BundleError, match="unexpected"):
        load(base_of(named("bert/prefix")), folder)


@pytest.mark.parametrize(("word", "value"), [("hidden_size", 32), ("model_type", "roberta")])
def test_an_adapter_for_another_base_is_refused(word: str, value: Any, tmp_path: Path) -> None:
    folder = copied("bert/pfeiffer/task", tmp_path)
    rewrite_words(folder, lambda about: about.update({word: value}))
    with pytest.raises(BundleError, match=word):
        load(base_of(named("bert/pfeiffer")), folder)


def test_a_base_of_another_depth_is_refused() -> None:
    base = AutoModel.from_pretrained(GOLDEN / "bert" / "base", num_hidden_layers=1)
    with pytest.raises(BundleError, match=r"unexpected encoder.layer.1"):
        load(base, GOLDEN / "bert/houlsby/task")


BOTTLENECK = json.loads((GOLDEN / "bert/pfeiffer/task/adapter_config.json").read_text())["config"]
PREFIX = json.loads((GOLDEN / "bert/prefix/task/adapter_config.json").read_text())["config"]


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (BOTTLENECK | {"inv_adapter": "nice"}, "inv_adapter 'nice'"),
        (BOTTLENECK | {"phm_bias": False}, "phm_bias"),
        (BOTTLENECK | {"fast": True}, "fast"),
        (BOTTLENECK | {"reduction_factor": None}, "no reduction_factor"),
        (BOTTLENECK | {"scaling": "twice"}, "twice"),
        (PREFIX | {"use_gating": True}, "use_gating"),
        (PREFIX | {"non_linearity": "relu"}, "non_linearity"),
        ({"architecture": "lora", "r": 8}, "lora"),
        ({"architecture": "prompt_tuning"}, "prompt_tuning"),
        ({"architecture": "reft"}, "reft"),
        ({"architecture": "union", "configs": [BOTTLENECK, BOTTLENECK]}, "bottleneck, bottleneck"),
        ({"architecture": "union", "configs": [BOTTLENECK, {"architecture": "lora"}]}, "lora"),
        ({"architecture": "union", "configs": [BOTTLENECK, PREFIX | {"leave_out": [0]}]}, "left out"),
        (None, "no mh_adapter"),
    ],
)
def test_settings_without_a_like_are_refused(config: Any, word: str, tmp_path: Path) -> None:
    folder = copied("bert/pfeiffer/task", tmp_path)
    rewrite_words(folder, lambda about: about.update(config=config))
    with pytest.raises(ConfigError, match=word):
        load(base_of(named("bert/pfeiffer")), folder)


def test_prefixes_in_some_layers_of_t5_are_refused() -> None:
    with pytest.raises(ConfigError, match="layers of T5"):
        settings.read({"config": PREFIX | {"leave_out": [0]}, "model_type": "t5", "version": "adapters.1.3.0"})


@pytest.mark.parametrize("word", ["residual_before", "temperature"])
def test_fusions_without_a_like_are_refused(word: str, tmp_path: Path) -> None:
    folder = copied("bert/fusion", tmp_path) / "fusion"
    rewrite_words(folder, lambda about: about["config"].update({word: True}), "adapter_fusion_config.json")
    with pytest.raises(ConfigError, match=word):
        load(base_of(named("bert/fusion")), folder)


@pytest.mark.parametrize(
    ("word", "value"),
    [("layers", 1), ("use_pooler", True), ("activation_function", "relu"), ("num_labels", 5), ("bias", False),
     ("head_type", "tagging")],
)  # fmt: skip
def test_heads_without_a_place_are_refused(word: str, value: Any, tmp_path: Path) -> None:
    folder = copied("bert/pfeiffer/task", tmp_path)
    rewrite_words(folder, lambda about: about["config"].update({word: value}), "head_config.json")
    with pytest.raises(ConfigError, match=f"{value}"):
        load(base_of(named("bert/pfeiffer")), folder)


def test_a_family_whose_names_are_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="'mpnet'"):
        load(tiny("mpnet"), GOLDEN / "bert/pfeiffer/task")


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("ran",)


def test_nothing_in_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied("bert/pfeiffer/task", tmp_path)
    torch.save({UP: Payload()}, folder / "pytorch_adapter.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="weights alone"):
        load(base_of(named("bert/pfeiffer")), folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "neither"),
        (lambda folder: (folder / "pytorch_adapter.bin").unlink(), "neither"),
        (lambda folder: (folder / "pytorch_adapter.bin").write_bytes(b"PK"), "weights alone"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "none that can be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "an object"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"config": "pfeiffer"}'), "an object"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "a name"),
    ],
)
def test_folders_that_are_not_whole_are_refused(spoil: Callable[[Path], Any], word: str, tmp_path: Path) -> None:
    folder = copied("bert/pfeiffer/task", tmp_path)
    spoil(folder)
    with pytest.raises(BundleError, match=word):
        load(base_of(named("bert/pfeiffer")), folder)


@pytest.mark.parametrize("name", ["bottle", "a.b"])
def test_names_that_peft_cannot_take_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load(base_of(named("bert/pfeiffer")), GOLDEN / "bert/pfeiffer/task", name)


def test_a_second_adapter_beside_the_first() -> None:
    """Both, with their heads, are what they are alone; a name can be had once."""
    pfeiffer, houlsby = named("bert/pfeiffer"), named("bert/houlsby")
    model = load(base_of(pfeiffer), GOLDEN / "bert/pfeiffer/task", "one")
    model = load(model, GOLDEN / "bert/houlsby/task", "two")
    for case, name in ((houlsby, "two"), (pfeiffer, "one")):
        model.set_adapter(name)
        assert torch.equal(outputs(model, case)["logits"], outputs(imported(case), case)["logits"])
    with pytest.raises(ConfigError, match="'two'"):
        load(model, GOLDEN / "bert/houlsby/task", "two")


def test_a_fusions_adapters_are_given_or_there(tmp_path: Path) -> None:
    case = named("bert/fusion")
    expected = outputs(imported(case), case)["logits"]
    alone = copied("bert/fusion/fusion", tmp_path)
    with pytest.raises(BundleError, match="adapter 'first'"):
        load(base_of(case), alone)
    given = load(base_of(case), alone, adapters={name: GOLDEN / "bert/fusion" / name for name in case.adapters})
    assert torch.equal(outputs(given, case)["logits"], expected)
    there: Any = base_of(case)
    for name in case.adapters:
        there = load(there, GOLDEN / "bert/fusion" / name)
    assert torch.equal(outputs(load(there, alone), case)["logits"], expected)


def test_a_fusion_is_the_same_after_save_pretrained(tmp_path: Path) -> None:
    case = named("bert/fusion")
    model = imported(case)
    model.save_pretrained(tmp_path)
    first, second = case.adapters
    loaded = PeftModel.from_pretrained(base_of(case), tmp_path / first, adapter_name=first)
    for name in (second, "first,second"):
        loaded.load_adapter(tmp_path / name, name)
    loaded.set_adapter("first,second")
    again, before = outputs(loaded.eval(), case)["logits"], outputs(model, case)["logits"]
    torch.testing.assert_close(again, before, atol=1e-6, rtol=0)


def test_names_of_the_first_releases_are_understood(tmp_path: Path) -> None:
    """Their files name no version either: `gelu` was what transformers calls gelu_new."""
    case = named("bert/gelu_new")
    folder = copied("bert/gelu_new/task", tmp_path)

    def older(about: dict[str, Any]) -> None:
        about["config"].update(non_linearity="gelu", invertible_adapter=None)
        del about["version"]

    rewrite_words(folder, older)
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    torch.save(
        {key.replace(".adapters.", ".layer_text_task_adapters."): tensor for key, tensor in tensors.items()},
        folder / "pytorch_adapter.bin",
    )
    model = load(base_of(case), folder)
    assert torch.equal(outputs(model, case)["hidden"], outputs(imported(case), case)["hidden"])


def test_the_model_takes_the_heads_labels(tmp_path: Path) -> None:
    folder = copied("bert/pfeiffer/task", tmp_path)
    labels = {"bad": 0, "good": 2, "so so": 1}
    rewrite_words(folder, lambda about: about["config"].update(label2id=labels), "head_config.json")
    model = load(base_of(named("bert/pfeiffer")), folder)
    assert model.config.id2label == {0: "bad", 1: "so so", 2: "good"}


@pytest.mark.parametrize(("family", "activation"), [("distilbert", torch.relu), ("electra", torch.nn.functional.gelu)])
def test_heads_of_other_families_are_two_layers_on_the_first_token(
    family: str, activation: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    """As AdapterHub computes them: recorded are those of BERT and RoBERTa."""
    bare = tiny(family)
    folder = tmp_path / "bare"
    bare.save_pretrained(folder)
    hidden = bare(**inputs(family)).last_hidden_state[:, 0]
    size = hidden.shape[1]
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS).eval()
    head = {
        "heads.task.1.weight": torch.randn(size, size), "heads.task.1.bias": torch.randn(size),
        "heads.task.4.weight": torch.randn(LABELS, size), "heads.task.4.bias": torch.randn(LABELS),
    }  # fmt: skip
    place = heads.PLACES[family]
    config = METHODS["pfeiffer"](reduction_factor=4, modules_to_save=[place.inner, place.outer])
    save(get_peft_model(base, config, "task"), tmp_path / "task")
    torch.save(head, tmp_path / "task" / "pytorch_model_head.bin")
    again = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS).eval()
    logits = load(again, tmp_path / "task")(**inputs(family)).logits
    inner = activation(hidden @ head["heads.task.1.weight"].T + head["heads.task.1.bias"])
    torch.testing.assert_close(logits, inner @ head["heads.task.4.weight"].T + head["heads.task.4.bias"])


def test_what_is_loaded_has_the_models_mode(tmp_path: Path) -> None:
    """Or the dropout of a second adapter would be at work in evaluation."""
    model = load(base_of(named("bert/pfeiffer")), GOLDEN / "bert/pfeiffer/task", "one")
    model = load(model, GOLDEN / "bert/houlsby/task", "two")
    assert not any(module.training for module in model.modules())
