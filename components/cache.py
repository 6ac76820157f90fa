"""The user's cache folder: what was fetched once and can be fetched again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from components.errors import StorageError


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
    """A file for its user alone, that has its name once the block has ended well; otherwise nothing is left of it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = tempfile.NamedTemporaryFile(dir=path.parent, suffix=".new", delete=False)  # noqa: SIM115  # closed below
    try:
        with file:
            yield file  # type: ignore[misc]  # a wrapper of one
        Path(file.name).replace(path)
    finally:
        Path(file.name).unlink(missing_ok=True)


def make_room(folder: Path, ending: str, room: int) -> None:
    """Remove files with that ending, those used longest ago first, until the others take `room` bytes at most."""
    found = []
    for path in folder.glob(f"*{ending}"):
        with suppress(FileNotFoundError):  # another job makes room, too
            about = path.stat()
            found.append((about.st_mtime, about.st_size, path))
    taken = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if taken <= room:
            return
        taken -= size
        path.unlink(missing_ok=True)


def _default() -> str:
    import platformdirs  # not at the top: a bare machine that names its folder does without

    return platformdirs.user_cache_dir("adapterline")
