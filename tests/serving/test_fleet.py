"""Many bundles on one base: each answers as it does alone, and what cannot be served together is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from components.errors import BundleError, ConfigError, DataError
from components.methods import settings_of
from components.serving import classifier, fleet, models
from components.serving.classifier import table
from components.serving.fleet import Fleet
from components.training.batching import bounded_batches
from components.training.spec import DataRef
from tests.conftest import make_base, toy_rows
from tests.registry.registered import seal
from tests.serving.conftest import Bundle, dropped
from tests.training.toy_jobs import finished, saved_split

TEXTS = [" ".join(text.split()[: 1 + number % 10]) for number, (text, _) in enumerate(toy_rows(60, seed=3))]


@pytest.fixture(scope="module")
def folders(bundle_of: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one method and of others, with more labels, with a layer dropped, with another limit of tokens."""
    return {
        "a.first": bundle_of(),
        "second": bundle_of(seed=2),
        "third": bundle_of("houlsby"),
        "wide": bundle_of(labels=4),
        "dropped": dropped(bundle_of(seed=2), tmp_path_factory.mktemp("dropped") / "bundle"),
        "parallel": bundle_of("parallel"),
    }


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Fleet:
    return fleet.load(folders)


def test_each_text_is_answered_by_the_bundle_of_its_name(served: Fleet, folders: dict[str, Path]) -> None:
    names = [list(folders)[row % len(folders)] for row in range(len(TEXTS))]
    found = served.probabilities(TEXTS, names)
    assert found.shape == (len(TEXTS), 4)
    for name, folder in folders.items():
        alone = classifier.load(folder)
        rows = [row for row, other in enumerate(names) if other == name]
        expected = alone.probabilities([TEXTS[row] for row in rows])
        assert np.isfinite(expected).all()
        assert found[rows, : len(alone.labels)] == pytest.approx(expected, abs=1e-5), name
        assert not found[rows, len(alone.labels) :].any()


def test_all_answer_to_every_text(served: Fleet, folders: dict[str, Path]) -> None:
    found = served.answers(table(TEXTS))
    assert list(found) == list(folders)
    for name, folder in folders.items():
        assert found[name] == pytest.approx(classifier.load(folder).probabilities(TEXTS), abs=1e-5), name


def test_bundles_answer_differently(served: Fleet) -> None:
    found = served.answers(table(TEXTS))
    assert not np.allclose(found["a.first"], found["second"], atol=1e-3)
    assert not np.allclose(found["second"], found["dropped"], atol=1e-3)


def test_each_bundle_cuts_texts_where_its_job_did(
    bundle_of: Bundle, lively_base: Path, data: DataRef, tmp_path: Path
) -> None:
    from tests.training.toy_jobs import toy_spec

    training = toy_spec(lively_base, data, "pfeiffer").training.model_copy(update={"max_tokens": 8})
    short = finished(lively_base, data, "pfeiffer", tmp_path / "short", epochs=1, training=training)
    both = fleet.load({"long": bundle_of(), "short": short})
    long_texts = [f"{text} {text}" for text in TEXTS]
    found, laid = both.answers(table(long_texts)), ["long", "short"] * (len(TEXTS) // 2)
    assert found["short"] == pytest.approx(classifier.load(short).probabilities(long_texts), abs=1e-5)
    assert found["long"] == pytest.approx(classifier.load(bundle_of()).probabilities(long_texts), abs=1e-5)
    rows = both.probabilities(long_texts, laid)
    assert rows[::2] == pytest.approx(found["long"][::2], abs=1e-5)
    assert rows[1::2] == pytest.approx(found["short"][1::2], abs=1e-5)


def test_a_text_is_answered_alike_beside_longer_ones(
    bundle_of: Bundle, lively_base: Path, data: DataRef, tmp_path: Path
) -> None:
    """Also by an adapter with gates, which are means over tokens and padding."""
    settings = settings_of("pfeiffer", reduction_factor=2, use_gating=True)
    gated = finished(lively_base, data, "pfeiffer", tmp_path / "gated", epochs=1, settings=settings)
    both = fleet.load({"plain": bundle_of(), "gated": gated})
    alone = np.concatenate([both.answers(table([text]))["gated"] for text in TEXTS])
    assert both.answers(table(TEXTS))["gated"] == pytest.approx(alone, abs=1e-5)
    mixed = both.probabilities(TEXTS, ["plain", "gated"] * (len(TEXTS) // 2))
    assert mixed[1::2] == pytest.approx(alone[1::2], abs=1e-5)


def test_the_frozen_matrices_are_passed_once_whatever_the_number_of_bundles(served: Fleet) -> None:
    calls: dict[str, int] = {}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
        for name, module in served._model.named_modules()
        if type(module) is nn.Linear and ".encoder." in name and "bottleneck_" not in name
    ]
    names = list(served.manifests)
    served.probabilities(TEXTS[: len(names)], names)
    for hook in hooks:
        hook.remove()
    assert calls
    assert set(calls.values()) == {1}


def test_no_texts_no_rows(served: Fleet) -> None:
    assert served.probabilities([], []).shape == (0, 4)
    assert served.answers(table([]))["second"].shape == (0, 2)


@pytest.mark.parametrize(("names", "word"), [(["nobody"], "nobody"), (["second", "second"], "1 texts")])
def test_each_text_needs_a_name_that_is_known(served: Fleet, names: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        served.probabilities(["word1"], names)


def test_what_is_no_string_is_refused(served: Fleet) -> None:
    with pytest.raises(DataError, match="position 0"):
        served.probabilities([None], ["second"])  # type: ignore[list-item]


@pytest.mark.parametrize("method", ["full", "lora", "mam"])
def test_a_method_that_cannot_share_a_pass_is_refused_by_name(bundle_of: Bundle, method: str) -> None:
    with pytest.raises(ConfigError, match=f"other of method {method}"):
        fleet.load({"first": bundle_of(), "other": bundle_of(method)})


def test_bundles_that_cannot_share_a_batch_are_refused_by_name(bundle_of: Bundle) -> None:
    with pytest.raises(ConfigError, match="behind among first, behind"):
        fleet.load({"first": bundle_of("houlsby"), "behind": bundle_of("adapter-plus")})


def test_a_bundle_on_another_base_is_refused_by_name(bundle_of: Bundle, data: DataRef, tmp_path: Path) -> None:
    elsewhere = finished(
        make_base(tmp_path / "base", initializer_range=0.2), data, "pfeiffer", tmp_path / "b", epochs=1
    )
    with pytest.raises(BundleError, match=r"for other; found .*, of first"):
        fleet.load({"first": bundle_of(), "other": elsewhere})


def test_bundles_on_an_encoder_and_a_decoder_answer_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "t5", decoder_start_token_id=0, d_kv=16, eos_token_id=3)
    first = finished(base, saved_split(tmp_path / "split", 40), "pfeiffer", tmp_path / "first", epochs=1)
    second = shutil.copytree(first, tmp_path / "second")
    chosen = models.loaded([str(first), str(second)])
    assert (chosen.fleets, list(chosen.alone)) == ([], ["first", "second"])
    found = chosen.answers(table(TEXTS[:5]))
    assert np.array_equal(found["second"], classifier.load(first).probabilities(TEXTS[:5]))
    with pytest.raises(ConfigError, match="found an encoder and a decoder"):
        fleet.load({"first": first, "second": second}).answers(table(TEXTS[:5]))


def test_a_bundle_that_lacks_a_weight_is_refused_by_name(bundle_of: Bundle, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = dropped(bundle_of(), tmp_path / "bundle")
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "adapter_model.safetensors")
    seal(folder)
    with pytest.raises(BundleError, match=r"in bundle other; .*missing"):
        fleet.load({"first": bundle_of(), "other": folder})


def test_batches_are_bounded_by_tokens_and_hold_each_row_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 1_000)
    batches = list(bounded_batches(lengths, 1_024))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1_000))
    assert max(len(batch) * lengths[batch].max() for batch in batches) <= 1_024
    assert [len(batch) for batch in bounded_batches(np.array([5_000, 3]), 1_024)] == [1, 1]
