"""Frozen matrices, kept as their products are fastest: as torch has them, or for oneDNN's own operations on CPUs.

For float32 torch calls MKL, which leaves half of what an AMD processor with AVX-512 can do. In bfloat16 it calls
oneDNN, which lays the matrix out anew each time, for processors multiply pairs: 5 % of a product of 1,024 rows, 30 % of
one of 8. A matrix that never changes is laid out once.

There are no gradients here: it is for nodes of autograd that have their own, and where none are needed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial

import torch

from components.training import measured


class Matrix:
    """With its bias, for products as torch computes them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """weight: (m, n).  bias: (m,)."""
        self.weight, self.bias = weight, bias

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x · weightᵀ + bias. x: (rows, n)."""
        return torch.addmm(self.bias, x, self.weight.t())

    def back(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of x in `of`, from that of what it makes: (rows, m)."""
        return grad @ self.weight


class OneDNN(Matrix):
    """By the operation that torch's Inductor takes for them."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self.weight, self.bias)

    def back(self, grad: torch.Tensor) -> torch.Tensor:
        return _product(grad, self.weight.t())


class LaidOut(Matrix):
    """The same of matrices laid out for it: one for `of`, and another one for `back` once that is asked for."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._forth, self.bias = _laid_out(weight), bias
        self._back: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # made anew each time
        return self._forth.to_dense()

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self._forth, self.bias)

    def back(self, grad: torch.Tensor) -> torch.Tensor:
        if self._back is None:  # as for all layers of a trunk
            self._back = _laid_out(self.weight.t())
        return _product(grad, self._back)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


def _laid_out(weight: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return made


def frozen(weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> Matrix:
    """A matrix in `dtype`, of the kind whose products are fastest where it is. weight: (m, n).  bias: (m,)."""
    kind = preferred(weight.device, dtype)
    return kind(weight.detach().to(dtype), bias.detach().to(dtype))


def preferred(device: torch.device, dtype: torch.dtype) -> type[Matrix]:
    """In float32 by a measurement of some hundredths of a second that is made once."""
    if device.type != "cpu" or not _is_there():
        return Matrix
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return LaidOut
    return OneDNN if dtype == torch.float32 and _is_faster(device) else Matrix


def _is_there() -> bool:
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return there and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))


@dataclass(frozen=True)
class Measured:
    """faster: of oneDNN, clearly."""

    faster: bool


@functools.cache
def _is_faster(device: torch.device) -> bool:
    return measured.kept(device, ["onednn"], Measured, _measure).faster


def _measure() -> Measured:
    with measured.one_thread(), torch.no_grad():
        x, weight, bias = torch.randn(256, 768), torch.randn(768, 768), torch.randn(768)
        ways = (partial(kind(weight, bias).of, x) for kind in (OneDNN, Matrix))
        return Measured(measured.is_faster(*ways))
