"""Trunks on disk: what is written is read, once, within bounds, whoever writes beside."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.errors import StorageError
from components.training import trunk_cache
from components.training.trunk_cache import FOLDER, Layout, Store, TrunkCache

LENGTHS = np.array([3, 1, 4, 2])
HIDDEN = 8
WIDTH = 5  # more than any row has
LAYOUT = Layout(LENGTHS, 2, HIDDEN, torch.float32)
BYTES = 2 * int(LENGTHS.sum()) * HIDDEN * 4


def starts_of(rows: Any) -> Any:
    return WIDTH * np.arange(len(rows))


def states_of(rows: Any, beyond: float = torch.nan) -> list[torch.Tensor]:
    """Of each row numbers that tell row, token and state; beyond its end, if not told, nothing that may be read."""
    made = []
    for state in (0.0, 0.5):
        block = torch.full((len(rows), WIDTH, HIDDEN), beyond)
        for index, row in enumerate(rows):
            for token in range(LENGTHS[row]):
                block[index, token] = 10 * row + token + state
        made.append(block.flatten(0, 1))
    return made


def read(store: Store, rows: list[int]) -> list[torch.Tensor]:
    return store.read(np.array(rows), starts_of(rows), WIDTH * len(rows))


def fill(store: Store) -> None:
    for rows in ([2, 0], [1, 3]):
        store.write(np.array(rows), starts_of(rows), states_of(rows))


def opened(cache: TrunkCache, name: str, filling: Callable[[Store], None] = fill) -> Store | None:
    return cache.opened(name, LAYOUT, filling)


def never(store: Store) -> None:
    raise AssertionError("written again")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Asked of the logger itself, which servers of other tests may have muted."""
    lines: list[str] = []
    monkeypatch.setattr(trunk_cache.log, "warning", lambda line, *values: lines.append(line % values))
    return lines


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / FOLDER).glob("*.states"))


@pytest.mark.parametrize("rows", [[0], [3, 1], [2, 0, 1, 3]])
def test_what_is_read_is_what_was_written_padded_with_zeros(tmp_path: Path, rows: list[int]) -> None:
    store = opened(TrunkCache(tmp_path, 10**6), "one")
    assert store is not None
    for found, written in zip(read(store, rows), states_of(rows, 0.0), strict=True):
        assert torch.equal(found, written)


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    opened(TrunkCache(tmp_path, 10**6), "one")
    assert opened(TrunkCache(tmp_path, 10**6), "one", never) is not None


def test_a_file_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    opened(TrunkCache(tmp_path, 10**6), "one")
    (tmp_path / FOLDER / "one.states").write_bytes(b"short")
    store = opened(TrunkCache(tmp_path, 10**6), "one")
    assert store is not None
    assert torch.equal(read(store, [2])[0], states_of([2], 0.0)[0])


@pytest.mark.parametrize("left", [0, BYTES // 2 + 4, BYTES - 4])
def test_a_file_that_is_cut_short_while_it_is_read_is_told(tmp_path: Path, left: int) -> None:
    store = opened(TrunkCache(tmp_path, 10**6), "one")
    assert store is not None
    os.truncate(tmp_path / FOLDER / "one.states", left)
    with pytest.raises(StorageError, match=r"bytes of a row in .*one\.states; found"):
        read(store, [0, 1, 2, 3])


def test_what_broke_off_while_it_was_written_leaves_nothing(tmp_path: Path) -> None:
    def break_off(store: Store) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(TrunkCache(tmp_path, 10**6), "one", break_off)
    assert [path.suffix for path in (tmp_path / FOLDER).iterdir()] == [".lock"]
    assert opened(TrunkCache(tmp_path, 10**6), "one") is not None


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path, 2 * BYTES)
    for age, name in enumerate(("old", "older")):
        opened(cache, name)
        os.utime(tmp_path / FOLDER / f"{name}.states", (1000 - age, 1000 - age))
    opened(cache, "new")
    assert names(tmp_path) == ["new", "old"]


def test_use_makes_young(tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path, 2 * BYTES)
    for age, name in enumerate(("used", "idle")):
        opened(cache, name)
        os.utime(tmp_path / FOLDER / f"{name}.states", (1000 + age, 1000 + age))
    opened(cache, "used", never)
    opened(cache, "new")
    assert names(tmp_path) == ["new", "used"]


def test_one_that_is_removed_while_it_is_read_can_be_read_on(tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path, BYTES)
    store = opened(cache, "one")
    opened(cache, "two")
    assert names(tmp_path) == ["two"]
    assert store is not None
    assert torch.equal(read(store, [0])[1], states_of([0], 0.0)[1])


def fill_in(store: Store) -> None:
    store.write(store.rows, starts_of(store.rows), states_of(store.rows))


def test_of_what_is_larger_than_the_limit_the_shortest_rows_are_kept(tmp_path: Path, told: list[str]) -> None:
    cache = TrunkCache(tmp_path, BYTES - 1)
    store = opened(cache, "one", fill_in)
    assert store is not None
    assert store.rows.tolist() == [0, 1, 3]
    assert store.has(np.array([3, 2, 1, 0])).tolist() == [True, False, True, True]
    for found, written in zip(read(store, [3, 0]), states_of([3, 0], 0.0), strict=True):
        assert torch.equal(found, written)
    assert (tmp_path / FOLDER / "one.states").stat().st_size == BYTES * 6 // 10
    assert told == [
        "of 6.4e-07 GB that frozen layers make of the texts 3.84e-07 are kept, the rest is computed in each step: "
        "raise compute.trunk_cache_gb (6.39e-07)"
    ]
    assert opened(cache, "one", never) is not None


def test_so_they_are_where_first_tokens_are_kept(tmp_path: Path) -> None:
    layout = Layout(LENGTHS, 1, HIDDEN, torch.float32, first=True)
    assert layout.bytes == 4 * HIDDEN * 4
    store = TrunkCache(tmp_path, layout.bytes // 2).opened("one", layout, lambda store: None)
    assert store is not None
    assert store.rows.tolist() == [1, 3]


@pytest.mark.parametrize(("limit", "trains", "validates"), [
    (3 * BYTES, 2 * BYTES, BYTES),
    (3 * BYTES - 1, 12 * BYTES // 10, 6 * BYTES // 10),
    (BYTES, 6 * BYTES // 10, 3 * BYTES // 10),
])  # fmt: skip
def test_two_that_want_more_than_there_is_get_the_same_share(
    tmp_path: Path, limit: int, trains: int, validates: int
) -> None:
    """Or jobs that keep both would take turns to remove one for the other."""
    cache = TrunkCache(tmp_path, limit)
    large = Layout(LENGTHS, 4, HIDDEN, torch.float32)
    for filling in (lambda store: None, never):
        assert cache.opened("trains", large, filling, beside=LAYOUT.bytes) is not None
        assert cache.opened("validates", LAYOUT, filling, beside=large.bytes) is not None
    sizes = {path.stem: path.stat().st_size for path in (tmp_path / FOLDER).glob("*.states")}
    assert sizes == {"trains": trains, "validates": validates}


def test_of_what_is_far_larger_nothing_is_kept_nor_taken_away(tmp_path: Path, told: list[str]) -> None:
    opened(TrunkCache(tmp_path, BYTES), "one")
    assert opened(TrunkCache(tmp_path, BYTES // 11), "two", never) is None
    assert names(tmp_path) == ["one"]
    (line,) = told
    assert "of the texts 0 are kept, the rest is computed in each step: raise" in line


def test_with_a_higher_limit_all_are_kept(tmp_path: Path) -> None:
    opened(TrunkCache(tmp_path, BYTES - 1), "one", fill_in)
    store = opened(TrunkCache(tmp_path, BYTES), "one")
    assert store is not None
    assert store.has(np.arange(4)).all()
    assert torch.equal(read(store, [2])[0], states_of([2], 0.0)[0])


def test_with_a_lower_limit_what_is_there_is_read(tmp_path: Path) -> None:
    opened(TrunkCache(tmp_path, BYTES), "one")
    store = opened(TrunkCache(tmp_path, BYTES - 1), "one", never)
    assert store is not None
    assert store.has(np.arange(4)).all()


def test_one_that_was_kept_in_part_makes_room_before_others(tmp_path: Path) -> None:
    opened(TrunkCache(tmp_path, BYTES - 1), "one", fill_in)
    opened(TrunkCache(tmp_path, 2 * BYTES), "two")
    os.utime(tmp_path / FOLDER / "two.states", (1000, 1000))
    opened(TrunkCache(tmp_path, 2 * BYTES), "one")
    assert names(tmp_path) == ["one", "two"]


def test_a_disk_that_has_too_little_room_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, BYTES))  # type: ignore[attr-defined]
    assert opened(TrunkCache(tmp_path, 10**6), "one", never) is None
    assert told == [
        "of 6.4e-07 GB that frozen layers make of the texts 0 are kept, the rest is computed in each step: "
        "the disk has too little room, or others are writing"
    ]


def test_what_another_is_writing_counts(tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path, 2 * BYTES - 1)

    def meanwhile(store: Store) -> None:
        assert opened(cache, "two", never) is None
        fill(store)

    assert opened(cache, "one", meanwhile) is not None
    assert names(tmp_path) == ["one"]


def test_for_what_has_no_room_beside_another_that_is_written_nothing_is_taken_away(tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path, 2 * BYTES)
    opened(cache, "old")

    def meanwhile(store: Store) -> None:
        assert cache.opened("large", Layout(2 * LENGTHS, 2, HIDDEN, torch.float32), never) is None
        fill(store)

    opened(cache, "new", meanwhile)
    assert names(tmp_path) == ["new", "old"]


def test_beside_another_that_is_written_old_ones_make_room(tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path, 2 * BYTES)
    opened(cache, "old")

    def meanwhile(store: Store) -> None:
        assert opened(cache, "two") is not None
        fill(store)

    opened(cache, "one", meanwhile)
    assert names(tmp_path) == ["one", "two"]


def _be_killed(folder: Path) -> None:
    opened(TrunkCache(folder, BYTES), "one", lambda store: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("name", ["one", "two"])
def test_what_a_killed_writer_left_makes_room(tmp_path: Path, name: str) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=_be_killed, args=(tmp_path,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert [path.stat().st_size for path in (tmp_path / FOLDER).glob("*.new")] == [BYTES]
    assert opened(TrunkCache(tmp_path, BYTES), name) is not None
    assert list((tmp_path / FOLDER).glob("*.new")) == []


def test_others_cannot_read_what_is_kept(tmp_path: Path) -> None:
    opened(TrunkCache(tmp_path, 10**6), "one")
    assert (tmp_path / FOLDER).stat().st_mode & 0o077 == 0


def _write_slowly(folder: Path, log: Path) -> None:
    def slowly(store: Store) -> None:
        with log.open("a") as file:
            file.write("written\n")
        time.sleep(0.3)
        fill(store)

    store = opened(TrunkCache(folder, 10**6), "one", slowly)
    assert store is not None
    assert torch.equal(read(store, [0])[0], states_of([0], 0.0)[0])


def test_of_several_writers_one_writes_and_the_others_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")  # what tests before have left in this process is not theirs
    writers = [context.Process(target=_write_slowly, args=(tmp_path, log)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert log.read_text() == "written\n"
