"""Frozen sub-layers of an encoder, each one node of autograd: gradients of what they read, none of their matrices.

Composed of torch's own operations, attention and feed-forward make some thirty nodes that cast, copy and keep more than
is owed for a base that does not learn. Here the matrices are cast once, queries, keys and values are one product, and
what only the backward pass of a trained matrix would need is not kept (Vaswani et al. 2017 for what is computed).

All tensors: x (tokens, hidden), rows packed one behind the other; what is returned has the dtype of the matrices.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812  # as everybody calls it

from components.training import onednn
from components.training.heads import attend, attend_back, fits
from components.training.onednn import Matrix
from components.training.packing import Packing

log = logging.getLogger("adapterline")
aten = torch.ops.aten

# Of sums of powers of two: beyond, bfloat16 does not hold all of their bits, or of their inverse's.
LEAST, MOST = 2.0**-100, 2.0**126
Derived = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# By transformers' name of the activation: itself, and its gradient from that of its output and from its input. The
# gradient takes the place of what it is made from, which nothing needs any more.
ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Derived]] = {
    "gelu": (F.gelu, lambda g, x: aten.gelu_backward.grad_input(g, x, grad_input=g)),
    "gelu_new": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda g, x: aten.gelu_backward.grad_input(g, x, approximate="tanh", grad_input=g),
    ),
    "relu": (F.relu, lambda g, x: aten.threshold_backward.grad_input(g, x, 0, grad_input=g)),
    "silu": (F.silu, lambda g, x: aten.silu_backward.grad_input(g, x, grad_input=g)),
}


class Attention:
    """Self-attention up to the end of its output matrix, from the modules of a frozen layer."""

    def __init__(
        self,
        query: nn.Linear,
        key: nn.Linear,
        value: nn.Linear,
        out: nn.Linear,
        heads: int,
        dtype: torch.dtype,
        compiled: bool = False,
    ) -> None:
        """compiled: by `heads`, where that fits."""
        self.heads, self.hidden, self.dtype = heads, query.out_features, dtype
        self.compiled = compiled and fits(query.weight.device, dtype, self.hidden // heads)
        # On CPUs softmax takes a quarter to a half less in bfloat16 where scores are exponents of two, not of e.
        self.by_powers = dtype == torch.bfloat16 and query.weight.device.type == "cpu"
        self.unit = math.log(2) if self.by_powers else 1.0  # of scores
        scale = (self.hidden // heads) ** -0.5 / self.unit  # applied once, to what makes the queries
        matrices = (query.weight * scale, key.weight, value.weight)
        biases = (query.bias * scale, key.bias, value.bias)
        self.qkv = onednn.frozen(torch.cat(matrices), torch.cat(biases), dtype)
        self.out = onednn.frozen(out.weight, out.bias, dtype)

    def __call__(self, x: torch.Tensor, packing: Packing, first: bool, fused: bool) -> torch.Tensor:
        """first: only for the first token of each row, (rows, hidden).  fused: by torch's fused attention."""
        x = x.to(self.dtype)
        if fused and not first:
            return self._fused(x, packing)
        made: torch.Tensor = self.node(first).apply(x, self, packing)
        return made

    def node(self, first: bool) -> Any:
        """What computes it where attention is not torch's."""
        if first:
            return _FirstToken
        return _Heads if self.compiled else _Attention

    def _fused(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        q, k, v = _product(x, self.qkv).view(len(x), 3, self.heads, -1).unbind(1)
        return _product(attended(q, k, v, packing, self.unit), self.out)

    @cached_property
    def apart(self) -> tuple[Matrix, torch.Tensor, torch.Tensor]:
        """What makes the queries, for scores in units of one, and the matrices of keys and values, (heads, features,
        hidden) each.
        """
        query, key, value = self.qkv.weight.view(3, self.hidden, self.hidden)
        shape, bias = (self.heads, -1, self.hidden), self.qkv.bias[: self.hidden]
        queries = onednn.frozen(query * self.unit, bias * self.unit, self.dtype)
        return queries, key.view(shape), value.view(shape)

    def of_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) as (heads, rows, features)."""
        return x.view(len(x), self.heads, -1).transpose(0, 1)

    def heads_first(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, width, n · hidden) as (n, rows · heads, width, features)."""
        rows, width, n = x.shape[0], x.shape[1], x.shape[2] // self.hidden
        split = x.view(rows, width, n, self.heads, -1).permute(2, 0, 3, 1, 4)
        return split.contiguous().view(n, rows * self.heads, width, -1)

    def heads_last(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse: (n, rows · heads, width, features) as (rows, width, n · hidden)."""
        n, of_all, width, features = x.shape
        split = x.view(n, -1, self.heads, width, features).permute(1, 3, 0, 2, 4)
        return split.reshape(of_all // self.heads, width, -1)


class FeedForward:
    """The feed-forward up to the end of its second matrix, from the modules of a frozen layer."""

    def __init__(self, up: nn.Linear, down: nn.Linear, activation: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.up, self.down = (onednn.frozen(each.weight, each.bias, dtype) for each in (up, down))
        self.activation, self.derived = ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = _FeedForward.apply(x.to(self.dtype), self, None)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return made

    def node(self, first: bool) -> Any:
        return _FeedForward


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: Attention, packing: Packing) -> torch.Tensor:
        q, k, v = own.heads_first(packing.spread(own.qkv.of(x)))
        p = _probabilities(q, k, own, packing)
        seen = packing.pack(own.heads_last(torch.bmm(p, v).unsqueeze(0)))
        ctx.save_for_backward(q, k, v, p)
        ctx.own, ctx.packing = own, packing
        return own.out.of(seen)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, p = ctx.saved_tensors
        own, packing = ctx.own, ctx.packing
        seen = own.heads_first(packing.spread(own.out.back(grad)))[0]
        grads = torch.empty((3, *q.shape), dtype=q.dtype, device=q.device)
        scores = _through_softmax(seen * own.unit if own.by_powers else seen, v, p)
        torch.bmm(scores, k, out=grads[0])
        torch.bmm(scores.transpose(1, 2), q, out=grads[1])
        torch.bmm(p.transpose(1, 2), seen, out=grads[2])
        return own.qkv.back(packing.pack(own.heads_last(grads))), None, None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: Attention, packing: Packing) -> torch.Tensor:
        qkv = own.qkv.of(x)
        seen, norms = attend(qkv, packing, own.heads)
        ctx.save_for_backward(qkv, norms)
        ctx.own, ctx.packing = own, packing
        return own.out.of(seen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        own: Attention = ctx.own
        qkv, norms = ctx.saved_tensors
        made = attend_back(qkv, norms, own.out.back(grad), ctx.packing, own.heads)
        return own.qkv.back(made), None, None


class _FirstToken(torch.autograd.Function):
    """The last layer of a model whose head reads the first token: one query a row.

    Keys and values of all tokens would be products with as many rows as there are tokens. So much is not owed:
    q · (W x) = (Wᵀ q) · x, and what is seen, a mean of W x by probabilities, is W times the mean of x. The bias of the
    keys adds the same to all scores of a query, which softmax does not see.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: Attention, packing: Packing) -> torch.Tensor:
        query, key, value = own.apart
        q = own.of_heads(query.of(x[packing.firsts]))
        asked = torch.bmm(q, key).transpose(0, 1).contiguous()  # (rows, heads, hidden), as are means
        x = packing.spread(x)
        scores = torch.bmm(asked, x.transpose(1, 2))
        if packing.mask is not None:
            scores.add_(packing.mask[:, 0])
        p = torch.softmax(scores, -1, out=scores)
        means = torch.bmm(p, x)
        seen = torch.bmm(means.transpose(0, 1), value.transpose(1, 2)).transpose(0, 1).reshape(-1, own.hidden)
        ctx.save_for_backward(x, asked, p)
        ctx.own, ctx.packing = own, packing
        return own.out.of(seen + own.qkv.bias[2 * own.hidden :])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, asked, p = ctx.saved_tensors
        own: Attention = ctx.own
        query, key, value = own.apart
        means = torch.bmm(own.of_heads(own.out.back(grad)), value).transpose(0, 1).contiguous()
        scores = _through_softmax(means, x, p)
        read = torch.bmm(torch.cat([p, scores], 1).transpose(1, 2), torch.cat([means, asked], 1))
        q = torch.bmm(torch.bmm(scores, x).transpose(0, 1), key.transpose(1, 2))
        read[:, 0] += query.back(q.transpose(0, 1).reshape(-1, own.hidden))
        return ctx.packing.pack(read), None, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: FeedForward, packing: Packing | None) -> torch.Tensor:
        inner = own.up.of(x)
        ctx.save_for_backward(inner)
        ctx.own = own
        return own.down.of(own.activation(inner))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (inner,) = ctx.saved_tensors
        own = ctx.own
        return own.up.back(own.derived(own.down.back(grad), inner)), None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix.of(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return ctx.matrix.back(grad), None


def _product(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    made: torch.Tensor = _Product.apply(x, matrix)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return made


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scale: float | None = None
) -> torch.Tensor:
    """What each query sees, by torch's fused attention: (tokens, hidden), or (rows, hidden) of one query a row.

    q: (tokens or rows, heads, features).  k, v: (tokens, heads, features).  scale: of scores; else features ** -0.5.
    """
    by_first = len(q) == packing.rows
    if q.is_cuda and (packed := packing.packed) and not by_first:
        from torch.nn.attention.varlen import varlen_attn  # takes long to import

        seen: Any = varlen_attn(q, k, v, *2 * (packed.bounds,), *2 * (packed.longest,), scale=scale)
        return seen.flatten(1)  # type: ignore[no-any-return]  # torch leaves it untyped

    def spread(x: torch.Tensor) -> torch.Tensor:
        return packing.spread(x.flatten(1)).view(packing.rows, packing.width, *x.shape[1:]).transpose(1, 2)

    asked = q.unsqueeze(2) if by_first else spread(q)
    seen = F.scaled_dot_product_attention(asked, spread(k), spread(v), attn_mask=packing.allowed, scale=scale)
    return seen.flatten(1) if by_first else packing.pack(seen.transpose(1, 2).flatten(2))


@cache
def attends_packed(device: torch.device, dtype: torch.dtype, heads: int, features: int) -> bool:
    """Is what packed rows see there what padded ones do, and its gradients? Tried once: builds of torch differ in what
    they have FlashAttention for.
    """
    lengths = np.array([5, 17, 1])
    try:
        with torch.enable_grad():
            packed, padded = (_attention_of(lengths, device, dtype, heads, features, each) for each in (True, False))
    except Exception as error:  # noqa: BLE001  # a kernel that is not there says so as it likes
        log.warning("rows are padded: attention of packed ones fails here: %s", str(error).partition("\n")[0][:200])
        return False
    if all(torch.allclose(one, other, rtol=0.05, atol=0.05) for one, other in zip(packed, padded, strict=True)):
        return True
    log.warning("rows are padded: attention of packed ones gives something else here")
    return False


def _attention_of(
    lengths: npt.NDArray[np.int64], device: torch.device, dtype: torch.dtype, heads: int, features: int, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens of all rows, hidden) of random queries, keys and values, the same in each call, and their gradients."""
    packing = Packing.of(lengths, dtype, device, packed)
    of_rows = torch.from_numpy(
        np.concatenate([np.arange(n) + at for n, at in zip(lengths, packing.starts, strict=True)])
    )
    given = torch.randn(len(of_rows), 3, heads, features, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(packing.tokens, 3, heads, features).index_copy(0, of_rows, given).to(device, dtype).requires_grad_()
    q, k, v = x.unbind(1)
    seen = attended(q, k, v, packing)[of_rows.to(device)]
    (gradients,) = torch.autograd.grad(seen.float().square().sum(), x)
    return seen, gradients[of_rows.to(device)]


def _probabilities(q: torch.Tensor, k: torch.Tensor, own: Attention, packing: Packing) -> torch.Tensor:
    """(rows · heads, width, width); q and k: (rows · heads, width, features)."""
    if own.by_powers:
        powers = _scores(q, k, own, packing).exp2_()  # without taking the largest off, which takes as long again
        sums = powers.sum(-1, keepdim=True)
        least, most = sums.aminmax()
        if least > LEAST and most < MOST:
            return powers.mul_(sums.reciprocal_())
    scores = _scores(q, k, own, packing)
    if own.by_powers:
        scores.mul_(own.unit)
    return torch.softmax(scores, -1, out=scores)


def _scores(q: torch.Tensor, k: torch.Tensor, own: Attention, packing: Packing) -> torch.Tensor:
    scores = torch.bmm(q, k.transpose(1, 2))
    if packing.mask is not None:
        by_row = scores.view(packing.rows, own.heads, *scores.shape[1:])
        shortest = int(packing.lengths.min())  # before which it masks nothing
        by_row[..., shortest:] += packing.mask[..., shortest:]
    return scores


def _through_softmax(seen: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Gradients of the scores from those of what was seen."""
    grad = torch.bmm(seen, v.transpose(1, 2))
    through: torch.Tensor = aten._softmax_backward_data.out(grad, p, -1, p.dtype, grad_input=grad)
    return through
