"""What lies about, and what of it nothing refers to any more."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from components import storage
from components.registry import artifacts, claim, garbage, inventory, references
from components.registry.garbage import Kind, Thing


@dataclass(frozen=True)
class Places:
    """Where things lie. artifacts: the root that MLflow keeps artifacts in."""

    store: str
    artifacts: str
    workspace: Path
    cache: Path


@dataclass(frozen=True)
class Survey:
    """notes: why more than this may be left over."""

    leftovers: list[Thing]
    kept: int
    kept_bytes: int
    notes: list[str]


def survey(places: Places, tracking_uri: str, running: Collection[str] | None, now: float, grace: float) -> Survey:
    """Look at every place, and then ask who refers to what is there: what comes meanwhile is young.

    running: keys of jobs that run elsewhere, None when nobody could say.  now: s since 1970.  grace: what changed in so
    many seconds stays.

    Raises AdapterlineError when somebody does not answer who must be asked.
    """
    storage.require(places.store)
    things = inventory.of_store(places.store)
    shared = {
        str(places.workspace): inventory.of_workspace(places.workspace),
        str(places.cache): inventory.of_cache(places.cache),
    }
    entries = inventory.listing(places.artifacts)
    data, promoted = references.accepted(places.store), references.promotions(places.store)
    registry = references.ask(tracking_uri, sorted({*data, *promoted}))
    if things or entries or any(shared.values()):
        claim.require_sole(registry, places.store)
    notes = []
    for place, found in shared.items():
        if claim.is_sole(registry, place):
            things += found
        elif found:
            notes.append(f"{place} is used by another MLflow too, or not since this release: all there stays")
    ours = replace(registry, experiments=claim.claimed(registry, places.store))
    things += artifacts.things(places.artifacts, entries, ours, tracking_uri)
    roots = references.roots(registry, data.values(), promoted.values(), now) | frozenset(running or ())
    spared: dict[Kind, str] = {}
    if running is None:
        spared["job"] = "Prefect did not say which jobs run: all jobs stay"
    if blind := artifacts.unread(things, registry):
        names = ", ".join(f"{version.name}/{version.number}" for version in blind[:3])
        spared["bundle"] = f"the bundle of {names} could not be read: all bundles that fusions stand on stay"
    if unread := [thing.place for thing in things if thing.held == garbage.UNREAD]:
        names = ", ".join(unread[:3])
        spared["bundle"] = (
            f"{len(unread)} could not be read ({names}): they stay, and all bundles that fusions stand on"
        )
    left = garbage.leftovers(things, roots, now - grace, spared)
    going = set(map(id, left))
    rest = [thing for thing in things if id(thing) not in going]
    return Survey(left, len(rest), sum(thing.bytes for thing in rest), [*notes, *spared.values()])
