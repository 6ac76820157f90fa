"""What a job reads before it learns: the base, the parts of the split, their tokens. Jobs of one process share it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from components.errors import ConfigError
from components.training.distributed import ALONE, Group
from components.training.spec import JobSpec

if TYPE_CHECKING:
    from datasets import Dataset

    from components.base_model import BaseModel
    from components.training.batching import Tokens


@dataclass(frozen=True)
class Material:
    """parts, tokens: by name of the part.  padding: id of the padding token."""

    base: BaseModel
    parts: dict[str, Dataset]
    tokens: dict[str, Tokens]
    padding: int


@dataclass(frozen=True)
class Shelf:
    """What was read once is there for every later job that asks for the same.

    Models are not on it: one that is loaded again shares the pages of its file, and takes less time than a copy.
    """

    _read: dict[str, Material] = field(default_factory=dict)

    def material(self, spec: JobSpec, group: Group = ALONE) -> Material:
        """Raises AdapterlineError when base or split are not there, or not what the spec says."""
        asked = spec.model_dump_json(include={"base": True, "data": True, "labels": True, "training": {"max_tokens"}})
        if asked not in self._read:
            self._read[asked] = _read(spec, group)
        return self._read[asked]


def _read(spec: JobSpec, group: Group) -> Material:
    from components import base_model
    from components.data import ledger
    from components.training import token_cache
    from components.training.batching import tokenise

    with group.first_here():
        base = base_model.find_pinned(spec.base)
    with tempfile.TemporaryDirectory() as folder:
        parts, labels = ledger.load_parts(spec.data.uri, spec.data.digest, Path(folder))
    if labels != spec.labels:
        raise ConfigError(f"labels {', '.join(spec.labels)}", ", ".join(labels), "split the data again")
    tokenizer = base_model.load_tokenizer(base)
    most = spec.training.max_tokens
    tokens = {
        name: token_cache.kept(
            [spec.data.digest, name, spec.base.tokenizer_sha256, most], partial(tokenise, table, tokenizer, most)
        )
        for name, table in parts.items()
    }
    return Material(base, parts, tokens, base_model.padding(base))
