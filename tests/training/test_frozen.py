"""What a row is padded with, of whatever width, changes nothing of what is computed from the row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from components.training.frozen import Attention, Padding

HIDDEN, HEADS, LENGTHS = 32, 4, (5, 11)


@pytest.mark.parametrize("first", [False, True])
def test_padding_in_bfloat16_is_seen_by_nobody(first: bool) -> None:
    """Rows are widened there beyond the longest."""
    torch.manual_seed(0)
    own = Attention(*(nn.Linear(HIDDEN, HIDDEN) for _ in range(4)), HEADS, torch.bfloat16)
    padding = Padding.of(torch.tensor(LENGTHS), torch.bfloat16)
    assert padding.tokens > max(LENGTHS)
    rows = [torch.randn(1, length, HIDDEN).bfloat16().requires_grad_() for length in LENGTHS]
    x = torch.full((len(rows), padding.tokens, HIDDEN), 50.0, dtype=torch.bfloat16)
    for index, row in enumerate(rows):
        x[index, : row.shape[1]] = row.detach()[0]
    x.requires_grad_()
    together = own(x, padding, first, fused=False)
    sum(together[index, : 1 if first else length].float().sum() for index, length in enumerate(LENGTHS)).backward()
    for index, row in enumerate(rows):
        length = row.shape[1]
        alone = own(row, Padding(1, length, None), first, fused=False)
        alone.float().sum().backward()
        assert torch.allclose(together[index, : alone.shape[1]], alone[0], atol=0.02)
        assert x.grad is not None and row.grad is not None
        assert torch.allclose(x.grad[index, :length], row.grad[0], atol=0.02)
        assert not x.grad[index, length:].any()
