"""Near duplicates in bounded memory: templates, blocks and hashes change nothing of what comparing all pairs finds."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from components.data import minhash, near_duplicates, word_sets
from components.data.near_duplicates import clusters
from components.data.word_sets import WordSets, hashed
from tests.data.test_near_duplicates import WORDS, brute_force, families

# Words of a template and values of each slot: none, few or all of the rows are near duplicates of others.
TEMPLATES = {"alike": (20, 40), "at the threshold": (11, 12), "unlike": (7, 400)}


def template(fixed: int, values: int, seed: int) -> list[str]:
    """400 rows of the same words, but for three slots; now and then a word is left out."""
    rng = random.Random(seed)  # noqa: S311  # not for secrets
    rows = []
    for _ in range(400):
        words = [f"fixed{number}" for number in range(fixed) if rng.random() > 0.02]
        rows.append(" ".join([*words, *(f"slot{slot}is{rng.randrange(values)}" for slot in range(3))]))
    return rows


def sets_of(texts: list[str], folder: Path) -> WordSets:
    sets = WordSets(folder / "words")
    for words, sizes in hashed(texts):
        sets.add(words, sizes)
    sets.close()
    return sets


@pytest.fixture(params=[(16, 1 << 20), (0, 1 << 20), (0, 50)], ids=["as it is", "all crowded", "small blocks"])
def handling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All buckets through rare words, and blocks that many pairs do not fit into."""
    many, block = request.param
    monkeypatch.setattr(near_duplicates, "MANY", many)
    monkeypatch.setattr(near_duplicates, "AT_ONCE", block)
    monkeypatch.setattr(near_duplicates, "SOME", block)
    monkeypatch.setattr(word_sets, "WORDS", block)


@pytest.mark.usefixtures("handling")
@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_as_by_brute_force(kind: str) -> None:
    texts = template(*TEMPLATES[kind], seed=3)
    assert (clusters(texts, 0.8) == brute_force(texts, 0.8)).all()


@pytest.mark.usefixtures("handling")
@pytest.mark.parametrize("jaccard", [0.3, 0.6, 0.8])
def test_random_sets_as_by_brute_force(jaccard: float) -> None:
    texts = families(5) + template(11, 12, 4)[:100]
    assert (clusters(texts, jaccard) == brute_force(texts, jaccard)).all()


def test_rows_of_a_template_are_not_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """13 words are shared by 3,000 rows, two are each one's own: no near duplicates, and few pairs are looked at."""
    looked = 0
    similar = WordSets.similar

    def counted(self: WordSets, one: word_sets.Rows, other: word_sets.Rows, jaccard: float) -> object:
        nonlocal looked
        looked += len(one)
        return similar(self, one, other, jaccard)

    monkeypatch.setattr(WordSets, "similar", counted)
    fixed = " ".join(f"fixed{number}" for number in range(13))
    found = clusters([f"{fixed} order{row} number{row}" for row in range(3000)], 0.8)
    assert len(np.unique(found)) == 3000
    assert looked < 42 * 3000  # neighbours in each band; all pairs that share a key are about twelve million


@pytest.mark.parametrize("jaccard", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("words", [1 << 20, 40])
def test_similarity_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jaccard: float, words: int) -> None:
    monkeypatch.setattr(word_sets, "WORDS", words)
    texts = [
        *families(1)[:120],
        "",
        "one",
        "one two",
        "two one",
        *(" ".join(WORDS[:count]) for count in range(90, 101)),
    ]
    sets = sets_of(texts, tmp_path)
    one, other = np.triu_indices(len(texts), 1)
    known = [frozenset(text.split()) for text in texts]
    expected = [
        len(known[a] & known[b]) / max(1, len(known[a] | known[b])) >= jaccard
        for a, b in zip(one.tolist(), other.tolist(), strict=True)
    ]
    assert any(expected)
    assert sets.similar(one, other, jaccard).tolist() == expected


@pytest.mark.parametrize("jaccard", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_similar_sets_share_a_rare_word(tmp_path: Path, jaccard: float) -> None:
    texts = families(2) + template(11, 12, 1)[:60]
    sets = sets_of(texts, tmp_path)
    words, place, very = sets.rare(np.arange(len(texts)), jaccard)
    rare = [set(words[place == row].tolist()) for row in range(len(texts))]
    rarest = [set(words[(place == row) & very].tolist()) for row in range(len(texts))]
    one, other = np.triu_indices(len(texts), 1)
    near = sets.similar(one, other, jaccard)
    assert near.any()
    for a, b in zip(one[near].tolist(), other[near].tolist(), strict=True):
        small, large = sorted((a, b), key=lambda row: int(sets.sizes[row]))
        assert rarest[small] & (rarest if sets.sizes[a] == sets.sizes[b] else rare)[large]


def test_keys_agree_where_the_least_values_of_a_band_do() -> None:
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 2**64, 60, dtype=np.uint64)
    sets = [rng.choice(pool, size, replace=False) for size in rng.integers(1, 50, 700)]
    found = minhash.keys(np.concatenate(sets), np.array([len(each) for each in sets]), (42, 6))
    for band in (0, 17, 41):
        least = []
        for each in sets:
            hashes = slice(band * 6, band * 6 + 6)
            values = (minhash.FACTOR[hashes].astype(object) * (each & np.uint64(2**32 - 1)).astype(object)) + (
                minhash.SHIFT[hashes].astype(object)
            )
            least.append(tuple((values % 2**32).min(axis=1)))
        numbers = {values: number for number, values in enumerate(dict.fromkeys(least))}
        by_key = {key: number for number, key in enumerate(dict.fromkeys(found[band].tolist()))}
        assert [numbers[values] for values in least] == [by_key[key] for key in found[band].tolist()]


@pytest.mark.parametrize(("shared", "words"), [(12, 18), (16, 20), (18, 20)])
def test_pairs_share_keys_as_often_as_their_similarity_says(shared: int, words: int) -> None:
    """2,000 pairs in 42 bands: the same key with probability s^6. Within five standard errors."""
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, 2**64, (2000, 2 * words - shared), dtype=np.uint64)
    sizes = np.full(2000, words)
    one, other = (minhash.keys(each.ravel(), sizes, (42, 6)) for each in (drawn[:, :words], drawn[:, words - shared :]))
    expected = (shared / (2 * words - shared)) ** 6
    assert (one == other).mean() == pytest.approx(expected, abs=5 * (expected / (42 * 2000)) ** 0.5)
