"""Which MLflows use a place, be it a store, a workspace or a cache: PLACE/registries/DIGEST.json, written first.

What one MLflow knows nothing of may be another's. So `tidy` asks the one that a place belongs to, or nobody.
"""

from __future__ import annotations

import json

from components import digest, storage
from components.errors import RegistryError
from components.registry.references import Experiment, Registry
from components.registry.tracking import Tracking, calls

FOLDER = "registries"


def make(tracking: Tracking, *places: str) -> None:
    """Have the places know that this experiment of this MLflow uses them."""
    with calls(tracking.uri):
        found = tracking.client.get_experiment(tracking.experiment_id)
    experiment = Experiment(found.experiment_id, found.name, found.artifact_location, int(found.creation_time or 0))
    about = {"experiment": experiment.name, "number": experiment.id, "created_ms": experiment.created}
    for uri in (_file(place, experiment) for place in places):
        if not storage.exists(uri):
            storage.write(uri, json.dumps(about).encode(), if_absent=True)


def claimed(registry: Registry, place: str) -> list[Experiment]:
    """The experiments of this MLflow that use a place."""
    there = _there(place)
    return [experiment for experiment in registry.experiments if _file(place, experiment) in there]


def is_sole(registry: Registry, place: str) -> bool:
    """Does this MLflow use the place, and no other?"""
    there = _there(place)
    return bool(there) and there <= {_file(place, experiment) for experiment in registry.experiments}


def require_sole(registry: Registry, store: str) -> None:
    """Raise RegistryError unless this MLflow registers in the store, and no other does."""
    ours, there = {_file(store, experiment) for experiment in registry.experiments}, _there(store)
    if not there & ours:
        raise RegistryError(
            f"the MLflow that registers in {store}",
            "another, or one that has not since this release",
            "correct MLFLOW_TRACKING_URI or --store, or retrain once: that says whose the store is",
        )
    if there - ours:
        raise RegistryError(
            f"one MLflow that registers in {store}",
            f"{len(there - ours)} more ({', '.join(sorted(there - ours))})",
            "nothing can be told from what another refers to; remove these files if it is no more",
        )


def _there(place: str) -> set[str]:
    folder = storage.join(place, FOLDER)
    return {storage.join(folder, name) for name in storage.names(folder)}


def _file(place: str, experiment: Experiment) -> str:
    name = digest.of_json([experiment.id, experiment.created])  # its name may be changed
    return storage.join(place, FOLDER, f"{name[:16]}.json")
