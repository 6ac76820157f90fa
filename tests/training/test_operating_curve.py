"""AdapterDrop in a job: the curve over all depths, and the choice that the bundle keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.methods import settings_of
from components.training.operating_curve import Point, choose
from components.training.spec import DataRef
from tests.training.toy_jobs import finished


@pytest.mark.parametrize(
    ("scores", "margin", "chosen"),
    [
        ((0.9, 0.9, 0.8, 0.2), 0.0, 1),
        ((0.9, 0.9, 0.8, 0.2), 0.1, 2),
        ((0.9, 0.5, 0.89, 0.2), 0.05, 2),
        ((0.9, 0.5, 0.4, 0.2), 0.1, 0),
        ((0.9, 0.9, 0.9, 0.9), 0.5, 2),  # the last layer keeps its adapter
        ((-0.3, -0.35, -0.5, -0.9), 0.1, 1),  # a loss, turned
    ],
)
def test_the_most_layers_within_the_margin(scores: tuple[float, ...], margin: float, chosen: int) -> None:
    assert choose([Point(layers, score, 1.0) for layers, score in enumerate(scores)], margin) == chosen


def test_the_margin_is_below_the_score_with_all_that_learned() -> None:
    scores = (0.9, 0.88, 0.2)
    assert choose([Point(layers, score, 1.0) for layers, score in enumerate(scores, 2)], 0.05) == 3


@pytest.mark.parametrize("dropped", [{"drop_layers": 1}, {"drop_range": (1, 1)}])
def test_adapters_that_never_learned_stay_dropped(
    lively_base: Path, data: DataRef, tmp_path: Path, dropped: dict[str, Any]
) -> None:
    settings = settings_of("pfeiffer", reduction_factor=2, drop_margin=0.0, **dropped)
    folder = finished(lively_base, data, "pfeiffer", tmp_path / "bundle", epochs=1, settings=settings)
    curve = json.loads((folder / "metrics.json").read_text())["operating_curve"]
    assert [point["layers"] for point in curve["points"]] == [1, 2]
    assert json.loads((folder / "adapter_config.json").read_text())["drop_layers"] == 1


def test_the_bundle_keeps_what_was_chosen(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    settings = settings_of("pfeiffer", reduction_factor=2, drop_range=(0, 1), drop_margin=1.0)
    folder = finished(lively_base, data, "pfeiffer", tmp_path / "bundle", settings=settings)
    curve = json.loads((folder / "metrics.json").read_text())["operating_curve"]
    assert [point["layers"] for point in curve["points"]] == [0, 1, 2]
    assert curve["chosen"] == 1
    assert json.loads((folder / "adapter_config.json").read_text())["drop_layers"] == 1


def test_prefixes_are_folded_into_the_bundle(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = finished(lively_base, data, "mam", tmp_path / "bundle", epochs=1)
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        prefixes = [name for name in tensors.keys() if "bottleneck_parts" in name]  # noqa: SIM118  # no dict
    assert [name.rsplit(".", 1)[-1] for name in prefixes] == ["flat"]
