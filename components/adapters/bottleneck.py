"""The adapter itself: a bottleneck, and where it stands beside a sub-layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from components.adapters.config import BottleneckConfig
from components.adapters.phm import PHM
from components.errors import ConfigError

Norm = Callable[[torch.Tensor], torch.Tensor]

# AdapterHub's names where transformers has others.
ACTIVATIONS = {"leakyrelu": "leaky_relu", "gelu_orig": "gelu"}


class Bottleneck(nn.Module):
    """scaling · up(f(down(z))) with what the configuration adds: layer norms, gate, dropout, masks.

    All tensors: (batch, tokens, hidden).
    """

    def __init__(
        self, hidden: int, layer: int, config: BottleneckConfig, shared: Mapping[str, nn.Module] | None = None
    ) -> None:
        """layer: its number.  shared: what all layers of this adapter share, by name."""
        super().__init__()
        self.config = config
        size = _size(hidden, config.reduction_of(layer))
        self.ln_before = nn.LayerNorm(hidden) if config.ln_before else None
        self.down: PHM | nn.Linear
        self.up: PHM | nn.Linear
        self.down = PHM(hidden, size, "down", config, shared or {}) if config.phm_layer else nn.Linear(hidden, size)
        self.activation = _activation(config.non_linearity)
        self.up = PHM(size, hidden, "up", config, shared or {}) if config.phm_layer else nn.Linear(size, hidden)
        shape = {"learned": 1, "channel": hidden}
        self.scaling = nn.Parameter(torch.ones(shape[config.scaling])) if isinstance(config.scaling, str) else None
        self.gate = nn.Linear(hidden, 1) if config.use_gating else None
        self.ln_after = nn.LayerNorm(hidden) if config.ln_after else None
        self.dropout = nn.Dropout(config.dropout)
        self.which_masked = nn.Linear(hidden, size) if config.mask_rate else None
        self.mask_loss: torch.Tensor | None = None
        _initialise(self, config.init_weights)

    @property
    def dtype(self) -> torch.dtype:
        return self.up.bias.dtype

    @property
    def _learns(self) -> bool:
        """Nothing is left to chance in an adapter that is frozen, as under a fusion."""
        return self.training and self.up.bias.requires_grad

    def reads(self, h: torch.Tensor, x: torch.Tensor, norm: Norm | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the adapter reads, and the residual around it. h: output of the sub-layer, x: its residual input."""
        config = self.config
        if config.is_parallel:
            return x, h
        if not config.original_ln_before:
            return h, h
        total = h + x
        read = norm(total) if norm else total
        return read, {True: h, False: read, "post_add": total}[config.residual_before_ln]

    def raised(self, z: torch.Tensor) -> torch.Tensor:
        """scaling · up(f(down(z))): what AdapterFusion attends to."""
        inner = self.activation(self.down(z if self.ln_before is None else self.ln_before(z)))
        inner, kept = self._masked(inner)
        up: torch.Tensor = self.up(inner)
        if kept is not None and self.which_masked is not None:
            told = self.which_masked(up)
            self.mask_loss = nn.functional.binary_cross_entropy_with_logits(told.float(), kept.float())
        up = self._by_rows(up)
        scaling: Any = self.config.scaling if self.scaling is None else self.scaling
        scaled: torch.Tensor = up if self.scaling is None and scaling == 1 else up * scaling
        return scaled

    def forward(self, z: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The adapter's output with the residual around it."""
        output: torch.Tensor = self.dropout(self.raised(z))
        if self.gate is not None:
            output = output * torch.sigmoid(self.gate(z)).mean(dim=1, keepdim=True)
        if self.ln_after is None:
            return output + residual
        # Beside the sub-layer, its output never passes the adapter's own layer norm.
        before = self.config.adapter_residual_before_ln and not self.config.is_parallel
        normed: torch.Tensor = self.ln_after(output + residual) if before else self.ln_after(output) + residual
        return normed

    def _masked(self, inner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not (self._learns and self.config.mask_rate):
            return inner, None
        kept = torch.rand_like(inner) >= self.config.mask_rate
        return inner * kept, kept

    def _by_rows(self, up: torch.Tensor) -> torch.Tensor:
        """Stochastic depth (Huang et al. 2016): whole rows pass by, the others are scaled up."""
        share = self.config.stochastic_depth
        if not (self._learns and share):
            return up
        kept = torch.rand(len(up), 1, 1, device=up.device) >= share
        return up * kept / (1 - share)


def _size(hidden: int, reduction: float) -> int:
    size = int(hidden // reduction) if reduction > 0 else 0
    if size < 1:
        raise ConfigError(
            f"a reduction factor above 0 and at most the hidden size, {hidden}",
            f"{reduction:g}",
            "set reduction_factor",
        )
    return size


def _activation(name: str) -> nn.Module:
    name = ACTIVATIONS.get(name.lower(), name.lower())
    if name not in ACT2FN:
        raise ConfigError("an activation of transformers", f"{name!r}", f"choose among {', '.join(sorted(ACT2FN))}")
    activation: nn.Module = ACT2FN[name]
    return activation


def _initialise(bottleneck: Bottleneck, kind: str) -> None:
    """mam, as LoRA and He et al. 2022: the adapter starts as the identity, for what comes last starts at zero."""
    down, up = bottleneck.down, bottleneck.up
    for projection in (down, up):
        nn.init.zeros_(projection.bias)
        if isinstance(projection, nn.Linear) and kind == "bert":
            nn.init.normal_(projection.weight, std=0.02)
        elif isinstance(projection, nn.Linear) and kind == "houlsby":
            nn.init.trunc_normal_(projection.weight, std=0.01, a=-0.02, b=0.02)
    if kind == "mam":
        if isinstance(down, nn.Linear):
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight if isinstance(up, nn.Linear) else up.weights.last)
