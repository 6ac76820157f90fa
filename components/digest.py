"""Digests: sha256 over canonical content. Equal digests mean that the work need not be done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


def of_json(value: Any) -> str:
    """Digest of a JSON value, independent of key order and white space."""
    return of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_files(paths: Iterable[Path]) -> str:
    """Digest of several files by name and content, independent of their order and folder."""
    return of_json(sorted((path.name, of_file(path)) for path in paths))


def of_code(*parts: str) -> str:
    """Digest of our own source below `components/`, e.g. `of_code("adapters", "training")`: the code version.

    Comments count too. That retrains now and then without need, and never fails to retrain with need.
    """
    sources = sorted(path for part in parts for path in _sources(PACKAGE / part))
    return of_json([(path.relative_to(PACKAGE).as_posix(), of_file(path)) for path in sources])


def _sources(place: Path) -> Iterable[Path]:
    if place.is_dir():
        return chain(place.rglob("*.py"), place.rglob("*.c"))
    compiled = place.with_suffix(".c")
    return [place.with_suffix(".py"), *([compiled] if compiled.is_file() else [])]
