"""Registering: a bundle and its model code in MLflow, checked before anyone is pointed at it.

Order is what keeps the registry whole: the artifact is logged, the version made, its own predictions reproduced in a
fresh process, its tags set, and only then does the alias `candidate` move. Whatever fails before leaves the earlier
candidate where it was and takes the new version back.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from components.errors import RegistryError
from components.registry import bundle
from components.registry.tracking import Tracking, calls, load_mlflow
from components.registry.versions import (
    CANDIDATE,
    CODE,
    GATE_REPORT,
    RUN_DIGEST,
    Version,
    artifact_uri,
    examined,
    tagged,
    with_alias,
)

if TYPE_CHECKING:
    from datasets import Dataset

# A registered version must give the job's own test probabilities again, to this,
TOLERANCE = 1e-5
# for so many rows from all over the test part. A wrong base, adapter, head, tokenizer or cut shows in any of them, and
# to score thousands again would cost more than all else that a registration does.
ROWS = 256
# Characters of a version's description that MLflow's databases hold.
DESCRIPTION = 5000

log = logging.getLogger("adapterline")


def register(
    tracking: Tracking,
    run_id: str,
    name: str,
    folder: Path,
    test: Dataset,
    tags: Mapping[str, str],
    about: str,
    examples: Sequence[str] = (),
) -> Version:
    """Register a bundle as the next version of a model and make it the candidate.

    folder: the bundle.  test: the frozen test part, whose predictions are reproduced from the registered version.
    about: the text on the version's page.  examples: texts that it is to answer besides.

    Raises RegistryError when they are not, or MLflow refuses; the earlier candidate then still stands.
    """
    mlflow = load_mlflow(tracking.uri)
    earlier = with_alias(tracking, name, CANDIDATE)
    if (left := _left_proven(tracking, name, tags, earlier)) is not None:
        _make_candidate(tracking, left)
        return left
    with calls(tracking.uri):
        _tidy(tracking, name, tags.get(RUN_DIGEST, ""))
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow would like type hints that hold for one kind of input only
            model = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(CODE / "serving" / "model.py"),
                artifacts={"bundle": str(folder)},
                code_paths=[str(CODE)],
                pip_requirements=_requirements(),
            )
        if not tracking.client.search_registered_models(f"name = '{name}'"):
            tracking.client.create_registered_model(name)
        made = tracking.client.create_model_version(
            name,
            model.model_uri,
            run_id=run_id,
            tags={"state": "unproven", **tags},
            description=_fitting(about),
            model_id=model.model_id,
        )
    version = Version(name, str(made.version), "", 0, tags)
    try:
        said = _prove(tracking, version.address, test, folder, examples)
        with calls(tracking.uri):
            uri = artifact_uri(tracking, name, version.number)
            size = _measure(uri)
            for key, value in {"bytes": str(size), "state": "proven"}.items():
                tracking.client.set_model_version_tag(name, version.number, key, value)
        _make_candidate(tracking, version)
    except BaseException:
        _take_back(tracking, version, earlier)
        raise
    return Version(name, version.number, uri, size, {**tags, "state": "proven"}, said)


def _fitting(about: str) -> str:
    """As many of its lines as MLflow holds, and where the rest is."""
    if len(about) <= DESCRIPTION:
        return about
    rest = f"\n\nThe rest is in {GATE_REPORT} of the run that the tag gate_run names."
    return about[: DESCRIPTION - len(rest)].rpartition("\n")[0] + rest


def _make_candidate(tracking: Tracking, version: Version) -> None:
    with calls(tracking.uri):
        tracking.client.set_registered_model_alias(version.name, CANDIDATE, version.number)


def _left_proven(tracking: Tracking, name: str, tags: Mapping[str, str], earlier: Version | None) -> Version | None:
    """The version of this very run and bundle to which an earlier attempt that was killed only did not move the alias.

    Newer than the candidate: an older one had its turn.
    """
    newer_than = int(earlier.number) if earlier else 0
    for found in tagged(tracking, name, RUN_DIGEST):
        same = all(found.tags.get(key) == tags.get(key) for key in (RUN_DIGEST, "bundle_digest"))
        if same and found.tags.get("state") == "proven" and int(found.number) > newer_than:
            return found
    return None


def _take_back(tracking: Tracking, version: Version, earlier: Version | None) -> None:
    """Undo a registration that did not finish. Its own failure is logged, not raised: it must not hide the cause."""
    try:
        with calls(tracking.uri):
            if earlier is not None:  # deleting a version deletes its aliases, and ours may have moved already
                tracking.client.set_registered_model_alias(version.name, CANDIDATE, earlier.number)
            tracking.client.delete_model_version(version.name, version.number)
    except RegistryError as error:
        log.warning("version %s of %s could not be taken back: %s", version.number, version.name, error)


def _prove(tracking: Tracking, version: str, test: Dataset, folder: Path, examples: Sequence[str]) -> str:
    """What the version answers to the examples. Raises RegistryError unless a fresh process gives the job's own test
    probabilities.

    A second process is asked before a version is taken back: on a shared CPU one in some dozens of runs was seen to
    round differently by 1e-5 and not again, while a version that is wrong stays wrong.
    """
    predicted, labels = bundle.read_predictions(folder).probabilities, bundle.read_manifest(folder).labels
    if predicted.shape != (len(test), len(labels)):
        raise RegistryError(
            f"{(len(test), len(labels))} probabilities", f"{predicted.shape}", "the version was taken back"
        )
    rows = np.unique(np.linspace(0, len(test) - 1, ROWS).round().astype(int))
    gaps = []
    for _ in range(2):
        # So few rows are soon done, and threads that wait for one another on a busy machine burn seconds of CPU.
        found, said = examined(tracking, version, test.select(rows), labels, examples, threads=1)
        gaps.append(float(np.abs(found - predicted[rows]).max()))
        if gaps[-1] <= TOLERANCE:
            return said
    raise RegistryError(
        f"the job's own test probabilities to {TOLERANCE:g}",
        f"gaps of {' and '.join(f'{gap:.2g}' for gap in gaps)} in two processes",
        "the version was taken back",
    )


def _tidy(tracking: Tracking, name: str, run_digest: str) -> None:
    """Take back versions that an earlier attempt at this very run left behind when it was killed.

    Two equal runs at once are no case: the deployment's concurrency limit lets one run a model at a time.
    """
    for left in tracking.client.search_model_versions(f"name = '{name}'"):
        if left.tags.get("state") == "unproven" and left.tags.get(RUN_DIGEST) == run_digest:
            tracking.client.delete_model_version(name, left.version)


def _measure(uri: str) -> int:
    """Bytes of everything that was registered, as the store lists it."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    store = get_artifact_repository(uri)

    def below(path: str | None) -> int:
        return sum(
            below(entry.path) if entry.is_dir else int(entry.file_size or 0) for entry in store.list_artifacts(path)
        )

    return below(None)


def _requirements() -> list[str]:
    """The versions that trained the bundle, without local build marks."""
    names = ("mlflow", "pydantic", "platformdirs", "pypi-simple", "safetensors")
    pinned = {**bundle.libraries(), **{name: bundle.version_of(name) for name in names}}
    return [f"{name}=={version.partition('+')[0]}" for name, version in sorted(pinned.items())]
