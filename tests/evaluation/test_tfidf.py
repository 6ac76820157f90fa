"""The yardstick: it learns what words tell, and its columns are those of the labels."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from components.evaluation.tfidf import yardstick
from tests.conftest import toy_rows

LABELS = ("bad", "good")


def table(count: int, seed: int) -> Dataset:
    texts, labels = zip(*toy_rows(count, seed), strict=True)
    return Dataset.from_dict({"text": list(texts), "label": [LABELS.index(label) for label in labels]})


def test_learns_telling_words() -> None:
    test = table(200, seed=1)
    found = yardstick(table(400, seed=0), test, LABELS, seed=0).probabilities
    assert (found.argmax(axis=1) == np.array(test["label"])).mean() > 0.95


def test_probabilities_sum_to_one() -> None:
    found = yardstick(table(100, seed=0), table(50, seed=1), LABELS, seed=0).probabilities
    assert found.sum(axis=1) == pytest.approx(1)


def test_a_class_that_training_lacks_keeps_its_column() -> None:
    found = yardstick(table(100, seed=0), table(50, seed=1), ("bad", "good", "unseen"), seed=0).probabilities
    assert found.shape == (50, 3)
    assert not found[:, 2].any()


def test_the_second_text_is_read_too() -> None:
    def pairs(count: int, seed: int) -> Dataset:
        made = table(count, seed)
        return made.rename_column("text", "text_pair").add_column("text", ["the same"] * count)

    test = pairs(200, seed=1)
    found = yardstick(pairs(400, seed=0), test, LABELS, seed=0).probabilities
    assert (found.argmax(axis=1) == np.array(test["label"])).mean() > 0.95


def test_repeats_exactly() -> None:
    first, second = (yardstick(table(100, 0), table(50, 1), LABELS, seed=0).probabilities for _ in range(2))
    assert np.array_equal(first, second)


def test_counts_its_weights() -> None:
    train = Dataset.from_dict({"text": ["one two", "three"], "label": [0, 1]})
    assert yardstick(train, train, LABELS, seed=0).parameters == len({"one", "two", "one two", "three"}) + 1
