"""AdapterFusion (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247): several frozen adapters, composed."""

from __future__ import annotations

import torch
from torch import nn

from components.adapters.config import BottleneckConfig
from components.errors import ConfigError


class Fusion(nn.Module):
    """What the adapters of one site contribute together.

    query: (batch, tokens, hidden), what the adapters read; contributions: (batch, tokens, adapters, hidden), what each
    makes of it, without residual; the result has the residual added.
    """

    def __init__(self, children: list[str], config: BottleneckConfig) -> None:
        super().__init__()
        self.children_names = children
        self.config = config
        self.seen: torch.Tensor | None = None  # the weights of the last batch, (batch, tokens, adapters)

    def forward(self, query: torch.Tensor, contributions: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        weights = self.weights(query, contributions)
        if not self.training:
            self.seen = weights.detach()
        return self.values(torch.einsum("bta,btah->bth", weights, contributions)) + residual

    def weights(self, query: torch.Tensor, contributions: torch.Tensor) -> torch.Tensor:
        """How much each adapter counts, (batch, tokens, adapters); they sum to 1."""
        raise NotImplementedError

    def values(self, mixed: torch.Tensor) -> torch.Tensor:
        return mixed

    def regulariser(self) -> torch.Tensor | None:
        """A loss beside the task's, before its weight; None where there is none."""
        return None


class Attention(Fusion):
    """softmax(Q query · K contribution), then V: `dynamic`; without V: `static`.

    V begins as the identity (with 1e-6 beside the diagonal, as published) and is held near it.
    """

    def __init__(self, hidden: int, children: list[str], config: BottleneckConfig) -> None:
        super().__init__(children, config)
        self.query, self.key = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        for projection in (self.query, self.key):
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)
        self.value = nn.Linear(hidden, hidden, bias=False) if config.fusion == "dynamic" else None
        if self.value is not None:
            nn.init.constant_(self.value.weight, 1e-6)
            with torch.no_grad():
                self.value.weight.fill_diagonal_(1.0)

    def weights(self, query: torch.Tensor, contributions: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bth,btah->bta", self.query(query), self.key(contributions))
        return torch.softmax(scores, dim=-1)

    def values(self, mixed: torch.Tensor) -> torch.Tensor:
        # Linear, so that it may come after the sum as well as before: as many times cheaper as there are adapters.
        return mixed if self.value is None else self.value(mixed)

    def regulariser(self) -> torch.Tensor | None:
        """Sum of squares of V - 1, as published."""
        if self.value is None or not self.value.weight.requires_grad:
            return None
        weight = self.value.weight
        return (weight - torch.eye(len(weight), device=weight.device, dtype=weight.dtype)).pow(2).sum()


class Average(Fusion):
    """The same weights for every token: given, or learned (softmax of one number an adapter, equal at first)."""

    def __init__(self, children: list[str], config: BottleneckConfig) -> None:
        super().__init__(children, config)
        learned = config.fusion == "learned_average"
        self.scores = nn.Parameter(torch.zeros(len(children))) if learned else None
        given = dict(zip(config.fuse or (), config.fusion_weights or (), strict=False))
        fixed = torch.tensor([given.get(child, 1.0) for child in children])
        self.register_buffer("fixed", fixed / fixed.sum(), persistent=False)
        self.fixed: torch.Tensor

    def weights(self, query: torch.Tensor, contributions: torch.Tensor) -> torch.Tensor:
        weights = self.fixed if self.scores is None else torch.softmax(self.scores, dim=0)
        return weights.to(contributions.dtype).expand(*contributions.shape[:3])


def make(hidden: int, children: list[str], config: BottleneckConfig) -> Fusion:
    """The fusion that the configuration names. Raises ConfigError when it has fewer than two adapters to fuse."""
    if len(children) < 2:
        raise ConfigError(
            "two or more adapters at each place of a fusion",
            f"{', '.join(children) or 'none'} of {', '.join(config.fuse or ())}",
            "load the adapters first, all with the same layers",
        )
    return Attention(hidden, children, config) if config.fusion in ("dynamic", "static") else Average(children, config)
