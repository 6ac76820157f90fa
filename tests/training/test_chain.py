"""Sub-layers as one node of autograd make what they make one by one, and are left apart where more is to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.adapters.parameters import training_mode
from components.training import encoder
from components.training.encoder import Encoder
from components.training.packing import Packing
from tests.adapters.adapted import stir
from tests.conftest import make_base
from tests.training.plain_loop import CPU, model_of

HIDDEN, LENGTHS = 32, np.array([5, 3, 7])


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), request.param, num_hidden_layers=4, hidden_dropout_prob=0.0)


def learning(
    base: Path, method: str, dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[Any, Encoder, Packing, list[torch.Tensor]]:
    """A model, its encoder, and states at the cut."""
    model = model_of(base, method, **settings).to(torch.promote_types(dtype, torch.float32))
    stir(model, "default")
    training_mode(model)
    own = Encoder(model, dtype, plain_until=8)
    packing = Packing.of(LENGTHS, dtype, CPU)
    torch.manual_seed(0)
    states = [torch.randn(packing.tokens, HIDDEN).to(dtype) for _ in range(own.cut.states)]
    return model, own, packing, states


@pytest.fixture
def chained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sub-layers each chain had."""
    seen, through = [], encoder.through
    monkeypatch.setattr(encoder, "through", lambda links, *rest: (seen.append(len(links)), through(links, *rest))[1])
    return seen


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("settings", [{}, {"leave_out": [0, 1]}, {"leave_out": [2]}, {"drop_layers": 3}])
def test_it_makes_what_they_make_one_by_one(
    base: Path,
    settings: dict[str, Any],
    dtype: torch.dtype,
    close: float,
    chained: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, own, packing, states = learning(base, "pfeiffer", dtype, **settings)
    weights = torch.arange(HIDDEN, dtype=dtype)
    learned = [each for each in model.parameters() if each.requires_grad]
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            made = own.tail(states, packing)
        gradients = torch.autograd.grad((made * weights).sum(), learned, allow_unused=True)
        found.append([made, *(each for each in gradients if each is not None)])
        monkeypatch.setattr(encoder, "chains", lambda *_: False)
    assert chained == [len(own.sublayers) - own.cut.sublayer]
    one, other = found
    assert len(one) == len(other) > 4
    for ours, theirs in zip(one, other, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).norm() <= close * theirs.norm()


def test_what_it_kept_is_there_for_one_backward_pass(base: Path) -> None:
    _, own, packing, states = learning(base, "pfeiffer")
    made = own.tail(states, packing).sum()
    made.backward(retain_graph=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with pytest.raises(RuntimeError, match="one backward pass"):
        made.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def test_where_nothing_learns_nothing_is_kept(base: Path, chained: list[int]) -> None:
    _, own, packing, states = learning(base, "pfeiffer")
    with torch.no_grad():
        own.tail(states, packing)
    assert not chained


@pytest.mark.parametrize(("method", "settings"), [("houlsby", {}), ("lora", {}), ("pfeiffer", {"scaling": 2.0})])
def test_where_there_is_more_to_them_they_are_left_apart(
    base: Path, method: str, settings: dict[str, Any], chained: list[int]
) -> None:
    _, own, packing, states = learning(base, method, **settings)
    assert own.tail(states, packing).requires_grad
    assert not chained


def test_so_they_are_where_attention_is_torchs(base: Path, chained: list[int]) -> None:
    _, own, packing, states = learning(base, "pfeiffer")
    own.plain_until = 0
    assert own.tail(states, packing).requires_grad
    assert not chained


def test_so_they_are_where_something_drops_out(base: Path, chained: list[int]) -> None:
    _, own, packing, states = learning(base, "pfeiffer", leave_out=[1])
    dropout = own.sublayers[-2].exit
    if not isinstance(dropout, torch.nn.Dropout):
        pytest.skip("DistilBERT's attention ends with its matrix, which does not drop out")
    dropout.p = 0.1
    dropout.train()
    assert own.tail(states, packing).requires_grad
    assert not chained
