"""In families whose layers are not known one by one, a trunk below the first layer that learns changes no result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from components.adapters.config import METHODS
from components.adapters.parameters import training_mode
from components.config import TrainingConfig
from components.training import loop
from components.training.batching import Tokens, collate, training_batches
from components.training.layered import Layered
from components.training.passes import AboveLayers, Means, Whole, passes
from components.training.precision import Precision
from components.training.trunk_cache import TrunkCache
from tests.conftest import make_base
from tests.training.plain_loop import CPU, SCHEDULE, full_of, losses, model_of, tokens_of

NO_DROPOUT = {"hidden_dropout_prob": 0.0}
SPECIAL = {"bos_token_id": 2, "eos_token_id": 3}
LAYERS = 4
FAMILIES: dict[str, dict[str, Any]] = {
    "mpnet": NO_DROPOUT,
    "deberta-v2": {
        **NO_DROPOUT,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 8,
    },
    "modernbert": {
        **SPECIAL,
        "initializer_range": 0.05,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "global_attn_every_n_layers": 2,
    },
    "gpt2": {**SPECIAL, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"eos_token_id": 3, "dropout_rate": 0.0, "decoder_start_token_id": 0},
    "llama": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "bart": {
        **SPECIAL,
        "decoder_start_token_id": 2,
        "d_model": 32,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "dropout": 0.0,
    },
}
HALF = {"leave_out": (0, 1)}

BaseOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> BaseOf:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            settings = {"num_hidden_layers": LAYERS, **FAMILIES.get(family, {})}
            made[family] = make_base(tmp_path_factory.mktemp(family), family, **settings)
        return made[family]

    return base


@pytest.fixture
def cache(tmp_path: Path) -> TrunkCache:
    return TrunkCache(tmp_path, 10**9)


def ended(base: Path) -> Tokens:
    """Rows that all end, for the heads that read the end of a text."""
    tokens = tokens_of(base)
    return Tokens([np.append(row[:-1], np.int32(3)) for row in tokens.ids], None, tokens.labels, tokens.cut)


def cut(model: Any, tokens: Tokens) -> str | None:
    """Before which layer, or before the end of which."""
    training_mode(model)
    found = Layered.of(model, collate(tokens, [0, 1, 2], 0, CPU, 20), torch.float32)
    return found and f"{'end of ' if found.end else ''}{found.cut.layer}"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_fifty_steps_lose_what_a_plain_padded_loop_loses(base_of: BaseOf, family: str, cache: TrunkCache) -> None:
    base = base_of(family)
    tokens = ended(base)
    model = model_of(base, "pfeiffer", **HALF)
    assert cut(model, tokens) == "end of 2"
    plain = losses(model, tokens, None)
    assert len(set(plain)) == len(plain)
    for means in (Means(cache, "base"), Means(cache, "base"), Means(cache, "base", tokens_at_once=100)):
        assert losses(model_of(base, "pfeiffer", **HALF), tokens, means) == pytest.approx(plain, abs=1e-4)
    (kept,) = cache._folder.glob("*.states")
    assert kept.stat().st_size == 2 * sum(tokens.lengths) * 32 * 4  # h and x of each token once, and no padding


@pytest.mark.parametrize("family", ["deberta-v2", "llama"])
def test_adapters_in_all_layers_save_the_first(base_of: BaseOf, family: str, cache: TrunkCache) -> None:
    base = base_of(family)
    tokens = ended(base)
    assert cut(model_of(base, "pfeiffer"), tokens) == "end of 0"
    plain = losses(model_of(base, "pfeiffer"), tokens, None)
    assert losses(model_of(base, "pfeiffer"), tokens, Means(cache, "base")) == pytest.approx(plain, abs=1e-4)


BEFORE_NORM = {"original_ln_after": False, "original_ln_before": True, "residual_before_ln": True}


@pytest.mark.parametrize(("family", "method", "settings", "where"), [
    ("bert", "mam", HALF, "2"), ("deberta-v2", "head", {}, "3"), ("deberta-v2", "houlsby", HALF, "2"),
    ("mpnet", "parallel", HALF, "end of 2"), ("mpnet", "pfeiffer", {**HALF, **BEFORE_NORM}, "end of 2"),
    ("mpnet", "pfeiffer", {"drop_range": [1, 3]}, "end of 1"),
])  # fmt: skip
def test_so_they_do_by_every_method(
    base_of: BaseOf, family: str, method: str, settings: dict[str, Any], where: str, cache: TrunkCache
) -> None:
    base = base_of(family)
    tokens = tokens_of(base)
    assert cut(model_of(base, method, **settings), tokens) == where
    plain = losses(model_of(base, method, **settings), tokens, None)
    assert losses(model_of(base, method, **settings), tokens, Means(cache, "base")) == pytest.approx(plain, abs=1e-4)


def test_what_is_left_to_chance_is_drawn_as_without_a_trunk(base_of: BaseOf, cache: TrunkCache) -> None:
    base = base_of("mpnet")
    tokens = tokens_of(base)
    plain, above = (
        losses(
            model_of(base, "pfeiffer", dropout=0.5, init_weights="bert", **HALF), tokens, means, whole=not means.cache
        )
        for means in (Means(), Means(cache, "base"))
    )
    assert above == pytest.approx(plain, abs=1e-4)
    assert above != pytest.approx(losses(model_of(base, "pfeiffer", **HALF), tokens, Means(cache, "base")), abs=1e-3)


def test_without_room_for_it_a_trunk_is_computed_in_each_step(base_of: BaseOf, tmp_path: Path) -> None:
    base = base_of("mpnet")
    tokens, small = tokens_of(base), TrunkCache(tmp_path, 1_000)
    plain = losses(model_of(base, "pfeiffer", **HALF), tokens, None)
    assert losses(model_of(base, "pfeiffer", **HALF), tokens, Means(small, "base")) == pytest.approx(plain, abs=1e-4)
    assert not list(tmp_path.rglob("*.states"))


@pytest.mark.parametrize(("settings", "layer"), [
    ({"leave_out": (0, 1, 2)}, 3), ({"leave_out": (1, 2)}, 0), ({}, 0), ({"drop_layers": 3}, 3),
    ({"drop_range": [1, 3]}, 1), ({"drop_range": [1, 3], "drop_layers": 3}, 1), ({"drop_range": [0, 3]}, 0),
    ({"drop_range": [0, 3], "leave_out": (0, 1)}, 2),
])  # fmt: skip
def test_the_cut_is_in_the_first_layer_that_may_learn(base_of: BaseOf, settings: dict[str, Any], layer: int) -> None:
    base = base_of("mpnet")
    assert cut(model_of(base, "pfeiffer", **settings), tokens_of(base)) == f"end of {layer}"


@pytest.mark.parametrize("settings", [{"use_gating": True}, {"mask_rate": 0.3}])
def test_where_padding_counts_there_is_no_trunk(base_of: BaseOf, settings: dict[str, Any]) -> None:
    base = base_of("mpnet")
    assert cut(model_of(base, "pfeiffer", **HALF, **settings), tokens_of(base)) is None


def test_nor_where_layers_hand_on_more_than_hidden_states(base_of: BaseOf) -> None:
    """T5's first layer makes the position bias of all others."""
    base = base_of("t5")
    assert cut(model_of(base, "pfeiffer", **HALF), ended(base)) is None


def test_nor_where_a_layer_reads_padding(tmp_path: Path) -> None:
    """ConvBERT's convolutions do. It is noticed also where all rows are of one length, and have none in training."""
    base = make_base(tmp_path, "convbert", num_hidden_layers=LAYERS, hidden_dropout_prob=0.0, conv_kernel_size=3)
    end = {"exit": "output.dropout", "norm": "output.LayerNorm"}
    first = {key: f"attention.{path}" for key, path in end.items()}
    place = {
        "layers": "encoder.layer",
        "attention": {"entry": "attention", **first},
        "output": {"entry": "intermediate", **end},
    }
    config = METHODS["pfeiffer"](reduction_factor=2, leave_out=[0, 1], places=[place])
    tokens = tokens_of(base)
    alike = Tokens([row[:4] for row in tokens.ids], None, tokens.labels, tokens.cut)
    model = get_peft_model(full_of(base), config)
    training_mode(model)
    means = Means(TrunkCache(tmp_path, 10**9), "base")
    with passes(model, alike, alike, 0, CPU, Precision(CPU, low=False), 16, means) as through:
        assert type(through.learn) is Whole


def test_nor_for_who_asks_for_compiled_models(base_of: BaseOf, cache: TrunkCache) -> None:
    base = base_of("mpnet")
    model, tokens = model_of(base, "pfeiffer", **HALF), tokens_of(base)
    training_mode(model)
    means = Means(cache, "base", compile=True)
    with passes(model, tokens, tokens, 0, CPU, Precision(CPU, low=False), 16, means) as through:
        assert type(through.learn) is Whole


def test_in_bfloat16_its_layers_see_few_widths(base_of: BaseOf, cache: TrunkCache) -> None:
    base, seen = base_of("mpnet"), set()
    model = model_of(base, "pfeiffer", **HALF)
    ids = [np.full(length, 7, np.int32) for length in range(4, 64)]
    tokens = Tokens(ids, None, np.zeros(60, np.int64), np.zeros(60, np.int64))
    training_mode(model)
    model.base_model.model.mpnet.encoder.layer[0].register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[1]))
    with passes(model, tokens, tokens, 0, CPU, Precision(CPU, low=True), 16, Means(cache, "base")) as through:
        through.learn.logits(np.arange(60))
    seen.discard(6)  # what was tried before
    assert seen and seen <= set(range(8, 65, 8))


def test_nor_for_a_model_without_adapters(base_of: BaseOf) -> None:
    assert cut(full_of(base_of("mpnet")), tokens_of(base_of("mpnet"))) is None


def test_a_kept_trunk_is_computed_once(base_of: BaseOf, cache: TrunkCache) -> None:
    """And another seed over the same rows finds it."""
    base, seen = base_of("deberta-v2"), []
    tokens = tokens_of(base)
    for _ in range(2):
        model = model_of(base, "pfeiffer", **HALF)
        lower, upper = (model.base_model.model.deberta.encoder.layer[number].attention for number in (2, 3))
        calls = {"lower": 0, "upper": 0}
        lower.register_forward_hook(lambda *_, calls=calls: calls.update(lower=calls["lower"] + 1))
        upper.register_forward_hook(lambda *_, calls=calls: calls.update(upper=calls["upper"] + 1))
        losses(model, tokens, Means(cache, "base"))
        seen.append(calls)
    (first, second) = (each["lower"] for each in seen)
    assert second <= 4 < first < seen[0]["upper"]  # a few to try whether the rest does without
    assert seen[1]["upper"] > 50


@pytest.mark.parametrize("low", [False, True])
def test_validation_is_scored_in_float32_as_by_the_whole_model(base_of: BaseOf, low: bool, cache: TrunkCache) -> None:
    """Also in the middle of training, and whatever the arithmetic of training is."""
    base = base_of("mpnet")
    tokens, model = tokens_of(base), model_of(base, "pfeiffer", **HALF)
    learner = loop.learner(model, SCHEDULE, TrainingConfig(), len(tokens.ids), CPU)
    training_mode(model)
    with passes(model, tokens, tokens, 0, CPU, Precision(CPU, low), 16, Means(cache, "base")) as through:
        assert isinstance(through.learn, AboveLayers)
        learn = loop.Learning(learner, None, 1.0)
        for rows in training_batches(tokens.lengths, 16, 0, 1):
            learn(tokens, rows, through)
        through.ready_to_check()
        fast = loop.predict(model, tokens, 0, CPU, through=through)
    assert fast == pytest.approx(loop.predict(model, tokens, 0, CPU), abs=1e-6)


def test_the_model_computes_as_ever_after_the_block(base_of: BaseOf, cache: TrunkCache) -> None:
    base = base_of("gpt2")
    model, tokens = model_of(base, "pfeiffer", **HALF), tokens_of(base)
    inputs = collate(tokens, np.arange(5), 0, CPU)
    training_mode(model)
    with torch.no_grad():
        alone = model(**inputs).logits
        with passes(model, tokens, tokens, 0, CPU, Precision(CPU, low=False), 16, Means(cache, "base")) as through:
            assert torch.allclose(through.learn.logits(np.arange(5)), alone, atol=1e-5)
            assert torch.equal(model(**inputs).logits, alone)
        assert torch.equal(model(**inputs).logits, alone)


def test_without_a_cache_every_layer_is_computed(base_of: BaseOf) -> None:
    """Embeddings would be, twice."""
    base = base_of("mpnet")
    model, tokens = model_of(base, "pfeiffer", **HALF), tokens_of(base)
    training_mode(model)
    with passes(model, tokens, tokens, 0, CPU, Precision(CPU, low=False), 16, Means()) as through:
        assert type(through.learn) is Whole
