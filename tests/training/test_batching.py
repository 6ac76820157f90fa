"""Tokens and batches: what is cut, who is in which batch, what the model is given."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from components import base_model
from components.config import BaseConfig
from components.training.batching import (
    Ragged,
    Tokens,
    bounded_batches,
    collate,
    parts,
    tokenise,
    training_batches,
    widened,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, CLS, SEP = 0, 2, 3
LENGTHS = np.random.default_rng(0).integers(5, 100, size=1_003)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    return base_model.load_tokenizer(base_model.find(BaseConfig(name=str(tiny_base))))


def texts_of(*words: int) -> Dataset:
    """Texts of so many words."""
    texts = [" ".join(f"word{number}" for number in range(count)) for count in words]
    return Dataset.from_dict({"text": texts, "label": [number % 2 for number in range(len(words))]})


def pair(words: int, pair_words: int) -> Dataset:
    return texts_of(words).add_column("text_pair", [" ".join(["lovely"] * pair_words)])


def test_every_row_once_an_epoch() -> None:
    rows = np.concatenate(training_batches(LENGTHS, 16, seed=1, epoch=1))
    assert sorted(rows) == list(range(len(LENGTHS)))


def test_every_batch_full_but_one() -> None:
    sizes = sorted(len(batch) for batch in training_batches(LENGTHS, 16, seed=1, epoch=1))
    assert sizes == [1_003 % 16, *[16] * 62]


def test_same_seed_and_epoch_same_batches() -> None:
    first, second = (training_batches(LENGTHS, 16, seed=1, epoch=2) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("seed", "epoch"), [(1, 2), (2, 1)])
def test_another_seed_or_epoch_other_batches(seed: int, epoch: int) -> None:
    members = [{tuple(sorted(batch)) for batch in training_batches(LENGTHS, 16, *at)} for at in ((1, 1), (seed, epoch))]
    assert not members[0] & members[1]


def test_batches_do_not_come_in_order_of_length() -> None:
    means = [LENGTHS[batch].mean() for batch in training_batches(LENGTHS, 16, seed=1, epoch=1)]
    correlation = np.corrcoef(means, np.arange(len(means)))[0, 1]
    assert abs(correlation) < 0.4


def test_a_batch_holds_near_equal_lengths() -> None:
    padded = sum(LENGTHS[batch].max() * len(batch) for batch in training_batches(LENGTHS, 16, seed=1, epoch=1))
    assert padded < 1.1 * LENGTHS.sum()


def test_bounded_batches_cover_every_row_longest_first() -> None:
    rows = np.concatenate(list(bounded_batches(LENGTHS, 500)))
    assert sorted(rows) == list(range(len(LENGTHS)))
    assert np.all(np.diff(LENGTHS[rows]) <= 0)


def test_a_bounded_batch_has_a_power_of_two_of_rows_as_large_as_its_tokens_allow() -> None:
    batches = list(bounded_batches(LENGTHS, 500))
    assert max(len(rows) * LENGTHS[rows].max() for rows in batches) <= 500
    for rows in batches[:-1]:
        assert len(rows).bit_count() == 1
        assert 2 * len(rows) * LENGTHS[rows].max() > 500


@pytest.mark.parametrize("most", [64, 256, 512])
def test_lengths_have_few_widths_which_are_a_little_wider(most: int) -> None:
    widths = [widened(tokens) for tokens in range(1, most + 1)]
    assert len(set(widths)) <= most // 16 + 8
    assert widths == sorted(widths)
    assert all(tokens <= width <= max(8, 1.25 * tokens + 8) for tokens, width in enumerate(widths, 1))
    assert widths[-1] == most


def test_a_text_above_the_bound_goes_alone() -> None:
    assert [rows.tolist() for rows in bounded_batches(np.array([3, 900, 2]), 500)] == [[1], [0, 2]]


def test_without_a_bound_a_batch_goes_in_one_part() -> None:
    assert [part.tolist() for part in parts(np.array([5, 900, 2]), None)] == [[0, 1, 2]]


class TestParts:
    LENGTHS = np.random.default_rng(0).integers(3, 200, size=16)

    @pytest.mark.parametrize("hands", [1, 2, 3, 5, 20])
    @pytest.mark.parametrize("tokens", [1, 300, 10_000])
    def test_every_row_is_in_one_part(self, hands: int, tokens: int) -> None:
        found = parts(self.LENGTHS, tokens, hands)
        assert all(len(part) for part in found)
        assert sorted(np.concatenate(found)) == list(range(16))

    @pytest.mark.parametrize("hands", [2, 3, 4])
    def test_all_hands_have_as_many_rows(self, hands: int) -> None:
        counts = [len(part) for part in parts(self.LENGTHS, 10**6, hands)]
        assert len(counts) == hands
        assert all(count & (count - 1) == 0 or max(counts) - min(counts) <= 1 for count in counts)

    def test_rows_of_like_length_go_together_and_the_longest_first(self) -> None:
        long, short = parts(self.LENGTHS, 10**6, 2)
        assert self.LENGTHS[short].max() <= self.LENGTHS[long].min()

    def test_all_that_is_at_work_is_bounded(self) -> None:
        for part in parts(self.LENGTHS, 1000, 4):
            assert len(part) == 1 or len(part) * self.LENGTHS[part].max() <= 250


@pytest.mark.parametrize("words", [6, 7, 8, 40])
def test_a_cut_text_keeps_its_first_words_and_both_special_tokens(
    tokenizer: PreTrainedTokenizerFast, words: int
) -> None:
    tokens = tokenise(texts_of(words), tokenizer, max_tokens=8)
    whole = tokenise(texts_of(words), tokenizer, max_tokens=64).ids[0]
    assert tokens.ids[0].tolist() == [CLS, *whole[1:-1][:6], SEP]


def test_what_does_not_fit_is_counted_in_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenise(texts_of(5, 6, 7, 40), tokenizer, max_tokens=8).cut.tolist() == [0, 0, 1, 34]


@pytest.mark.parametrize(("words", "pair_words"), [(40, 1), (1, 40), (20, 20), (9, 2)])
def test_a_cut_pair_loses_words_of_the_longer_text_only(
    tokenizer: PreTrainedTokenizerFast, words: int, pair_words: int
) -> None:
    ids = tokenise(pair(words, pair_words), tokenizer, max_tokens=12).ids[0].tolist()
    first, second = ids[1:].index(SEP), len(ids) - 3 - ids[1:].index(SEP)
    assert (ids[0], ids[-1], len(ids)) == (CLS, SEP, 12)
    assert min(first, second) >= min(words, pair_words, 4)


def test_so_it_is_of_a_pair(tokenizer: PreTrainedTokenizerFast) -> None:
    cut = [tokenise(pair(5, count), tokenizer, max_tokens=12).cut[0] for count in (4, 5, 30)]
    assert cut == [0, 1, 26]


def test_threads_with_one_tokenizer_cut_each_at_its_own_length(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a server that answers with several models."""
    texts, limits = texts_of(3, 40), [8, 16, 64] * 4
    expected = [tokenise(texts, tokenizer, limit) for limit in limits]
    set_at_once = tokenizer.set_truncation_and_padding

    def set_slowly(**state: Any) -> None:
        set_at_once(**state)
        time.sleep(0.005)  # in which another thread would set its own

    monkeypatch.setattr(tokenizer, "set_truncation_and_padding", set_slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda limit: tokenise(texts, tokenizer, limit), limits))
    for one, other in zip(found, expected, strict=True):
        assert [row.tolist() for row in one.ids] == [row.tolist() for row in other.ids]
        assert one.cut.tolist() == other.cut.tolist()


def test_token_types_tell_the_texts_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    typed = copy.deepcopy(tokenizer)
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokens = tokenise(pair(3, 2), typed, max_tokens=32)
    assert tokens.types is not None
    assert tokens.types[0].tolist() == [0] * 5 + [1] * 3


def test_lengths_are_known_without_a_look_at_each_row(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokenise(texts_of(3, 0, 40, 5), tokenizer, max_tokens=8)
    expected = [len(row) for row in tokens.ids]
    monkeypatch.setattr(Ragged, "__getitem__", None)
    assert tokens.lengths.tolist() == expected == [5, 2, 8, 7]
    assert tokens.lengths.dtype == np.int64


def test_labels_keep_their_order(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenise(texts_of(*range(1, 8)), tokenizer, max_tokens=8).labels.tolist() == [0, 1, 0, 1, 0, 1, 0]


def ragged() -> Tokens:
    rows = [np.array([CLS, 9, SEP]), np.array([CLS, 9, 8, 7, SEP]), np.array([CLS, SEP])]
    return Tokens(rows, [np.ones_like(row) for row in rows], np.zeros(3, dtype=np.int64), np.zeros(3, dtype=bool))


def test_padding_fills_up_to_the_longest_of_the_batch() -> None:
    inputs = collate(ragged(), [2, 0], padding=77, device=torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[CLS, SEP, 77], [CLS, 9, SEP]]


def test_attention_mask_covers_exactly_the_tokens() -> None:
    inputs = collate(ragged(), [2, 1], padding=CLS, device=torch.device("cpu"))
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_token_types_are_padded_with_zero() -> None:
    inputs = collate(ragged(), [0, 1], padding=77, device=torch.device("cpu"))
    assert inputs["token_type_ids"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
