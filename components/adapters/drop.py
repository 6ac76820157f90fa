"""AdapterDrop (Rücklé et al. 2021, https://arxiv.org/abs/2010.11918): the first layers do without their adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from components.errors import ConfigError


class Draw:
    """How many layers do without their adapters in this step of training. None: as many as the configuration says."""

    def __init__(self) -> None:
        self.layers: int | None = None


def draw(drawn: Draw, low: int, high: int, model: nn.Module, args: Any) -> None:
    """A forward pre-hook of the model: another number at each step, low and high included."""
    if torch.is_grad_enabled():  # nothing is drawn where nothing is learned
        drawn.layers = int(torch.randint(low, high + 1, ()))


def drop(model: Any, layers: int, adapter: str | None = None) -> None:
    """Let the first `layers` of a PEFT model do without the adapter; saved with it.

    An adapter trained with `drop_range` allows any number in its range. Raises ConfigError for a number that leaves no
    layer.
    """
    name = adapter or model.active_adapter
    deepest = max(module.index for module in model.modules() if hasattr(module, "bottleneck_adapters"))
    if not 0 <= layers <= deepest:
        raise ConfigError(f"0 to {deepest} layers without adapters", f"{layers}", "leave the last layer its adapter")
    model.peft_config[name].drop_layers = layers
