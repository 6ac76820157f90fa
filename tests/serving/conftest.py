"""Bundles that were trained on one tiny base, for the tests of serving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from components.config import SplitConfig
from components.data import ledger, rows
from components.data.split import split
from components.training.spec import DataRef
from tests.conftest import make_base, toy_rows
from tests.registry.registered import seal
from tests.training.toy_jobs import LABELS, finished, saved_split

Bundle = Callable[..., Path]


@pytest.fixture(scope="session")
def lively_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), initializer_range=0.1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataRef:
    return saved_split(tmp_path_factory.mktemp("split"))


@pytest.fixture(scope="session")
def bundle_of(lively_base: Path, data: DataRef, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Trains the bundle of a method once: an epoch, by a seed, with so many labels."""
    made: dict[tuple[object, ...], Path] = {}

    def train(method: str = "pfeiffer", seed: int = 1, labels: int = 2) -> Path:
        key = (method, seed, labels)
        if key not in made:
            names = ("bad", "good", "odd", "even")[:labels]
            there = data if labels == len(LABELS) else labelled(tmp_path_factory.mktemp("split"), names)
            folder = tmp_path_factory.mktemp("bundles") / f"{method}-{seed}-{labels}"
            made[key] = finished(lively_base, there, method, folder, epochs=1, seed=seed, labels=names)
        return made[key]

    return train


def labelled(folder: Path, names: tuple[str, ...]) -> DataRef:
    """A split of toy rows that have these labels in turn."""
    texts = [text for text, _ in toy_rows(200)]
    table = Dataset.from_dict({"text": texts, "label": [names[row % len(names)] for row in range(len(texts))]})
    made = split(rows.clean(table, names), SplitConfig(validation=0.15, test=0.25))
    ledger.save(made, str(folder))
    return DataRef(uri=str(folder), digest=made.digest)


def dropped(folder: Path, to: Path) -> Path:
    """A copy of a bundle whose first layer does without its adapter, whose weights there are no numbers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, "drop_layers": 1}))
    weights = load_file(to / "adapter_model.safetensors")
    for name, tensor in weights.items():
        if ".layer.0." in name and "bottleneck_" in name:
            tensor.fill_(torch.nan)
    save_file(weights, to / "adapter_model.safetensors")
    seal(to)
    return to
