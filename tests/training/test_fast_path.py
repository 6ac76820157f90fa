"""What is computed above a cached trunk, by several threads, for one token a row, is what the whole model computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from components.adapters.bottleneck import Bottleneck
from components.adapters.config import METHODS
from components.adapters.parameters import training_mode
from components.adapters.places import positions
from components.config import TrainingConfig
from components.training import loop, passes
from components.training.batching import Tokens, collate, training_batches
from components.training.encoder import Encoder
from components.training.frozen import FeedForward
from components.training.passes import AboveTrunk, Means, Whole
from components.training.precision import Precision
from components.training.trunk_cache import TrunkCache
from tests.adapters.adapted import stir
from tests.conftest import make_base
from tests.training.plain_loop import CPU, SCHEDULE, full_of, losses, model_of, tokens_of

ALIKE = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
# Methods whose layers the encoder knows: all but those that reach into attention itself.
KNOWN = ("pfeiffer", "houlsby", "parallel", "adapter-plus", "compacter", "lora", "ia3", "head")


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = make_base(folder, family, num_hidden_layers=3, hidden_dropout_prob=0.0)
        return made[family]

    return base


@pytest.fixture
def cache(tmp_path: Path) -> TrunkCache:
    return TrunkCache(tmp_path, 10**9)


@pytest.mark.parametrize("method", KNOWN)
def test_fifty_steps_lose_what_a_plain_padded_loop_loses(
    base_of: Callable[[str], Path], method: str, cache: TrunkCache
) -> None:
    base = base_of("bert")
    tokens = tokens_of(base)
    plain = losses(model_of(base, method), tokens, None)
    assert np.mean(plain[-10:]) < np.mean(plain[:10])  # it learns, or equal losses would say little
    for means in (Means(), Means(cache, "base"), Means(cache, "base"), Means(tokens_at_once=100)):
        assert losses(model_of(base, method), tokens, means) == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("method", ["houlsby", "lora"])
@pytest.mark.parametrize("family", ALIKE)
def test_so_they_do_in_every_family_that_is_built_alike(
    base_of: Callable[[str], Path], family: str, method: str, cache: TrunkCache
) -> None:
    base = base_of(family)
    tokens = tokens_of(base)
    plain = losses(model_of(base, method), tokens, None)
    assert losses(model_of(base, method), tokens, Means(cache, "base")) == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("settings", [
    {"leave_out": (0,)}, {"leave_out": (0, 1)}, {"drop_layers": 1}, {"dropout": 0.0},
    {"drop_layers": 2, "drop_range": [0, 1]},
])  # fmt: skip
@pytest.mark.parametrize("method", ["pfeiffer", "houlsby"])
def test_so_they_do_wherever_the_first_adapter_stands(
    base_of: Callable[[str], Path], method: str, settings: dict[str, Any], cache: TrunkCache
) -> None:
    base = base_of("bert")
    tokens = tokens_of(base)
    plain = losses(model_of(base, method, **settings), tokens, None)
    assert losses(model_of(base, method, **settings), tokens, Means(cache, "base")) == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "compacter", "lora"])
def test_so_they_do_when_threads_share_each_batch(
    base_of: Callable[[str], Path], cache: TrunkCache, method: str
) -> None:
    base = base_of("bert")
    tokens = tokens_of(base)
    plain = losses(model_of(base, method), tokens, None)
    for means in (Means(), Means(cache, "base")):
        assert losses(model_of(base, method), tokens, means, threads=3) == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("method", ["houlsby", "lora"])  # with matrices of attention that are frozen, and that learn
def test_so_they_do_when_rows_are_packed(
    base_of: Callable[[str], Path], method: str, cache: TrunkCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs."""
    base = base_of("bert")
    tokens = tokens_of(base)
    plain = losses(model_of(base, method), tokens, None)
    monkeypatch.setattr("components.training.encoder.takes_packed", lambda *_: True)
    trunk = passes.Trunk(Encoder(model_of(base, method), torch.float32, 0), tokens, 0, CPU, Precision(CPU, low=False))
    assert trunk.packing(np.arange(3)).packed
    for means in (Means(), Means(cache, "base")):
        assert losses(model_of(base, method), tokens, means) == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_full_fine_tuning_learns_the_same_of_rows_that_are_packed(
    base_of: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs."""
    base = base_of(family)
    tokens = tokens_of(base)
    plain = losses(full_of(base), tokens, None)
    assert np.mean(plain[-10:]) < np.mean(plain[:10])
    monkeypatch.setattr("components.training.encoder.takes_packed", lambda *_: True)
    for means in (Means(), Means(tokens_at_once=100)):
        assert losses(full_of(base), tokens, means) == pytest.approx(plain, abs=1e-4)


def test_it_does_so_by_every_token_and_in_the_precision_of_the_model(
    base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens, rows = full_of(base_of("bert")).train(), tokens_of(base_of("bert")), np.arange(16)
    low, seen = Precision(CPU, low=True), []
    model.bert.encoder.layer[-1].output.dense.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr("components.training.encoder.takes_packed", lambda *_: True)
    with passes.passes(model, tokens, tokens, 0, CPU, low, 16) as through:
        packed = through.learn.logits(rows)
    assert seen[0] >= sum(tokens.lengths[rows])
    assert torch.equal(packed, Whole(model, tokens, 0, CPU, low, compile=False).logits(rows))


def test_attention_that_drops_out_is_left_to_the_model(
    base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = full_of(base_of("bert")), tokens_of(base_of("bert"))
    model.config.attention_probs_dropout_prob = 0.1
    monkeypatch.setattr("components.training.encoder.takes_packed", lambda *_: True)
    with passes.passes(model, tokens, tokens, 0, CPU, Precision(CPU, low=False), 16) as through:
        assert type(through.learn) is Whole


@pytest.mark.parametrize(("family", "name"), [("bert", "hidden_act"), ("distilbert", "activation")])
def test_activations_that_have_weights_keep_them(tmp_path: Path, family: str, name: str, cache: TrunkCache) -> None:
    base = make_base(tmp_path / "base", family, **{name: "prelu"})
    tokens = tokens_of(base)

    def steep(model: Any) -> Any:
        for module in model.modules():
            if isinstance(module, torch.nn.PReLU):
                module.weight.data.fill_(-0.8)
        return model

    plain = losses(steep(model_of(base, "pfeiffer")), tokens, None)
    assert losses(steep(model_of(base, "pfeiffer")), tokens, Means(cache, "base")) == pytest.approx(plain, abs=1e-4)
    assert plain != pytest.approx(losses(model_of(base, "pfeiffer"), tokens, None), abs=1e-3)


def test_rows_that_pass_an_adapter_by_do_so_one_by_one(
    base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stochastic depth: of a batch some rows are changed, some not, also in the last layer, where a row is a token."""
    base, rows = base_of("bert"), np.arange(16)
    monkeypatch.setattr("components.training.encoder.takes_packed", lambda *_: True)
    model = model_of(base, "pfeiffer", stochastic_depth=0.5)
    training_mode(model)
    encoder = Encoder(model, torch.float32, plain_until=64)
    assert not encoder.packs
    kept: list[torch.Tensor] = []
    original = Bottleneck._by_rows

    def watched(self: Bottleneck, up: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        found = original(self, up + 1)
        kept.append(found.flatten(1).any(1))
        return found

    monkeypatch.setattr(Bottleneck, "_by_rows", watched)
    trunk = passes.Trunk(encoder, tokens_of(base), 0, CPU, Precision(CPU, low=False))
    with encoder.in_place():
        AboveTrunk(trunk).logits(rows)
    assert len(kept) == 3
    assert all(len(each) == len(rows) and 0 < each.sum() < len(rows) for each in kept)


@pytest.mark.parametrize("hands", [1, 2])
@pytest.mark.parametrize("method", KNOWN)
def test_gradients_are_those_of_the_whole_model(base_of: Callable[[str], Path], method: str, hands: int) -> None:
    """To 1e-6 of the largest, of which a hundredth would already move the losses unseen."""
    base = base_of("bert")
    tokens, rows = tokens_of(base), np.arange(7)
    found = []
    for fast in (False, True):
        model = model_of(base, method).double()
        stir(model, "default")  # at its start an adapter that changes nothing has no gradients but of what comes last
        training_mode(model)
        if fast:
            encoder = Encoder(model, torch.float64, plain_until=64)
            trunk = passes.Trunk(encoder, tokens, 0, CPU, Precision(CPU, low=False))
            with encoder.in_place(), (crew := passes.Crew(hands)).at_work():
                logits = AboveTrunk(trunk).logits
                shares = np.array_split(rows, hands)
                work = [lambda share=share, logits=logits: logits(share).pow(2).sum() for share in shares]
                crew.learn(work, [each for each in model.parameters() if each.requires_grad])
        else:
            model(**collate(tokens, rows, 0, CPU)).logits.pow(2).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    largest = max(float(grad.abs().max()) for grad in found[0].values() if grad is not None)
    for name, grad in found[0].items():
        other = found[1][name]
        if grad is None or other is None:
            assert not any(each is not None and each.any() for each in (grad, other)), name
        else:
            assert torch.allclose(grad, other, rtol=0, atol=1e-6 * largest), name


@pytest.mark.parametrize(("method", "settings", "cut"), [
    ("pfeiffer", {}, "1+2"), ("houlsby", {}, "0+2"), ("lora", {}, "0"), ("parallel", {}, "1+2"),
    ("pfeiffer", {"drop_layers": 1}, "3+2"), ("pfeiffer", {"drop_layers": 2, "drop_range": [1, 2]}, "3+2"),
    ("head", {}, "6 first"),
    ("pfeiffer", {"leave_out": (0, 1)}, "5+2 first"), ("houlsby", {"leave_out": (0, 1)}, "4+2 first"),
])  # fmt: skip
def test_the_trunk_reaches_to_the_first_module_that_learns(
    base_of: Callable[[str], Path], method: str, settings: dict[str, Any], cut: str
) -> None:
    """Sub-layers below; +2 where the cut is within one, whose h and x are kept; first, where one token a row is."""
    found = Encoder(model_of(base_of("bert"), method, **settings), torch.float32, 0).cut
    inside, first = "+2" if found.inside else "", " first" if found.first else ""
    assert f"{found.sublayer}{inside}{first}" == cut


@pytest.mark.parametrize("method", ["mam", "prefix", "bitfit"])
def test_what_reaches_into_attention_or_embeddings_is_left_to_the_code_of_the_model(
    base_of: Callable[[str], Path], method: str
) -> None:
    assert not Encoder.fits(model_of(base_of("bert"), method))


def test_so_is_what_learns_of_tokens_that_the_head_does_not_read(base_of: Callable[[str], Path]) -> None:
    assert not Encoder.fits(model_of(base_of("bert"), "pfeiffer", mask_rate=0.3))


def test_so_are_adapters_at_places_that_their_user_named(base_of: Callable[[str], Path]) -> None:
    own = {"layers": "encoder.layer", "attention": {"entry": "attention", "exit": "attention.output.dense"}}
    place = {**own, "output": {"entry": "intermediate", "exit": "output.dense", "norm": "output.LayerNorm"}}
    config = METHODS["pfeiffer"](reduction_factor=2, places=[place])
    assert not Encoder.fits(get_peft_model(full_of(base_of("bert")), config))


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_one_token_is_asked_for_where_matrices_of_attention_learn(base_of: Callable[[str], Path], method: str) -> None:
    model, tokens = model_of(base_of("bert"), method), tokens_of(base_of("bert"))
    training_mode(model)
    encoder, seen = Encoder(model, torch.float32), []
    query, *_, out = encoder.sublayers[-2].modules
    for module in (query, out):
        module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    trunk = passes.Trunk(encoder, tokens, 0, CPU, Precision(CPU, low=False))
    with encoder.in_place():
        AboveTrunk(trunk).logits(np.arange(7))
    assert seen == [7, 7]


@pytest.mark.parametrize("means", [None, Means(), Means(tokens_at_once=40)])
def test_layers_are_dropped_alike_on_every_way(
    base_of: Callable[[str], Path], means: Means | None, cache: TrunkCache
) -> None:
    """AdapterDrop draws their number once a step: above a kept trunk, or one computed in its midst, and in parts."""
    base = base_of("bert")
    tokens = tokens_of(base)
    kept, other = (
        losses(model_of(base, "pfeiffer", drop_range=[0, 2], init_weights="bert"), tokens, each)
        for each in (Means(cache, "base"), means)
    )
    assert other == pytest.approx(kept, abs=1e-4)
    without = losses(model_of(base, "pfeiffer", init_weights="bert"), tokens, Means(cache, "base"))
    assert kept != pytest.approx(without, abs=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("low", [False, True])
def test_prefixes_leave_room_for_the_longest_text(base_of: Callable[[str], Path], family: str, low: bool) -> None:
    """In bfloat16 batches are widened, but not beyond the positions of a base, some of which a prefix takes."""
    base = base_of(family)
    model = model_of(base, "prefix", length=20)
    longest = positions(model.config) - 20
    tokens = Tokens([np.full(longest, 7, np.int32)] * 2, None, np.zeros(2, np.int64), np.zeros(2, np.int64))
    assert Whole(model, tokens, 0, CPU, Precision(CPU, low), compile=False).logits(np.arange(2)).shape == (2, 2)


def test_so_are_other_families(base_of: Callable[[str], Path]) -> None:
    assert not Encoder.fits(model_of(base_of("mpnet"), "pfeiffer"))


def test_a_model_in_the_block_still_computes_as_ever(base_of: Callable[[str], Path]) -> None:
    model, tokens = model_of(base_of("bert"), "pfeiffer").eval(), tokens_of(base_of("bert"))
    inputs = collate(tokens, np.arange(5), 0, CPU)
    with torch.no_grad():
        alone = model(**inputs).logits
        encoder = Encoder(model, torch.float32, 64)
        with encoder.in_place():
            assert torch.equal(model(**inputs).logits, alone)
        assert torch.equal(model(**inputs).logits, alone)
        with passes.passes(model, tokens, tokens, 0, CPU, Precision(CPU, low=False), 16):
            assert torch.equal(model(**inputs).logits, alone)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that went through each feed-forward of ours."""
    seen: list[int] = []
    original = FeedForward.__call__

    def counted(self: FeedForward, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return original(self, x)

    monkeypatch.setattr(FeedForward, "__call__", counted)
    return seen


@pytest.mark.parametrize("family", ALIKE)
@pytest.mark.parametrize("method", [*KNOWN, "full"])
def test_rows_are_scored_as_by_the_whole_model(
    base_of: Callable[[str], Path], family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loop.AT_ONCE, "cpu", 64)  # several batches
    base = base_of(family)
    model, tokens = full_of(base) if method == "full" else model_of(base, method), tokens_of(base)
    with torch.no_grad():
        whole = torch.softmax(model.eval()(**collate(tokens, range(len(tokens.ids)), 0, CPU)).logits, -1).numpy()
    assert loop.predict(model, tokens, 0, CPU) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("method", ["pfeiffer", "full"])
def test_of_rows_that_are_scored_the_last_layer_computes_one_token(
    base_of: Callable[[str], Path], method: str, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    monkeypatch.setitem(loop.AT_ONCE, "cpu", 64)
    base = base_of("bert")
    model, tokens = full_of(base) if method == "full" else model_of(base, method), tokens_of(base)
    loop.predict(model, tokens, 0, CPU)
    assert sum(computed[0::3]) >= sum(tokens.lengths)
    assert sum(computed[2::3]) == len(tokens.ids)


def test_threads_that_score_with_one_model_do_not_meet(
    base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a server."""
    monkeypatch.setitem(loop.AT_ONCE, "cpu", 64)
    model, tokens = model_of(base_of("bert"), "pfeiffer"), tokens_of(base_of("bert"))
    alone = loop.predict(model, tokens, 0, CPU)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: loop.predict(model, tokens, 0, CPU), range(12)):
            assert np.allclose(found, alone, atol=1e-6)


def test_a_single_batch_goes_through_the_whole_model(base_of: Callable[[str], Path], computed: list[int]) -> None:
    """To lay its matrices together would take as long as to compute it."""
    model, tokens = model_of(base_of("bert"), "pfeiffer"), tokens_of(base_of("bert"))
    loop.predict(model, Tokens(tokens.ids[:3], None, tokens.labels[:3], tokens.cut[:3]), 0, CPU)
    assert not computed


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("method", KNOWN)
def test_validation_is_scored_in_float32_as_by_the_whole_model(
    base_of: Callable[[str], Path], method: str, low: bool, cache: TrunkCache
) -> None:
    """Also in the middle of training, and whatever the arithmetic of training is."""
    base = base_of("bert")
    tokens = tokens_of(base)
    model = model_of(base, method)
    learner = loop.learner(model, SCHEDULE, TrainingConfig(), len(tokens.ids), CPU)
    training_mode(model)
    with passes.passes(model, tokens, tokens, 0, CPU, Precision(CPU, low), 16, Means(cache, "base")) as through:
        learn = loop.Learning(learner, None, 1.0)
        for rows in training_batches(tokens.lengths, 16, 0, 1):
            learn(tokens, rows, through)
        fast = loop.predict(model, tokens, 0, CPU, through=through)
        training_mode(model)
    assert fast == pytest.approx(loop.predict(model, tokens, 0, CPU), abs=1e-6)
