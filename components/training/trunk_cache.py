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
from dataclasses import dataclass, replace
from functools import cached_property
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

log = logging.getLogger("adapterline")


@dataclass(frozen=True)
class Layout:
    """What is kept of rows: so many states of each token, or of the first one alone.

    In a file the rows that are kept lie one behind the other, each as (states, its tokens, hidden).  lengths: (rows,),
    tokens of each.  kept: (rows,), is it? None for all.
    """

    lengths: Rows
    states: int
    hidden: int
    dtype: torch.dtype
    first: bool = False
    kept: npt.NDArray[np.bool_] | None = None

    @property
    def counts(self) -> Rows:
        """(rows,): of how many tokens of each row there are states."""
        return np.ones_like(self.lengths) if self.first else self.lengths

    @cached_property
    def starts(self) -> Rows:
        """(rows + 1,): where each row begins, in tokens, and the last one ends."""
        counts = self.counts if self.kept is None else self.counts * self.kept
        return np.concatenate([[0], np.cumsum(counts)])

    @property
    def token(self) -> int:
        """Bytes of one state of a token."""
        return self.hidden * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.states * int(self.starts[-1]) * self.token

    def within(self, most: int) -> Layout:
        """The same of the shortest rows, in at most so many bytes."""
        order = np.argsort(self.lengths, kind="stable")
        kept = np.zeros(len(order), dtype=np.bool_)
        kept[order] = self.states * np.cumsum(self.counts[order]) * self.token <= most
        return replace(self, kept=kept)


class Store:
    """States of rows in one file.

    Read and written a row at a time rather than mapped: pages of a mapped file count as memory of the job.
    """

    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self._file, self.layout = file, layout

    @property
    def rows(self) -> Rows:
        """Those that are kept."""
        return np.flatnonzero(self.has(np.arange(len(self.layout.lengths))))

    def has(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """(rows,): which of them are kept."""
        kept = self.layout.kept
        return np.ones(len(rows), dtype=np.bool_) if kept is None else kept[rows]

    def write(self, rows: Rows, starts: Rows, states: list[torch.Tensor]) -> None:
        """states: (tokens, hidden) each.  starts: (rows,), where the rows start in them."""
        for content, place in self._parts(rows, starts, states):
            if os.pwritev(self._file.fileno(), content, place) != _size(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def read(self, rows: Rows, starts: Rows, tokens: int) -> list[torch.Tensor]:
        """(tokens, hidden) each, with zeros where no row is. starts: (rows,), where the rows are to start.

        Raises StorageError when the file was cut short meanwhile.
        """
        layout = self.layout
        found = [torch.zeros(tokens, layout.hidden, dtype=layout.dtype) for _ in range(layout.states)]
        for content, place in self._parts(rows, starts, found):
            if (got := os.preadv(self._file.fileno(), content, place)) != _size(content):
                raise self._cut_short(_size(content), got)
        return found

    def _parts(self, rows: Rows, starts: Rows, states: list[torch.Tensor]) -> Iterator[tuple[list[memoryview], int]]:
        """Of each row its bytes in all states, and where they are in the file."""
        token, begins, whole = self.layout.token, self.layout.starts, [_bytes(each.contiguous()) for each in states]
        places, sizes = begins[rows] * token * len(whole), (begins[rows + 1] - begins[rows]) * token
        for start, size, place in zip((starts * token).tolist(), sizes.tolist(), places.tolist(), strict=True):
            yield [each[start : start + size] for each in whole], place

    def _cut_short(self, expected: int, found: int) -> StorageError:
        todo = "run the same again: a file that is not whole is computed anew"
        return StorageError(f"{expected} bytes of a row in {self._file.name}", f"{found}", todo)


class TrunkCache:
    """The files in one folder. Where there is no room, as much is kept as there is room for, and nothing fails."""

    def __init__(self, folder: Path, limit: int) -> None:
        """limit: bytes of all files together."""
        self._folder, self._limit = folder / FOLDER, limit

    def opened(self, name: str, layout: Layout, fill: Callable[[Store], None], beside: int = 0) -> Store | None:
        """The states of that name, written by `fill` if they are not there; of some rows where all would take too much
        room, None where even these would.

        beside: bytes of another file that wants as large a share of what it needs.
        """
        both = layout.bytes + beside
        part = layout if both <= self._limit else layout.within(self._limit * layout.bytes // both)
        path = self._folder / f"{name}{ENDING}"
        with cache.alone(path.with_suffix(".lock")):
            store = _whole(path, layout) or _whole(path, part)
            if store is None and part.bytes:
                self._write(path, part, fill)
                store = _whole(path, part)  # unless there was too little room, or another job made room of it at once
        kept = store.layout.bytes if store else 0
        if kept < layout.bytes:
            log.warning(
                "of %.3g GB that frozen layers make of the texts %.3g are kept, the rest is computed in each step: %s",
                layout.bytes / 1e9,
                kept / 1e9,
                f"raise compute.trunk_cache_gb ({self._limit / 1e9:.3g})"
                if kept == part.bytes
                else "the disk has too little room, or others are writing",
            )
        return store

    def _write(self, path: Path, layout: Layout, fill: Callable[[Store], None]) -> None:
        """Nothing, where it would take too much room."""
        path.unlink(missing_ok=True)  # of another size
        try:
            with ExitStack() as unfinished:
                with cache.room(self._folder, ENDING, self._limit - layout.bytes):
                    if layout.bytes > SHARE * shutil.disk_usage(self._folder).free:
                        return
                    file = unfinished.enter_context(cache.writing(path))
                    # A disk that is full says so before anything is computed, and others count all of it from here on.
                    os.posix_fallocate(file.fileno(), 0, layout.bytes)
                fill(Store(file, layout))
                os.fsync(file.fileno())
        except OSError as error:
            if not disk.full(error):
                raise


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Of a contiguous tensor, which shares their memory."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def _size(content: list[memoryview]) -> int:
    return sum(each.nbytes for each in content)


def _whole(path: Path, layout: Layout) -> Store | None:
    """The file, if it is there and all in it. Opened before it is looked at: others may make room of it meanwhile."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != layout.bytes:
        file.close()
        return None
    os.utime(file.fileno())
    return Store(file, layout)
