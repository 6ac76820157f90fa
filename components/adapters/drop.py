"""AdapterDrop (Rücklé et al. 2021, https://arxiv.org/abs/2010.11918): the first layers do without their adapters."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from components.errors import ConfigError


class Draw:
    """How many layers do without their adapters in this step of training. None: as many as the configuration says."""

    def __init__(self) -> None:
        self.layers: int | None = None
        self.random = random.Random(torch.initial_seed())  # noqa: S311  # no secret


def draw(drawn: Draw, low: int, high: int, model: nn.Module, args: Any) -> None:
    """A forward pre-hook of the model: another number at each step, low and high included."""
    if torch.is_grad_enabled():  # nothing is drawn where nothing is learned
        drawn.layers = drawn.random.randint(low, high)


def reseed(model: nn.Module, seed: int) -> None:
    """From here on a PEFT model draws what it would draw anywhere else from this seed: in other processes, or later."""
    for module in model.modules():
        if isinstance(drawn := getattr(module, "draw", None), Draw):
            drawn.random.seed(seed)


def depth(model: nn.Module) -> int:
    """The number of layers up to the last one that carries adapters."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "bottleneck_adapters")]
    return 1 + max(int(site.index) for site in modules)


def drop(model: Any, layers: int, adapter: str | None = None) -> None:
    """Let the first `layers` of a PEFT model do without the adapter; saved with it.

    An adapter trained with `drop_range` allows any number in its range. Raises ConfigError for a number that leaves no
    layer.
    """
    deepest = depth(model) - 1
    if not 0 <= layers <= deepest:
        raise ConfigError(f"0 to {deepest} layers without adapters", f"{layers}", "leave the last layer its adapter")
    model.peft_config[adapter or model.active_adapter].drop_layers = layers
