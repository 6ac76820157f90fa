"""States of trunks on disk, one file for each digest, read through the page cache by every job that shares it.

    CACHE/trunk/DIGEST.states     complete: it got this name when everything was in it
    CACHE/trunk/DIGEST.lock       held by the one who writes; a second one waits, and then reads

All files together stay below a limit; those that were used longest ago go first. A job that reads one which goes
meanwhile keeps what it has open.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from components import disk

FOLDER = "trunk"
ENDING = ".states"
# Of the disk's free space, what one file may take: other jobs want to write, too.
SHARE = 0.5


class Store:
    """States of all rows in one array, (states, tokens of all rows, hidden), memory-mapped."""

    def __init__(self, array: torch.Tensor, starts: npt.NDArray[np.int64]) -> None:
        """starts: (rows + 1,), where each row begins and the last one ends."""
        self._array, self._starts = array, starts

    def write(self, rows: npt.NDArray[np.int64], states: list[torch.Tensor]) -> None:
        """states: (rows, tokens, hidden) each, padded."""
        for index, row in enumerate(rows):
            begin, end = self._starts[row], self._starts[row + 1]
            for kept, state in zip(self._array, states, strict=True):
                kept[begin:end] = state[index, : end - begin]

    def read(self, rows: npt.NDArray[np.int64]) -> list[torch.Tensor]:
        """(rows, tokens, hidden) each, padded with zeros."""
        spans = [(int(self._starts[row]), int(self._starts[row + 1])) for row in rows]
        longest = max(end - begin for begin, end in spans)
        found = [self._array.new_empty(len(spans), longest, self._array.shape[-1]) for _ in self._array]
        for kept, block in zip(self._array, found, strict=True):
            for index, (begin, end) in enumerate(spans):
                block[index, : end - begin] = kept[begin:end]
                block[index, end - begin :] = 0
        return found


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
        """The states of that name, written by `fill` if they are not there; None when they would take too much room.

        lengths: (rows,), tokens of each.
        """
        starts = np.concatenate([[0], np.cumsum(lengths)])
        shape = (states, int(starts[-1]), hidden)
        size = int(np.prod(shape)) * dtype.itemsize
        if size > self._limit:
            return None
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f"{name}{ENDING}"
        with _alone(path.with_suffix(".lock")):
            if not (path.is_file() and path.stat().st_size == size):
                self._make_room(size)
                if size > SHARE * shutil.disk_usage(self._folder).free:
                    return None
                try:
                    _write(path, size, lambda file: fill(Store(_mapped(file, shape, dtype, True), starts)))
                except OSError as error:
                    if disk.full(error):
                        return None
                    raise
            path.touch()
            return Store(_mapped(path, shape, dtype, False), starts)

    def _make_room(self, size: int) -> None:
        files = sorted(self._folder.glob(f"*{ENDING}"), key=lambda path: path.stat().st_mtime)
        taken = sum(path.stat().st_size for path in files)
        for path in files:
            if taken + size <= self._limit:
                return
            taken -= path.stat().st_size
            path.unlink(missing_ok=True)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype, writable: bool) -> torch.Tensor:
    return torch.from_file(str(path), shared=writable, size=int(np.prod(shape)), dtype=dtype).view(shape)


def _write(path: Path, size: int, fill: Callable[[Path], None]) -> None:
    """A file that has its name only once all is in it, and on the disk."""
    number, name = tempfile.mkstemp(dir=path.parent, suffix=".new")
    try:
        os.posix_fallocate(number, 0, size)  # a disk that is full says so here, not by a signal when a page is written
        fill(Path(name))
        os.fsync(number)
        Path(name).replace(path)
    finally:
        os.close(number)
        Path(name).unlink(missing_ok=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
