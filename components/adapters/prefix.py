"""Prefix tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190): learned keys and values before those of the text.

They enter through transformers' attention interface, so that no model's code is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from components.adapters.config import BottleneckConfig
from components.errors import ConfigError

ATTENTION = "adapterline_sdpa"  # this name in `config._attn_implementation`


class Prefix(nn.Module):
    """Keys and values of one stack of layers, (length, layers · 2 · width), as such or made by a small network.

    width: key-value heads · features of a head.  The network, tanh between two linear maps of learned (length, hidden)
    inputs, steadies training and can be folded away after it.
    """

    def __init__(self, layers: list[int], hidden: int, heads: int, width: int, config: BottleneckConfig) -> None:
        """layers: the numbers of those that have prefixes, in the order of the keys and values."""
        super().__init__()
        self.layers, self.heads, self.width = layers, heads, width
        self.take_positions = config.prefix_positions
        size = config.prefix_bottleneck
        outputs = len(layers) * 2 * width
        if size is None:
            self.flat = nn.Parameter(torch.randn(config.prefix_length, outputs))
            return
        self.inputs = nn.Parameter(torch.randn(config.prefix_length, hidden))
        self.inner_layer, self.outer_layer = nn.Linear(hidden, size), nn.Linear(size, outputs)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def folded(self) -> torch.Tensor:
        """(length, layers · 2 · width): keys and values of the first layer, of the second, ..."""
        if hasattr(self, "flat"):
            return self.flat
        made: torch.Tensor = self.outer_layer(torch.tanh(self.inner_layer(self.inputs)))
        return made

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (heads, length, features) each."""
        begin = 2 * self.width * self.layers.index(layer)
        part = slice(begin, begin + 2 * self.width)
        if hasattr(self, "flat"):
            both = self.flat[:, part]
        else:
            inner = torch.tanh(self.inner_layer(self.inputs))
            both = nn.functional.linear(inner, self.outer_layer.weight[part], self.outer_layer.bias[part])
        keys, values = both.view(len(both), 2, self.heads, -1).permute(1, 2, 0, 3)
        return keys, values

    def fold(self) -> None:
        """Keep the keys and values, let go of the network that made them."""
        if not hasattr(self, "flat"):
            flat, learns = self.folded().detach(), self.inputs.requires_grad
            del self.inputs, self.inner_layer, self.outer_layer
            self.flat = nn.Parameter(flat, requires_grad=learns)


def fold(model: Any) -> None:
    """Fold the prefixes of a trained model: it computes the same from fewer parameters. Others are left as they are."""
    for module in model.modules():
        if isinstance(module, Prefix):
            module.fold()
    for config in getattr(model, "peft_config", {}).values():
        if isinstance(config, BottleneckConfig):
            config.prefix_bottleneck = None


@dataclass(frozen=True)
class Slot:
    """Where an attention module finds its prefixes: in what part of which shared parts, and as which layer."""

    shared: Any  # the SharedParts of the model
    part: str
    layer: int
    distances: Any = None  # the module that makes the stack's relative position biases, in T5

    def active(self) -> list[Prefix]:
        if self.shared.disable_adapters:
            return []
        parts = self.shared.bottleneck_parts
        found = [parts[name][self.part] for name in self.shared.active_adapters
                 if name in parts and self.part in parts[name]]  # fmt: skip
        return [prefix for prefix in found if self.layer in prefix.layers]


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention, with the prefixes of the module's active adapters in front.

    query: (batch, heads, tokens, features); key, value: (batch, key-value heads, keys, features). Prefixes are visible
    from every token, whatever the mask.
    """
    slot: Any = module.__dict__.get("bottleneck_slot")
    for prefix in slot.active() if slot else ():
        keys, values = (part.to(key.dtype).expand(len(key), -1, -1, -1) for part in prefix.of_layer(slot.layer))
        causal = kwargs.get("is_causal")
        if attention_mask is None and (getattr(module, "is_causal", True) if causal is None else causal):
            attention_mask = _causal(query, key)
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        length = keys.shape[2]
        if attention_mask is not None:
            visible = True if attention_mask.dtype == torch.bool else 0.0
            attention_mask = nn.functional.pad(attention_mask, (length, 0), value=visible)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = _widened(kwargs["position_bias"], length, slot if prefix.take_positions else None)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


def _widened(bias: torch.Tensor, length: int, slot: Slot | None) -> torch.Tensor:
    """Relative position biases, (1, heads, tokens, keys), with `length` more keys in front.

    These have no position (a bias of 0), unless there is a slot with distances: then they take the first ones, and all
    other keys are that much further away.
    """
    if slot is None or slot.distances is None:
        return nn.functional.pad(bias, (length, 0))
    tokens, keys = bias.shape[2:]
    made: torch.Tensor = slot.distances.compute_bias(
        tokens, keys + length, device=bias.device, past_seen_tokens=keys - tokens
    )
    return made


def _causal(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    tokens, keys = query.shape[2], key.shape[2]
    return torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)[None, None]


def install(model: Any) -> None:
    """Let the model's attention look for prefixes. Raises ConfigError for a model whose attention is its own code."""
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:  # transformers warns, and keeps the old one
        raise ConfigError(
            "a base whose attention takes prefixes",
            f"family {model.config.model_type!r}, which computes it by code of its own",
            "choose a method without prefixes, or another base",
        )


# At import, so that a model that comes pickled into another process finds it.
AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
