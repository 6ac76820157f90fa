"""The adapted module: what was there, and bottlenecks beside it."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN

from components.adapters.config import BottleneckConfig
from components.errors import ConfigError


class Bottleneck(nn.Module):
    """up(f(down(x))), without the residual. x: (batch, tokens, hidden), and so is the result."""

    def __init__(self, hidden: int, config: BottleneckConfig) -> None:
        super().__init__()
        size = int(hidden // config.reduction_factor) if config.reduction_factor > 0 else 0
        if size < 1:
            raise ConfigError(
                f"a reduction factor above 0 and at most the hidden size, {hidden}",
                f"{config.reduction_factor}",
                "set adapter.bottleneck.reduction_factor",
            )
        activations = {"leakyrelu": "leaky_relu"}
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Linear(hidden, size)
        self.activation = ACT2FN[activations.get(config.non_linearity, config.non_linearity)]
        self.up = nn.Linear(size, hidden)
        # LoRA-like, as He et al. 2022 (https://arxiv.org/abs/2110.04366): the adapter starts as the identity.
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.up(self.activation(self.down(self.dropout(x))))
        return output


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """Wraps the module that an adapter follows. With several active adapters their contributions add up."""

    adapter_layer_names = ("bottleneck_adapters",)

    base_layer: Any  # a module; torch types attributes of modules too widely to call them
    bottleneck_adapters: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_adapters = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def hidden(self) -> int:
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter, drawn from the current random state."""
        self.bottleneck_adapters[adapter_name] = Bottleneck(self.hidden, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def contribution(self, x: torch.Tensor) -> torch.Tensor | None:
        """Sum of the active adapters' outputs, in the dtype of x; None when there are none."""
        if self.disable_adapters:
            return None
        total: torch.Tensor | None = None
        for name in self.active_adapters:
            if name in self.bottleneck_adapters:
                adapter = self.bottleneck_adapters[name]
                part = adapter(x if torch.is_autocast_enabled(x.device.type) else x.to(adapter.down.weight.dtype))
                total = part if total is None else total + part
        return None if total is None else total.to(x.dtype)


class AfterDense(BottleneckLayer):
    """Houlsby's place: h + adapter(h), before the residual sum. Wraps the dense module that computes h."""

    @property
    def hidden(self) -> int:
        return int(self.get_base_layer().out_features)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        h: torch.Tensor = self.base_layer(x, *args, **kwargs)
        added = self.contribution(h)
        return h if added is None else h + added


class AfterNorm(BottleneckLayer):
    """Pfeiffer's place: norm(s + adapter(norm(s))), s being the residual sum. Wraps the layer norm."""

    @property
    def hidden(self) -> int:
        return int(self.get_base_layer().normalized_shape[-1])

    def forward(self, s: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        normed: torch.Tensor = self.base_layer(s, *args, **kwargs)
        added = self.contribution(normed)
        return normed if added is None else self.base_layer(s + added, *args, **kwargs)
