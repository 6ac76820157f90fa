"""A bundle at work: texts in, probabilities out, in the order asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.errors import BaseModelError, BundleError, DataError
from components.registry import bundle
from components.serving import classifier
from components.serving.classifier import Classifier
from components.training.spec import DataRef
from tests.conftest import make_base
from tests.training.toy_jobs import LABELS, RATES, finished, toy_split


@pytest.fixture(scope="module", params=RATES)
def trained(
    request: pytest.FixtureRequest, lively_base: Path, data: DataRef, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return finished(lively_base, data, request.param, tmp_path_factory.mktemp("bundle"), epochs=12)


@pytest.fixture(scope="module")
def loaded(trained: Path) -> Classifier:
    return classifier.load(trained)


def test_serves_what_the_job_measured(loaded: Classifier, trained: Path) -> None:
    found = loaded.probabilities(list(toy_split().test["text"]))
    assert np.array_equal(found, bundle.read_predictions(trained).probabilities)


def test_labels_are_those_of_the_split(loaded: Classifier) -> None:
    assert loaded.labels == LABELS


def test_columns_follow_the_labels(loaded: Classifier) -> None:
    praise = "lovely great wonderful happy superb delightful charming brilliant"
    blame = "awful terrible horrible sad dreadful nasty gloomy broken"
    assert loaded.probabilities([blame, praise, blame]).argmax(axis=1).tolist() == [0, 1, 0]


def test_rows_follow_the_texts(loaded: Classifier) -> None:
    texts = ["word1", "word2 awful word3 word4 word5", "lovely word7"]
    forwards, backwards = loaded.probabilities(texts), loaded.probabilities(texts[::-1])
    assert forwards == pytest.approx(backwards[::-1], abs=1e-6)


def test_no_texts_no_rows(loaded: Classifier) -> None:
    assert loaded.probabilities([]).shape == (0, 2)


def test_an_empty_text_has_probabilities(loaded: Classifier) -> None:
    assert loaded.probabilities([""]).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", ["nested"]])
def test_what_is_no_string_is_refused_by_position(loaded: Classifier, wrong: object) -> None:
    with pytest.raises(DataError, match="position 1"):
        loaded.probabilities(["fine", wrong])  # type: ignore[list-item]


def test_a_second_text_changes_the_answer(loaded: Classifier) -> None:
    one, two = (loaded.probabilities(["word1"], [pair]) for pair in ("lovely great happy", "awful sad broken"))
    assert not np.allclose(one, two, atol=1e-4)


def test_pairs_that_are_no_strings_are_refused(loaded: Classifier) -> None:
    with pytest.raises(DataError):
        loaded.probabilities(["fine"], [None])  # type: ignore[list-item]


def test_as_many_pairs_as_texts(loaded: Classifier) -> None:
    with pytest.raises(DataError, match="2 texts; found 1"):
        loaded.probabilities(["one", "two"], ["only one"])


def test_a_changed_bundle_is_not_served(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    folder = finished(lively_base, data, "pfeiffer", tmp_path, epochs=1)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"adapter_config\.json"):
        classifier.load(folder)


def test_a_bundle_is_not_served_on_another_base(data: DataRef, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    folder = finished(base, data, "pfeiffer", tmp_path / "bundle", epochs=1)
    make_base(base, initializer_range=0.05)
    with pytest.raises(BaseModelError, match="weights digest"):
        classifier.load(folder)
