"""What stands under an alias, and what each version was made with: its base and its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from components.errors import RegistryError
from components.registry import tracking, versions
from components.registry.tracking import Tracking, calls
from components.registry.versions import Version

# The parameters of a run, whole, as an artifact of it; its page shows them one by one, and cut.
CONFIG = "config.json"
# So many signs of a digest are enough to name it, as everywhere.
SHORTEST_DIGEST = 8


def under(tracking: Tracking, alias: str) -> list[Version]:
    """The version under this alias of every model that has one, by name. Those of other makers are among them."""
    names = versions.models(tracking)
    found = (versions.with_alias(tracking, name, alias) for name in names)
    return [version for version in found if version is not None]


def is_ours(version: Version) -> bool:
    """Was it registered by these flows?"""
    return {"bundle_digest", "gate_run", "split_digest"} <= set(version.tags)


def stands_on(tags: Mapping[str, str], base: str) -> bool:
    """Is this the base of a version with these tags? By name, revision, or the start of its weights' digest."""
    by_digest = len(base) >= SHORTEST_DIGEST and tags.get("base_weights_sha256", "").startswith(base)
    return bool(base) and (by_digest or base in (tags.get("base"), tags.get("base_revision")))


def configuration(connection: Tracking, version: Version) -> dict[str, Any]:
    """The parameters of the run that a version comes from, as JSON.

    Raises RegistryError when that run has kept none.
    """
    run = version.tags["gate_run"]
    content = tracking.kept(connection, run, CONFIG)
    if content is None:
        raise RegistryError(
            f"{CONFIG} with the run of version {version.number} of {version.name}",
            f"none with run {run[:8]}: earlier ones kept their parameters cut",
            "retrain it once by its preset or configuration",
        )
    found: dict[str, Any] = json.loads(content)
    return found


def accuracy(tracking: Tracking, version: Version) -> float | None:
    """What the gate measured on the test part; None when its run does not say."""
    with calls(tracking.uri):
        value = tracking.client.get_run(version.tags["gate_run"]).data.metrics.get("adapter/accuracy")
    return None if value is None else float(value)
