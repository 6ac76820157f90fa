"""Sub-layers one after the other, as one node of autograd.

Between nodes autograd checks and counts what here is known: of all layers' adapters that takes 2.5 % of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from components.training.packing import Packing

if TYPE_CHECKING:
    from components.training.encoder import SubLayer


class Kept:
    """Of one node's forward pass for its backward pass, as in autograd's own context."""

    def __init__(self, needed: bool = True) -> None:
        """needed: are gradients of what the node reads?"""
        self.needs_input_grad = 3 * (needed,)
        self.saved_tensors: tuple[torch.Tensor, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors


def chains(sublayers: Sequence[SubLayer], fused: bool) -> bool:
    """Are all of them nodes whose gradients are known here? fused: by torch's fused attention."""
    return all(each.frozen and each.end and not (fused and each.is_attention and not each.first) for each in sublayers)


def through(sublayers: Sequence[SubLayer], h: torch.Tensor, x: torch.Tensor, packing: Packing) -> torch.Tensor:
    """What the last sub-layer makes, with gradients of all that learns in them.

    h, x: states of a trunk, which need none: what the first sub-layer made of x, and x.
    """
    ends = [each.end for each in sublayers]
    learned = [parameter for end in ends if end for parameter in end.learned]
    made: torch.Tensor = _Chain.apply(list(zip(sublayers, ends, strict=True)), packing, h, x.to(h.dtype), *learned)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return made


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, links: Any, packing: Packing, h: torch.Tensor, x: torch.Tensor, *learned: torch.Tensor
    ) -> torch.Tensor:
        (_, ctx.end), *rest = links
        own = iter(learned)
        ctx.of_end, ctx.packing, ctx.rest = Kept(needed=False), packing, []
        x = _ended(ctx.of_end, ctx.end, h, x, own)
        for sublayer, end in rest:
            node, of_h, of_end = sublayer.frozen.node(sublayer.first), Kept(), Kept()
            h = node.forward(of_h, x, sublayer.frozen, packing)
            x = _ended(of_end, end, h, x[packing.firsts] if sublayer.first else x, own)
            ctx.rest.append((sublayer.first, node, of_h, end, of_end))
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        learned: list[torch.Tensor] = []
        rest, ctx.rest = ctx.rest, None
        if rest is None:
            raise RuntimeError("expected one backward pass; found a second one, for which nothing is kept")
        while rest:
            first, node, of_h, end, of_end = rest.pop()
            _, grad, _, *own = end.node.backward(of_end, grad)
            learned[:0] = own
            through_h, *_ = node.backward(of_h, grad)
            if first:
                through_h.index_add_(0, ctx.packing.firsts, grad)
            else:
                through_h.add_(grad)
            grad = through_h
        _, _, _, *own = ctx.end.node.backward(ctx.of_end, grad)
        return None, None, None, None, *own, *learned


def _ended(kept: Kept, end: Any, h: torch.Tensor, x: torch.Tensor, learned: Any) -> torch.Tensor:
    made: torch.Tensor = end.node.forward(kept, end, h, x, *(next(learned) for _ in end.learned))
    return made
