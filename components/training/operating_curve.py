"""What AdapterDrop costs and saves: score and latency for every number of layers without adapters."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from components.adapters.drop import depth, drop
from components.config import TrainingConfig
from components.evaluation import metrics
from components.training.batching import Tokens
from components.training.loop import predict


@dataclass(frozen=True)
class Point:
    """layers: the first ones, without adapters.  score: the validation metric, higher is better.
    milliseconds: of computing, a text.
    """

    layers: int
    score: float
    milliseconds: float


def measure(model: Any, tokens: Tokens, training: TrainingConfig, padding: int, device: torch.device) -> list[Point]:
    """Points from the layers that are dropped anyway to all layers. The model is left as it was found."""
    config = model.peft_config[model.active_adapter]
    before = config.drop_layers
    curve = []
    for layers in range(before, depth(model) + 1):
        config.drop_layers = layers
        begin = time.perf_counter()
        probabilities = predict(model, tokens, padding, device)
        seconds = time.perf_counter() - begin
        measured = metrics.measure(tokens.labels, probabilities)
        score = metrics.score(measured, training.metric)
        curve.append(Point(layers, score, round(1000 * seconds / len(tokens.labels), 4)))
    config.drop_layers = before
    return curve


def choose(curve: list[Point], margin: float) -> int:
    """The most layers whose score is at most `margin` below that with all adapters that learned; never all layers."""
    return max(point.layers for point in curve[:-1] if point.score >= curve[0].score - margin)


def settle(model: Any, curve: list[Point], margin: float) -> dict[str, Any]:
    """Drop what the margin allows, for good, and tell of it as it goes into the bundle's metrics."""
    chosen = choose(curve, margin)
    drop(model, chosen)
    return {"chosen": chosen, "margin": margin, "points": [asdict(point) for point in curve]}
