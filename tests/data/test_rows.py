"""Rows: what makes two the same, and a digest that follows content and not order."""

from __future__ import annotations

import pytest
from datasets import Dataset

from components.data import rows
from tests.conftest import toy_rows
from tests.data.refusal import refusal
from tests.data.toy_corpus import cleaned, shuffled, table

PAIRS = Dataset.from_dict(
    {"text": ["a b", "a", "A  b"], "text_pair": ["c", "b c", "C"], "label": ["bad", "good", "bad"]}
)


@pytest.mark.parametrize("variant", ["HELLO there", "  hello\tthere ", "hello\n there", "Hello There"])
def test_case_and_white_space_do_not_make_another_row(variant: str) -> None:
    assert rows.row_id(variant) == rows.row_id("hello there")


@pytest.mark.parametrize("other", ["hello, there", "hellothere", "there hello", ""])
def test_other_words_make_another_row(other: str) -> None:
    assert rows.row_id(other) != rows.row_id("hello there")


def test_a_pair_is_not_its_joined_text() -> None:
    ids = [rows.row_id("a b", "c"), rows.row_id("a", "b c"), rows.row_id("a b c"), rows.row_id("a b c", "")]
    assert len(set(ids)) == 4


def test_row_id_stays_the_same_for_ever() -> None:
    """Ids are stored with frozen test rows: another recipe would unfreeze them."""
    assert rows.row_id("Hello  there") == "12998c017066eb0d"


def test_exact_duplicates_are_kept_once() -> None:
    result = cleaned([("One text", "bad"), ("one  TEXT", "bad"), ("one text", "bad"), ("other", "good")])
    assert sorted(result.table["label"]) == [0, 1]
    assert (result.read, result.exact_duplicates, result.contradicting_rows) == (4, 2, 0)


def test_contradicting_labels_are_dropped_and_reported() -> None:
    result = cleaned([("same words", "bad"), ("Same words", "good"), ("same words", "bad"), ("fine", "good")])
    assert result.table["text"] == ["fine"]
    assert result.contradicting == (rows.row_id("same words"),)
    assert (result.contradicting_rows, result.exact_duplicates) == (3, 0)


def test_same_text_with_another_pair_contradicts_nothing() -> None:
    pairs = Dataset.from_dict({"text": ["a", "a"], "text_pair": ["b", "c"], "label": ["bad", "good"]})
    assert len(rows.clean(pairs, ("bad", "good")).table) == 2


def test_pairs_are_duplicates_when_both_texts_are() -> None:
    result = rows.clean(PAIRS, ("bad", "good"))
    assert result.exact_duplicates == 1
    assert sorted(zip(result.table["text_pair"], result.table["label"], strict=True)) == [("C", 0), ("b c", 1)]


@pytest.mark.parametrize("seed", range(3))
def test_cleaned_rows_do_not_depend_on_the_order_read(seed: int) -> None:
    given = toy_rows(50) + [(text.upper(), label) for text, label in toy_rows(20)]
    assert cleaned(shuffled(given, seed)).table.to_dict() == cleaned(given).table.to_dict()


def test_label_codes_follow_the_declared_order() -> None:
    result = rows.clean(table([("x", "good"), ("y", "bad")]), ("good", "bad"))
    assert dict(zip(result.table["text"], result.table["label"], strict=True)) == {"x": 0, "y": 1}


def test_digest_does_not_follow_order() -> None:
    given = toy_rows(50)
    assert rows.data_digest(table(shuffled(given, 1))) == rows.data_digest(table(given))


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given[:-1],
        lambda given: [*given, given[0]],
        lambda given: [(given[0][0] + ".", given[0][1]), *given[1:]],
        lambda given: [(given[0][0], given[1][1]), *given[1:]],
        lambda given: [(given[0][0], given[1][1]), (given[1][0], given[0][1]), *given[2:]],
    ],
    ids=["fewer", "repeated", "text", "label", "labels swapped"],
)
def test_digest_follows_content(change) -> None:  # type: ignore[no-untyped-def]
    given = toy_rows(10)
    assert rows.data_digest(table(change(given))) != rows.data_digest(table(given))


def test_digest_tells_pair_from_text() -> None:
    assert rows.data_digest(PAIRS) != rows.data_digest(PAIRS.remove_columns("text_pair"))


def test_labels_found_are_sorted() -> None:
    assert rows.label_names(table([("x", "b"), ("y", "a"), ("z", "b"), ("w", "a")]), None) == ("a", "b")


def test_declared_labels_keep_their_order() -> None:
    assert rows.label_names(table([("x", "b"), ("y", "a")]), ("b", "a", "c")) == ("b", "a", "c")


def test_one_class_is_refused_even_when_two_are_declared() -> None:
    error = refusal(lambda: rows.label_names(table([("x", "a"), ("y", "a")]), ("a", "b")))
    assert error.found == "rows of one class only"
