"""Registered versions: found by name, their tags, bundles and predictions."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components import forks, storage
from components.errors import BundleError, RegistryError, RegistryUnavailable
from components.methods import Member
from components.registry import bundle, members
from components.registry.tracking import Tracking, calls, load_mlflow, pages
from components.serving.score import AWAY

if TYPE_CHECKING:
    from datasets import Dataset

CANDIDATE, PRODUCTION = "candidate", "production"
RUN_DIGEST = "run_digest"
# In the run named by the tag gate_run.
GATE_REPORT = "gate/gate.json"
CODE = Path(__file__).parent.parent
SCORE = CODE / "serving" / "score.py"


@dataclass(frozen=True)
class Version:
    """A registered version. `size` is what its artifact takes in the store, bytes. `said`: what it answered to example
    texts when it was proven, as its command line prints it.
    """

    name: str
    number: str
    uri: str
    size: int
    tags: Mapping[str, str]
    said: str = field(default="", compare=False)

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
        uri = artifact_uri(tracking, name, str(found.version))
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
            place, _ = bundle_of(tracking, version, Path(folder))
            storage.upload_folder(place, uri, last=bundle.MANIFEST)
    return Member(name=version.name, version=version.number, uri=uri, digest=digest)


def bundle_of(tracking: Tracking, version: Version, folder: Path) -> tuple[Path, bundle.Manifest]:
    """The bundle of a version, downloaded below `folder`, and its manifest.

    Raises RegistryError unless it is, byte for byte, the one that was registered.
    """
    with calls(tracking.uri):
        load_mlflow(tracking.uri).artifacts.download_artifacts(version.uri, dst_path=str(folder))
    wanted = version.tags["bundle_digest"]
    place = next((path.parent for path in folder.rglob(bundle.MANIFEST)), folder)
    try:
        manifest = bundle.read_manifest(place)
    except BundleError as error:
        raise RegistryError(f"{version.address}: {error.expected}", error.found, "name another version") from error
    if manifest.digest != wanted:
        found = manifest.digest[:12]
        raise RegistryError(f"{version.address} with bundle digest {wanted[:12]}", found, "name another version")
    return place, manifest


def models(tracking: Tracking) -> list[str]:
    """Names of all registered models."""
    with calls(tracking.uri):
        return sorted(model.name for model in pages(tracking.client.search_registered_models))


def tagged(tracking: Tracking, name: str, tag: str) -> list[Version]:
    """The versions of a model that have a tag, oldest first, whatever else they are."""
    with calls(tracking.uri):
        found = pages(tracking.client.search_model_versions, filter_string=f"name = '{name}'")
        numbers = sorted(int(each.version) for each in found if each.tags.get(tag))
    versions = (_looked_up(tracking, tracking.client.get_model_version, name, str(number)) for number in numbers)
    return [version for version in versions if version is not None]


def tag(tracking: Tracking, version: Version, tags: Mapping[str, str | None]) -> None:
    """Set tags of a version; None takes one away."""
    with calls(tracking.uri):
        there = tracking.client.get_model_version(version.name, version.number).tags
        for key, value in tags.items():
            if value is not None:
                tracking.client.set_model_version_tag(version.name, version.number, key, value)
            elif key in there:
                tracking.client.delete_model_version_tag(version.name, version.number, key)


def answering(tracking: Tracking, name: str, run_digest: str) -> Version | None:
    """The version under `candidate` or `production` that was made by an equal run, if there is one."""
    for alias in (PRODUCTION, CANDIDATE):
        version = with_alias(tracking, name, alias)
        if version is not None and version.tags.get(RUN_DIGEST) == run_digest:
            return version
    return None


def score(tracking: Tracking, version: str, rows: Dataset, labels: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """Probabilities of a registered version for rows, computed in a fresh process, (rows, labels).

    A label that the version does not know gets probability 0. Raises RegistryError when it cannot be loaded,
    RegistryUnavailable when that is because MLflow or its store does not answer.
    """
    return examined(tracking, version, rows, labels, ())[0]


def examined(
    tracking: Tracking,
    version: str,
    rows: Dataset,
    labels: tuple[str, ...],
    texts: Sequence[str],
    threads: int | None = None,
) -> tuple[npt.NDArray[np.float32], str]:
    """The same, and what the version's command line prints of some texts: to load it a second time takes seconds.

    threads: to compute with; None for as many as torch chooses.
    """
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        table, out = Path(folder) / "rows.parquet", Path(folder) / "probabilities.safetensors"
        rows.to_parquet(table)
        # As a file, and elsewhere: nothing of this checkout is imported before the version brings its own code.
        command = ["-P", str(SCORE), version, "--rows", str(table), "--out", str(out)]
        command += ["--text", *texts] if texts else []
        command += ["--threads", str(threads)] if threads else []
        done = forks.run(command, {**os.environ, "MLFLOW_TRACKING_URI": tracking.uri}, folder)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            kind = RegistryUnavailable if done.returncode == AWAY else RegistryError
            raise kind(f"{version} to load and predict", last, "see the message; the version is not used")
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
    return answer, done.stdout


def artifact_uri(tracking: Tracking, name: str, number: str) -> str:
    """Where the artifact of a version lies."""
    return str(tracking.client.get_model_version_download_uri(name, number))
