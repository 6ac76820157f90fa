"""The end of a sub-layer as one node makes what its modules make, and is taken only where they are plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from components.adapters.config import METHODS
from components.adapters.parameters import training_mode
from components.training.encoder import Encoder, SubLayer
from components.training.end import End
from components.training.packing import Packing
from tests.adapters.adapted import stir
from tests.conftest import make_base
from tests.training.plain_loop import CPU, full_of, model_of

HIDDEN = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), "bert", num_hidden_layers=3, hidden_dropout_prob=0.0)


def end_of(model: Any, at_layer: int = 1) -> SubLayer:
    return Encoder(model, torch.float64).sublayers[2 * at_layer + 1]


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("begins", [False, True])
def test_outputs_and_gradients_are_those_of_the_modules(
    base: Path, activation: str, begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """begins: what it reads needs no gradient, as above a trunk."""
    found = []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(End, "of", lambda site, norm: None)
        model = model_of(base, "pfeiffer", non_linearity=activation).double()
        stir(model, "default")
        training_mode(model)
        sublayer = end_of(model)
        assert (sublayer._end is not None) == whole
        packing = Packing.of(np.array([5, 3]), torch.float64, CPU)
        torch.manual_seed(0)
        h, x = (torch.randn(packing.tokens, HIDDEN, dtype=torch.float64, requires_grad=not begins) for _ in range(2))
        learned = [each for each in sublayer.exit.parameters() if each.requires_grad]
        assert len(learned) == 4
        made = sublayer.ended(h, x, packing)
        wanted = learned if begins else [h, x, *learned]
        found.append([made, *torch.autograd.grad((made * torch.arange(HIDDEN)).sum(), wanted)])
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_of_few_bits_it_is_as_near_as_the_modules_are(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(base, "pfeiffer")
    stir(model, "default")
    packing = Packing.of(np.array([9] * 8), torch.float32, CPU)
    h, x = (torch.randn(packing.tokens, HIDDEN) for _ in range(2))
    with torch.no_grad():
        exact = end_of(model).ended(h, x, packing)
        with torch.autocast("cpu", torch.bfloat16):
            ours = end_of(model).ended(h.bfloat16(), x.bfloat16(), packing)
            monkeypatch.setattr(End, "of", lambda site, norm: None)
            theirs = end_of(model).ended(h.bfloat16(), x.bfloat16(), packing)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    far, near = ((each - exact).square().mean().sqrt() for each in (ours, theirs))
    assert far <= 1.2 * near < 0.02


@pytest.mark.parametrize("settings", [
    {"ln_before": True}, {"ln_after": True}, {"scaling": 2.0}, {"scaling": "learned"}, {"use_gating": True},
    {"dropout": 0.1}, {"stochastic_depth": 0.1}, {"drop_range": [0, 1]}, {"residual_before_ln": False},
    {"residual_before_ln": "post_add"}, {"original_ln_before": False}, {"original_ln_after": False},
    {"is_parallel": True}, {"phm_layer": True}, {"non_linearity": "tanh"}, {"train_layer_norm": True},
])  # fmt: skip
def test_whatever_else_an_end_has_is_left_to_the_modules(base: Path, settings: dict[str, Any]) -> None:
    config = METHODS["pfeiffer"](reduction_factor=2, **settings)
    assert end_of(get_peft_model(full_of(base), config))._end is None


@pytest.mark.parametrize("settings", [{"drop_layers": 2}, {"leave_out": [1]}])
def test_where_no_adapter_works_it_is_the_norm_alone(base: Path, settings: dict[str, Any]) -> None:
    sublayer = end_of(model_of(base, "pfeiffer", **settings).double())
    assert sublayer._end is not None
    assert not sublayer._end.learned
    h, x = (torch.randn(4, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in range(2))
    made, right = sublayer._end(h, x), sublayer.norm(h + x)
    assert torch.allclose(made, right)
    weights = torch.arange(HIDDEN, dtype=torch.float64)
    for one, other in zip(
        *(torch.autograd.grad((each * weights).sum(), [h, x]) for each in (made, right)), strict=True
    ):
        assert torch.allclose(one, other)


def test_so_are_two_adapters_and_none(base: Path) -> None:
    model = model_of(base, "pfeiffer")
    assert end_of(model)._end is not None
    with model.disable_adapter():
        assert end_of(model)._end is None
    model.add_adapter("other", model.peft_config["default"])
    assert end_of(model)._end is not None
    end_of(model).exit.set_adapter(["default", "other"])
    assert end_of(model)._end is None


def test_a_norm_without_bias_is_left_to_itself() -> None:
    assert End.of(nn.Identity(), nn.LayerNorm(4, bias=False)) is None
