"""States of trunks on disk, one file for each digest, read by every job that shares it.

    CACHE/trunk/DIGEST.states     complete: it got this name when everything was in it
    CACHE/trunk/DIGEST.lock       held by the one who writes; a second one waits, and then reads
    CACHE/trunk/….new             unfinished, of its full size from the start; locked as long as its writer lives
    CACHE/trunk.lock              held by the one who makes room

All files together, unfinished ones too, stay below a limit; those that were used longest ago go first. A job that reads
one which goes meanwhile keeps what it has open. What is larger than the limit is kept in part, of the shortest texts:
batches are of like length, so most are kept whole or not at all, and what is computed are large matrices.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from components import cache, disk
from components.errors import StorageError

Rows = npt.NDArray[np.int64]

FOLDER = "trunk"
ENDING = ".states"
# Of the disk's free space, what one file may take: other jobs want to write, too.
SHARE = 0.5
# Of the limit, what one file takes that is kept in part: the rows to validate on want room, too.
PART = 0.8
# Of a trunk, what is worth keeping.
LEAST = 0.2

log = logging.getLogger("adapterline")


class Store:
    """States of rows in one file, (states, tokens of all of them, hidden).

    Read and written a row at a time rather than mapped: pages of a mapped file count as memory of the job.
    """

    def __init__(self, file: BinaryIO, starts: npt.NDArray[np.int64], states: int, hidden: int, dtype: torch.dtype):
        """starts: (rows + 1,), where each row begins and the last one ends; a row that is not kept has no tokens."""
        self._file, self._starts, self._states = file, starts, states
        self._hidden, self._dtype = hidden, dtype

    @property
    def rows(self) -> Rows:
        """Those that are kept."""
        return np.flatnonzero(np.diff(self._starts))

    def has(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """(rows,): which of them are kept."""
        return self._starts[rows + 1] > self._starts[rows]

    def write(self, rows: Rows, starts: Rows, states: list[torch.Tensor]) -> None:
        """states: (tokens, hidden) each.  starts: (rows,), where the rows start in them."""
        for number, state in enumerate(states):
            for row, start, length in self._parts(rows, starts):
                content = _bytes(state[start : start + length].contiguous())
                if os.pwrite(self._file.fileno(), content, self._place(number, row)) != content.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def read(self, rows: Rows, starts: Rows, tokens: int) -> list[torch.Tensor]:
        """(tokens, hidden) each, with zeros where no row is. starts: (rows,), where the rows are to start.

        Raises StorageError when the file was cut short meanwhile.
        """
        found = [torch.zeros(tokens, self._hidden, dtype=self._dtype) for _ in range(self._states)]
        for number, state in enumerate(found):
            for row, start, length in self._parts(rows, starts):
                content = _bytes(state[start : start + length])
                got = os.preadv(self._file.fileno(), [content], self._place(number, row))
                if got != content.nbytes:
                    raise self._cut_short(content.nbytes, got)
        return found

    def _parts(self, rows: Rows, starts: Rows) -> Iterator[tuple[int, int, int]]:
        """Of each row its number, start and length."""
        lengths = self._starts[rows + 1] - self._starts[rows]
        return zip(rows.tolist(), starts.tolist(), lengths.tolist(), strict=True)

    def _cut_short(self, expected: int, found: int) -> StorageError:
        todo = "run the same again: a file that is not whole is computed anew"
        return StorageError(f"{expected} bytes of a row in {self._file.name}", f"{found}", todo)

    def _place(self, state: int, row: int) -> int:
        """Of a row's first byte."""
        return int(state * self._starts[-1] + self._starts[row]) * self._hidden * self._dtype.itemsize


class TrunkCache:
    """The files in one folder. Where there is no room, nothing is kept, and nothing fails."""

    def __init__(self, folder: Path, limit: int) -> None:
        """limit: bytes of all files together."""
        self._folder, self._limit = folder / FOLDER, limit

    def opened(
        self,
        name: str,
        lengths: npt.NDArray[np.int64],
        states: int,
        hidden: int,
        dtype: torch.dtype,
        fill: Callable[[Store], None],
    ) -> Store | None:
        """The states of that name, written by `fill` if they are not there. Those of the shortest rows where all would
        take too much room; None where even these would.

        lengths: (rows,), tokens of each.
        """
        token = states * hidden * dtype.itemsize
        kept = _kept(lengths, self._limit // token, int(PART * self._limit) // token)
        starts = np.concatenate([[0], np.cumsum(lengths * kept)])
        size, whole = int(starts[-1]) * token, int(lengths.sum()) * token

        def store(file: BinaryIO) -> Store:
            return Store(file, starts, states, hidden, dtype)

        if size < whole:
            _tell(whole, size, f"raise compute.trunk_cache_gb ({self._limit / 1e9:.3g})")
        if not size:
            return None
        path = self._folder / f"{name}{ENDING}"
        with cache.alone(path.with_suffix(".lock")):
            file = _whole(path, size)
            if file is None:
                try:
                    self._write(path, size, lambda written: fill(store(written)))
                except OSError as error:
                    if not disk.full(error):
                        raise
                file = _whole(path, size)
            if file is None:  # there was too little room, or another job made room of it at once
                _tell(whole, 0, "the disk has too little room, or others are writing")
                return None
            os.utime(file.fileno())
            return store(file)

    def _write(self, path: Path, size: int, fill: Callable[[BinaryIO], None]) -> None:
        """Nothing, where it would take too much of the disk. Raises OSError when there is no room."""
        with ExitStack() as unfinished:
            with cache.room(self._folder, ENDING, self._limit - size):
                if size > SHARE * shutil.disk_usage(self._folder).free:
                    return
                file = unfinished.enter_context(cache.writing(path))
                # A disk that is full says so before anything is computed, and others count all of it from here on.
                os.posix_fallocate(file.fileno(), 0, size)
            fill(file)
            os.fsync(file.fileno())


def _tell(whole: int, kept: int, why: str) -> None:
    """whole, kept: bytes."""
    log.warning(
        "of %.3g GB that frozen layers make of the texts %.3g are kept, the rest is computed in each step: %s",
        whole / 1e9,
        kept / 1e9,
        why,
    )


def _kept(lengths: npt.NDArray[np.int64], most: int, part: int) -> npt.NDArray[np.bool_]:
    """(rows,): which are kept. All, if they have at most `most` tokens, or else the shortest with `part` together."""
    order = np.argsort(lengths, kind="stable")
    sums = np.cumsum(lengths[order])
    kept = np.ones(len(lengths), dtype=np.bool_)
    if len(sums) and sums[-1] > most:
        kept[order] = (sums <= part) & (part >= LEAST * sums[-1])
    return kept


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Of a contiguous tensor, which shares their memory."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def _whole(path: Path, size: int) -> BinaryIO | None:
    """The file, if it is there and all in it. Opened before it is looked at: others may make room of it meanwhile."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size == size:
        return file
    file.close()
    return None
