"""Presets joined with +: a method's on the data of another."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from components import config, presets
from components.errors import ConfigError
from components.methods import AdapterMethod

METHODS = sorted(path.stem for path in presets.METHODS.glob("*.yaml"))


def test_every_method_has_a_preset() -> None:
    assert sorted(get_args(AdapterMethod)) == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_preset_opens_with_its_command_and_holds_the_adapter_alone(name: str) -> None:
    path = presets.preset(name)
    assert path.read_text().splitlines()[0] == f"# python -m flows.retrain --preset tweets+{name}"
    assert {*presets.content(path)} <= {"adapter", "gate"}
    assert presets.content(path)["adapter"]["method"] == name


@pytest.mark.parametrize("name", METHODS)
def test_joined_they_are_the_method_on_the_data(name: str) -> None:
    together, data = config.load_preset(f"movies+{name}"), config.load_preset("movies")
    assert together.adapter.method == name
    assert together.model_copy(update={"adapter": data.adapter, "gate": data.gate}) == data


@pytest.mark.parametrize("name", METHODS)
def test_parameters_survive_json(name: str) -> None:
    loaded = config.load_preset(f"tweets+{name}")
    assert config.parse(loaded.model_dump(mode="json"), "JSON") == loaded


def test_the_later_one_wins() -> None:
    assert config.load_preset("depression").adapter.schedule.epochs == 4
    assert config.load_preset("depression+lora").adapter == config.load_preset("tweets+lora").adapter
    assert config.load_preset("tweets+movies").model == "movies-sentiment"


def test_what_the_later_one_does_not_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "PRESETS", tmp_path)
    (tmp_path / "a.yaml").write_text("model: a\ndata: {source: x.csv}\ngate: {margin: 0.5, seed: 3}\n")
    (tmp_path / "b.yaml").write_text("gate: {margin: 0.25}\n")
    gate = config.load_preset("a+b").gate
    assert (gate.margin, gate.seed) == (0.25, 3)


def test_overrides_win_over_all() -> None:
    assert config.load_preset("tweets+lora", {"adapter.lora.r": "3"}).adapter.lora == config.Lora(r=3)


def test_flow_parameters_take_them_too() -> None:
    assert config.settle(None, "tweets+lora", {}) == config.load_preset("tweets+lora")


@pytest.mark.parametrize("names", ["lora", "lora+ia3"])
def test_a_method_without_data_is_refused(names: str) -> None:
    with pytest.raises(ConfigError, match=r"write e\.g\. tweets\+"):
        config.load_preset(names)


@pytest.mark.parametrize("names", ["tweets+lorra", "twets+lora", "tweets+", "+", ""])
def test_an_unknown_one_is_answered_with_both_kinds(names: str) -> None:
    with pytest.raises(ConfigError, match=r"a preset among .*tweets.* among .*lora"):
        config.load_preset(names)


def test_two_methods_that_read_different_sections_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method lora reads adapter\.lora: remove bottleneck"):
        config.load_preset("tweets+lora", {"adapter.bottleneck.reduction_factor": 8})
