"""MLflow's artifacts in the store: those of runs and logged models that it has deleted or forgotten.

`mlflow gc` forgets runs and models whether or not it could remove what they left in S3. Here the store is looked at
first, and MLflow is asked about each name that is found there.

    ROOT/RUN/artifacts/…        ROOT/models/m-…/artifacts/…         of an experiment that keeps its artifacts at ROOT
    ROOT/7/RUN/artifacts/…      ROOT/7/models/m-…/artifacts/…       of experiment 7 of a server that does
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from components import storage
from components.errors import StorageError, StorageUnavailable
from components.registry import bundle, garbage, inventory, references
from components.registry.garbage import Thing
from components.registry.references import Registry
from components.registry.tracking import PROXIED
from components.storage import Entry

ARTIFACTS = re.compile(r"^((?:(\d+)/)?(?:models/(m-[0-9a-f]{32})|([0-9a-f]{32})))/artifacts/.+$")
MANIFEST = re.compile(rf"/artifacts/artifacts/[^/]+/{re.escape(bundle.MANIFEST)}$")


def things(root: str, entries: Sequence[Entry], registry: Registry, uri: str) -> list[Thing]:
    """The runs' and models' artifacts below `root` of the experiments in `registry`. entries: what lies there.

    What lies beside them, in places of other experiments, is somebody else's, and not among them.
    """
    ours = places(root, registry)
    found = []
    for name, files in inventory.grouped(entries, ARTIFACTS).items():
        match = ARTIFACTS.match(files[0].name)
        if match is None or (match[2] or "") not in ours:
            continue
        place = storage.join(root, name)
        thing = Thing("run", place, root, files, inventory.newest(files))
        found.append(_of_run(thing, match[4], registry, uri) if match[4] else _model(thing, match[3], registry, uri))
    return found


def places(root: str, registry: Registry) -> set[str]:
    """Where below `root` the experiments keep their artifacts: `` for right there, or a number."""
    found: set[str | None] = set()
    for experiment in registry.experiments:
        location = urlsplit(experiment.location)
        if location.scheme == PROXIED:  # of a server that keeps them at the root
            found.add(location.path.strip("/"))
        elif location.scheme in ("", "file"):
            found.add(_below(str(Path(root).resolve()), str(Path(unquote(location.path)).resolve())))
        else:
            found.add(_below(root, experiment.location.rstrip("/")))
    return {place for place in found if place is not None and (not place or place.isdecimal())}


def _below(root: str, location: str) -> str | None:
    """What follows `root` in a location; None when it is elsewhere."""
    root = root.rstrip("/")
    if location == root:
        return ""
    return location.removeprefix(f"{root}/") if location.startswith(f"{root}/") else None


def _of_run(thing: Thing, run: str, registry: Registry, uri: str) -> Thing:
    key = f"run:{run}"
    thing = replace(thing, keys=frozenset({key}))
    if (known := registry.runs.get(run)) is None:
        return replace(thing, why="MLflow has forgotten its run", held=_gone(key, uri))
    ours = {experiment.id for experiment in registry.experiments}
    return thing if known.experiment in ours else replace(thing, held="it is not ours")


def _gone(key: str, uri: str) -> str:
    """Why a run or model stays that no search has found: asked for it, MLflow has it after all."""
    return "" if references.is_gone(uri, key) else "MLflow has it"


def _model(thing: Thing, model: str, registry: Registry, uri: str) -> Thing:
    """A logged model. One that MLflow has and that holds no bundle of ours is not for us to judge."""
    key = f"logged model:{model}"
    thing = replace(thing, kind="logged model", keys=frozenset({key}))
    there = model in registry.models
    manifests = [file.name for file in thing.files if MANIFEST.search(file.name)]
    if not there:
        thing = replace(thing, why="MLflow has deleted or forgotten it", held=_gone(key, uri))
    if len(manifests) != 1:
        return replace(thing, held="it is not ours") if there else thing
    try:
        manifest, refers = inventory.described(storage.join(thing.base, manifests[0]))
    except StorageUnavailable:
        raise
    except (ValueError, StorageError):
        return replace(thing, held=garbage.UNREAD)
    return replace(thing, keys=thing.keys | {f"recorded:{manifest.digest}"}, refers=refers)


def unread(things: Sequence[Thing], registry: Registry) -> list[references.Version]:
    """The fusions whose manifests were not among the things: which members they stand on is not known."""
    known = {key for thing in things if thing.refers for key in thing.keys}
    return [
        version
        for version in registry.versions
        if version.tags.get("method", "fusion") == "fusion"
        and not any(f"logged model:{model}" in known for model in version.model_ids)
    ]
