"""Token ids on disk: what one job tokenised, later ones with the same rows, tokenizer and length map into memory.

CACHE/tokens/DIGEST.arrow     ids, [types], labels and cut of one part of a split, a row each

All files together stay below a limit; those that were used longest ago go first, and who has them mapped keeps them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from components import cache, digest
from components.errors import StorageError
from components.training.batching import Ragged, Tokens

FOLDER = "tokens"
ENDING = ".arrow"
LIMIT = 4 * 10**9  # bytes of all files together
# What token ids follow from, beside texts, tokenizer and length.
CODE = ("training/batching", "training/token_cache", "base_model")
LIBRARIES = ("tokenizers", "transformers")


def kept(about: list[str | int], make: Callable[[], Tokens]) -> Tokens:
    """The tokens that `make` makes, from the cache if they are there. about: all that they follow from."""
    try:
        folder = cache.folder() / FOLDER
    except StorageError:  # in a container without one, say
        return make()
    versions = [metadata.version(name) for name in LIBRARIES]
    name = digest.of_json([*about, *versions, digest.of_code(*CODE)])
    path = folder / f"{name}{ENDING}"
    found = _read(path)
    if found is None:
        found = make()
        _write(path, found)
    return found


def _read(path: Path) -> Tokens | None:
    """None when they are not there, or the file is damaged."""
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        columns = {name: table.column(name) for name in table.column_names}
        os.utime(path)  # whoever tidies up sees that it was read
        return Tokens(
            Ragged(columns["ids"].chunks),
            Ragged(columns["types"].chunks) if "types" in columns else None,
            columns["labels"].to_numpy(),
            columns["cut"].to_numpy(),
        )
    except (OSError, pa.ArrowInvalid, KeyError):
        return None


def _write(path: Path, tokens: Tokens) -> None:
    """Where nothing can be written, or all of it is too much, nothing is kept, and nothing fails."""
    columns = {"ids": _lists(tokens.ids), "labels": tokens.labels, "cut": tokens.cut}
    if tokens.types is not None:
        columns["types"] = _lists(tokens.types)
    table = pa.table(columns)
    if table.nbytes > LIMIT:
        return
    with (
        suppress(OSError),
        cache.room(path.parent, ENDING, LIMIT - table.nbytes),
        cache.writing(path) as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)


def _lists(rows: Sequence[Any]) -> pa.Array:
    return rows.lists if isinstance(rows, Ragged) else pa.array(rows, pa.large_list(pa.int32()))
