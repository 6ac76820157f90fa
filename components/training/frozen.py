"""Frozen sub-layers of an encoder, each one node of autograd: gradients of what they read, none of their matrices.

Composed of torch's own operations, attention and feed-forward make some thirty nodes that cast, copy and keep more than
is owed for a base that does not learn. Here the matrices are cast once, queries, keys and values are one product, and
what only the backward pass of a trained matrix would need is not kept (Vaswani et al. 2017 for what is computed).

All tensors: x (batch, tokens, hidden); what is returned has the dtype of the matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as everybody calls it

from components.training.batching import widened

aten = torch.ops.aten

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


@dataclass(frozen=True)
class Padding:
    """Which of (batch, tokens) are none. mask: (batch, 1, 1, tokens), added to scores; None where all rows are full."""

    batch: int
    tokens: int
    mask: torch.Tensor | None

    @staticmethod
    def of(lengths: torch.Tensor, dtype: torch.dtype) -> Padding:
        """lengths: (batch,)."""
        tokens = width(lengths, dtype)
        if int(lengths.min()) == tokens:
            return Padding(len(lengths), tokens, None)
        beyond = torch.arange(tokens, device=lengths.device) >= lengths.unsqueeze(1)
        mask = torch.zeros(beyond.shape, dtype=dtype, device=lengths.device)
        mask.masked_fill_(beyond, torch.finfo(dtype).min)
        return Padding(len(lengths), tokens, mask[:, None, None, :])

    @property
    def allowed(self) -> torch.Tensor | None:
        """As scaled_dot_product_attention takes it: True where a token may be looked at."""
        return None if self.mask is None else self.mask == 0


def width(lengths: Any, dtype: torch.dtype) -> int:
    """Tokens that rows of these lengths have with padding. lengths: (batch,)."""
    longest = int(lengths.max())
    return widened(longest) if dtype == torch.bfloat16 else longest


class Attention:
    """Self-attention up to the end of its output matrix, from the modules of a frozen layer."""

    def __init__(
        self, query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear, heads: int, dtype: torch.dtype
    ) -> None:
        self.heads, self.hidden = heads, query.out_features
        scale = (self.hidden // heads) ** -0.5  # of scores; applied once, to what makes the queries
        matrices = (query.weight * scale, key.weight, value.weight)
        biases = (query.bias * scale, key.bias, value.bias)
        self.qkv = torch.cat([each.detach() for each in matrices]).to(dtype)
        self.qkv_bias = torch.cat([each.detach() for each in biases]).to(dtype)
        self.out, self.out_bias = out.weight.detach().to(dtype), out.bias.detach().to(dtype)

    def __call__(self, x: torch.Tensor, padding: Padding, first: bool, fused: bool) -> torch.Tensor:
        """first: only for the first token, (batch, 1, hidden).  fused: by torch's fused attention."""
        x = x.to(self.qkv.dtype)
        if fused and not first:
            return self._fused(x, padding)
        made: torch.Tensor = (_FirstToken if first else _Attention).apply(x, self, padding)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return made

    def _fused(self, x: torch.Tensor, padding: Padding) -> torch.Tensor:
        qkv = _project(x, self.qkv, self.qkv_bias)
        q, k, v = qkv.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=padding.allowed, scale=1.0)
        return _project(seen.transpose(1, 2).reshape(x.shape), self.out, self.out_bias)

    @property
    def key(self) -> torch.Tensor:
        """(heads, features, hidden), as is `value`."""
        return self.qkv[self.hidden : 2 * self.hidden].view(self.heads, -1, self.hidden)

    @property
    def value(self) -> torch.Tensor:
        return self.qkv[2 * self.hidden :].view(self.heads, -1, self.hidden)

    def of_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, hidden) as (heads, batch, features)."""
        return x.view(len(x), self.heads, -1).transpose(0, 1)

    def heads_first(self, projected: torch.Tensor, padding: Padding) -> torch.Tensor:
        """(batch · tokens, n · hidden) as (n, batch · heads, tokens, features)."""
        batch = padding.batch
        split = projected.view(batch, -1, projected.shape[-1] // self.hidden, self.heads, self.hidden // self.heads)
        return split.permute(2, 0, 3, 1, 4).contiguous().view(split.shape[2], batch * self.heads, split.shape[1], -1)

    def heads_last(self, parts: torch.Tensor, padding: Padding) -> torch.Tensor:
        """The inverse: (n, batch · heads, tokens, features) as (batch · tokens, n · hidden)."""
        n, _, tokens, features = parts.shape
        split = parts.view(n, padding.batch, self.heads, tokens, features)
        return split.permute(1, 3, 0, 2, 4).reshape(-1, n * self.hidden)


class FeedForward:
    """The feed-forward up to the end of its second matrix, from the modules of a frozen layer."""

    def __init__(self, up: nn.Linear, down: nn.Linear, activation: str, dtype: torch.dtype) -> None:
        self.up, self.up_bias = up.weight.detach().to(dtype), up.bias.detach().to(dtype)
        self.down, self.down_bias = down.weight.detach().to(dtype), down.bias.detach().to(dtype)
        self.activation, self.derived = ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = _FeedForward.apply(x.to(self.up.dtype), self)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return made


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: Attention, padding: Padding) -> torch.Tensor:
        q, k, v = own.heads_first(_product(_flat(x), own.qkv, own.qkv_bias), padding)
        p = _probabilities(q, k, own, padding)
        seen = own.heads_last(torch.bmm(p, v).unsqueeze(0), padding)
        ctx.save_for_backward(q, k, v, p)
        ctx.own, ctx.padding = own, padding
        return _product(seen, own.out, own.out_bias).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, p = ctx.saved_tensors
        own, padding = ctx.own, ctx.padding
        seen = own.heads_first(_flat(grad) @ own.out, padding)[0]
        grads = torch.empty((3, *q.shape), dtype=q.dtype, device=q.device)
        scores = _through_softmax(seen, v, p)
        torch.bmm(scores, k, out=grads[0])
        torch.bmm(scores.transpose(1, 2), q, out=grads[1])
        torch.bmm(p.transpose(1, 2), seen, out=grads[2])
        return (own.heads_last(grads, padding) @ own.qkv).view(grad.shape), None, None


class _FirstToken(torch.autograd.Function):
    """The last layer of a model whose head reads the first token: one query a row.

    Keys and values of all tokens would be products with as many rows as there are tokens. So much is not owed:
    q · (W x) = (Wᵀ q) · x, and what is seen, a mean of W x by probabilities, is W times the mean of x. The bias of the
    keys adds the same to all scores of a query, which softmax does not see.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: Attention, padding: Padding) -> torch.Tensor:
        hidden = own.hidden
        q = own.of_heads(_product(x[:, 0], own.qkv[:hidden], own.qkv_bias[:hidden]))
        asked = torch.bmm(q, own.key).transpose(0, 1).contiguous()  # (batch, heads, hidden), as are means
        scores = torch.bmm(asked, x.transpose(1, 2))
        if padding.mask is not None:
            scores.add_(padding.mask[:, 0])
        p = torch.softmax(scores, -1, out=scores)
        means = torch.bmm(p, x)
        seen = torch.bmm(means.transpose(0, 1), own.value.transpose(1, 2)).transpose(0, 1).reshape(-1, hidden)
        ctx.save_for_backward(x, asked, p)
        ctx.own = own
        return _product(seen + own.qkv_bias[2 * hidden :], own.out, own.out_bias).unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, asked, p = ctx.saved_tensors
        own: Attention = ctx.own
        means = torch.bmm(own.of_heads(_flat(grad) @ own.out), own.value).transpose(0, 1).contiguous()
        scores = _through_softmax(means, x, p)
        read = torch.bmm(torch.cat([p, scores], 1).transpose(1, 2), torch.cat([means, asked], 1))
        q = torch.bmm(torch.bmm(scores, x).transpose(0, 1), own.key.transpose(1, 2))
        read[:, 0] += q.transpose(0, 1).reshape(-1, own.hidden) @ own.qkv[: own.hidden]
        return read, None, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: FeedForward) -> torch.Tensor:
        inner = _product(_flat(x), own.up, own.up_bias)
        ctx.save_for_backward(inner)
        ctx.own = own
        return _product(own.activation(inner), own.down, own.down_bias).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (inner,) = ctx.saved_tensors
        own = ctx.own
        return (own.derived(_flat(grad) @ own.down, inner) @ own.up).view(grad.shape), None


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _product(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.addmm(bias, x, matrix.t())


def _project(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(x, matrix, bias)


def _probabilities(q: torch.Tensor, k: torch.Tensor, own: Attention, padding: Padding) -> torch.Tensor:
    """(batch · heads, queries, tokens); q and k: (batch · heads, tokens, features)."""
    scores = torch.bmm(q, k.transpose(1, 2))
    if padding.mask is not None:
        scores.view(padding.batch, own.heads, *scores.shape[1:]).add_(padding.mask)
    return torch.softmax(scores, -1, out=scores)


def _through_softmax(seen: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Gradients of the scores from those of what was seen."""
    grad = torch.bmm(seen, v.transpose(1, 2))
    through: torch.Tensor = aten._softmax_backward_data.out(grad, p, -1, p.dtype, grad_input=grad)
    return through
