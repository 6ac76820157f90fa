"""Products of matrices: by torch, which calls MKL for float32 on CPUs, or by oneDNN where that is faster.

MKL leaves half of what an AMD processor with AVX-512 can do. There are no gradients here: it is for nodes of autograd
that have their own, and where none are needed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial

import torch

from components.training import measured


class Products:
    """As torch computes them."""

    def of(self, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """x · matrixᵀ + bias. x: (rows, n).  matrix: (m, n).  bias: (m,)."""
        return torch.addmm(bias, x, matrix.t())

    def back(self, grad: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The gradient of x in `of`, from that of what it makes: (rows, m)."""
        return grad @ matrix


class OneDNN(Products):
    """By the operation that torch's Inductor takes for them."""

    def of(self, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
        return made

    def back(self, grad: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return self.of(grad, matrix.t(), None)


@dataclass(frozen=True)
class Measured:
    """faster: of oneDNN, clearly."""

    faster: bool


def preferred(device: torch.device, dtype: torch.dtype) -> Products:
    """What is clearly faster there, by a measurement of some hundredths of a second that is made once.

    In bfloat16 torch calls oneDNN anyway.
    """
    return OneDNN() if device.type == "cpu" and dtype == torch.float32 and _is_faster(device) else Products()


@functools.cache
def _is_faster(device: torch.device) -> bool:
    is_there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if not is_there or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return measured.kept(device, ["onednn"], Measured, _measure).faster


def _measure() -> Measured:
    with measured.one_thread(), torch.no_grad():
        x, matrix, bias = torch.randn(256, 768), torch.randn(768, 768), torch.randn(768)
        ways = (partial(each.of, x, matrix, bias) for each in (OneDNN(), Products()))
        return Measured(measured.is_faster(*ways))
