"""Exporting: what AdapterHub does not have is refused; what it has, it reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from components.adapters.adapterhub import load, save
from components.adapters.config import METHODS, BottleneckConfig
from components.errors import ConfigError
from tests.adapters.adapterhub.cases import CASES, LABELS
from tests.adapters.adapterhub.test_conformance import GOLDEN, imported, inputs_of, named
from tests.adapters.architectures import tiny

VENV = "ADAPTERHUB_VENV"  # a folder for `record.py --venv`, where AdapterHub is or may be installed


@pytest.mark.parametrize(
    ("family", "config", "word"),
    [
        ("bert", METHODS["masked"](reduction_factor=4), "masked neurons"),
        ("bert", METHODS["houlsby"](reduction_factor=4), "trained layer norms"),
        ("bert", METHODS["pfeiffer"](reduction_factor=4, drop_layers=1), "dropped layers"),
        ("bert", METHODS["pfeiffer"](reduction_factor=4, drop_range=[0, 1]), "dropped layers"),
        ("t5", METHODS["mam"](reduction_factor=4, prefix_length=3, prefix_bottleneck=4), "T5 prefixes"),
        ("bert", LoraConfig(target_modules=["query"]), "LORA"),
        ("mpnet", METHODS["pfeiffer"](reduction_factor=4), "'mpnet'"),
    ],
)
def test_what_adapterhub_does_not_have_is_refused(family: str, config: Any, word: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny(family), config, adapter_name="task")
    with pytest.raises(ConfigError, match=word):
        save(model, tmp_path / "task")
    assert not (tmp_path / "task").exists()


def test_fusions_by_average_are_refused(tmp_path: Path) -> None:
    model = imported(named("bert/fusion_static"))
    model.add_adapter("mean", BottleneckConfig(fuse=["first", "second"], fusion="average"))
    with pytest.raises(ConfigError, match="average"):
        save(model, tmp_path, "mean")


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'other'.*task"):
        save(imported(named("bert/pfeiffer")), tmp_path, "other")


@pytest.mark.parametrize("method", ["pfeiffer", "adapter-plus", "parallel", "compacter", "mam"])
def test_our_own_methods_come_back_as_they_were(method: str, tmp_path: Path) -> None:
    more = {"prefix_length": 3, "prefix_bottleneck": 4} if method == "mam" else {}
    torch.manual_seed(0)
    model = get_peft_model(tiny("bert"), METHODS[method](reduction_factor=4, **more), adapter_name="task").eval()
    save(model, tmp_path)
    again = load(tiny("bert"), tmp_path)
    inputs = inputs_of(named("bert/pfeiffer"))
    assert torch.equal(again(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_scalings_are_no_whole_numbers(tmp_path: Path) -> None:
    """AdapterHub takes floats alone."""
    save(get_peft_model(tiny("bert"), METHODS["pfeiffer"](reduction_factor=4, scaling=2), "task"), tmp_path)
    assert '"scaling": 2.0' in (tmp_path / "adapter_config.json").read_text()


def test_a_formats_files_replace_the_others(tmp_path: Path) -> None:
    """Or AdapterHub would read those of an earlier export."""
    model = imported(named("bert/pfeiffer"))
    save(model, tmp_path, safetensors=True)
    save(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json", "pytorch_adapter.bin", "head_config.json", "pytorch_model_head.bin"
    }  # fmt: skip


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_models_own_head_goes_along(kind: Any, tmp_path: Path) -> None:
    """As AdapterHub saves the head of a transformers model: under the model's own names."""
    torch.manual_seed(0)
    base = GOLDEN / "bert" / "base"
    config = METHODS["pfeiffer"](reduction_factor=4, modules_to_save=["classifier"])
    model = get_peft_model(kind.from_pretrained(base, num_labels=LABELS), config, "task").eval()
    save(model, tmp_path)
    head = json.loads((tmp_path / "head_config.json").read_text())
    assert (head["config"], head["model_class"]) == (None, type(model.get_base_model()).__name__)
    assert torch.load(tmp_path / "pytorch_model_head.bin").keys() == {"classifier.weight", "classifier.bias"}
    again = load(kind.from_pretrained(base, num_labels=LABELS).eval(), tmp_path)
    inputs = inputs_of(named("bert/pfeiffer"))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
def test_adapterhub_itself_computes_the_same_from_every_export(tmp_path: Path) -> None:
    if VENV not in os.environ:
        pytest.skip(f"{VENV} names no folder with AdapterHub's environment: see tests/adapters/adapterhub/record.py")
    for index, case in enumerate(CASES):
        save(imported(case), tmp_path / case.path, safetensors=index % 2 == 0)
    record = Path(__file__).parent / "record.py"
    command = [sys.executable, str(record), "--venv", os.environ[VENV], "--check", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert found.stdout.count("max abs difference") == len(CASES)
