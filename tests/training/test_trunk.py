"""A trunk that there is room for in part: what is missing is computed, and the steps are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.training.batching import Tokens, training_batches
from components.training.crew import ALONE
from components.training.encoder import Encoder
from components.training.passes import Means
from components.training.precision import Precision
from components.training.trunk import Trunk
from components.training.trunk_cache import TrunkCache
from tests.conftest import make_base
from tests.training.plain_loop import CPU, losses, model_of, tokens_of

HIDDEN = 32


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def base(family: str) -> Path:
        return make_base(tmp_path_factory.mktemp(family), family, num_hidden_layers=3, hidden_dropout_prob=0.0)

    return base


def bytes_of(tokens: Tokens) -> int:
    """Of one state of each token."""
    return int(sum(tokens.lengths)) * HIDDEN * 4


@pytest.mark.parametrize("packed", [False, True])  # True as on GPUs
@pytest.mark.parametrize(("family", "method", "settings", "states"), [
    ("bert", "pfeiffer", {}, 2), ("bert", "lora", {}, 1),
    ("mpnet", "pfeiffer", {"leave_out": (0,)}, 2),
])  # fmt: skip
def test_fifty_steps_lose_what_a_plain_padded_loop_loses(
    base_of: Callable[[str], Path],
    family: str,
    method: str,
    settings: dict[str, Any],
    states: int,
    packed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = base_of(family)
    tokens = tokens_of(base)
    plain = losses(model_of(base, method, **settings), tokens, None)
    monkeypatch.setattr("components.training.encoder.takes_packed", lambda *_: packed)
    whole = states * bytes_of(tokens)
    half = Means(TrunkCache(tmp_path, whole * 6 // 10), "base")
    for _ in range(2):  # written, and read
        assert losses(model_of(base, method, **settings), tokens, half) == pytest.approx(plain, abs=1e-4)
    (file,) = tmp_path.rglob("*.states")
    assert 0.4 * whole < file.stat().st_size <= 0.48 * whole


def test_only_what_is_missing_is_computed_beside_others_for_few_shapes(
    base_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("bert")
    tokens = tokens_of(base)
    encoder = Encoder(model_of(base, "pfeiffer"), torch.float32)
    with encoder.in_place():
        trunk = Trunk(encoder, tokens, 0, CPU, Precision(CPU, low=False))
        trunk.keep(TrunkCache(tmp_path, 2 * bytes_of(tokens) * 6 // 10), "base", ALONE)
        kept = trunk._store.has(np.arange(len(tokens.ids)))
        computed = []
        compute = trunk.computed
        monkeypatch.setattr(trunk, "computed", lambda rows, packing: computed.append(rows) or compute(rows, packing))
        batches = training_batches(tokens.lengths, 16, 0, 1)
        for rows in batches:
            trunk.states(rows)
    missing = [np.count_nonzero(~kept[rows]) for rows in batches if not kept[rows].all()]
    assert any(count < 16 for count in missing)
    assert [len(rows) for rows in computed] == [1 << (int(count) - 1).bit_length() for count in missing]
    assert all(np.count_nonzero(~kept[rows]) == count for rows, count in zip(computed, missing, strict=True))
