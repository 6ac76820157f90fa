"""What AdapterHub computed and recorded, ours computes from the same files; what we save, it would find as its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from components.adapters.adapterhub import load, save
from components.adapters.adapterhub.folder import ADAPTER, FUSION, HEAD, read
from components.adapters.adapterhub.heads import weights as of_head
from components.adapters.adapterhub.weights import of_adapter, of_fusion
from tests.adapters.adapterhub.cases import CASES, LABELS, Case

GOLDEN = Path(__file__).parent / "golden"
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.path)


def named(path: str) -> Case:
    return next(case for case in CASES if case.path == path)


def base_of(case: Case) -> Any:
    """The recorded base: bare, or with a head to be where the case has one."""
    folder = GOLDEN / case.family / "base"
    if case.head:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS)
    else:
        model = AutoModel.from_pretrained(folder)
    return model.eval()


def folder_of(case: Case) -> Path:
    return GOLDEN / case.path / ("fusion" if case.fusion else case.adapters[0])


def imported(case: Case, base: Any = None) -> PeftModel:
    return load(base_of(case) if base is None else base, folder_of(case))


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(GOLDEN / case.family / "inputs.safetensors").items()
            if "." not in name}  # fmt: skip


def outputs(model: torch.nn.Module, case: Case) -> dict[str, torch.Tensor]:
    """As they were recorded: the last hidden state, and logits where there is a head."""
    found = model(**inputs_of(case), output_hidden_states=True)
    if case.family == "t5" and case.wrapped:  # AdapterHub's T5 with heads to come scales what they would read
        return {"hidden": found[0] * found[0].shape[-1] ** -0.5}
    return {"hidden": found.hidden_states[-1], "logits": found.logits} if case.head else {"hidden": found[0]}


def recorded(case: Case, kind: str) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / case.path / "case.safetensors")
    return {name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.")}


def weights_of(model: PeftModel, case: Case) -> dict[str, torch.Tensor]:
    """All that AdapterHub added, as it is in our model, by AdapterHub's names."""
    base = model.get_base_model()
    fusion = ",".join(case.adapters)
    found = {key: tensor for name in case.adapters for key, tensor in of_adapter(base, name, name).items()}
    if case.fusion:
        found |= of_fusion(base, fusion, fusion)
    if case.head:
        found |= of_head({"config": {}, "name": fusion}, base, fusion)
    return found


def without_base(case: Case, names: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model that can have heads has its name in front of all weights but the head's."""
    prefix = {"bart": "model.", "gpt2": "transformer.", "t5": "transformer."}.get(case.family, f"{case.family}.")
    return {name.removeprefix(prefix) if case.wrapped else name: tensor for name, tensor in names.items()}


@every_case
def test_computes_what_adapterhub_computes(case: Case) -> None:
    model = imported(case)
    with torch.no_grad():
        found = outputs(model, case)
    for name, expected in recorded(case, "output").items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=0, msg=lambda text, of=name: f"{of}: {text}")


@every_case
def test_every_weight_has_adapterhubs_gradient(case: Case) -> None:
    """Within 1e-4 of the weight's largest; or of 1 % of the case's largest, for those that are 0 in theory."""
    model = imported(case)
    model.requires_grad_(True)
    found = outputs(model, case)
    scalar = "logits" if case.head else "hidden"
    probe = load_file(GOLDEN / case.family / "inputs.safetensors")[f"probe.{scalar}"]
    (found[scalar] * probe).sum().backward()
    expected = without_base(case, recorded(case, "gradient"))
    ours = weights_of(model, case)
    assert ours.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, tensor in ours.items():
        gradient = tensor.grad if tensor.is_leaf else tensor._base.grad.view(tensor.shape)  # type: ignore[union-attr]
        allowed = 1e-4 * max(float(expected[name].abs().max()), largest / 100)
        assert float((gradient - expected[name]).abs().max()) <= allowed, name


@every_case
def test_exports_the_same_weights_and_words(case: Case, tmp_path: Path) -> None:
    """Compared with the very files that AdapterHub wrote, which so are what it reads."""
    save(imported(case), tmp_path)
    for name in case.adapters:
        ours = tmp_path / name if case.fusion else tmp_path
        same_files(case, GOLDEN / case.path / name, ours, ADAPTER)
    if case.fusion:
        same_files(case, folder_of(case), tmp_path, FUSION)
    if case.head:
        same_files(case, folder_of(case), tmp_path, HEAD)


def same_files(case: Case, theirs: Path, ours: Path, kind: Any) -> None:
    expected, found = read(theirs, kind), read(ours, kind)
    tensors = {name: tensor for name, tensor in without_base(case, expected.tensors).items() if ".pool." not in name}
    written = without_base(case, found.tensors)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    varying = {"model_name", "model_class"} if case.wrapped and not case.head else {"model_name"}
    assert {word: value for word, value in found.about.items() if word not in varying} == {
        word: value for word, value in expected.about.items() if word not in varying
    }


@pytest.mark.parametrize("safetensors", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize("path", ["bert/mam", "bert/fusion", "bert/ln_before", "t5/compacter"])
def test_our_own_export_loads_again(path: str, safetensors: bool, tmp_path: Path) -> None:
    case = named(path)
    model = imported(case)
    save(model, tmp_path, safetensors=safetensors)
    with torch.no_grad():
        again, before = outputs(load(base_of(case), tmp_path), case), outputs(model, case)
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
