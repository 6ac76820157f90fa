"""What a training owes in floating-point operations, and how many the device can do in a second.

**Owed** are the multiplications and additions of matrix products that no rearrangement can save, counted from the
tokens that are there, without padding. For a row of n tokens, hidden size h, a heads, feed-forward f, bottleneck b:

    layer   8 n h² + 4 n h f + 4 n² h       forward; the last layer owes one token's query, key and value matrices,
                                            output and feed-forward, and what it sees: 8 h² + 4 h f + 4 n h a
    adapter 4 n h b                         forward; of one token in the last layer
    head    2 h² + 2 h c                    pooler and classifier, of one token

Backward, a product owes as much again for each gradient that is needed: of its input, of its weights. A frozen matrix
owes the first only; attention's products (4 n² h) owe both, as neither side is a weight. Below the first adapter
nothing owes a backward pass, and the forward pass through that frozen part is owed once a training, not once an epoch.
That is the least for anybody who trains the same thing, so rivals that train the same have the same debt.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}  # of square matrices; caches decide which is fastest
MEASURE_S = 2.0


@dataclass(frozen=True)
class Shape:
    """Sizes of an encoder. bottleneck: 0 for full fine-tuning.  first: the first layer with an adapter."""

    layers: int
    hidden: int
    feed_forward: int
    labels: int
    heads: int
    bottleneck: int = 0
    first: int = 0


def owed(shape: Shape, lengths: np.ndarray, epochs: int) -> float:
    """Operations that `epochs` epochs over rows of these lengths owe. lengths: (rows,) tokens."""
    n = lengths.astype(np.float64)
    h, f, b = shape.hidden, shape.feed_forward, shape.bottleneck
    whole = (8 * n * h * h + 4 * n * h * f, 4 * n * n * h)  # linear maps, attention's products
    last = (8 * h * h + 4 * h * f, 4 * n * h * shape.heads)
    head = 2 * h * h + 2 * h * shape.labels
    each, once = np.zeros_like(n), np.zeros_like(n)
    for index in range(shape.layers):
        top = index == shape.layers - 1
        linear, attention = last if top else whole
        if not b:
            each += 3 * (linear + attention)
        elif index <= shape.first:
            once += linear + attention  # its adapter stands behind all of it
        else:
            each += 2 * linear + 3 * attention
        if b and index >= shape.first:
            # the first adapter owes no gradient of what it reads
            each += (3 if index > shape.first else 2.5) * 4 * (1 if top else n) * h * b
    each += 3 * head if not b else 2 * 2 * h * h + 3 * 2 * h * shape.labels  # an adapter's pooler is frozen
    return float((epochs * each + once).sum())


def peak(precision: str, device: torch.device, threads: int | None = None) -> float:
    """Operations a second of torch.mm in `float32` or `bfloat16`, the best of several sizes and tries."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    best = 0.0
    for side in SIDES[device.type]:
        left, right = (torch.randn(side, side, device=device).to(getattr(torch, precision)) for _ in range(2))
        torch.mm(left, right)
        synchronise(device)
        until = time.perf_counter() + MEASURE_S
        while time.perf_counter() < until:
            begin = time.perf_counter()
            torch.mm(left, right)
            synchronise(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - begin))
    torch.set_num_threads(before)
    return best


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_of(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {cores()} cores"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
