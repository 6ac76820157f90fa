"""The golden files themselves: complete, and recorded on base models that compute the same in our transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.adapters.adapterhub.cases import CASES, FAMILIES, Case

GOLDEN = Path(__file__).parent / "golden"


def saved_names(folder: Path) -> set[str]:
    """Names of the weights that AdapterHub saved below the folder, each weight once."""
    names: set[str] = set()
    for path in folder.rglob("*/*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    for path in folder.rglob("*.bin"):
        names.update(torch.load(path, weights_only=True))
    return {name for name in names if ".pool." not in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_base_computes_what_was_recorded(family: str) -> None:
    """Otherwise a difference in a case would say nothing about adapters."""
    from transformers import AutoModel

    shared = load_file(GOLDEN / family / "inputs.safetensors")
    model = AutoModel.from_pretrained(GOLDEN / family / "base", attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = model(**{name: tensor for name, tensor in shared.items() if "." not in name}).last_hidden_state
    torch.testing.assert_close(hidden, shared["base.hidden"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.path)
def test_every_saved_weight_has_a_gradient(case: Case) -> None:
    recorded = load_file(GOLDEN / case.path / "case.safetensors")
    gradients = {name.removeprefix("gradient.") for name in recorded if name.startswith("gradient.")}
    assert gradients == saved_names(GOLDEN / case.path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.path)
def test_adapters_move_the_outputs(case: Case) -> None:
    """A case that computes what the base does would agree with any mistake."""
    base = load_file(GOLDEN / case.family / "inputs.safetensors")["base.hidden"]
    recorded = load_file(GOLDEN / case.path / "case.safetensors")
    assert (recorded["output.hidden"] - base).abs().max() > 0.1


def test_there_are_no_other_cases() -> None:
    """A case that was renamed leaves no old folder behind."""
    found = {path.parent.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("case.json")}
    assert found == {case.path for case in CASES}


def test_both_formats_occur() -> None:
    formats = {path.suffix for case in CASES for path in (GOLDEN / case.path).glob("*/*adapter*")} - {".json"}
    assert formats == {".bin", ".safetensors"}


def test_all_are_of_one_release() -> None:
    versions = {json.dumps(json.loads(path.read_text())["versions"]) for path in GOLDEN.rglob("case.json")}
    assert len(versions) == 1
