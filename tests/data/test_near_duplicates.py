"""Near duplicates: hashing finds the clusters that comparing all pairs finds."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from components.data.near_duplicates import clusters
from tests.data.toy_corpus import similar_pairs

WORDS = [f"w{number}" for number in range(400)]


def brute_force(texts: list[str], jaccard: float) -> npt.NDArray[np.int64]:
    """(rows,) number of the first row that each is linked with."""
    pairs = similar_pairs(texts, jaccard)
    ends = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (ends[0], ends[1])), shape=(len(texts), len(texts)))
    component = connected_components(graph, directed=False)[1]
    first = np.unique(component, return_index=True)[1]
    return first[component]


def families(seed: int) -> list[str]:
    """60 random word sets, and of each five kin with ever more words exchanged: similarities all over the range."""
    rng = random.Random(seed)  # noqa: S311  # not for secrets
    texts = []
    for _ in range(60):
        words = rng.sample(WORDS, rng.randint(4, 40))
        for exchanged in range(6):
            kept = words[: max(1, len(words) - exchanged * len(words) // 12)]
            texts.append(" ".join(rng.sample(kept, len(kept)) + rng.sample(WORDS, len(words) - len(kept))))
    return rng.sample(texts, len(texts))


@pytest.mark.parametrize("jaccard", [0.3, 0.5, 0.7, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(2))
def test_random_word_sets_as_by_brute_force(jaccard: float, seed: int) -> None:
    texts = families(seed)
    expected = brute_force(texts, jaccard)
    assert 1 < len(np.unique(expected)) < len(texts)  # something is joined, and not everything
    assert (clusters(texts, jaccard) == expected).all()


def test_real_posts_as_by_brute_force(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("depression_reddit/depression_dataset_reddit_cleaned.csv")
    with path.open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for _, row in zip(range(1500), csv.DictReader(file), strict=False)]
    found, expected = clusters(texts, 0.8), brute_force(texts, 0.8)
    assert int((found != expected).sum()) == 0  # a number only: a failure must not print posts


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("a b c d", "a b c d e", True),  # exactly 0.8
        ("a b c", "a b c e", False),  # 0.75
        ("A b  c", "c B a", True),  # order, case and white space aside
        ("a a a a b", "a b", True),  # sets, not counts
        ("", "  ", True),
        ("", "a", False),
    ],
)
def test_threshold_is_a_jaccard_similarity_of_word_sets(one: str, other: str, together: bool) -> None:
    found = clusters([one, other], 0.8)
    assert bool(found[0] == found[1]) is together


def test_chains_of_near_duplicates_are_one_cluster() -> None:
    words = [f"x{number}" for number in range(20)]
    chain = [" ".join(words[start : start + 12]) for start in range(6)]
    assert clusters(["quite another text", *chain], 0.8).tolist() == [0, 1, 1, 1, 1, 1, 1]


def test_no_texts_have_no_clusters() -> None:
    assert clusters([], 0.8).shape == (0,)
