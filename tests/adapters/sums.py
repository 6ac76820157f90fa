"""The residual sums that a model makes, seen by hooks at the places that a row of the table names."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from components.adapters import places
from components.adapters.places import Site, Stack


@dataclass
class Sum:
    """One pass through a site, as hooks saw it."""

    layer: str
    site: str
    normalised: bool
    x: Tensor
    h: Tensor | None = None
    normed: list[Tensor] | None = None  # what the norm reads and what it makes of that
    after: Tensor | None = None  # the layer's output


def first(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, tuple) else value
    return tensor


def sums(model: Any, stack: Stack, batch: dict[str, Tensor]) -> list[Sum]:
    """All sums of a stack in the order in which the model reads their x."""
    seen: list[Sum] = []
    latest: dict[tuple[str, str], Sum] = {}

    def watch(layer: str, kind: str, site: Site) -> None:
        def read(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            latest[layer, kind] = Sum(layer, kind, site.norm is not None, x.clone())
            seen.append(latest[layer, kind])

        def computed(_module: nn.Module, _args: Any, output: Any) -> None:
            latest[layer, kind].h = first(output).clone()

        def normed(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            latest[layer, kind].normed = [args[0].clone(), output.clone()]

        model.get_submodule(f"{layer}.{site.entry}").register_forward_pre_hook(read, with_kwargs=True)
        model.get_submodule(f"{layer}.{site.exit}").register_forward_hook(computed)
        if site.norm is not None:
            model.get_submodule(f"{layer}.{site.norm}").register_forward_hook(normed)

    def left(_module: nn.Module, _args: Any, output: Any) -> None:
        seen[-1].after = first(output).clone()

    for layer, _ in places.layers(model, (stack,)):
        for kind, site in stack.sites.items():
            watch(layer, kind, site)
        model.get_submodule(layer).register_forward_hook(left)
    with torch.no_grad():
        model(**batch)
    return seen


def check(found: list[Sum]) -> None:
    """h + x is what the norm reads or, without one, what goes on; and what goes on is the next sub-layer's x."""
    goes_on = []
    for one in found:
        assert one.h is not None
        if one.normalised:
            assert one.normed is not None
            assert torch.equal(one.normed[0], one.h + one.x)
        goes_on.append(one.normed[1] if one.normed else one.h + one.x)
    for (before, after), on in zip(pairwise(found), goes_on, strict=False):
        assert torch.equal(after.x, on)
        assert before.layer == after.layer or torch.equal(before.after, on)
    assert torch.equal(found[-1].after, goes_on[-1])
