"""The end of a sub-layer, one node of autograd: gradients of what an adapter in it learns, and of what it reads.

    norm(t)                               t = h + x
    norm(t + up(f(down(norm(t)))))        with an adapter

So where a bottleneck, with nothing else to it, stands between two passes through the frozen layer norm of its sub-layer
(Pfeiffer et al. 2021). Composed of modules that is some fifty nodes forth and back, which cast and copy more than they
compute.

All tensors: h, x (tokens or rows, hidden), of one dtype, which is that of what is returned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from components.adapters.bottleneck import Bottleneck
from components.adapters.layer import Site
from components.training.frozen import ACTIVATIONS

aten = torch.ops.aten
# What a configuration may not have, beside its places and sizes.
PLAIN = {
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "is_parallel": False,
    "ln_before": False,
    "ln_after": False,
    "phm_layer": False,
    "use_gating": False,
    "scaling": 1.0,
    "dropout": 0.0,
    "mask_rate": 0.0,
    "stochastic_depth": 0.0,
    "drop_range": None,
}


class End:
    """Of a frozen layer norm, with the adapter that it is around, if there is one."""

    def __init__(self, adapter: Bottleneck | None, norm: nn.LayerNorm) -> None:
        self._maps: list[Any] = []
        self.node: Any = _Norm
        if adapter is not None:
            self.node, self._maps = _End, [adapter.down, adapter.up]
            self.activation, self.derived = ACTIVATIONS[adapter.config.non_linearity]
        self._norm, self._weights = norm, (norm.weight.detach(), norm.bias.detach())

    @staticmethod
    def of(site: nn.Module, norm: nn.Module) -> End | None:
        """None where anything else works at this site, or the norm learns. On GPUs norms of few bits have no weights of
        many, which they have here.
        """
        if type(norm) is not nn.LayerNorm or norm.weight.is_cuda or norm.bias is None:
            return None
        if any(parameter.requires_grad for parameter in norm.parameters()):
            return None
        if not isinstance(site, Site) or not site.may_work:
            return End(None, norm)
        adapter = site.alone
        if not isinstance(adapter, Bottleneck) or adapter.config.non_linearity not in ACTIVATIONS:
            return None
        plain = all(getattr(adapter.config, name) == value for name, value in PLAIN.items())
        return End(adapter, norm) if plain else None

    @property
    def learned(self) -> list[torch.Tensor]:
        return [each for linear in self._maps for each in (linear.weight, linear.bias)]

    def __call__(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.node.apply(self, h, x, *self.learned)
        return made

    def normed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """And what its gradient needs: mean and scale of each row."""
        made: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = aten.native_layer_norm(
            x, self._norm.normalized_shape, *self._weights, self._norm.eps
        )
        return made

    def through_norm(self, grad: torch.Tensor, x: torch.Tensor, *statistics: torch.Tensor) -> torch.Tensor:
        """The gradient of x in `normed`."""
        made: torch.Tensor = aten.native_layer_norm_backward(
            grad, x, self._norm.normalized_shape, *statistics, *self._weights, [True, False, False]
        )[0]
        return made


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: End, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        total = h + x
        made, *statistics = own.normed(total)
        ctx.save_for_backward(total, *statistics)
        ctx.own = own
        return made

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = ctx.own.through_norm(grad, *ctx.saved_tensors)
        return None, grad, grad


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: End, h: torch.Tensor, x: torch.Tensor, *learned: torch.Tensor) -> torch.Tensor:
        down, down_bias, up, up_bias = (each.to(h.dtype) for each in learned)
        total = h + x
        read, *of_read = own.normed(total)
        inner = torch.addmm(down_bias, read, down.t())
        active = own.activation(inner)
        output = torch.addmm(up_bias, active, up.t()).add_(total)
        made, *of_output = own.normed(output)
        ctx.save_for_backward(total, read, *of_read, inner, active, output, *of_output, down, up)
        ctx.own, ctx.dtype = own, learned[0].dtype
        return made

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, read, mean, scale, inner, active, output, mean_of_output, scale_of_output, down, up = ctx.saved_tensors
        own: End = ctx.own
        grad = own.through_norm(grad, output, mean_of_output, scale_of_output)
        within = own.derived(grad @ up, inner)
        learned = [
            each
            for of_output, of_input in ((within, read), (grad, active))
            for each in ((of_output.t() @ of_input).to(ctx.dtype), of_output.sum(0, dtype=ctx.dtype))
        ]
        if any(ctx.needs_input_grad[1:3]):
            grad = own.through_norm(within @ down, total, mean, scale).add_(grad)
        return None, grad, grad, *learned
