"""How rows of unequal length lie in one matrix of tokens: most of a layer knows no rows, attention spreads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components.training.batching import widened

# Packed tokens are filled up to a multiple of this.
FILLING = 32


@dataclass(frozen=True)
class Packing:
    """Of (tokens, n), and of the same rows spread, (rows, width, n).

    Packed, rows lie one behind the other, with filling behind the last: no padding is computed, and on GPUs
    FlashAttention takes them so (Dao 2023). Otherwise they are padded, and there are few shapes, which on CPUs matters
    more (see `batching.widened`). What is no token is seen by nobody, and its gradients are zero.

    lengths: (rows,), tokens of each.  starts: (rows,), place of the first, and `firsts` the same on the device.
    mask: (rows, 1, 1, width), added to scores; None where all rows are full.
    """

    rows: int
    width: int
    tokens: int
    lengths: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    firsts: torch.Tensor
    mask: torch.Tensor | None
    packed: Packed | None

    @staticmethod
    def of(lengths: npt.NDArray[np.int64], dtype: torch.dtype, device: torch.device, packed: bool = False) -> Packing:
        """lengths: (rows,)."""
        rows, column = len(lengths), np.arange(width(lengths, dtype))
        there = column < lengths[:, None]
        tokens, starts, places = there.size, np.arange(rows) * len(column), None
        if packed:
            starts, total = np.cumsum(lengths) - lengths, int(lengths.sum())
            tokens = -(-(total + 1) // FILLING) * FILLING  # one at least, which is what all that is no token looks like
            spread = np.where(there, starts[:, None] + column, tokens - 1)
            bounds = np.array([*starts, total, tokens], np.int32)
            places = Packed(
                torch.from_numpy(spread.ravel()).to(device),
                torch.from_numpy(np.flatnonzero(there)).to(device),
                torch.from_numpy(bounds).to(device),
                int(np.diff(bounds).max()),
            )
        mask = None
        if not there.all():
            beyond = torch.from_numpy(~there).to(device)
            mask = torch.zeros(beyond.shape, dtype=dtype, device=device)
            mask = mask.masked_fill_(beyond, torch.finfo(dtype).min)[:, None, None, :]
        firsts = torch.from_numpy(starts).to(device)
        return Packing(rows, len(column), tokens, lengths, starts, firsts, mask, places)

    @property
    def allowed(self) -> torch.Tensor | None:
        """As scaled_dot_product_attention takes it: True where a token may be looked at."""
        return None if self.mask is None else self.mask == 0

    def apart(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens or rows, n) as (rows, tokens of each, n), where all rows have as many; else (1, tokens, n)."""
        told = self.packed is None or len(x) == self.rows
        return x.view(self.rows if told else 1, -1, x.shape[-1])

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, n) as (rows, width, n)."""
        if self.packed is None:
            return x.view(self.rows, self.width, -1)
        moved: torch.Tensor = _Spread.apply(x, self.packed)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return moved.view(self.rows, self.width, -1)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse."""
        x = x.reshape(-1, x.shape[-1])
        if self.packed is None:
            return x
        moved: torch.Tensor = _Pack.apply(x, self.packed, self.tokens)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return moved


@dataclass(frozen=True)
class Packed:
    """there: (rows · width,), which token is at each place when they are spread.  back: (all rows' tokens,), at which
    place each is.  bounds: (rows + 2,), where each row begins, and the filling, and where all ends.  longest: of these.
    """

    there: torch.Tensor
    back: torch.Tensor
    bounds: torch.Tensor
    longest: int


def takes_packed(device: torch.device, dtype: torch.dtype, head: int) -> bool:
    """Does torch's fused attention take packed rows there? FlashAttention does, for GPUs from Ampere on, in few bits.

    head: features of one.
    """
    if device.type != "cuda" or torch.version.hip or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and head % 8 == 0 and head <= 256


def width(lengths: npt.NDArray[np.int64], dtype: torch.dtype) -> int:
    """Tokens that rows of these lengths have when spread. lengths: (rows,)."""
    longest = int(lengths.max())
    return widened(longest) if dtype == torch.bfloat16 else longest


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        ctx.packed, ctx.tokens = packed, len(x)
        return x.index_select(0, packed.there)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return _pack(grad, ctx.packed, ctx.tokens), None


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: Packed, tokens: int) -> torch.Tensor:
        ctx.packed = packed
        return _pack(x, packed, tokens)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad.index_select(0, ctx.packed.there), None, None


def _pack(x: torch.Tensor, packed: Packed, tokens: int) -> torch.Tensor:
    made = x.new_zeros(tokens, x.shape[1])
    made[: len(packed.back)] = x.index_select(0, packed.back)
    return made
