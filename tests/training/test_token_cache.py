"""Tokens on disk are those that were made, are made once, and no trouble with the file is trouble for the job."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from components import base_model, cache
from components.config import BaseConfig
from components.training import token_cache
from components.training.batching import Tokens, tokenise
from tests.training.toy_jobs import toy_split

ABOUT: list[str | int] = ["data", "train", "tokenizer", 8]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERLINE_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    return base_model.load_tokenizer(base_model.find(BaseConfig(name=str(tiny_base))))


@pytest.fixture
def tokens(tokenizer: PreTrainedTokenizerFast) -> Tokens:
    return tokenise(toy_split(300).parts["train"], tokenizer, 8)


def never() -> Tokens:
    raise AssertionError("made again")


def files() -> list[Path]:
    return list((cache.folder() / token_cache.FOLDER).iterdir())


def same(one: Tokens, other: Tokens) -> bool:
    def columns(tokens: Tokens) -> list[Any]:
        lists = [*tokens.ids, *(tokens.types or [])]
        return [*lists, tokens.labels, tokens.cut, tokens.lengths]

    return all(np.array_equal(*each) for each in zip(columns(one), columns(other), strict=True))


def with_types(tokens: Tokens) -> Tokens:
    return Tokens(tokens.ids, [np.ones_like(row) for row in tokens.ids], tokens.labels, tokens.cut)


@pytest.mark.parametrize("typed", [False, True])
def test_what_is_kept_is_what_was_made(tokens: Tokens, typed: bool) -> None:
    tokens = with_types(tokens) if typed else tokens
    assert token_cache.kept(ABOUT, lambda: tokens) is tokens
    assert same(token_cache.kept(ABOUT, never), tokens)


def test_a_part_without_rows_is_kept_too(tokenizer: PreTrainedTokenizerFast) -> None:
    empty = tokenise(toy_split(300).parts["train"].select([]), tokenizer, 8)
    token_cache.kept(ABOUT, lambda: empty)
    assert len(token_cache.kept(ABOUT, never).ids) == 0


@pytest.mark.parametrize("place", range(len(ABOUT)))
def test_of_anything_else_they_are_made_anew(tokens: Tokens, place: int) -> None:
    token_cache.kept(ABOUT, lambda: tokens)
    other: list[str | int] = [*ABOUT[:place], "other", *ABOUT[place + 1 :]]
    with pytest.raises(AssertionError, match="made again"):
        token_cache.kept(other, never)


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_damaged_file_is_written_again(tokens: Tokens, left: int) -> None:
    token_cache.kept(ABOUT, lambda: tokens)
    [path] = files()
    path.write_bytes(path.read_bytes()[:left])
    assert token_cache.kept(ABOUT, lambda: tokens) is tokens
    assert same(token_cache.kept(ABOUT, never), tokens)


def test_reading_makes_young(tokens: Tokens) -> None:
    token_cache.kept(ABOUT, lambda: tokens)
    [path] = files()
    os.utime(path, (1_000, 1_000))
    token_cache.kept(ABOUT, never)
    assert path.stat().st_mtime > 1_000


def test_what_was_used_longest_ago_makes_room(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    token_cache.kept(["old"], lambda: tokens)
    [old] = files()
    monkeypatch.setattr(token_cache, "LIMIT", 2 * old.stat().st_size)
    token_cache.kept(["older"], lambda: tokens)
    [older] = {*files()} - {old}
    for age, path in enumerate((old, older)):
        os.utime(path, (1000 - age, 1000 - age))
    token_cache.kept(["new"], lambda: tokens)
    assert len(files()) == 2
    assert old in files()
    assert older not in files()


def test_what_is_larger_than_the_limit_is_not_kept_and_takes_nothing_away(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_cache.kept(["small"], lambda: tokens)
    before = files()
    monkeypatch.setattr(token_cache, "LIMIT", 100)
    token_cache.kept(["large"], lambda: tokens)
    assert files() == before


def test_a_full_disk_keeps_nothing_and_fails_nothing(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(Path, "replace", full)
    assert token_cache.kept(ABOUT, lambda: tokens) is tokens
    assert files() == []


def test_without_a_cache_folder_nothing_is_kept_and_nothing_fails(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERLINE_CACHE", "/proc/nobody/writes/here")
    assert token_cache.kept(ABOUT, lambda: tokens) is tokens


def test_others_cannot_read_them(tokens: Tokens) -> None:
    token_cache.kept(ABOUT, lambda: tokens)
    assert (cache.folder() / token_cache.FOLDER).stat().st_mode & 0o077 == 0
