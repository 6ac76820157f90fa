"""AdapterDrop (Rücklé et al. 2021, https://arxiv.org/abs/2010.11918): the first layers do without their adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from components.errors import ConfigError


def depth(model: nn.Module) -> int:
    """The number of layers up to the last one that carries adapters."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "bottleneck_adapters")]
    return 1 + max(int(site.index) for site in modules)


def drop(model: Any, layers: int, adapter: str | None = None) -> None:
    """Let the first `layers` of a PEFT model do without the adapter; saved with it.

    An adapter trained with `drop_range` allows any number in its range. Raises ConfigError for a number that leaves no
    layer, and for adapters with prefixes, which stay in every layer.
    """
    config, deepest = model.peft_config[adapter or model.active_adapter], depth(model) - 1
    if not 0 <= layers <= deepest:
        raise ConfigError(f"0 to {deepest} layers without adapters", f"{layers}", "leave the last layer its adapter")
    if config.prefix_length:
        raise ConfigError("an adapter without prefixes, for AdapterDrop", "prefixes", "choose another method")
    config.drop_layers = layers
