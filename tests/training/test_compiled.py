"""A model that cannot be compiled is told of, and used as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from components.training import compiled
from components.training.compiled import Compiled


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.tanh(self.linear(x))
        return made


def test_without_a_compiler_the_reason_is_told_once_and_the_model_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # or what was compiled before would do
    monkeypatch.setattr(inductor, "fx_graph_cache", False)
    told: list[str] = []  # asked of the logger itself, which servers of other tests may have muted
    monkeypatch.setattr(compiled.log, "warning", lambda line, *values: told.append(line % values))
    monkeypatch.setattr(inductor.cpp, "cxx", ("/no/such/compiler",))
    torch._dynamo.reset()
    model = Model()
    through = Compiled(model)
    x = torch.randn(2, 4)
    for _ in range(2):
        assert torch.equal(through(x=x), model(x))
    (line,) = told
    assert line.startswith("not compiled: ")
    assert line.endswith("; training goes on without")


def test_what_is_wrong_with_the_model_itself_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: refuse)
    with pytest.raises(RuntimeError, match="shapes"):
        Compiled(Model())(x=torch.zeros(2, 5))
