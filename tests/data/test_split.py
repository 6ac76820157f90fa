"""Split: nothing similar is parted, what was once tested on is never learned from, and the same rows part the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from components.config import SplitConfig
from components.data import rows
from components.data.split import Split, assign, split
from tests.conftest import toy_rows
from tests.data.refusal import refusal
from tests.data.toy_corpus import Row, cleaned, near_copy, shuffled, similar_pairs, with_copies

CONFIG = SplitConfig(validation=0.1, test=0.2)


def parted(given: list[Row], frozen: Dataset | None = None, config: SplitConfig = CONFIG) -> Split:
    return split(cleaned(given), config, frozen)


def part_of_row(result: Split) -> dict[str, str]:
    return {row: name for name, table in result.parts.items() for row in table["row"]}


@pytest.fixture(scope="module")
def with_duplicates() -> Split:
    return parted(with_copies(200))


def test_every_row_is_in_exactly_one_part(with_duplicates: Split) -> None:
    ids = [row for table in with_duplicates.parts.values() for row in table["row"]]
    assert sorted(ids) == sorted(cleaned(with_copies(200)).table["row"])


def test_exact_duplicates_are_not_parted(with_duplicates: Split) -> None:
    folded = [{rows.fold(text) for text in table["text"]} for table in with_duplicates.parts.values()]
    assert not (folded[0] & folded[1] or folded[0] & folded[2] or folded[1] & folded[2])


def test_near_duplicates_are_not_parted(with_duplicates: Split) -> None:
    placed = [(text, name) for name, table in with_duplicates.parts.items() for text in table["text"]]
    pairs = similar_pairs([text for text, _ in placed], CONFIG.near_duplicate_jaccard)
    assert len(pairs) >= 150  # 50 rows with two near copies each
    assert [pair for pair in pairs if placed[pair[0]][1] != placed[pair[1]][1]] == []


def test_near_duplicates_are_counted(with_duplicates: Split) -> None:
    assert with_duplicates.near_duplicates == 100


def test_near_duplicate_pairs_of_texts_are_not_parted() -> None:
    """Text and second text count together: the same question with another answer may be another row."""
    given = toy_rows(120)
    twice = [
        (text, f"the answer to {number} is {note}", label)
        for number, (text, label) in enumerate(given)
        for note in ("long", "short")
    ]
    columns = dict(zip(("text", "text_pair", "label"), map(list, zip(*twice, strict=True)), strict=True))
    result = split(rows.clean(Dataset.from_dict(columns), ("bad", "good")), CONFIG)
    texts = [set(table["text"]) for table in result.parts.values()]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


@pytest.mark.parametrize(
    ("names", "earlier", "line"),
    [
        (["text", "text_pair", "label"], ["row", "text"], "rows with text, .*; found text and text_pair;"),
        (["text", "label"], ["row", "text", "text_pair"], "rows with text and text_pair, .*; found text;"),
    ],
)
def test_rows_that_gained_or_lost_a_second_text_are_refused(names: list[str], earlier: list[str], line: str) -> None:
    texts, labels = map(list, zip(*toy_rows(100), strict=True))
    table = Dataset.from_dict({name: labels if name == "label" else texts for name in names})
    frozen = Dataset.from_dict({name: ["0" * 16] for name in earlier})
    error = refusal(lambda: split(rows.clean(table, ("bad", "good")), CONFIG, frozen))
    assert re.search(line, str(error))


@pytest.mark.parametrize("seed", range(3))
def test_order_of_rows_does_not_matter(with_duplicates: Split, seed: int) -> None:
    assert parted(shuffled(with_copies(200), seed)).digest == with_duplicates.digest


def test_hash_seed_of_the_interpreter_does_not_matter() -> None:
    program = (
        "import json; from components.config import SplitConfig; from components.data.split import split;"
        "from tests.data.toy_corpus import cleaned, with_copies;"
        "print(json.dumps(split(cleaned(with_copies(60)), SplitConfig()).digest))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parent.parent.parent,
            stdout=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    one, other = (json.loads(run.communicate()[0]) for run in runs)
    assert one == other


def test_seed_decides_which_rows_are_held_out() -> None:
    given = toy_rows(200)
    one, other = (parted(given, config=SplitConfig(seed=seed)) for seed in (0, 1))
    assert set(one.test["row"]) != set(other.test["row"])


def test_digest_follows_content(with_duplicates: Split) -> None:
    given = with_copies(200)
    changed = parted([(given[0][0] + " indeed", given[0][1]), *given[1:]])
    assert changed.digest != with_duplicates.digest


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05])
def test_classes_keep_their_shares(share: float) -> None:
    texts = [text for text, _ in toy_rows(1000)]
    given = [(text, "bad" if number < share * 1000 else "good") for number, text in enumerate(texts)]
    for name, wanted in {"train": 0.7, "validation": 0.1, "test": 0.2}.items():
        table = parted(given).parts[name]
        assert len(table) == pytest.approx(wanted * 1000, abs=2)
        assert table["label"].count(0) == pytest.approx(share * wanted * 1000, abs=1)


@pytest.mark.parametrize("few", [0, 1])
def test_part_without_a_class_is_refused(few: int) -> None:
    given = [row for row in toy_rows(100) if row[1] == ("good", "bad")[few]] + [toy_rows(4, seed=1)[few]]
    error = refusal(lambda: parted(given))
    assert f"test lacks {('bad', 'good')[few]}" in error.found


EARLIER, LATER = toy_rows(200), toy_rows(200, seed=7)


@pytest.fixture(scope="module")
def earlier() -> Split:
    return parted(EARLIER)


def learned(result: Split) -> set[str]:
    return {*result.train["row"], *result.validation["row"]}


def near_copies(table: Dataset) -> list[Row]:
    return [near_copy((row["text"], ("bad", "good")[row["label"]]), "besides") for row in table]


def test_frozen_rows_are_the_test_rows(earlier: Split) -> None:
    assert earlier.frozen["row"] == earlier.test["row"]
    assert "label" not in earlier.frozen.column_names


@pytest.mark.parametrize("seed", range(3))
def test_what_was_tested_on_is_never_learned_from(earlier: Split, seed: int) -> None:
    """Whatever the later seed deals out."""
    later = parted(EARLIER + LATER, earlier.frozen, SplitConfig(seed=seed))
    assert set(earlier.test["row"]) <= set(later.test["row"])


def test_near_duplicates_of_what_was_tested_on_are_never_learned_from(earlier: Split) -> None:
    copies = near_copies(earlier.test)
    later = parted(EARLIER + LATER + copies, earlier.frozen)
    assert not {rows.row_id(text) for text, _ in copies} & learned(later)


def test_not_even_when_the_tested_rows_are_gone(earlier: Split) -> None:
    copies = near_copies(earlier.test)
    later = parted(LATER + copies, earlier.frozen)
    assert not {rows.row_id(text) for text, _ in copies} & learned(later)


def test_frozen_rows_stay_frozen_when_they_are_gone_for_a_while(earlier: Split) -> None:
    between = parted(LATER, earlier.frozen)
    assert {*earlier.test["row"], *between.test["row"]} == set(between.frozen["row"])
    again = parted(EARLIER + LATER, between.frozen)
    assert not set(between.frozen["row"]) & learned(again)


def test_new_rows_are_held_out_too_once_the_test_part_has_room(earlier: Split) -> None:
    later = parted(EARLIER + LATER, earlier.frozen)
    assert len(later.test) == pytest.approx(0.2 * 400, abs=2)


@pytest.mark.parametrize("seed", range(8))
def test_a_cluster_larger_than_a_part_is_learned_from(seed: int) -> None:
    """Rather than a test part that one family of copies makes up; wherever the seed puts it in the queue."""
    ids = np.arange(20, dtype=np.uint64)
    cluster = np.array([0] * 10 + list(range(10, 20)))
    config = SplitConfig(validation=0.1, test=0.2, seed=seed)
    part = assign(ids, np.zeros(20, dtype=np.int64), cluster, np.zeros(20, dtype=bool), config)
    assert set(part[:10].tolist()) == {0}
    assert (part == 2).sum() == 4
