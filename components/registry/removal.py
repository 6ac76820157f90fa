"""Removing a thing so that a failure half-way leaves nothing that looks whole."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from components import storage
from components.registry import bundle, inventory, uploads
from components.registry.garbage import Thing
from components.registry.tracking import calls, load_mlflow
from components.storage import Entry

# Their presence says that the rest is there, so they go before it.
FIRST = (bundle.MANIFEST, "split.json", "last.safetensors")
# These tell what the rest is, so they go after it.
LAST = (".spec.json", ".progress.json")


def remove(thing: Thing, tracking_uri: str) -> bool:
    """Remove a thing, unless it has changed since it was listed or a process has its lock: then False."""
    if thing.kind == "upload":
        uploads.abort(thing)
        return True
    with _held(thing) as alone:
        if not alone or not _is_as_listed(thing):
            return False
        if thing.kind == "logged model":
            _delete_in_mlflow(thing, tracking_uri)
        for file in sorted(thing.files, key=_turn):
            storage.remove(storage.join(thing.base, file.name))
        if not storage.is_s3(thing.base):
            _remove_empty(Path(thing.base), thing)
    return True


def _turn(file: Entry) -> tuple[int, str]:
    return 0 if file.name.endswith(FIRST) else 2 if file.name.endswith(LAST) else 1, file.name


@contextlib.contextmanager
def _held(thing: Thing) -> Iterator[bool]:
    """Hold the lock of a job on this machine: one that starts now waits, and then trains anew."""
    if thing.kind != "job" or storage.is_s3(thing.base):
        yield True
        return
    with contextlib.ExitStack() as held:
        try:
            lock = held.enter_context(Path(f"{thing.place}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or another user's
            yield False
            return
        yield True


def _is_as_listed(thing: Thing) -> bool:
    """The very files, unchanged, and no more."""
    name = thing.place.removeprefix(thing.base).strip("/")
    found = [replace(entry, name=f"{name}/{entry.name}") for entry in inventory.listing(thing.place)]
    beside = {file.name for file in thing.files if not file.name.startswith(f"{name}/")}
    if thing.kind == "job":
        beside |= {f"{name}{ending}" for ending in LAST}
    for other in beside:
        if entry := storage.find(storage.join(thing.base, other)):
            found.append(replace(entry, name=other))
    return sorted(found, key=_name) == sorted(thing.files, key=_name)


def _name(file: Entry) -> str:
    return file.name


def _delete_in_mlflow(thing: Thing, uri: str) -> None:
    """Have MLflow show it as deleted before its files go, unless it did."""
    from mlflow.exceptions import MlflowException

    client = load_mlflow(uri).MlflowClient(uri)
    with calls(uri):
        try:
            client.delete_logged_model(thing.place.rpartition("/")[2])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise


def _remove_empty(base: Path, thing: Thing) -> None:
    """The thing's folders on disk, deepest first; one that something has come into stays."""
    folders = {parent for file in thing.files for parent in (base / file.name).parents}
    folders = {folder for folder in folders if folder != base and folder.is_relative_to(base)} | {Path(thing.place)}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()
