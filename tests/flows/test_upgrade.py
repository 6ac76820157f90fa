"""A change of base in one command, on real servers: two models, of which one fails its gate on the new base."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.config import RegistryConfig
from components.data import ledger
from components.errors import GateFailed
from components.registry import bundle, standing, tracking, versions
from components.registry.versions import Version
from flows.retrain import retrain
from flows.upgrade import upgrade
from tests.conftest import make_base
from tests.flows.conftest import Command, settings_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.integration,
    pytest.mark.xdist_group("servers"),
    pytest.mark.usefixtures("servers"),
]

STORE = "s3://adapterline"
FITS, GROWS = "moves-fits", "moves-grows"


@dataclass
class Moved:
    """What an upgrade of both models left: the bases, the versions in production, what it said and how it ended."""

    old_base: Path
    new_base: Path
    before: dict[str, Version]
    said: list[str]
    error: GateFailed

    def again(self) -> None:
        upgrade(str(self.new_base), standing_on=str(self.old_base))


def connect() -> tracking.Tracking:
    return tracking.connect(RegistryConfig())


def under(alias: str, model: str) -> Version:
    found = versions.with_alias(connect(), model, alias)
    assert found is not None
    return found


def count(model: str) -> int:
    return len(connect().client.search_model_versions(f"name = '{model}'"))


@pytest.fixture(scope="module")
def moved(servers: dict[str, str], workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    """The bundle of the second model may not be larger than on its base, and the new base is twice as wide."""
    folder = tmp_path_factory.mktemp("upgrade")
    # Not the base that all tests share: other models of these servers stand on it.
    old = make_base(folder / "old", initializer_range=0.12)
    new = make_base(folder / "new", hidden_size=64, intermediate_size=128)
    make = settings_in(folder, workspace, old)
    retrain(make(FITS))
    _, manifest = versions.bundle_of(connect(), under(versions.CANDIDATE, FITS), folder / "bundle")
    retrain(make(GROWS, gate__max_bundle_mb=1.2 * manifest.bytes / 1e6))
    for model in (FITS, GROWS):
        connect().client.set_registered_model_alias(model, versions.PRODUCTION, "1")
    for source in folder.glob("*.csv"):
        source.unlink()  # an upgrade stands on what was saved
    before = {model: under(versions.PRODUCTION, model) for model in (FITS, GROWS)}
    with listening() as said, pytest.raises(GateFailed) as caught:
        upgrade(str(new), standing_on=str(old))
    return Moved(old, new, before, said, caught.value)


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """The lines that a person would see."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("adapterline")
    log.addHandler(listener)
    try:
        yield said
    finally:
        log.removeHandler(listener)


def test_what_passes_is_the_candidate_on_the_new_base(moved: Moved) -> None:
    new = under(versions.CANDIDATE, FITS)
    assert (new.number, new.tags["base"], new.tags["verdict"]) == ("2", str(moved.new_base), "pass")


def test_what_fails_its_gate_is_told_and_not_registered(moved: Moved) -> None:
    assert f"1 that are not ({GROWS}: gate failed)" in str(moved.error)
    assert any(GROWS in line and "bundle size" in line for line in moved.said)
    assert under(versions.CANDIDATE, GROWS) == moved.before[GROWS]
    assert count(GROWS) == 1


def test_production_stands(moved: Moved) -> None:
    for model, version in moved.before.items():
        assert under(versions.PRODUCTION, model) == version


def test_the_parts_are_the_very_same(moved: Moved, tmp_path: Path) -> None:
    old, new = moved.before[FITS].tags, under(versions.CANDIDATE, FITS).tags
    assert new["split_digest"] == old["split_digest"]
    held_out, _ = ledger.load_parts(old["split_uri"], old["split_digest"], tmp_path / "old")
    assert not set(held_out["test"]["row"]) & ledger.learned_rows(new["split_uri"])


@pytest.mark.parametrize("model", [FITS, GROWS])
def test_the_ledger_gains_nothing(moved: Moved, model: str) -> None:
    assert len(ledger.records(STORE, model)) == 1


def test_of_the_configuration_only_the_base_changes(moved: Moved) -> None:
    old = standing.configuration(connect(), moved.before[FITS])
    new = standing.configuration(connect(), under(versions.CANDIDATE, FITS))
    assert new.pop("base")["name"] == str(moved.new_base)
    assert old.pop("base")["name"] == str(moved.old_base)
    assert new == old


def test_old_and_new_are_compared_in_a_line_each(moved: Moved) -> None:
    table = moved.said[[line.startswith("model") and "difference" in line for line in moved.said].index(True) :]
    (fits,) = [line for line in table if line.startswith(FITS) and "registered" in line]
    (grows,) = [line for line in table if line.startswith(GROWS) and "gate failed" in line]
    for model, line in ((FITS, fits), (GROWS, grows)):
        accuracy = standing.accuracy(connect(), moved.before[model])
        assert accuracy is not None
        assert line.split()[:4] == [model, "1", f"{100 * accuracy:.1f}", "%"]
        assert line.count(" %") == 2, "an accuracy before and one after"
        assert " to " in line, "the bounds of the difference"


def test_the_same_again_trains_and_registers_nothing(moved: Moved, workspace: Path) -> None:
    jobs = sorted(workspace.glob(f"jobs/*/{bundle.MANIFEST}"))
    standing_before = under(versions.CANDIDATE, FITS)
    with pytest.raises(GateFailed):
        moved.again()
    assert sorted(workspace.glob(f"jobs/*/{bundle.MANIFEST}")) == jobs
    assert under(versions.CANDIDATE, FITS) == standing_before
    assert (count(FITS), count(GROWS)) == (2, 1)


def test_a_listing_tells_what_is_done_from_what_is_left(moved: Moved) -> None:
    with listening() as said:
        assert upgrade(str(moved.new_base), standing_on=str(moved.old_base), only_list=True) == []
    (fits,) = [line for line in said if line.startswith(FITS)]
    (grows,) = [line for line in said if line.startswith(GROWS)]
    assert fits.endswith("up to date: version 2")
    assert grows.endswith("retrain")


def test_a_listing_by_hand_says_what_does_not_fit_and_does_nothing(moved: Moved, command: Command) -> None:
    arguments = ("--base", str(moved.new_base), "--all-from", "PRODUCTION", "--standing-on", str(moved.old_base))
    done = command("flows.retrain", *arguments, "--set", "adapter.bottleneck.reduction_factor=100", "--list")
    assert done.returncode == 0, done.stderr
    assert f"{FITS}: expected an adapter that fits the base model" in done.stdout
    assert "at most the hidden size, 64" in done.stdout
    assert (count(FITS), count(GROWS)) == (2, 1)
