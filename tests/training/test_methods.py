"""Every method by name: from a spec to a bundle that loads again and answers the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from components import base_model
from components.config import BaseConfig
from components.registry import bundle
from components.training import batching, loop
from components.training.spec import DataRef, JobSpec
from tests.training.toy_jobs import ADAPTERS, finished, toy_spec, toy_split

every_adapter = pytest.mark.parametrize("method", ADAPTERS)


@pytest.fixture(scope="module")
def bundles(lively_base: Path, data: DataRef, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    return {method: finished(lively_base, data, method, root / method, epochs=2) for method in ADAPTERS}


@every_adapter
def test_a_loaded_bundle_answers_what_the_job_answered(
    bundles: dict[str, Path], lively_base: Path, method: str
) -> None:
    manifest = bundle.read_manifest(bundles[method])
    base = base_model.find(BaseConfig(name=str(lively_base)))
    torch.manual_seed(123)  # another state than the job's: nothing may be left to chance
    model = bundle.load_model(bundles[method], manifest, base)
    tokens = batching.tokenise(toy_split().test, base_model.load_tokenizer(base), manifest.max_tokens)
    found = loop.predict(model, tokens, 0, torch.device("cpu"))
    assert np.array_equal(found, bundle.read_predictions(bundles[method]).probabilities)


@every_adapter
def test_training_lowers_the_loss(bundles: dict[str, Path], method: str) -> None:
    history = json.loads((bundles[method] / "metrics.json").read_text())["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


@every_adapter
def test_the_same_spec_gives_the_same_bytes(
    bundles: dict[str, Path], lively_base: Path, data: DataRef, tmp_path: Path, method: str
) -> None:
    again = finished(lively_base, data, method, tmp_path / "again", epochs=2)
    for name in ("adapter_config.json", "adapter_model.safetensors", bundle.PREDICTIONS):
        assert (again / name).read_bytes() == (bundles[method] / name).read_bytes(), name


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_modules_are_listed_in_order(bundles: dict[str, Path], method: str) -> None:
    """PEFT keeps them in sets, whose order differs from process to process."""
    config = json.loads((bundles[method] / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) > 1


@pytest.mark.parametrize(("method", "settings"), [("lora", None), ("full", {"r": 2}), ("bitfit", {"length": 3})])
def test_settings_of_another_method_are_refused(
    lively_base: Path, data: DataRef, method: str, settings: dict[str, int] | None
) -> None:
    plain = toy_spec(lively_base, data, method).model_dump()
    with pytest.raises(ValidationError, match=f"method {method} has settings of type"):
        JobSpec.model_validate({**plain, "settings": settings})
