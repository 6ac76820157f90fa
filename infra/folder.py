"""The folder that a stack lives in: where it is, whose it is, what is written there and how."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from infra.errors import StackError

# Relative to the working directory, as every command of the project is run from the checkout.
FOLDER = Path(os.environ.get("ADAPTERLINE_STACK") or "out/stack")
# What the servers write in their first minutes: databases, their write-ahead logs, the store's first volumes.
NEEDED_MB = 300


def identity(folder: Path) -> str:
    """What marks the processes and containers of this stack, and no other's."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


def make(folder: Path) -> None:
    """The folder, for its owner only: keys and rows are in it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def check_space(folder: Path) -> None:
    """Raises StackError when there is no room for what the servers write in their first minutes."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free // 10**6
    if free < NEEDED_MB:
        raise StackError(
            f"expected {NEEDED_MB} MB free for {folder}; found {free} MB; "
            "free some, or name a folder elsewhere in ADAPTERLINE_STACK"
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Whatever fails in the block on a full disk fails for that reason, in one line."""
    try:
        yield
    except (StackError, OSError) as error:
        check_space(folder)
        if isinstance(error, OSError):
            raise StackError(f"expected to write in {folder}; found {error.strerror}; check the folder") from error
        raise


def write_private(path: Path, text: str) -> None:
    """Whole or not at all, and readable by its owner only from its first moment."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    try:
        with open_private(draft, os.O_EXCL) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def open_private(path: Path, flags: int = 0) -> IO[str]:
    """A file for writing, for its owner only."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600), "w")


def record(folder: Path) -> dict[str, Any]:
    """What the last `up` wrote down; empty when there is none, or after `down`."""
    try:
        found: dict[str, Any] = json.loads((folder / "stack.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time starts or stops what is in the folder; the others wait."""
    with open_private(folder / "change.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(f"waiting for another command that starts or stops {folder}\n")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
