"""What a row lies beside changes nothing of what is computed from the row, packed or padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from components.training import frozen, onednn
from components.training.frozen import Attention, FeedForward, attends_packed
from components.training.onednn import LaidOut, Matrix, OneDNN
from components.training.packing import Packing, takes_packed
from tests.training.conftest import BF16

HIDDEN, HEADS, LENGTHS = 32, 4, np.array([5, 11, 1])
CPU = torch.device("cpu")
LAYOUTS = pytest.mark.parametrize("packed", [False, True])


def layout(lengths: Any, dtype: torch.dtype, packed: bool) -> Packing:
    return Packing.of(np.asarray(lengths), dtype, CPU, packed)


def alone_of(tokens: int) -> Packing:
    """Of one row without padding."""
    first = torch.zeros(1, dtype=torch.int64)
    return Packing(1, tokens, tokens, np.array([tokens]), np.zeros(1, np.int64), first, None, None)


@LAYOUTS
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_what_is_no_token_is_seen_by_nobody(first: bool, fused: bool, packed: bool) -> None:
    """In bfloat16, where there is more of it."""
    torch.manual_seed(0)
    own = Attention(*(nn.Linear(HIDDEN, HIDDEN) for _ in range(4)), HEADS, torch.bfloat16)
    together = layout(LENGTHS, torch.bfloat16, packed)
    rows = [torch.randn(length, HIDDEN).bfloat16() for length in LENGTHS]
    x = torch.full((together.tokens, HIDDEN), 50.0, dtype=torch.bfloat16)
    places = [range(start, start + length) for start, length in zip(together.starts, LENGTHS, strict=True)]
    for row, place in zip(rows, places, strict=True):
        x[place] = row
    x.requires_grad_()
    made = own(x, together, first, fused)
    (made if first else torch.cat([made[place] for place in places])).float().sum().backward()
    assert x.grad is not None
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        row.requires_grad_()
        alone = own(row, alone_of(len(row)), first, fused)
        alone.float().sum().backward()
        assert torch.allclose(made[index] if first else made[place], alone[0] if first else alone, atol=0.02)
        assert row.grad is not None
        assert torch.allclose(x.grad[place], row.grad, atol=0.02)
        x.grad[place] = 0
    assert not x.grad.any()


@LAYOUTS
@pytest.mark.parametrize("lengths", [[1], [4, 4], [3, 1, 8, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_again_what_was_spread_gives_each_row_back(
    lengths: list[int], dtype: torch.dtype, packed: bool
) -> None:
    packing = layout(lengths, dtype, packed)
    x = torch.arange(packing.tokens, dtype=dtype).unsqueeze(1).requires_grad_()
    spread = packing.spread(x)
    assert spread.shape == (len(lengths), packing.width, 1)
    back = packing.pack(spread)
    back.sum().backward()
    assert x.grad is not None
    for row, (start, length) in enumerate(zip(packing.starts, lengths, strict=True)):
        place = slice(start, start + length)
        assert torch.equal(spread[row, :length], x[place])
        assert torch.equal(back[place], x[place])
        assert x.grad[place].eq(1).all()


def test_packed_rows_follow_one_another_with_filling_behind() -> None:
    packing = layout([3, 1, 8], torch.bfloat16, packed=True)
    assert packing.starts.tolist() == [0, 3, 4]
    assert packing.tokens == 32
    assert packing.packed is not None
    assert packing.packed.bounds.tolist() == [0, 3, 4, 12, 32]
    assert packing.packed.longest == 20


def test_on_cpus_rows_are_padded() -> None:
    assert not takes_packed(CPU, torch.bfloat16, 32)
    packing = Packing.of(np.array([3, 1, 8]), torch.float32, CPU)
    assert packing.packed is None
    assert packing.tokens == 3 * 8
    assert packing.starts.tolist() == [0, 8, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_see_what_padded_ones_do(dtype: torch.dtype) -> None:
    assert attends_packed(CPU, dtype, HEADS, HIDDEN // HEADS)


@pytest.mark.parametrize("fault", ["fails", "differs"])
def test_where_they_do_not_rows_are_padded_and_why_is_told(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = frozen.attended

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing) -> torch.Tensor:
        if packing.packed and fault == "fails":
            raise NotImplementedError("no such kernel")
        return right(q, k, v.flip(0) if packing.packed else v, packing)

    monkeypatch.setattr(frozen, "attended", wrong)
    assert not attends_packed.__wrapped__(CPU, torch.float32, HEADS, HIDDEN // HEADS)
    assert ("no such kernel" if fault == "fails" else "something else") in caplog.text


@pytest.mark.parametrize(
    ("kind", "dtype", "close"), [(OneDNN, torch.float32, 0.0), pytest.param(LaidOut, torch.bfloat16, 0.01, marks=BF16)]
)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_products_by_onednn_change_nothing(
    first: bool, fused: bool, kind: type[Matrix], dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    maps = [nn.Linear(HIDDEN, HIDDEN) for _ in range(4)]
    up, down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)
    packing = layout(LENGTHS, dtype, packed=False)
    given = torch.randn(packing.tokens, HIDDEN, dtype=dtype)
    made = []
    for each in (Matrix, kind):
        monkeypatch.setattr(onednn, "preferred", lambda device, dtype, each=each: each)
        x = given.clone().requires_grad_()
        attention, forward = Attention(*maps, HEADS, dtype), FeedForward(up, down, "gelu", dtype)
        assert type(attention.qkv) is type(forward.up) is each
        y = forward(attention(x, packing, first, fused=fused))
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        made.append((y.detach(), gradient))
    for ours, torchs in zip(*made, strict=True):
        assert torch.allclose(ours, torchs, atol=1e-5) or (ours - torchs).norm() <= close * torchs.norm()


@pytest.mark.parametrize(
    ("beyond", "most"),
    [(0.0, frozen.MOST), (0.0, 0.0), (300.0, frozen.MOST), (-300.0, frozen.MOST), (-92.0, frozen.MOST)],
)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_attention_in_bfloat16_is_that_of_float32(
    first: bool, fused: bool, beyond: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """beyond: what all scores have in common, whose exponential no number holds.  most: that sums may be."""
    monkeypatch.setattr(frozen, "MOST", most)
    torch.manual_seed(0)
    maps = [nn.Linear(HIDDEN, HIDDEN) for _ in range(4)]
    query, key, *_ = maps
    with torch.no_grad():
        for each in (query, key):
            each.weight.mul_(0.0 if beyond else 3.0)
            each.bias.fill_(abs(beyond) ** 0.5 * (HIDDEN // HEADS) ** -0.25)
        key.bias.mul_(-1.0 if beyond < 0 else 1.0)
    lengths = [LENGTHS.max()] * 3
    given, made = torch.randn(3 * LENGTHS.max(), HIDDEN), []
    for dtype in (torch.float32, torch.bfloat16):
        packing = layout(lengths, dtype, packed=False)
        places = torch.arange(packing.tokens).view(3, -1)[:, : LENGTHS.max()].flatten()
        x = torch.zeros(packing.tokens, HIDDEN, dtype=dtype)
        x[places] = given.to(dtype)
        x.requires_grad_()
        y = Attention(*maps, HEADS, dtype)(x, packing, first, fused)
        y = y if first else y[places]
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        made.append((y.detach().float(), gradient[places].float()))
    for right, low in zip(*made, strict=True):
        assert (low - right).norm() <= 0.03 * right.norm()
