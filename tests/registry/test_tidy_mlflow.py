"""What MLflow leaves behind when it deletes and forgets goes, and what a version needs stays, byte for byte.

A real MLflow on a database file; artifacts in a folder and in a real S3 store.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components import storage
from components.config import RegistryConfig
from components.errors import RegistryError, StorageUnavailable
from components.registry import claim, garbage, inventory, references, removal, tracking
from components.registry.garbage import Thing
from components.registry.survey import Places, Survey, survey
from components.registry.tracking import Tracking
from infra import local
from tests.registry import populations as made

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("stack")]

MODEL = "tickets"
DAY_S = 86_400.0
CODE = """\
from pathlib import Path
import mlflow

class Model(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.answer = (Path(context.artifacts["bundle"]) / "metrics.json").read_text()

    def predict(self, context, model_input, params=None):
        return self.answer

mlflow.models.set_model(Model())
"""


@dataclass(frozen=True)
class There:
    """A registry and the places that it refers to."""

    tracking: Tracking
    places: Places
    folder: Path

    def register(self, name: str, version: bool = True, **tags: str) -> Any:
        """A run with an artifact, its logged model with a bundle, and a version of it."""
        client, mlflow = self.tracking.client, tracking.load_mlflow(self.tracking.uri)
        run = tracking.start(self.tracking, name, {"role": "adapter", "job_digest": made.sha(name)})
        tracking.keep(self.tracking, run, {"metrics.json": name})
        digest = made.make_bundle(self.folder / name, name, made.sha("split"))
        (self.folder / "model.py").write_text(CODE)
        with mlflow.start_run(run_id=run):
            model = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(self.folder / "model.py"),
                artifacts={"bundle": str(self.folder / name)},
                pip_requirements=["pydantic"],
            )
        if not version:
            return model
        if not client.search_registered_models(f"name = '{MODEL}'"):
            client.create_registered_model(MODEL)
        about = {"method": "pfeiffer", "bundle_digest": digest, **tags}
        return client.create_model_version(MODEL, model.model_uri, run_id=run, tags=about, model_id=model.model_id)

    def forget(self, *, runs: tuple[str, ...] = (), models: tuple[str, ...] = ()) -> None:
        """What `mlflow gc` does to the database."""
        from mlflow.tracking._tracking_service.utils import _get_store

        store = _get_store(self.tracking.uri)
        for run in runs:
            store._hard_delete_run(run)
        for model in models:
            store._hard_delete_logged_model(model)

    def look(self, days: float = 2, running: frozenset[str] | None = frozenset()) -> Survey:
        """As it will be `days` from now, for what is here was made just now."""
        return survey(self.places, self.tracking.uri, running, time.time() + days * DAY_S, DAY_S)

    def found(self) -> dict[tuple[str, str], Thing]:
        """What is left over, by kind and last name."""
        return {(each.kind, each.place.rpartition("/")[2]): each for each in self.look().leftovers}

    def content(self) -> dict[str, bytes]:
        root = self.places.artifacts
        return {name: storage.read(storage.join(root, name)) for name in storage.names(root)}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.Stack]:
    _forget_keys()
    with local.stack(tmp_path_factory.mktemp("stack")) as stack, local.exported(stack.environment):
        yield stack
    _forget_keys()


def _forget_keys() -> None:
    """The next stack has other keys, and may have the port of one before: of this module's, or of another's."""
    import boto3
    from mlflow.store.artifact.s3_artifact_repo import _cached_get_s3_client

    _cached_get_s3_client.cache_clear()
    boto3.setup_default_session()


@pytest.fixture(autouse=True)
def databases(empty_mlflow: Path, tmp_path: Path) -> None:
    for name in ("mlflow.db", "other.db"):
        shutil.copy(empty_mlflow, tmp_path / name)


@pytest.fixture(params=["folder", "s3"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> There:
    store = str(tmp_path / "store")
    if request.param == "s3":
        request.getfixturevalue("stack")
        store = f"s3://{local.BUCKET}/{tmp_path.name}"
    return registry_at(store, tmp_path)


@pytest.fixture
def at_home(tmp_path: Path) -> There:
    return registry_at(str(tmp_path / "store"), tmp_path)


def registry_at(store: str, folder: Path, database: str = "mlflow.db") -> There:
    connection = tracking.connect(RegistryConfig(store=store, tracking_uri=f"sqlite:///{folder / database}"))
    claim.make(connection, store, str(folder / "work"), str(folder / "cache"))
    return There(connection, Places(store, f"{store}/mlflow", folder / "work", folder / "cache"), folder)


def answer(there: There, version: Any) -> str:
    """What a version says when it is loaded from its artifacts."""
    mlflow = tracking.load_mlflow(there.tracking.uri)
    return str(mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}").predict(["text"]))


def model_of(version: Any) -> str:
    return str(version.source).rpartition("/")[2]


def test_what_mlflow_deleted_and_forgot_goes_and_a_live_version_loads_byte_for_byte(there: There) -> None:
    live, deleted, purged = (there.register(name) for name in ("live", "deleted", "purged"))
    client = there.tracking.client
    for version in (deleted, purged):
        client.delete_model_version(MODEL, version.version)
        client.delete_run(version.run_id)
    client.delete_logged_model(model_of(purged))
    there.forget(runs=(purged.run_id,), models=(model_of(purged),))
    before = there.content()

    found = there.found()
    assert set(found) == {(kind, name) for each in (deleted, purged) for kind, name in
                          (("run", each.run_id), ("logged model", model_of(each)))}  # fmt: skip
    assert there.content() == before  # looking removes nothing

    for thing in found.values():
        assert removal.remove(thing, there.tracking.uri)
    kept = {name: content for name, content in before.items() if live.run_id in name or model_of(live) in name}
    assert there.content() == kept
    assert answer(there, live) == '"live"'
    assert there.look().leftovers == []


def test_nothing_of_the_last_day_is_left_over(at_home: There) -> None:
    version = at_home.register("fresh")
    at_home.tracking.client.delete_model_version(MODEL, version.version)
    at_home.tracking.client.delete_run(version.run_id)
    assert at_home.look(days=0).leftovers == []
    assert at_home.look(days=2).leftovers != []


def test_a_model_that_a_killed_registration_left_goes_and_mlflow_shows_it_as_deleted(at_home: There) -> None:
    model = at_home.register("unfinished", version=False)
    ((kind, name), thing), = at_home.found().items()  # fmt: skip
    assert (kind, name) == ("logged model", model.model_id)
    removal.remove(thing, at_home.tracking.uri)
    assert references.is_gone(at_home.tracking.uri, f"logged model:{model.model_id}")


def test_runs_and_models_that_a_version_names_stay_though_they_are_deleted(at_home: There) -> None:
    gate = tracking.start(at_home.tracking, "gate", {})
    tracking.keep(at_home.tracking, gate, {"gate/gate.json": "{}"})
    version = at_home.register("live", gate_run=gate)
    client = at_home.tracking.client
    for run in (gate, version.run_id):
        client.delete_run(run)
    client.delete_logged_model(model_of(version))
    assert at_home.found() == {}


def test_a_copy_of_a_version_keeps_what_it_was_made_of(at_home: There) -> None:
    version = at_home.register("copied")
    client = at_home.tracking.client
    copy = client.copy_model_version(f"models:/{MODEL}/{version.version}", "elsewhere")
    client.delete_model_version(MODEL, version.version)
    assert at_home.found() == {}
    assert answer(at_home, copy) == '"copied"'


def test_what_another_experiment_deleted_is_not_ours(at_home: There) -> None:
    config = RegistryConfig(store=at_home.places.store, tracking_uri=at_home.tracking.uri, experiment="theirs")
    theirs = There(tracking.connect(config), at_home.places, at_home.folder)
    run = tracking.start(theirs.tracking, "theirs", {})
    tracking.keep(theirs.tracking, run, {"metrics.json": "{}"})
    at_home.tracking.client.delete_run(run)
    assert at_home.found() == {}


def test_a_workspace_that_another_mlflow_uses_stays(at_home: There) -> None:
    work = at_home.places.workspace
    made.write(work / "jobs" / made.job_name("a") / "checkpoint/last.safetensors")
    assert len(at_home.look().leftovers) == 1
    other = RegistryConfig(store=str(at_home.folder / "other"), tracking_uri=f"sqlite:///{at_home.folder}/other.db")
    claim.make(tracking.connect(other), str(work))
    found = at_home.look()
    assert found.leftovers == []
    assert [note for note in found.notes if str(work) in note]


def test_what_a_record_of_history_names_stays_though_its_version_is_deleted(at_home: There) -> None:
    version = at_home.register("once in production")
    client = at_home.tracking.client
    client.delete_model_version(MODEL, version.version)
    client.delete_run(version.run_id)
    digest = version.tags["bundle_digest"]
    made.promote(Path(at_home.places.store), MODEL, digest, version.run_id)
    assert at_home.found() == {}


def test_a_logged_model_of_somebody_else_stays_until_mlflow_deletes_it(at_home: There) -> None:
    mlflow = tracking.load_mlflow(at_home.tracking.uri)
    (at_home.folder / "plain.py").write_text(CODE)
    with mlflow.start_run(experiment_id=at_home.tracking.experiment_id):
        model = mlflow.pyfunc.log_model(
            name="theirs", python_model=str(at_home.folder / "plain.py"), pip_requirements=["pydantic"]
        )
    assert at_home.found() == {}
    at_home.tracking.client.delete_logged_model(model.model_id)
    assert set(at_home.found()) == {("logged model", model.model_id)}


def test_a_registered_model_below_a_run_that_trains_stays(at_home: There) -> None:
    model = at_home.register("registering", version=False)
    at_home.tracking.client.update_run(model.run_id, status="RUNNING")
    assert at_home.found() == {}


def test_another_mlflow_in_the_same_store_stops_everything(at_home: There) -> None:
    at_home.register("theirs")
    other = registry_at(at_home.places.store, at_home.folder, "other.db")
    for each in (at_home, other):
        with pytest.raises(RegistryError, match="one MLflow that registers in"):
            each.look()


def test_an_mlflow_that_never_registered_there_is_refused(at_home: There) -> None:
    at_home.register("theirs")
    uri = f"sqlite:///{at_home.folder / 'other.db'}"
    with pytest.raises(RegistryError, match="the MLflow that registers in"):
        survey(at_home.places, uri, frozenset(), time.time(), 0)


def test_claiming_again_changes_nothing(at_home: There) -> None:
    claim.make(at_home.tracking, at_home.places.store)
    assert len(storage.names(f"{at_home.places.store}/registries")) == 1


def test_a_model_that_the_user_may_not_see_stops_everything(at_home: There, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search would leave it out, and its versions would seem to be gone."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    def refuse(*_: object) -> None:
        raise MlflowException("no", PERMISSION_DENIED)

    made.accept(Path(at_home.places.store), MODEL, 1, made.sha("s"), made.sha("f"), made.sha("r"))
    monkeypatch.setattr("mlflow.MlflowClient.get_registered_model", refuse)
    with pytest.raises(RegistryError, match="PERMISSION_DENIED"):
        at_home.look()


def test_a_fusion_whose_bundle_cannot_be_read_keeps_all_members(at_home: There) -> None:
    member = Path(at_home.places.store) / "bundles" / made.sha("member")
    made.write(member / "metrics.json")
    version = at_home.register("fusion", method="fusion")
    path = Path(at_home.places.artifacts) / "models" / model_of(version) / "artifacts/artifacts/fusion/manifest.json"
    whole = path.read_text()
    path.write_text("{")
    assert at_home.found() == {}
    path.write_text(whole)
    assert set(at_home.found()) == {("bundle", member.name)}


def test_jobs_stay_when_nobody_can_say_which_run(at_home: There) -> None:
    made.write(Path(at_home.places.store) / "jobs" / made.job_name("a") / "checkpoint/last.safetensors")
    assert at_home.look(running=None).leftovers == []
    assert at_home.look(running=frozenset({f"job:{made.sha('a', 'job')[:16]}"})).leftovers == []
    assert len(at_home.look().leftovers) == 1


class TestRemoving:
    """Of one unfinished or finished job, in a folder and in S3."""

    def bundle(self, there: There) -> Thing:
        name = made.job_name("a")
        made.make_bundle(there.folder / name, "a", made.sha("split"))
        storage.upload_folder(there.folder / name, storage.join(there.places.store, "jobs", name), "manifest.json")
        made.make_spec(there.folder / "spec.json", "a", made.sha("split"))
        storage.upload(there.folder / "spec.json", storage.join(there.places.store, "jobs", f"{name}.spec.json"))
        (thing,) = inventory.of_store(there.places.store)
        return thing

    def names(self, there: There) -> list[str]:
        found = storage.names(storage.join(there.places.store, "jobs"))
        return [name for name in found if not name.endswith(".lock")]

    def test_a_failure_half_way_leaves_an_incomplete_bundle_that_the_next_try_removes(
        self, there: There, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        thing, original, count = self.bundle(there), storage.remove, 0

        def failing(uri: str) -> None:
            nonlocal count
            count += 1
            if count == 2:
                raise StorageUnavailable("an S3 server", "none", "start it")
            original(uri)

        monkeypatch.setattr(storage, "remove", failing)
        with pytest.raises(StorageUnavailable):
            removal.remove(thing, there.tracking.uri)
        assert sorted(storage.names(thing.place)) == ["metrics.json"]  # no manifest: it was never whole
        monkeypatch.undo()
        (rest,) = there.look().leftovers
        assert removal.remove(rest, there.tracking.uri)
        assert inventory.of_store(there.places.store) == []

    @pytest.mark.parametrize("name", ["/metrics.json", "/more.json", ".spec.json", ".progress.json"])
    def test_what_changed_since_it_was_listed_stays(self, there: There, name: str) -> None:
        thing = self.bundle(there)
        storage.write(thing.place + name, b"something else")
        before = self.names(there)
        assert not removal.remove(thing, there.tracking.uri)
        assert self.names(there) == before

    def test_what_was_written_again_stays_though_it_is_the_same(self, there: There) -> None:
        thing = self.bundle(there)
        time.sleep(1.1)  # S3 tells whole seconds
        storage.write(f"{thing.place}/metrics.json", storage.read(f"{thing.place}/metrics.json"))
        assert not removal.remove(thing, there.tracking.uri)
        assert set(self.names(there)) == {file.name for file in thing.files}

    def test_no_empty_folders_stay_on_disk(self, at_home: There) -> None:
        thing = self.bundle(at_home)
        assert removal.remove(thing, at_home.tracking.uri)
        assert [path.name for path in (Path(at_home.places.store) / "jobs").iterdir() if path.is_dir()] == []


def test_an_upload_that_was_broken_off_is_listed_and_ended(stack: local.Stack, tmp_path: Path) -> None:
    there = registry_at(f"s3://{local.BUCKET}/{tmp_path.name}", tmp_path)
    key = f"{tmp_path.name}/jobs/{made.job_name('a')}/model.safetensors"
    foreign = f"{tmp_path.name}/elsewhere/model.bin"
    for each in (key, foreign):
        begun = storage.client().create_multipart_upload(Bucket=local.BUCKET, Key=each)
        name = {"Bucket": local.BUCKET, "Key": each, "UploadId": begun["UploadId"]}
        storage.client().upload_part(**name, PartNumber=1, Body=b"x" * 6_000_000)
    (thing,) = there.look().leftovers
    assert (thing.kind, thing.place, thing.bytes) == ("upload", f"s3://{local.BUCKET}/{key}", 6_000_000)
    assert garbage.in_both([thing], there.look().leftovers) == [thing]
    assert removal.remove(thing, there.tracking.uri)
    assert there.look().leftovers == []
    left = storage.client().list_multipart_uploads(Bucket=local.BUCKET, Prefix=f"{tmp_path.name}/")["Uploads"]
    assert [upload["Key"] for upload in left] == [foreign]
