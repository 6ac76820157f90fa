"""Registered versions: a bundle and its model code in MLflow, checked before anyone is pointed at it.

Order is what keeps the registry whole: the artifact is logged, the version made, its own predictions reproduced in a
fresh process, its tags set, and only then does the alias `candidate` move. Whatever fails before leaves the earlier
candidate where it was and takes the new version back.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components import storage
from components.errors import BundleError, RegistryError
from components.methods import Member
from components.registry import bundle, members
from components.registry.tracking import Tracking, calls, load_mlflow

if TYPE_CHECKING:
    from datasets import Dataset

CANDIDATE, PRODUCTION = "candidate", "production"
RUN_DIGEST = "run_digest"
# In the run named by the tag gate_run.
GATE_REPORT = "gate/gate.json"
# A registered version must give the job's own test probabilities again, to this.
TOLERANCE = 1e-5
CODE = Path(__file__).parent.parent
SCORE = CODE / "serving" / "score.py"

log = logging.getLogger("adapterline")


@dataclass(frozen=True)
class Version:
    """A registered version. `size` is what its artifact takes in the store, bytes."""

    name: str
    number: str
    uri: str
    size: int
    tags: Mapping[str, str]

    @property
    def address(self) -> str:
        """What MLflow loads it by."""
        return f"models:/{self.name}/{self.number}"


def with_alias(tracking: Tracking, name: str, alias: str) -> Version | None:
    """The version under an alias, None when the model or the alias is not there."""
    return _looked_up(tracking, tracking.client.get_model_version_by_alias, name, alias)


def _looked_up(tracking: Tracking, ask: Callable[[str, str], Any], name: str, which: str) -> Version | None:
    from mlflow.exceptions import MlflowException

    with calls(tracking.uri):
        try:
            found = ask(name, which)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        uri = _artifact_uri(tracking, name, str(found.version))
    return Version(name, str(found.version), uri, int(found.tags.get("bytes", 0)), found.tags)


def find(tracking: Tracking, reference: str) -> Version:
    """The version that `tweets-sentiment@production` or `tweets-sentiment/3` stands for.

    Raises RegistryError when there is none, or it was not registered by these flows.
    """
    by_alias = "@" in reference
    ask = tracking.client.get_model_version_by_alias if by_alias else tracking.client.get_model_version
    name, _, which = reference.partition("@" if by_alias else "/")
    version = _looked_up(tracking, ask, name, which)
    if version is None:
        raise RegistryError(f"a registered version {reference}", "none", "retrain that model, or correct its name")
    if version.tags.get("state") != "proven" or "bundle_digest" not in version.tags:
        raise RegistryError(
            f"a proven version {reference}", f"version {version.number} without that tag", "name another"
        )
    return version


def member(tracking: Tracking, reference: str, store: str) -> Member:
    """A registered version as a member of fusions: its bundle is kept in the store, where versions that stand on it
    find it for as long as they live.

    Raises RegistryError when there is no such version, or its bundle is not the one that was registered.
    """
    version = find(tracking, reference)
    digest = version.tags["bundle_digest"]
    uri = members.place(store, digest)
    if not members.is_kept(uri):
        with tempfile.TemporaryDirectory() as folder:
            storage.upload_folder(bundle_of(tracking, version, Path(folder)), uri, last=bundle.MANIFEST)
    return Member(name=version.name, version=version.number, uri=uri, digest=digest)


def bundle_of(tracking: Tracking, version: Version, folder: Path) -> Path:
    """The bundle of a version, downloaded below `folder`.

    Raises RegistryError unless it is, byte for byte, the one that was registered.
    """
    with calls(tracking.uri):
        load_mlflow(tracking.uri).artifacts.download_artifacts(version.uri, dst_path=str(folder))
    wanted, manifests = version.tags["bundle_digest"], list(folder.rglob(bundle.MANIFEST))
    try:
        found = bundle.read_manifest(manifests[0].parent).digest if manifests else "no bundle"
    except BundleError as error:
        raise RegistryError(f"{version.address}: {error.expected}", error.found, "name another version") from error
    if found != wanted:
        raise RegistryError(f"{version.address} with bundle digest {wanted[:12]}", found[:12], "name another version")
    return manifests[0].parent


def models(tracking: Tracking) -> list[str]:
    """Names of all registered models."""
    with calls(tracking.uri):
        return sorted(model.name for model in pages(tracking.client.search_registered_models))


def tagged(tracking: Tracking, name: str, tag: str) -> list[Version]:
    """The versions of a model that have a tag, oldest first."""
    with calls(tracking.uri):
        found = pages(tracking.client.search_model_versions, f"name = '{name}'")
        numbers = sorted(int(each.version) for each in found if each.tags.get(tag))
    return [find(tracking, f"{name}/{number}") for number in numbers]


def tag(tracking: Tracking, version: Version, tags: Mapping[str, str | None]) -> None:
    """Set tags of a version; None takes one away."""
    with calls(tracking.uri):
        there = tracking.client.get_model_version(version.name, version.number).tags
        for key, value in tags.items():
            if value is not None:
                tracking.client.set_model_version_tag(version.name, version.number, key, value)
            elif key in there:
                tracking.client.delete_model_version_tag(version.name, version.number, key)


def pages(search: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """Everything that an MLflow search finds, page by page."""
    token = None
    while True:
        page = search(*arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def answering(tracking: Tracking, name: str, run_digest: str) -> Version | None:
    """The version under `candidate` or `production` that was made by an equal run, if there is one."""
    for alias in (PRODUCTION, CANDIDATE):
        version = with_alias(tracking, name, alias)
        if version is not None and version.tags.get(RUN_DIGEST) == run_digest:
            return version
    return None


def register(
    tracking: Tracking, run_id: str, name: str, folder: Path, test: Dataset, tags: Mapping[str, str], about: str
) -> Version:
    """Register a bundle as the next version of a model and make it the candidate.

    folder: the bundle.  test: the frozen test part, whose predictions are reproduced from the registered version.
    about: the text on the version's page.

    Raises RegistryError when they are not, or MLflow refuses; the earlier candidate then still stands.
    """
    mlflow = load_mlflow(tracking.uri)
    earlier = with_alias(tracking, name, CANDIDATE)
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
            description=about,
            model_id=model.model_id,
        )
    version = Version(name, str(made.version), "", 0, tags)
    try:
        _prove(tracking, version.address, test, folder)
        with calls(tracking.uri):
            uri = _artifact_uri(tracking, name, version.number)
            size = _measure(uri)
            for key, value in {"state": "proven", "bytes": str(size)}.items():
                tracking.client.set_model_version_tag(name, version.number, key, value)
            tracking.client.set_registered_model_alias(name, CANDIDATE, version.number)
    except BaseException:
        _take_back(tracking, version, earlier)
        raise
    return Version(name, version.number, uri, size, {**tags, "state": "proven"})


def _take_back(tracking: Tracking, version: Version, earlier: Version | None) -> None:
    """Undo a registration that did not finish. Its own failure is logged, not raised: it must not hide the cause."""
    try:
        with calls(tracking.uri):
            if earlier is not None:  # deleting a version deletes its aliases, and ours may have moved already
                tracking.client.set_registered_model_alias(version.name, CANDIDATE, earlier.number)
            tracking.client.delete_model_version(version.name, version.number)
    except RegistryError as error:
        log.warning("version %s of %s could not be taken back: %s", version.number, version.name, error)


def score(tracking: Tracking, version: str, rows: Dataset, labels: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """Probabilities of a registered version for rows, computed in a fresh process, (rows, labels).

    A label that the version does not know gets probability 0. Raises RegistryError when it cannot be loaded.
    """
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        table, out = Path(folder) / "rows.parquet", Path(folder) / "probabilities.safetensors"
        rows.to_parquet(table)
        # As a file, and elsewhere: nothing of this checkout is imported before the version brings its own code.
        command = [sys.executable, "-P", str(SCORE), version, "--rows", str(table), "--out", str(out)]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking.uri}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RegistryError(f"{version} to load and predict", last, "see the message; the version is not used")
        with safe_open(out, "numpy") as file:
            about = file.metadata()
            known = json.loads(about["labels"])
            found: npt.NDArray[np.float32] = file.get_tensor("probabilities")
    if Path(about["code"]).is_relative_to(CODE):
        raise RegistryError(f"{version} to run its own code", "that of this checkout", "the artifact lacks its code")
    answer = np.zeros((len(rows), len(labels)), dtype=np.float32)
    for column, name in enumerate(labels):
        if name in known:
            answer[:, column] = found[:, known.index(name)]
    return answer


def _prove(tracking: Tracking, version: str, test: Dataset, folder: Path) -> None:
    """Raise RegistryError unless a fresh process gives the job's own test probabilities.

    A second process is asked before a version is taken back: on a shared CPU one in some dozens of runs was seen to
    round differently by 1e-5 and not again, while a version that is wrong stays wrong.
    """
    predictions, labels = bundle.read_predictions(folder), bundle.read_manifest(folder).labels
    gaps = []
    for _ in range(2):
        found = score(tracking, version, test, labels)
        if found.shape != predictions.probabilities.shape:
            raise RegistryError(
                f"{predictions.probabilities.shape} probabilities", f"{found.shape}", "the version was taken back"
            )
        gaps.append(float(np.abs(found - predictions.probabilities).max()))
        if gaps[-1] <= TOLERANCE:
            return
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


def _artifact_uri(tracking: Tracking, name: str, number: str) -> str:
    return str(tracking.client.get_model_version_download_uri(name, number))


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
