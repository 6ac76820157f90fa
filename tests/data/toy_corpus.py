"""Rows for the split: unlike each other, except for the copies and near copies that a test asks for."""

from __future__ import annotations

import random
from itertools import combinations

from datasets import Dataset

from components.data.rows import Cleaned, clean, fold
from tests.conftest import toy_rows

Row = tuple[str, str]


def table(rows: list[Row]) -> Dataset:
    return Dataset.from_dict({"text": [text for text, _ in rows], "label": [label for _, label in rows]})


def cleaned(rows: list[Row]) -> Cleaned:
    return clean(table(rows), ("bad", "good"))


def near_copy(row: Row, word: str) -> Row:
    """One word more among eleven: Jaccard 10/11."""
    return f"{row[0]} {word}", row[1]


def with_copies(count: int, seed: int = 0) -> list[Row]:
    """`count` toy rows, an exact copy of each fifth in other case, and two near copies of each fourth."""
    rows = toy_rows(count, seed)
    copies = [(text.upper(), label) for text, label in rows[::5]]
    near = [near_copy(row, word) for row in rows[::4] for word in ("besides", "moreover")]
    return rows + copies + near


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    return random.Random(seed).sample(rows, len(rows))  # noqa: S311  # not for secrets


def similar_pairs(texts: list[str], jaccard: float) -> list[tuple[int, int]]:
    """By comparing all with all."""
    words = [frozenset(fold(text).split()) for text in texts]
    return [(a, b) for a, b in combinations(range(len(words)), 2) if _similarity(words[a], words[b]) >= jaccard]


def _similarity(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other) if one or other else 1.0
