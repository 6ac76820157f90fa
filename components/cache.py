"""The user's cache folder: what was fetched once and can be fetched again."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from components.errors import StorageError

UNFINISHED = ".new"


def folder() -> Path:
    """`$ADAPTERLINE_CACHE`, or `adapterline` in the user's cache folder. Made when missing.

    Raises StorageError when nothing can be written there.
    """
    path = Path(os.environ.get("ADAPTERLINE_CACHE") or _default())
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise StorageError(f"a cache folder to write in at {path}", "none", "set ADAPTERLINE_CACHE to another")
    return path


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file for its user alone, that has its name once the block has ended well; otherwise nothing is left of it.

    It is locked until then. A process that is killed leaves it, and nobody's lock on it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = tempfile.NamedTemporaryFile(dir=path.parent, suffix=UNFINISHED, delete=False)  # noqa: SIM115  # closed below
    try:
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file  # type: ignore[misc]  # a wrapper of one
            file.flush()
            Path(file.name).replace(path)
    finally:
        Path(file.name).unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Held by one thread of one process at a time, by a file at `path`; others wait."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def room(folder: Path, ending: str, most: int) -> Iterator[None]:
    """Has the files with that ending, and those that others are writing, take `most` bytes at most: what writers that
    are gone have left is removed, and then files, those used longest ago first. For the length of the block nobody else
    makes room there, so that is where whoever needs it takes it.

    Raises OSError, as for a full disk, when others are writing more than that; no file is removed for it then.
    """
    with alone(folder.with_suffix(".lock")):
        # Before the others: one that is finished meanwhile is counted twice rather than not at all.
        most -= sum(map(_being_written, folder.glob(f"*{UNFINISHED}")))
        if most < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        found = []
        for path in folder.glob(f"*{ending}"):
            with suppress(FileNotFoundError):  # someone tidies up
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
        taken = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if taken <= most:
                break
            taken -= size
            path.unlink(missing_ok=True)
        yield


def _being_written(path: Path) -> int:
    """Bytes of an unfinished file; of one whose writer is gone none, and it is removed."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return size
            path.unlink(missing_ok=True)
    except FileNotFoundError:  # finished meanwhile, or given up
        pass
    return 0


def _default() -> str:
    import platformdirs  # not at the top: a bare machine that names its folder does without

    return platformdirs.user_cache_dir("adapterline")
