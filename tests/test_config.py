"""Configuration: presets are valid, and whatever is wrong is said at once, before anything runs."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from components import config
from components.config import PRESETS, Bottleneck, Columns, RetrainConfig, SplitConfig
from components.errors import ConfigError
from components.methods import settings_of

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
LEAST: dict[str, Any] = {"model": "toy", "data": {"source": "rows.csv"}}


def written(folder: Path, content: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def refused(folder: Path, content: Any, overrides: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.load(written(folder, content), overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def merged(section: str, values: Any) -> dict[str, Any]:
    """The least configuration with one section more, or with keys added to `data`."""
    return {**LEAST, section: {**LEAST["data"], **values} if section == "data" else values}


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_valid_and_opens_with_its_command(name: str) -> None:
    path = config.preset(name)
    flow = "fuse" if config.load(path).adapter.fusion else "retrain"
    assert path.read_text().splitlines()[0] == f"# python -m flows.{flow} --preset {name}"


def test_presets_register_different_models() -> None:
    models = [config.load(config.preset(name)).model for name in NAMES]
    assert len(set(models)) == len(models) >= 5


def test_unknown_preset_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        config.preset("twets")
    assert all(name in caught.value.expected for name in NAMES)


def test_a_wrong_key_is_said_to_be_where_it_is(tmp_path: Path) -> None:
    content = {**LEAST, "seed": "x"}
    found = refused(tmp_path, content, {"gate.margn": "1", "training.batch_size": "0"}).found
    overrides, in_file = found.split(" (in an override); ")
    assert "gate.margn" in overrides
    assert "training.batch_size" in overrides
    assert in_file.startswith("seed: ")
    assert in_file.endswith(f" (in {tmp_path / 'config.yaml'})")


def test_source_and_model_are_enough(tmp_path: Path) -> None:
    assert config.load(written(tmp_path, LEAST)) == RetrainConfig.model_validate(LEAST)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_survive_json(name: str) -> None:
    """Prefect and the job specs carry them so."""
    loaded = config.load(config.preset(name))
    assert config.parse(loaded.model_dump(mode="json"), "JSON") == loaded


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    overrides = {"gate.margin": "0.02", "data.labels": "[0, 1]", "report.show_samples": "true", "seed": "7"}
    loaded = config.load(written(tmp_path, merged("gate", {"margin": 0.5, "seed": 3})), overrides)
    assert (loaded.gate.margin, loaded.gate.seed, loaded.seed) == (0.02, 3, 7)
    assert loaded.data.labels == ("0", "1")
    assert loaded.report.show_samples


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({**LEAST, "gates": {}}, "gates: unknown key (did you mean gate?)"),
        (merged("data", {"columns": {"lable": "x"}}), "data.columns.lable: unknown key (did you mean label?)"),
        (
            merged("adapter", {"bottleneck": {"reduction_faktor": 8}}),
            "adapter.bottleneck.reduction_faktor: unknown key (did you mean reduction_factor?)",
        ),
        (
            merged("baseline", {"schedule": {"epochs": 1, "learning_rates": {"bdy": 1, "layer_norm": 1, "head": 1}}}),
            "baseline.schedule.learning_rates.bdy: unknown key (did you mean body?)",
        ),
        ({**LEAST, "zzzzzz": 1}, "zzzzzz: unknown key"),
        ({**LEAST, 5: 1}, "5: "),
    ],
)
def test_unknown_key_is_named_with_the_nearest_known_one(tmp_path: Path, content: Any, said: str) -> None:
    assert said in refused(tmp_path, content).found


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("adapter", {"bottleneck": {"reduction_factor": 0}}, "adapter.bottleneck.reduction_factor: "),
        ("adapter", {"bottleneck": {"reduction_factor": {"0": 8, "1": -1}}}, "adapter.bottleneck.reduction_factor: "),
        ("adapter", {"bottleneck": {"reduction_factor": {"first": 8}}}, "name layers by number, or default"),
        ("adapter", {"bottleneck": {"leave_out": ["x"]}}, "adapter.bottleneck.leave_out.0: "),
        ("adapter", {"method": "full"}, "adapter.method: "),
        ("adapter", {"method": "lora", "bottleneck": {}}, "method lora reads adapter.lora: remove bottleneck"),
        ("adapter", {"method": "ia3", "lora": {"r": 8}}, "method ia3 has no section of its own: remove lora"),
        ("adapter", {"method": "lora", "lora": {"r": 0}}, "adapter.lora.r: "),
        ("adapter", {"method": "prefix", "prefix": {"length": 0}}, "adapter.prefix.length: "),
        ("split", {"test": 0}, "split.test: "),
        ("split", {"test": 0.9, "validation": 0.1}, "at least 5 % for training"),
        ("split", {"near_duplicate_jaccard": 0.01}, "split.near_duplicate_jaccard: "),
        ("data", {"labels": ["a"]}, "two or more different names"),
        ("data", {"labels": ["a", "b", "a"]}, "two or more different names"),
        ("data", {"labels": [1, "1"]}, "two or more different names"),
        ("data", {"labels": [True, False]}, "must stand in quotes"),
        ("data", {"columns": {"text": "label"}}, "must be different columns"),
        ("data", {"columns": {"text_pair": "text"}}, "must be different columns"),
        ("validation", {"warnings": ["labels"]}, "validation.warnings.0: "),
        ("model", "no spaces", "model: "),
        ("model", "../escape", "model: "),
        ("gate", 5, "gate: "),
        ("gate", {"seed": -1}, "gate.seed: "),
        ("seed", 2**32, "seed: "),
        ("sweep", {"seeds": [0, -1]}, "sweep.seeds.1: "),
    ],
)
def test_value_out_of_range_is_named(tmp_path: Path, section: str, values: Any, said: str) -> None:
    assert said in refused(tmp_path, merged(section, values)).found


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    wrong = {
        "data": {"columns": {"txt": "x"}},
        "adapter": {"bottleneck": {"reduction_factor": 0}},
        "gate": {"margin": 7},
        "sed": 1,
    }
    found = refused(tmp_path, wrong).found
    places = (
        "model: missing",
        "data.source: missing",
        "data.columns.txt:",
        "reduction_factor:",
        "gate.margin:",
        "sed:",
    )
    assert [place for place in places if place not in found] == []


@pytest.mark.parametrize("content", ["", "- a list", "just text", "a: [unclosed", "\tx: 1"])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    assert "config.yaml" in refused(tmp_path, content).found


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"FileNotFoundError in .*absent\.yaml"):
        config.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("key", "value"), [("gate.margin", "[1"), ("model.name", "x"), ("gate.margn", "1"), ("gate.margin", "")]
)
def test_override_that_is_wrong_is_named(tmp_path: Path, key: str, value: str) -> None:
    assert key in refused(tmp_path, LEAST, {key: value}).found


@pytest.mark.parametrize("factors", [{0: 8, "default": 2}, {"0": 8, "default": 2.0}])
def test_reduction_factors_are_by_layer_too(factors: Any) -> None:
    bottleneck = RetrainConfig.model_validate(merged("adapter", {"bottleneck": {"reduction_factor": factors}})).adapter
    assert bottleneck.settings == Bottleneck(reduction_factor={"0": 8.0, "default": 2.0})


@pytest.mark.parametrize("method", ["lora", "prefix", "parallel"])
def test_the_method_alone_can_be_changed_afterwards(method: str) -> None:
    """As Prefect's form and overrides do with whole parameters."""
    plain = RetrainConfig.model_validate(LEAST)
    changed = config.settle(plain, None, {"adapter.method": method})
    assert changed.adapter.method == method
    assert changed.adapter.settings == settings_of(method)


@pytest.mark.parametrize("key", ["sweep.learning_rates", "adapter.bottleneck.leave_out"])
def test_a_section_that_was_not_given_can_be_set_afterwards(key: str) -> None:
    """As the deployments' own overrides do with a configuration."""
    changed = config.settle(RetrainConfig.model_validate(LEAST), None, {key: "[1]"})
    assert attrgetter(key)(changed) == (1,)


def test_whole_number_labels_are_names() -> None:
    assert RetrainConfig.model_validate(merged("data", {"labels": [0, 1, "two"]})).data.labels == ("0", "1", "two")


def test_parameters_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RetrainConfig.model_validate(LEAST).seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("build", [lambda: Columns(lable="x"), lambda: SplitConfig(teest=0.1)])  # type: ignore[call-arg]
def test_every_part_refuses_unknown_keys(build: Any) -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        build()
