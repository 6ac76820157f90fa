"""Several adapters on one base: added, switched, removed, as users of PEFT expect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from components.adapters.config import METHODS
from tests.adapters.adapted import adapted, classifier, config_of, logits, stir
from tests.conftest import make_base

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), request.param)


def two(base: Path, method: str, second: str | None = None) -> PeftModel:
    """Adapters `task` and `second`, both trained; `task` is active."""
    model = adapted(base, method)
    _, head = classifier(base)
    model.add_adapter("second", config_of(second or method, head))
    stir(model, "task", seed=1)
    stir(model, "second", seed=2)
    return model.eval()


def alone(base: Path, method: str, seed: int) -> torch.Tensor:
    model = adapted(base, method)
    stir(model, "task", seed)
    return logits(model)


@every_method
def test_a_second_adapter_leaves_the_first_unchanged(base: Path, method: str) -> None:
    assert torch.equal(logits(two(base, method)), alone(base, method, seed=1))


@every_method
def test_a_loaded_adapter_leaves_the_first_unchanged(base: Path, tmp_path: Path, method: str) -> None:
    adapted(base, method).save_pretrained(tmp_path)
    model = adapted(base, method)
    stir(model)
    before = logits(model)
    model.load_adapter(str(tmp_path / "task"), "second")
    assert torch.equal(logits(model.eval()), before)


@every_method
def test_a_loaded_adapter_answers_as_when_saved(base: Path, tmp_path: Path, method: str) -> None:
    saved = adapted(base, method)
    stir(saved, seed=2)
    saved.save_pretrained(tmp_path)
    model = adapted(base, method)
    stir(model, seed=1)
    model.load_adapter(str(tmp_path / "task"), "second")
    model.set_adapter("second")
    assert torch.equal(logits(model.eval()), logits(saved))


@every_method
def test_switching_there_and_back(base: Path, method: str) -> None:
    model = two(base, method)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.set_adapter("task")
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(logits(model), first)


@every_method
def test_only_the_active_adapter_trains(base: Path, method: str) -> None:
    model = two(base, method)
    model.set_adapter("second")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".second." in name for name in trained)


@every_method
def test_a_deleted_adapter_leaves_no_weights(base: Path, method: str) -> None:
    model = two(base, method)
    model.delete_adapter("second")
    assert not [name for name in model.state_dict() if "second" in name]


@every_method
def test_deleting_one_adapter_keeps_the_other(base: Path, method: str) -> None:
    model = two(base, method)
    before = logits(model)
    model.delete_adapter("second")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("second", METHODS)
@every_method
def test_methods_live_side_by_side(tiny_base: Path, method: str, second: str) -> None:
    """Also those that train layer norms beside those that read them. One family: what meets is methods."""
    model = two(tiny_base, method, second)
    assert torch.equal(logits(model), alone(tiny_base, method, seed=1))
    model.set_adapter("second")
    assert torch.equal(logits(model), alone(tiny_base, second, seed=2))


@every_method
def test_saved_weights_name_no_adapter(base: Path, tmp_path: Path, method: str) -> None:
    adapted(base, method).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "task" / "adapter_model.safetensors")
    assert not [name for name in saved if "task" in name]
