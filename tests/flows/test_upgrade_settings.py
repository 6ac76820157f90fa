"""What a configuration becomes for another base, without servers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from components.config import RetrainConfig
from components.errors import ConfigError
from components.registry.versions import Version
from flows.outcomes import Came, Outcome
from flows.upgrade import ask, changed, with_members

KEPT: dict[str, Any] = {
    "model": "tickets",
    "data": {"source": "gone.csv"},
    "base": {"name": "old", "revision": "1", "weights_sha256": "0" * 64},
    "adapter": {"bottleneck": {"reduction_factor": 4}},
    "registry": {"store": "s3://ours/models", "tracking_uri": "http://another:5000"},
    "seed": 7,
}


def test_nothing_but_the_base_changes() -> None:
    found = changed(KEPT, ask("new", {"base.revision": "c0ffee"}), "here").model_dump()
    wanted = RetrainConfig.model_validate(KEPT).model_dump()
    assert found.pop("base") == {"name": "new", "revision": "c0ffee", "weights_sha256": None}
    assert wanted.pop("base")["name"] == "old"
    assert found.pop("registry") == {**wanted.pop("registry"), "tracking_uri": None}, "where the version was found"
    assert found == wanted


def test_overrides_reach_every_configuration_and_change_no_kept_one() -> None:
    before = copy.deepcopy(KEPT)
    asked = ask("new", {"gate.margin": "0.03", "compute.deployment": "train/gpu", "adapter.bottleneck": None})
    found = changed(KEPT, asked, "here")
    assert (found.gate.margin, found.compute.deployment, found.adapter.bottleneck) == (0.03, "train/gpu", None)
    assert before == KEPT


def test_a_deployment_without_a_place_for_jobs_leaves_them_with_the_run() -> None:
    """Where TRAIN_ON is not set, prefect.yaml gives an empty text."""
    kept = {**KEPT, "compute": {"deployment": "train/gpu"}}
    assert changed(kept, ask("new", {"compute.deployment": ""}), "here").compute.deployment is None


@pytest.mark.parametrize("key", ["model", "data.source", "split.seed", "validation.min_rows"])
def test_models_and_rows_stay_what_they_are(key: str) -> None:
    with pytest.raises(ConfigError, match=f"found {key}"):
        ask("new", {key: "1"})


def test_a_wrong_key_of_the_base_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"did you mean revision\?"):
        ask("new", {"base.revison": "1"})


def test_a_configuration_of_another_time_is_told_in_a_line() -> None:
    with pytest.raises(ConfigError, match=r"color: unknown key.*in config\.json of models:/tickets/3"):
        changed({**KEPT, "color": "red"}, ask("new", {}), "config.json of models:/tickets/3")


def version(name: str, number: str) -> Version:
    return Version(name, number, "", 0, {})


def came(name: str, old: str, new: str | None, how: Came = "registered") -> Outcome:
    return Outcome(version(name, old), how, version(name, new) if new else None)


def fusion(*members: str) -> RetrainConfig:
    adapter = {"method": "fusion", "fusion": {"members": members}}
    return RetrainConfig.model_validate({**KEPT, "adapter": adapter})


def members(config: RetrainConfig, *before: Outcome) -> tuple[str, ...]:
    found = with_members(config, version("tickets", "1"), before).adapter.fusion
    assert found is not None
    return found.members


def test_members_are_replaced_by_their_new_versions() -> None:
    config = fusion("a/1", "b@candidate")
    assert members(config, came("b", "3", "5"), came("c", "1", "2"), came("a", "1", "2")) == ("a/2", "b/5")


def test_members_that_stand_on_the_new_base_already_are_taken() -> None:
    moved = came("b", "5", "5", "up to date")
    assert members(fusion("a/1", "b@production"), came("a", "1", "2"), moved) == ("a/2", "b/5")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/1", "b/3"), r"b \(gate failed\)"),
        (("a/1", "c/1"), r"c \(not among them\)"),
        (("a/9", "c/1"), r"a/9 \(version 1 was retrained\)"),
    ],
)
def test_without_a_member_a_fusion_has_to_wait(names: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        members(fusion(*names), came("a", "1", "2"), came("b", "3", None, "gate failed"))


def test_what_is_no_fusion_has_no_members() -> None:
    config = RetrainConfig.model_validate(KEPT)
    assert with_members(config, version("tickets", "1"), []) is config
