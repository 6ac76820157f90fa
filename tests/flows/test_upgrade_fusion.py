"""A fusion moves to another base after its members, onto their new versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.registry import versions
from flows.fuse import fuse
from flows.retrain import retrain
from flows.upgrade import upgrade
from tests.conftest import make_base
from tests.flows.conftest import settings_in
from tests.flows.test_upgrade import connect, listening, under

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.integration,
    pytest.mark.xdist_group("servers"),
    pytest.mark.usefixtures("servers"),
]

MODELS = ("m-one", "m-two", "a-fused")  # by name the fusion would be first


def test_a_fusion_stands_on_the_new_versions_of_its_members(tmp_path: Path, workspace: Path) -> None:
    old = make_base(tmp_path / "old", initializer_range=0.12)
    new = make_base(tmp_path / "new", initializer_range=0.11)
    make = settings_in(tmp_path, workspace, old)
    retrain(make("m-one"))
    retrain(make("m-two", adapter__bottleneck__reduction_factor=4))
    adapter = {
        "method": "fusion",
        "fusion": {"members": ["m-one@candidate", "m-two/1"]},
        "schedule": {"epochs": 6, "learning_rates": {"body": 1e-3, "layer_norm": 1e-3, "head": 1e-2}},
    }
    fuse(make("a-fused", adapter=adapter, gate__max_trainable_share=0.5))
    for model in MODELS:
        connect().client.set_registered_model_alias(model, versions.PRODUCTION, "1")

    assert upgrade(str(new), standing_on=str(old)) == [f"models:/{model}/2" for model in ("m-one", "m-two", "a-fused")]
    fused = under(versions.CANDIDATE, "a-fused")
    assert fused.tags["members"] == "m-one/2, m-two/2"
    assert fused.tags["base"] == str(new)
    assert under(versions.PRODUCTION, "a-fused").number == "1"

    with listening() as said:
        again = upgrade(str(new), standing_on=str(old))
    assert again == [f"models:/{model}/2" for model in MODELS], "nothing is registered twice"
    assert not [line for line in said if "epoch" in line], "nothing is trained twice"
