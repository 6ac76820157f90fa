"""Modules of one form, one a row of a batch, computed at once: their weights stacked, not one call for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from components.adapters.bottleneck import Bottleneck, Norm

# What of a configuration decides how an adapter computes, beside its weights.
FORM = (
    "non_linearity", "is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln", "scaling",
    "phm_layer",
)  # fmt: skip


def form(part: nn.Module) -> tuple[Any, ...] | None:
    """Adapters of equal form can be computed at once; None for one that cannot."""
    if not isinstance(part, Bottleneck) or part.ln_before or part.ln_after or part.gate:
        return None
    return (part.dtype, part.down.bias.shape, *(getattr(part.config, name) for name in FORM))


def output(parts: Sequence[Bottleneck], h: torch.Tensor, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """Adapters of one form in eval mode, each on its row, residual included.

    parts: one a row.  h, x: (rows, tokens, hidden), what the sub-layer gave and read.
    """
    z, residual = parts[0].reads(h, x, norm)
    inner = parts[0].activation(through([part.down for part in parts], z))
    up = through([part.up for part in parts], inner)
    scaling: Any = parts[0].config.scaling
    if parts[0].scaling is not None:
        scaling = _of_rows([part.scaling for part in parts])[:, None]
    scaled: torch.Tensor = up * scaling
    return scaled + residual


def through(modules: Sequence[nn.Module], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Each row through its own module. Linear ones and layer norms of one size take a call in all; others, one each.

    modules: one a row.  x: (rows, …, inputs).  Returns (rows, …, widest outputs): -inf fills the rows of smaller ones.
    """
    first = modules[0]
    if all(module is first for module in modules):
        return first.forward(x, *args, **kwargs)  # type: ignore[no-any-return]  # past its hooks, which want whole batches
    if _are_like(nn.Linear, modules):
        return _linear(modules, x)
    if _are_like(nn.LayerNorm, modules):
        plain = nn.functional.layer_norm(x, first.normalized_shape, None, None, first.eps)  # type: ignore[arg-type]
        shape = (len(x), *[1] * (x.ndim - 2), -1)
        weight, bias = (_of_rows([getattr(module, name) for module in modules]) for name in ("weight", "bias"))
        normed: torch.Tensor = plain * weight.view(shape) + bias.view(shape)
        return normed.to(plain.dtype)
    made = [(rows, each.forward(x[rows], *args, **kwargs)) for each, rows in _grouped(modules, x.device)]
    widest = max(part.shape[-1] for _, part in made)
    whole: torch.Tensor = made[0][1].new_full((len(x), *made[0][1].shape[1:-1], widest), -torch.inf)
    for rows, part in made:
        whole[rows, ..., : part.shape[-1]] = part
    return whole


def _are_like(kind: type[nn.Module], modules: Sequence[nn.Module]) -> bool:
    first: Any = modules[0]
    return all(
        type(module) is kind
        and module.bias is not None
        and module.weight.shape == first.weight.shape
        and getattr(module, "eps", None) == getattr(first, "eps", None)
        for module in dict.fromkeys(modules)
    )


def _linear(modules: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
    """A matrix product a row; or a module, where equally many rows of each follow one another."""
    distinct = list(dict.fromkeys(modules))
    run, rest = divmod(len(modules), len(distinct))
    if rest or list(modules) != [module for module in distinct for _ in range(run)]:
        distinct, run = list(modules), 1
    weight = _of_rows([module.weight for module in distinct])
    bias = _of_rows([module.bias for module in distinct])
    made: torch.Tensor = torch.baddbmm(bias[:, None], x.reshape(len(distinct), -1, x.shape[-1]), weight.mT)
    return made.view(*x.shape[:-1], bias.shape[-1])


def _of_rows(tensors: Sequence[Any]) -> torch.Tensor:
    """(rows, …): stacked once each, and taken as often as rows have them."""
    distinct = {id(tensor): tensor for tensor in tensors}
    stack = torch.stack(list(distinct.values()))
    if len(distinct) == len(tensors):
        return stack
    place = {key: index for index, key in enumerate(distinct)}
    return stack[torch.tensor([place[id(tensor)] for tensor in tensors], device=stack.device)]


def _grouped(modules: Sequence[nn.Module], device: torch.device) -> list[tuple[nn.Module, torch.Tensor]]:
    rows: dict[nn.Module, list[int]] = {}
    for row, module in enumerate(modules):
        rows.setdefault(module, []).append(row)
    return [(module, torch.tensor(where, device=device)) for module, where in rows.items()]
