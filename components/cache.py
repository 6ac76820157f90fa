"""The user's cache folder: what was fetched once and can be fetched again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def folder() -> Path:
    """`$ADAPTERLINE_CACHE`, or `adapterline` in the user's cache folder. Made when missing."""
    path = Path(os.environ.get("ADAPTERLINE_CACHE") or platformdirs.user_cache_dir("adapterline"))
    path.mkdir(parents=True, exist_ok=True)
    return path
