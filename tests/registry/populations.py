"""Stores, workspaces and caches with things in them of which the builder knows whether they may go."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from components.base_model import BasePin
from components.data import ledger
from components.methods import Member
from components.registry import bundle, history

NOW = 1_700_000_000.0
OLD = NOW - 3 * 86_400
GRACE = 86_400.0


def sha(*words: object) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()


def base_of(name: str) -> BasePin:
    return BasePin(name=name, revision=None, weights_sha256=sha(name), tokenizer_sha256=sha(name, "tokenizer"))


def aged(path: Path, when: float = OLD) -> Path:
    """Everything below was last changed then."""
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(each, (when, when))
    return path


def write(path: Path, content: str = "{}", when: float = OLD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return aged(path, when)


def make_bundle(
    folder: Path,
    name: str,
    split: str,
    method: str = "pfeiffer",
    members: Sequence[Member] = (),
    base: str = "minilm",
    when: float = OLD,
) -> str:
    """Digest of a bundle that differs from others by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(name))
    manifest = bundle.write_manifest(
        folder,
        method=method,
        job_digest=sha(name, "job"),
        data_uri=f"store/splits/{split}",
        data_digest=split,
        code="code",
        seed=0,
        base=base_of(base),
        members=tuple(members),
        labels=("bad", "good"),
        max_tokens=16,
        trained_parameters=1,
        total_parameters=2,
    )
    aged(folder, when)
    return manifest.digest


def make_spec(path: Path, name: str, split: str, members: Sequence[Member] = (), when: float = OLD) -> None:
    """As much of a job's spec as says what it needs."""
    settings = {"members": [member.model_dump() for member in members]} if members else None
    base = base_of("minilm").model_dump()
    write(path, json.dumps({"name": name, "settings": settings, "data": {"digest": split}, "base": base}), when)


def make_split(store: Path, digest: str, whole: bool = True, when: float = OLD) -> Path:
    for part in ("train", "validation", "test"):
        write(store / "splits" / digest / f"{part}.parquet", part, when)
    if whole:
        write(store / "splits" / digest / "split.json", when=when)
    return store / "splits" / digest


def accept(store: Path, model: str, number: int, split: str, frozen: str, rows: str) -> ledger.Record:
    """A record of accepted data, as the flows write it."""
    record = ledger.Record(
        data_digest=rows,
        split_config_digest="settings",
        split_digest=split,
        split_uri=f"{store}/splits/{split}",
        frozen_digest=frozen,
        labels=("bad", "good"),
        rows_per_label={},
        rows_per_part={},
        near_duplicates=0,
        accepted_at="2026-01-01T00:00:00+00:00",
    )
    write(store / "data" / model / f"{number:06d}.json", record.model_dump_json())
    return record


def promote(store: Path, model: str, digest: str = "", run: str = "") -> None:
    """The next record of a model's history."""
    before = history.records(str(store), model)
    record = history.Record(
        sequence=len(before) + 1,
        model=model,
        action="promote",
        before=None,
        after="1",
        who="a test",
        why="for a test",
        when="2026-01-01T00:00:00+00:00",
        bundle_digest=digest,
        run=run,
        previous=before[-1].digest if before else "",
    )
    assert history.append(str(store), record)
    history.mark_done(str(store), record)


def job_name(name: str, method: str = "pfeiffer") -> str:
    return f"{method}-{sha(name, 'job')[:16]}"
