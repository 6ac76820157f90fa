"""In which arithmetic a training computes: bfloat16 where the device is faster so, beside weights kept in float32."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from components.errors import TrainingError
from components.training import kernels
from components.training.kernels import Shape


@dataclass(frozen=True)
class Precision:
    """low: bfloat16.  plain_until, math_until: texts of so many tokens at most attend by our own products, or by plain
    ones of torch, for which its fused attention is slower.  compiled: ours by `heads`.
    """

    device: torch.device
    low: bool
    plain_until: int = 0
    math_until: int = 0
    compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed."""
        return torch.bfloat16 if self.low else torch.float32

    @contextmanager
    def forward(self, width: int) -> Iterator[None]:
        """Around the forward pass of a batch of `width` tokens a row."""
        attention = sdpa_kernel(SDPBackend.MATH) if width <= self.math_until else nullcontext()
        with self.autocast(), attention:  # the latter for all threads: not to be entered by one of several
            yield

    def autocast(self) -> torch.autocast:
        """In this thread."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.low)

    @contextmanager
    def frozen(self, model: nn.Module, but: Collection[nn.Module] = ()) -> Iterator[None]:
        """Around many steps: frozen matrices are cast once, where autocast casts them in each step to the same values.

        but: modules that are not used meanwhile. Afterwards the model has its own tensors back.
        """
        kept: dict[nn.Parameter, torch.Tensor] = {}
        if self.low:
            for module in model.modules():
                if isinstance(module, nn.Linear) and module not in but:
                    kept |= {each: each.data for each in module.parameters(recurse=False) if not each.requires_grad}
        try:
            for parameter, data in kept.items():
                parameter.data = data.to(torch.bfloat16)
            yield
        finally:
            for parameter, data in kept.items():
                parameter.data = data


def arithmetic(device: torch.device, precision: str, shape: Shape) -> Precision:
    """`auto`, `fp32` or `bf16` on this device; `auto` is what is faster for layers of that shape.

    Raises TrainingError when bf16 is asked for and missing.
    """
    able = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16()
    if precision == "bf16" and not able:
        raise TrainingError(
            "a device that computes in bfloat16", f"{device.type} without it", "set training.precision: auto"
        )
    wanted = {"auto": (torch.bfloat16, torch.float32), "bf16": (torch.bfloat16,), "fp32": (torch.float32,)}[precision]
    found = kernels.chosen(device, shape, wanted if able else (torch.float32,))
    return Precision(device, found.bfloat16, found.plain_until, found.math_until, found.compiled)


def cpu_has_bf16() -> bool:
    from torch.backends import cpu

    return (
        bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()) and "AVX512" in cpu.get_cpu_capability()
    )
