"""In which arithmetic a training computes: bfloat16 where the device has it, beside weights kept in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from components.errors import TrainingError

# Up to this width plain attention beats torch's fused one on CPUs in bfloat16, whose backward is slow: 16 texts of 64
# tokens 12 ms against 36, of 128 44 against 68, of 256 219 against 115 (one core of a Xeon with AMX).
SHORT = 128


@dataclass(frozen=True)
class Precision:
    device: torch.device
    low: bool

    @contextmanager
    def forward(self, width: int) -> Iterator[None]:
        """Around the forward pass of a batch of `width` tokens a row."""
        if not self.low:
            yield
        elif self.device.type == "cpu" and width <= SHORT:
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            with torch.autocast(self.device.type, torch.bfloat16):
                yield

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[None]:
        """Around many steps: frozen matrices are cast once, where autocast casts them in each step to the same values.

        Afterwards the model has its own tensors back.
        """
        kept: dict[nn.Parameter, torch.Tensor] = {}
        if self.low:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    kept |= {each: each.data for each in module.parameters(recurse=False) if not each.requires_grad}
        try:
            for parameter, data in kept.items():
                parameter.data = data.to(torch.bfloat16)
            yield
        finally:
            for parameter, data in kept.items():
                parameter.data = data


def arithmetic(device: torch.device, precision: str) -> Precision:
    """`auto`, `fp32` or `bf16` on this device. Raises TrainingError when bf16 is asked for and missing."""
    able = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    if precision == "bf16" and not able:
        raise TrainingError(
            "a device that computes in bfloat16", f"{device.type} without it", "set training.precision: auto"
        )
    return Precision(device, able and precision != "fp32")


def _cpu_has_bf16() -> bool:
    from torch.backends import cpu

    return (
        bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()) and "AVX512" in cpu.get_cpu_capability()
    )
