"""Registered adapters are fused, on real servers: members by name, a version that stands on them, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from components import cache, storage
from components.config import RegistryConfig, RetrainConfig
from components.data import ledger, rows, sources
from components.data.split import split
from components.errors import AdapterlineError, ConfigError, DataError, RegistryError
from components.methods import members_of, settings_of
from components.registry import bundle, members, promotion, tracking, versions
from components.training import spec as specs
from components.training.spec import DataRef
from flows.fuse import fuse
from flows.retrain import retrain
from tests.conftest import make_base
from tests.flows.conftest import Command, Settings
from tests.registry.registered import Shelf
from tests.training.toy_jobs import finished

pytestmark = [
    pytest.mark.slow,
    pytest.mark.integration,
    pytest.mark.xdist_group("servers"),
    pytest.mark.usefixtures("servers"),
]

STORE = "s3://adapterline"
MODEL = "fused"
NAMES = ("part-one", "part-two")


def connect() -> tracking.Tracking:
    return tracking.connect(RegistryConfig())


@pytest.fixture
def fusion(settings: Settings, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RetrainConfig:
    """The two members are made by the first test that asks; one is in production, both are candidates.

    They learned from the split that the fusion will have, which no flow needs minutes for.
    """
    config = fused_from(settings, [f"{NAMES[0]}@production", f"{NAMES[1]}/1"])
    if versions.with_alias(connect(), NAMES[0], versions.CANDIDATE) is None:
        root = tmp_path_factory.mktemp("members")
        table = sources.read(config.data).table
        parts = split(rows.clean(table, rows.label_names(table, None)), config.split)
        ledger.save(parts, str(root / "split"))
        data = DataRef(uri=str(root / "split"), digest=parts.digest)
        for size, name in zip((2, 4), NAMES, strict=True):
            adapter = settings_of("pfeiffer", reduction_factor=size)
            trained = finished(tiny_base, data, "pfeiffer", root / name, epochs=8, settings=adapter)
            Shelf(root, trained, data, promotion.connect(RegistryConfig())).version(name)
            connect().client.set_registered_model_alias(name, versions.CANDIDATE, "1")
        connect().client.set_registered_model_alias(NAMES[0], versions.PRODUCTION, "1")
    return config


def fused_from(settings: Settings, names: list[str], **overrides: object) -> RetrainConfig:
    rates = {"body": 1e-3, "layer_norm": 1e-3, "head": 1e-2}
    adapter = {
        "method": "fusion",
        "fusion": {"members": names},
        "schedule": {"epochs": 6, "learning_rates": rates},
    }
    return settings(MODEL, adapter=adapter, gate__max_trainable_share=0.5, **overrides)


@pytest.fixture
def standing(fusion: RetrainConfig) -> versions.Version:
    """The candidate of the fused model."""
    if versions.with_alias(connect(), MODEL, versions.CANDIDATE) is None:
        fuse(fusion)
    found = versions.with_alias(connect(), MODEL, versions.CANDIDATE)
    assert found is not None
    return found


def test_a_fusion_is_registered_and_the_same_again_trains_nothing(
    standing: versions.Version, fusion: RetrainConfig
) -> None:
    """Registering has reproduced its predictions in a fresh process, which fetched the members."""
    assert standing.tags["method"] == "fusion"
    assert standing.tags["state"] == "proven"
    assert standing.tags["members"] == "part-one/1, part-two/1"
    assert fuse(fusion) == standing.address
    assert len(connect().client.search_model_versions(f"name = '{MODEL}'")) == 1


def test_names_that_mean_the_same_versions_train_nothing(standing: versions.Version, settings: Settings) -> None:
    same = fused_from(settings, [f"{NAMES[0]}/1", f"{NAMES[1]}@candidate"])
    assert fuse(same) == standing.address


def test_the_bundle_names_the_registered_bundles(standing: versions.Version, workspace: Path) -> None:
    manifests = [bundle.read_manifest(path.parent) for path in workspace.glob("jobs/fusion-*/manifest.json")]
    (manifest,) = [each for each in manifests if each.digest == standing.tags["bundle_digest"]]
    for name, member in zip(NAMES, manifest.members, strict=True):
        version = versions.find(connect(), f"{name}/1")
        assert (member.name, member.version, member.digest) == (name, "1", version.tags["bundle_digest"])
        assert member.uri == f"{STORE}/bundles/{member.digest}"
        assert bundle.MANIFEST in storage.names(member.uri)


def test_the_run_shows_where_each_member_helped(standing: versions.Version) -> None:
    there, run = connect(), standing.tags["gate_run"]
    measured = json.loads(Path(there.client.download_artifacts(run, "fusion/attention.json")).read_bytes())
    assert measured["members"] == ["part-one/1", "part-two/1"]
    assert [len(place["weights"]) for place in measured["places"]] == [2, 2]
    picture = Path(there.client.download_artifacts(run, "fusion/attention.png")).read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_without_a_member_the_version_does_not_answer(
    standing: versions.Version, command: Command, tmp_path: Path
) -> None:
    """With them it did, in a fresh process, or it would not have been registered."""
    arguments = ("components.serving.score", f"models:/{MODEL}@candidate", "--text", "lovely word1")
    (tmp_path / "bundles").mkdir()
    done = command(*arguments, **{members.PATH_VARIABLE: str(tmp_path / "bundles")})
    assert done.returncode == 1
    assert "expected member part-one/1 with bundle digest" in done.stderr
    assert "Traceback" not in done.stderr


REFUSED: dict[str, tuple[list[str], type[AdapterlineError], str]] = {
    "unknown model": (["nobody@production", "part-two/1"], RegistryError, "a registered version nobody@production"),
    "unknown alias": (["part-one@champion", "part-two/1"], RegistryError, "a registered version part-one@champion"),
    "unknown number": (["part-one/7", "part-two/1"], RegistryError, "a registered version part-one/7"),
    "one twice": (["part-one/1", "part-one@production"], ConfigError, "the bundle of part-one/1 twice"),
    "a fusion": (["part-one/1", "fused/1"], ConfigError, "fused/1 of method fusion"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_members_are_refused_before_anything_is_read(
    case: str, standing: versions.Version, settings: Settings
) -> None:
    names, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        fuse(fused_from(settings, names, data__source="no/such.csv"))


def test_members_on_another_base_are_refused(fusion: RetrainConfig, settings: Settings, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", initializer_range=0.2)
    names = [f"{name}/1" for name in NAMES]
    with pytest.raises(AdapterlineError, match="for a fusion with part-one/1"):
        fuse(fused_from(settings, names, base__name=str(other)))


def test_members_that_learned_from_the_test_part_are_refused(fusion: RetrainConfig, settings: Settings) -> None:
    config = fused_from(settings, [f"{name}/1" for name in NAMES], split__seed=5)
    with pytest.raises(DataError, match=r"that part-one/1 did"):
        fuse(config.model_copy(update={"model": "elsewhere"}))


def test_each_method_has_its_flow(fusion: RetrainConfig, settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"run flows\.fuse"):
        retrain(fusion)
    with pytest.raises(ConfigError, match=r"run flows\.retrain"):
        fuse(settings("plain"))


def test_what_a_cache_holds_in_part_is_fetched_again(standing: versions.Version, workspace: Path) -> None:
    (path,) = workspace.glob("jobs/fusion-*.spec.json")
    (first, *_) = members_of(specs.parse(path.read_bytes()).settings)
    folder, manifest = members.fetch(first)
    (folder / bundle.MANIFEST).unlink()
    assert members.fetch(first) == (folder, manifest)


def test_what_a_changed_cache_holds_is_refused(standing: versions.Version, workspace: Path) -> None:
    (path,) = workspace.glob("jobs/fusion-*.spec.json")
    (first, *_) = members_of(specs.parse(path.read_bytes()).settings)
    folder, _ = members.fetch(first)
    assert folder.is_relative_to(cache.folder())
    content = (folder / "metrics.json").read_bytes()
    try:
        (folder / "metrics.json").write_bytes(content + b" ")
        with pytest.raises(AdapterlineError, match=r"member part-one/1 .* metrics\.json with sha256"):
            members.fetch(first)
    finally:
        shutil.rmtree(folder)
    assert members.fetch(first)[0] == folder
