"""What lies in the store, the workspace and the cache, as things that stay or go as a whole.

Only names that the flows give are looked at: a file of somebody else's is never listed, nor are the ledger, the history
and locks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from components import base_model, digest, storage
from components.errors import StorageError, StorageUnavailable
from components.registry import bundle, garbage, members, uploads
from components.registry.garbage import Thing
from components.storage import Entry

# Where large files are written. In other places of S3 a broken-off upload is not ours.
AREAS = ("bundles", "frozen", "jobs", "splits")
RECORDS = ("data", "history")
SHA = r"[0-9a-f]{64}"
JOB = re.compile(r"^((?:[a-z0-9-]+-[0-9a-f]{16})|(?:[0-9a-f]{64}))(?:/.+|\.spec\.json|\.progress\.json)$")
LEAST = re.compile(r"^(tmp[a-z0-9_]{8}(?:\.new)?)(?:/.+)?$")  # as Python names temporary folders and files


def of_store(store: str) -> list[Thing]:
    """What the flows left in the store, except MLflow's artifacts."""
    areas = AREAS if storage.is_s3(store) else (*AREAS, *RECORDS)
    return [
        *_jobs(storage.join(store, "jobs")),
        *_folders(storage.join(store, members.FOLDER), SHA, "bundle"),
        *_folders(storage.join(store, "splits"), SHA, "split"),
        *_files(storage.join(store, "frozen"), rf"({SHA})\.parquet", "test rows"),
        *(thing for area in areas for thing in uploads.unfinished(storage.join(store, area))),
    ]


def of_workspace(workspace: Path) -> list[Thing]:
    """Copies of rows, jobs with their bundles and checkpoints, and reports."""
    return [
        *_jobs(str(workspace / "jobs")),
        *_files(str(workspace / "rows"), rf"({SHA})\.parquet", "rows"),
        *_folders(str(workspace / "reports"), r"[0-9a-f]{16}", "report"),
    ]


def of_cache(cache: Path) -> list[Thing]:
    """What was fetched once, and jobs whose bundles go to S3."""
    return [
        *_jobs(str(cache / "jobs")),
        *_folders(str(cache / members.FOLDER), SHA, "bundle"),
        *(
            _based(cache / "models", thing)
            for thing in _folders(str(cache / "models"), r"[\w.-]+-[0-9a-f]{12}", "base")
        ),
        *_files(str(cache / "pypi"), r"(.+\.(?:whl|zip|tar\.gz))", "archive"),
        *_files(str(cache / "tokens"), rf"({SHA})\.arrow", "tokens"),
        *_files(str(cache / "trunk"), rf"({SHA})\.states", "trunk"),
        *(
            thing
            for area in ("models", "pypi", "tokens", "trunk", members.FOLDER)
            for thing in _temporary(cache / area)
        ),
    ]


def listing(uri: str) -> list[Entry]:
    """All files below a place, sorted by name. On disk those of unfinished writes too, and links as links."""
    if storage.is_s3(uri):
        return storage.listing(uri)
    found = []
    for folder, names, files in os.walk(uri):
        links = [name for name in names if (Path(folder) / name).is_symlink()]
        for path in (Path(folder) / name for name in (*files, *links)):
            try:
                about = path.lstat()
            except FileNotFoundError:  # gone meanwhile
                continue
            name = path.relative_to(uri).as_posix()
            found.append(Entry(name, about.st_size, str(about.st_mtime_ns), about.st_mtime))
    return sorted(found, key=lambda entry: entry.name)


def grouped(entries: Iterable[Entry], pattern: re.Pattern[str]) -> dict[str, tuple[Entry, ...]]:
    """Entries by the first group of a pattern; those that it does not match are left out."""
    found = defaultdict(list)
    for entry in entries:
        if storage.UNFINISHED not in entry.name and (match := pattern.match(entry.name)):
            found[match[1]].append(entry)
    return {name: tuple(group) for name, group in found.items()}


def newest(files: Iterable[Entry]) -> float:
    return max((file.modified for file in files), default=0.0)


def described(uri: str) -> tuple[bundle.Manifest, frozenset[str]]:
    """The manifest at a URI, and what the bundle refers to: the members that it stands on, its split and base.

    Raises ValueError when it is none.
    """
    manifest = bundle.Manifest.model_validate_json(storage.read(uri))
    refers = {f"bundle:{member.digest}" for member in manifest.members}
    return manifest, frozenset({*refers, f"split:{manifest.data_digest}", f"base:{manifest.base.weights_sha256}"})


def _jobs(base: str) -> list[Thing]:
    """Jobs by name: folder, spec and signs of life; finished or not."""
    things: list[Thing] = []
    baselines: dict[tuple[str, str], tuple[float, str]] = {}
    for name, files in grouped(listing(base), JOB).items():
        thing = Thing("job", storage.join(base, name), base, files, newest(files), held=_lock(base, name))
        short = name[:16] if len(name) == 64 else name.rpartition("-")[2]
        keys, there = {f"job:{short}"}, {file.name for file in files}
        try:
            if f"{name}/{bundle.MANIFEST}" in there:
                manifest, refers = described(storage.join(base, name, bundle.MANIFEST))
                keys.add(f"bundle:{manifest.digest}")
                if manifest.method == "full":
                    place = (manifest.data_digest, manifest.base.weights_sha256)
                    baselines[place] = max((thing.modified, name), baselines.get(place, (0.0, "")))
            else:
                spec = f"{name}.spec.json"
                refers = _needed(json.loads(storage.read(storage.join(base, spec)))) if spec in there else frozenset()
                thing = replace(thing, why="its training was broken off, and no job goes on with it")
        except StorageUnavailable:
            raise
        except (ValueError, KeyError, TypeError, StorageError):  # damaged, of another release, or just changing
            thing, refers = replace(thing, held=garbage.UNREAD), frozenset()
        things.append(replace(thing, keys=frozenset(keys), refers=refers))
    best = {storage.join(base, name): split for (split, _), (_, name) in baselines.items()}
    return [
        replace(thing, keys=thing.keys | {f"baseline:{best[thing.place]}"}) if thing.place in best else thing
        for thing in things
    ]


def _needed(spec: Any) -> frozenset[str]:
    """What a job needs, by its spec."""
    fused = (spec["settings"] or {}).get("members", ())
    keys = {f"bundle:{member['digest']}" for member in fused}
    return frozenset({*keys, f"split:{spec['data']['digest']}", f"base:{spec['base']['weights_sha256']}"})


def _lock(base: str, name: str) -> str:
    """Why a job stays whose lock on this machine a process has; one that cannot be tried counts as held."""
    if storage.is_s3(base):
        return ""
    try:
        with (Path(base) / f"{name}.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return "" if error.errno == errno.ENOENT else "its lock is held"
    return ""


def _folders(base: str, name: str, kind: garbage.Kind) -> Iterator[Thing]:
    """Folders that are named by what they hold."""
    for key, files in grouped(listing(base), re.compile(rf"^({name})/.+$")).items():
        thing = Thing(kind, storage.join(base, key), base, files, newest(files), frozenset({f"{kind}:{key}"}))
        if kind == "bundle" and f"{key}/{bundle.MANIFEST}" in {file.name for file in files}:
            try:
                thing = replace(thing, refers=described(storage.join(base, key, bundle.MANIFEST))[1])
            except StorageUnavailable:
                raise
            except (ValueError, StorageError):
                thing = replace(thing, held=garbage.UNREAD)
        yield thing


def _files(base: str, name: str, kind: garbage.Kind) -> Iterator[Thing]:
    for key, files in grouped(listing(base), re.compile(rf"^{name}$")).items():
        place = storage.join(base, files[0].name)
        yield Thing(kind, place, base, files, newest(files), frozenset({f"{kind}:{key}"}))


def _based(base: Path, thing: Thing) -> Thing:
    """With the digest of the weights that are in it, by which versions name their base."""
    folder = Path(thing.place)
    keys = {f"embedded:{folder.name}"}
    weights = sorted(folder.glob("*.safetensors"))
    ours = {f"{name}-{archive.sha256[:12]}" for name, (archive, _) in base_model.EMBEDDED.items()}
    if folder.name not in ours and weights and (folder / "config.json").is_file():
        keys.add(f"base:{digest.of_files([folder / 'config.json', *weights])}")
    return replace(thing, keys=frozenset(keys))


def _temporary(base: Path) -> Iterator[Thing]:
    """Folders in which a process that was killed had begun to fetch something."""
    for name, files in grouped(listing(str(base)), LEAST).items():
        yield Thing("unfinished", str(base / name), str(base), files, newest(files))
