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

BaseOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> BaseOf:
    def base(family: str) -> Path:
        return make_base(tmp_path_factory.mktemp(family), family, num_hidden_layers=3, hidden_dropout_prob=0.0)

    return base


def bytes_of(tokens: Tokens) -> int:
    """Of one state of each token."""
    return int(sum(tokens.lengths)) * HIDDEN * 4


@pytest.mark.parametrize(("family", "method", "settings", "states"), [
    ("bert", "pfeiffer", {}, 2), ("bert", "lora", {}, 1), ("mpnet", "pfeiffer", {"leave_out": (0,)}, 2),
])  # fmt: skip
def test_fifty_steps_lose_what_a_plain_padded_loop_loses(
    base_of: BaseOf, family: str, method: str, settings: dict[str, Any], states: int, tmp_path: Path
) -> None:
    base = base_of(family)
    tokens = tokens_of(base)
    plain = losses(model_of(base, method, **settings), tokens, None)
    whole = states * bytes_of(tokens)
    half = Means(TrunkCache(tmp_path, whole), "base")  # the rows to validate on are the same
    for _ in range(2):  # written, and read
        assert losses(model_of(base, method, **settings), tokens, half) == pytest.approx(plain, abs=1e-4)
    (file,) = tmp_path.rglob("*.states")
    assert 0.4 * whole < file.stat().st_size <= 0.5 * whole


@pytest.mark.parametrize("method", ["pfeiffer", "head"])  # head: kept are the first tokens
def test_so_they_do_when_threads_share_each_batch(base_of: BaseOf, method: str, tmp_path: Path) -> None:
    base = base_of("bert")
    tokens = tokens_of(base)
    plain = losses(model_of(base, method), tokens, None)
    whole = 2 * bytes_of(tokens) if method == "pfeiffer" else len(tokens.ids) * HIDDEN * 4
    half = Means(TrunkCache(tmp_path, whole), "base")
    assert losses(model_of(base, method), tokens, half, threads=3) == pytest.approx(plain, abs=1e-4)
    (file,) = tmp_path.rglob("*.states")
    assert 0.4 * whole < file.stat().st_size <= 0.5 * whole


def test_so_they_do_when_rows_are_packed(base_of: BaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs."""
    base = base_of("bert")
    tokens = tokens_of(base)
    plain = losses(model_of(base, "pfeiffer"), tokens, None)
    monkeypatch.setattr("components.training.encoder.takes_packed", lambda *_: True)
    assert Encoder(model_of(base, "pfeiffer"), torch.float32).packs
    half = Means(TrunkCache(tmp_path, 2 * bytes_of(tokens)), "base")
    assert losses(model_of(base, "pfeiffer"), tokens, half) == pytest.approx(plain, abs=1e-4)
    assert list(tmp_path.rglob("*.states"))


@pytest.mark.parametrize("low", [False, True])
def test_only_what_is_missing_is_computed_in_bfloat16_beside_others_for_few_shapes(
    base_of: BaseOf, low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("bert")
    tokens = tokens_of(base)
    precision = Precision(CPU, low)
    encoder = Encoder(model_of(base, "pfeiffer"), precision.dtype)
    with encoder.in_place():
        trunk = Trunk(encoder, tokens, 0, CPU, precision)
        trunk.keep(TrunkCache(tmp_path, trunk.layout.bytes // 2), "base", ALONE)
        kept = trunk._store.has(np.arange(len(tokens.ids)))
        computed = []
        compute = trunk.computed
        monkeypatch.setattr(trunk, "computed", lambda rows, packing: computed.append(rows) or compute(rows, packing))
        batches = [rows for rows in training_batches(tokens.lengths, 16, 0, 1) if not kept[rows].all()]
        for rows in batches:
            trunk.states(rows)
    missing = [int(np.count_nonzero(~kept[rows])) for rows in batches]
    assert any(count not in (1, 2, 4, 8, 16) for count in missing)
    assert [len(rows) for rows in computed] == [1 << (count - 1).bit_length() if low else count for count in missing]
    assert [np.count_nonzero(~kept[rows]) for rows in computed] == missing
