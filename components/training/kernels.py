"""Which of several ways to compute the same is fastest on this device, by a short measurement that is made once.

What wins differs by an order of magnitude: bfloat16 runs at twice float32 on one processor, at ten times on another and
at a tenth on a third; the backward pass of torch's fused attention on CPUs loses to plain products for short texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as everybody calls it
from torch.nn.attention import SDPBackend, sdpa_kernel

from components.training import heads, measured
from components.training.frozen import Attention, FeedForward
from components.training.packing import Packing

WIDTHS = (64, 128, 256, 512)
USUAL = 128
INNER = ("intermediate_size", "hidden_dim", "n_inner", "d_ff", "encoder_ffn_dim")
ROWS = 4
# Below this hidden size what counts is how many operations there are, and every choice is a matter of chance.
SMALL = 128


@dataclass(frozen=True)
class Shape:
    """Of a layer: what its speed depends on."""

    hidden: int
    inner: int
    heads: int


def shape_of(config: Any) -> Shape:
    """From a transformers config, in whatever words of its family."""
    about = [
        next((size for name in names if (size := getattr(config, name, None))), 1)
        for names in (("hidden_size", "dim", "n_embd", "d_model"), INNER, ("num_attention_heads", "n_heads", "n_head"))
    ]
    hidden, inner, heads = (int(each) for each in about)
    while hidden % heads:  # T5's may together be wider or narrower than a token
        heads -= 1
    return Shape(hidden, inner if inner > 1 else 4 * hidden, heads)


@dataclass(frozen=True)
class Kernels:
    """bfloat16: or else float32.  …_until: the widest texts, in tokens, for which our own attention, or torch's plain
    one, is faster than torch's fused one; 0 for none.  compiled: ours by `heads`, where that fits.
    """

    bfloat16: bool
    plain_until: int
    math_until: int
    compiled: bool = False


def chosen(device: torch.device, shape: Shape, precisions: tuple[torch.dtype, ...]) -> Kernels:
    """precisions: one that is asked for, or several to choose from."""
    if shape.hidden < SMALL:
        return Kernels(precisions == (torch.bfloat16,), WIDTHS[-1], 0)
    able = heads.may_fit(device, precisions[0], shape.hidden // shape.heads)
    about = [asdict(shape), [str(each) for each in precisions], able]
    return measured.kept(device, about, Kernels, lambda: measure(device, shape, precisions))


def measure(device: torch.device, shape: Shape, precisions: tuple[torch.dtype, ...]) -> Kernels:
    """Times forward and backward pass of a layer's parts, with one thread, in a second or two.

    On GPUs nothing is measured: fused attention is made for them, and bfloat16 is half the memory.
    """
    if device.type != "cpu":
        return Kernels(torch.bfloat16 in precisions, 0, 0)
    with measured.one_thread():
        dtype = precisions[0]
        if len(precisions) > 1:
            dtype = min(precisions, key=lambda each: measured.seconds(_feed_forward(shape, each)))
        fused, own = (_attention(shape, dtype, fused=each) for each in (True, False))
        features = shape.hidden // shape.heads
        # What fails to compile today is tried again by each job, which tells why.
        compiled = heads.may_fit(device, dtype, features)
        if heads.fits(device, dtype, features):
            by_heads = _attention(shape, dtype, fused=False, compiled=True)
            if compiled := measured.is_faster(by_heads(USUAL), own(USUAL)):
                own = by_heads
        return Kernels(dtype == torch.bfloat16, _until(own, fused), _until(_composed(shape, dtype), fused), compiled)


def _until(one: Callable[[int], Any], other: Callable[[int], Any]) -> int:
    """The width up to which `one` is clearly faster than `other`."""
    until = 0
    for width in WIDTHS:
        if not measured.is_faster(one(width), other(width)):
            return until
        until = width
    return until


def _feed_forward(shape: Shape, dtype: torch.dtype) -> Callable[[], None]:
    own = FeedForward(nn.Linear(shape.hidden, shape.inner), nn.Linear(shape.inner, shape.hidden), "gelu", dtype)
    x = torch.randn(ROWS * 64, shape.hidden, dtype=dtype, requires_grad=True)
    return partial(_both_ways, lambda: own(x))


def _attention(
    shape: Shape, dtype: torch.dtype, fused: bool, compiled: bool = False
) -> Callable[[int], Callable[[], None]]:
    query, key, value, out = (nn.Linear(shape.hidden, shape.hidden) for _ in range(4))
    own = Attention(query, key, value, out, shape.heads, dtype, compiled)

    def of(width: int) -> Callable[[], None]:
        packing = Packing.of(np.array([width - 1] + [width] * (ROWS - 1)), dtype, torch.device("cpu"))
        x = torch.randn(packing.tokens, shape.hidden, dtype=dtype, requires_grad=True)
        return partial(_both_ways, lambda: own(x, packing, first=False, fused=fused))

    return of


def _composed(shape: Shape, dtype: torch.dtype) -> Callable[[int], Callable[[], None]]:
    """Attention as torch composes it where it is not fused, with projections as in `_attention`."""
    linear = nn.Linear(shape.hidden, shape.hidden, dtype=dtype).requires_grad_(False)

    def of(width: int) -> Callable[[], None]:
        x = torch.randn(ROWS, width, shape.hidden, dtype=dtype, requires_grad=True)
        allowed = torch.ones(ROWS, 1, 1, width, dtype=torch.bool)
        allowed[0, ..., -1] = False

        def run() -> torch.Tensor:
            q, k, v = (linear(x).view(ROWS, width, shape.heads, -1).transpose(1, 2) for _ in range(3))
            with sdpa_kernel(SDPBackend.MATH):
                seen = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
            projected: torch.Tensor = linear(seen.transpose(1, 2).reshape(x.shape))
            return projected

        return partial(_both_ways, run)

    return of


def _both_ways(run: Callable[[], torch.Tensor]) -> None:
    torch.autograd.backward(run().sum())
