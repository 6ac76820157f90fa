"""A full disk, told in one line whoever ran into it."""

from __future__ import annotations

import errno
import os

from components.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT)


def full(error: BaseException | None) -> StorageError | None:
    """What to say of an error that comes from a disk without space, or from a user's share of it; else None."""
    while error is not None:
        # Libraries in other languages have no error numbers, but the system's words.
        if (isinstance(error, OSError) and error.errno in FULL) or os.strerror(errno.ENOSPC) in str(error):
            place = getattr(error, "filename", None)
            found = f"none for {place}" if place else "none"
            return StorageError(
                "space left on the disk", found, "free some, and run the same again: what is done is kept"
            )
        error = error.__cause__ or error.__context__
    return None
