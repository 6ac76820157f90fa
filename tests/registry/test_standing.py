"""What stands under an alias, in a real MLflow without a server."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from components.config import RegistryConfig
from components.errors import RegistryError
from components.registry import standing, tracking
from components.registry.tracking import Tracking
from components.registry.versions import Version

DIGEST = "0123456789abcdef" * 4
TAGS = {"base": "org/model", "base_revision": "c0ffee", "base_weights_sha256": DIGEST}


@pytest.fixture(scope="module")
def there(empty_mlflow: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    folder = tmp_path_factory.mktemp("mlflow")
    database = shutil.copy(empty_mlflow, folder / "mlflow.db")
    return tracking.connect(RegistryConfig(store=str(folder / "store"), tracking_uri=f"sqlite:///{database}"))


def registered(there: Tracking, name: str, alias: str | None, tags: Mapping[str, str]) -> None:
    there.client.create_registered_model(name)
    version = there.client.create_model_version(name, "s3://nowhere", tags=dict(tags))
    if alias:
        there.client.set_registered_model_alias(name, alias, version.version)


@pytest.fixture(scope="module")
def five(there: Tracking) -> None:
    for name, alias in (("d", "production"), ("b", "candidate"), ("a", "production"), ("c", None)):
        registered(there, name, alias, {"bundle_digest": "1", "gate_run": "2", "split_digest": "3"})
    registered(there, "e", "production", {"made": "elsewhere"})


@pytest.mark.usefixtures("five")
def test_only_what_has_the_alias_stands_under_it(there: Tracking) -> None:
    assert [version.name for version in standing.under(there, "production")] == ["a", "d", "e"]


@pytest.mark.usefixtures("five")
def test_no_page_of_models_is_missed(there: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PAGE", 2)
    assert [version.name for version in standing.under(there, "production")] == ["a", "d", "e"]


@pytest.mark.usefixtures("five")
def test_versions_of_other_makers_are_told_apart(there: Tracking) -> None:
    assert [standing.is_ours(version) for version in standing.under(there, "production")] == [True, True, False]


@pytest.mark.parametrize("base", ["org/model", "c0ffee", DIGEST, DIGEST[:8]])
def test_a_base_is_meant_by_name_revision_or_digest(base: str) -> None:
    assert standing.stands_on(TAGS, base)


@pytest.mark.parametrize("base", ["org", "minilm", "c0ff", DIGEST[:4], DIGEST[1:], ""])
def test_another_base_is_not_meant(base: str) -> None:
    assert not standing.stands_on(TAGS, base)


def test_a_base_without_revision_is_not_meant_by_nothing() -> None:
    assert not standing.stands_on({**TAGS, "base_revision": ""}, "")


def version_of(run: str) -> Version:
    return Version("tickets", "3", "", 0, {"gate_run": run})


def test_the_configuration_is_the_one_kept_with_the_run(there: Tracking) -> None:
    run = tracking.start(there, "retrain", {})
    tracking.keep(there, run, {standing.CONFIG: '{"model": "tickets", "text": "' + "x" * 10_000 + '"}'})
    found = standing.configuration(there, version_of(run))
    assert (found["model"], len(found["text"])) == ("tickets", 10_000)


def test_a_run_that_kept_none_is_told_in_a_line(there: Tracking) -> None:
    run = tracking.start(there, "retrain", {})
    with pytest.raises(RegistryError, match=r"version 3 of tickets; found none .* retrain it once by its preset"):
        standing.configuration(there, version_of(run))


def test_an_accuracy_that_nobody_measured_is_none(there: Tracking) -> None:
    run = tracking.start(there, "retrain", {})
    assert standing.accuracy(there, version_of(run)) is None
    tracking.record(there, run, metrics={"adapter/accuracy": 0.5})
    assert standing.accuracy(there, version_of(run)) == 0.5
