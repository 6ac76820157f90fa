"""Parametrised hypercomplex multiplication: the projections of Compacter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from components.adapters.config import BottleneckConfig
from components.errors import ConfigError

OWN_RULE = 0.01  # spread at the start of a rule that is not shared, as in AdapterHub


class Factors(nn.Module):
    """n matrices, (n, rows, columns): as such, or left, (n, rows, rank), times right, (n, rank, columns).

    rank: None for matrices as such.
    """

    def __init__(self, n: int, rows: int, columns: int, rank: int | None) -> None:
        super().__init__()
        if rank is None:
            self.factors = nn.Parameter(torch.empty(n, rows, columns))
        else:
            self.left = nn.Parameter(torch.empty(n, rows, rank))
            self.right = nn.Parameter(torch.empty(n, rank, columns))

    def matrices(self) -> torch.Tensor:
        return self.factors if hasattr(self, "factors") else torch.bmm(self.left, self.right)

    @property
    def last(self) -> torch.Tensor:
        """Where this is zero, so are the matrices."""
        return self.factors if hasattr(self, "factors") else self.right

    def draw(self) -> None:
        for parameter in self.parameters(recurse=False):
            for matrix in parameter:
                nn.init.xavier_normal_(matrix)


class Rule(Factors):
    """The small factors A_i, (n, n, n)."""

    def __init__(self, config: BottleneckConfig, spread: float) -> None:
        n = config.phm_dim
        super().__init__(n, n, n, 1 if config.factorized_phm_rule else None)
        for name, parameter in list(self.named_parameters()):
            nn.init.normal_(parameter, std=spread)
            if not config.learn_phm:
                delattr(self, name)
                self.register_buffer(name, parameter.detach())


class PHM(Factors):
    """y = x H + b with H = Σ_i A_i ⊗ B_i (Mahabadi et al. 2021, equations 4 to 6).

    x: (batch, tokens, inputs), y: (batch, tokens, outputs). A_i: (n, n), by the rule; B_i: (inputs / n, outputs / n),
    of rank phm_rank where they are factorised. Compacter shares the A_i between all layers; the B_i may be shared, too.
    Raises ConfigError when n divides inputs or outputs not.
    """

    def __init__(
        self, inputs: int, outputs: int, position: str, config: BottleneckConfig, shared: Mapping[str, nn.Module]
    ) -> None:
        """position: `down` or `up`.  shared: what `shared_parts` made for all layers."""
        n = config.phm_dim
        if inputs % n or outputs % n:
            raise ConfigError(
                f"hidden and bottleneck sizes that phm_dim, {n}, divides",
                f"{inputs} and {outputs}",
                "change reduction_factor or phm_dim",
            )
        if config.shared_W_phm:
            nn.Module.__init__(self)
        else:
            super().__init__(n, inputs // n, outputs // n, config.phm_rank if config.factorized_phm_W else None)
            self.draw()
        self.bias = nn.Parameter(torch.zeros(outputs))
        if not config.shared_phm_rule:
            self.rule = Rule(config, OWN_RULE)
        # In a mapping they are no sub-modules: they are saved once, where they belong.
        self._shared = {kind: part for kind, part in shared.items() if isinstance(part, Factors)}
        self._position = position

    @property
    def weight(self) -> torch.Tensor:
        """H, (inputs, outputs)."""
        rule = self._shared.get("rule") or self.rule
        weights = self.weights.matrices()
        products = torch.einsum("nab,nij->aibj", rule.matrices().to(weights.dtype), weights)
        return products.reshape(-1, self.bias.numel())

    @property
    def weights(self) -> Factors:
        """The B_i, which may be of all layers."""
        return self._shared.get(self._position, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def shared_parts(hidden: int, config: BottleneckConfig) -> Iterator[tuple[str, nn.Module]]:
    """What all layers of an adapter share, by name: the `rule`, the factors B_i of `down` and of `up`."""
    if config.shared_phm_rule:
        yield "rule", Rule(config, config.phm_init_range)
    if config.shared_W_phm:
        n, size = config.phm_dim, int(hidden // config.reduction_of(0))
        rank = config.phm_rank if config.factorized_phm_W else None
        for position, inputs, outputs in (("down", hidden, size), ("up", size, hidden)):
            factors = Factors(n, inputs // n, outputs // n, rank)
            factors.draw()
            yield position, factors
