"""Which of several ways to compute the same is fastest on this device, by a short measurement that is made once.

What wins differs by an order of magnitude: bfloat16 runs at twice float32 on one processor, at ten times on another and
at a tenth on a third; the backward pass of torch's fused attention on CPUs loses to plain products for short texts.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as everybody calls it
from torch.nn.attention import SDPBackend, sdpa_kernel

from components import cache, digest
from components.errors import StorageError
from components.training.frozen import Attention, FeedForward
from components.training.packing import Packing

WIDTHS = (64, 128, 256, 512)
INNER = ("intermediate_size", "hidden_dim", "n_inner", "d_ff", "encoder_ffn_dim")
ROWS = 4
TIMES = 2
# Below this hidden size what counts is how many operations there are, and every choice is a matter of chance.
SMALL = 128
# What is measured by chance as a little faster is not worth another rounding.
CLEARLY = 0.9


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
    """bfloat16: or else float32.  …_until: the widest texts, in tokens, for which our plain attention, or torch's, is
    faster than torch's fused one; 0 for none.
    """

    bfloat16: bool
    plain_until: int
    math_until: int


def chosen(device: torch.device, shape: Shape, precisions: tuple[torch.dtype, ...]) -> Kernels:
    """precisions: one that is asked for, or several to choose from.

    What was measured is kept in the cache folder. Where nothing can be written, it is not, and nothing fails.
    """
    if shape.hidden < SMALL:
        return Kernels(precisions == (torch.bfloat16,), WIDTHS[-1], 0)
    code = digest.of_code("training/kernels", "training/frozen", "training/packing")
    about = [name_of(device), torch.__version__, asdict(shape), [str(each) for each in precisions], code]
    try:
        path = cache.folder() / "kernels" / f"{digest.of_json(about)[:32]}.json"
    except StorageError:  # in a container without one, say
        return measure(device, shape, precisions)
    try:
        return Kernels(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):  # not there yet, or damaged: measured again
        measured = measure(device, shape, precisions)
    with suppress(OSError), cache.writing(path) as file:
        file.write(json.dumps(asdict(measured)).encode())
    return measured


def measure(device: torch.device, shape: Shape, precisions: tuple[torch.dtype, ...]) -> Kernels:
    """Times forward and backward pass of a layer's parts, with one thread, in a second or two.

    On GPUs nothing is measured: fused attention is made for them, and bfloat16 is half the memory.
    """
    if device.type != "cpu":
        return Kernels(torch.bfloat16 in precisions, 0, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            dtype = precisions[0]
            if len(precisions) > 1:
                dtype = min(precisions, key=lambda each: _seconds(_feed_forward(shape, each)))
            fused = _attention(shape, dtype, fused=True)
            plain = _until(_attention(shape, dtype, fused=False), fused)
            return Kernels(dtype == torch.bfloat16, plain, _until(_composed(shape, dtype), fused))
    finally:
        torch.set_num_threads(before)


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "model\t"))]
        names = names[1::-1]
    except OSError:
        names = []
    return " ".join(names) or platform.processor()


def _until(one: Callable[[int], Any], other: Callable[[int], Any]) -> int:
    """The width up to which `one` is clearly faster than `other`."""
    until = 0
    for width in WIDTHS:
        if _seconds(one(width)) > CLEARLY * _seconds(other(width)):
            return until
        until = width
    return until


def _feed_forward(shape: Shape, dtype: torch.dtype) -> Callable[[], None]:
    own = FeedForward(nn.Linear(shape.hidden, shape.inner), nn.Linear(shape.inner, shape.hidden), "gelu", dtype)
    x = torch.randn(ROWS * 64, shape.hidden, dtype=dtype, requires_grad=True)
    return partial(_both_ways, lambda: own(x))


def _attention(shape: Shape, dtype: torch.dtype, fused: bool) -> Callable[[int], Callable[[], None]]:
    query, key, value, out = (nn.Linear(shape.hidden, shape.hidden) for _ in range(4))
    own = Attention(query, key, value, out, shape.heads, dtype)

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


def _seconds(run: Callable[[], Any]) -> float:
    """Of the fastest of some runs, after one that warms up."""
    run()
    taken = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return min(taken)
