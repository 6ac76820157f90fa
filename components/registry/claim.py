"""Which MLflows register in a store: STORE/registries/DIGEST.json, written before the first thing that one leaves.

What one MLflow knows nothing of may be another's. So `tidy` asks the one that the store belongs to, or nobody.
"""

from __future__ import annotations

import json

from components import digest, storage
from components.errors import RegistryError
from components.registry.references import Experiment, Registry
from components.registry.tracking import Tracking, calls

FOLDER = "registries"


def make(tracking: Tracking, store: str) -> None:
    """Have the store know that this MLflow registers there."""
    with calls(tracking.uri):
        found = tracking.client.get_experiment(tracking.experiment_id)
    experiment = Experiment(found.experiment_id, found.name, found.artifact_location, int(found.creation_time or 0))
    uri = _place(store, experiment)
    if not storage.exists(uri):
        about = {"experiment": experiment.name, "number": experiment.id, "created_ms": experiment.created}
        storage.write(uri, json.dumps(about).encode(), if_absent=True)


def require_sole(registry: Registry, store: str) -> None:
    """Raise RegistryError unless this MLflow registers in the store, and no other does."""
    folder = storage.join(store, FOLDER)
    ours = {_place(store, experiment) for experiment in registry.experiments}
    there = {storage.join(folder, name) for name in storage.names(folder)}
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


def _place(store: str, experiment: Experiment) -> str:
    name = digest.of_json([experiment.id, experiment.created])  # its name may be changed
    return storage.join(store, FOLDER, f"{name[:16]}.json")
