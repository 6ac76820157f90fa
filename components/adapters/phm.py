"""Parametrised hypercomplex multiplication: the projections of Compacter."""

from __future__ import annotations

import torch
from torch import nn

from components.adapters.config import BottleneckConfig
from components.errors import ConfigError


class Rule(nn.Module):
    """The small factors A_i, (n, n, n), of all layers of an adapter: Compacter shares them."""

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__()
        n = config.phm_dim
        self.factors = nn.Parameter(torch.empty(n, n, n).normal_(std=config.phm_init_range))


class PHM(nn.Module):
    """y = x H + b with H = Σ_i A_i ⊗ (s_i t_i), of rank r each (Mahabadi et al. 2021, equations 4 to 6).

    x: (batch, tokens, inputs), y: (batch, tokens, outputs). A_i: (n, n), shared; s_i: (inputs / n, r),
    t_i: (r, outputs / n). Raises ConfigError when n divides inputs or outputs not.
    """

    def __init__(self, inputs: int, outputs: int, config: BottleneckConfig, rule: Rule) -> None:
        super().__init__()
        n, rank = config.phm_dim, config.phm_rank
        if inputs % n or outputs % n:
            raise ConfigError(
                f"hidden and bottleneck sizes that phm_dim, {n}, divides",
                f"{inputs} and {outputs}",
                "change reduction_factor or phm_dim",
            )
        self.left = nn.Parameter(torch.empty(n, inputs // n, rank))
        self.right = nn.Parameter(torch.empty(n, rank, outputs // n))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self._rule = (rule,)  # in a tuple it is no sub-module: it is saved once, where it belongs
        for factors in (self.left, self.right):
            for factor in factors:
                nn.init.xavier_normal_(factor)

    @property
    def weight(self) -> torch.Tensor:
        """H, (inputs, outputs)."""
        products = torch.einsum("nab,nij->aibj", self._rule[0].factors, torch.bmm(self.left, self.right))
        return products.reshape(-1, self.bias.numel())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias
