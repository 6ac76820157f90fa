"""AdapterFusion as a job: bundles in, a bundle out that holds what was learned and names what it stands on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from safetensors.torch import load_file

from components import base_model
from components.adapters import fusion as layers
from components.config import BaseConfig
from components.errors import BundleError, ConfigError
from components.methods import Fusion, Member
from components.registry import bundle, members
from components.training import attention, batching, job, loop
from components.training.spec import DataRef, JobSpec
from tests.conftest import make_base
from tests.training.toy_jobs import finished, silent, toy_spec, toy_split

KINDS = ("dynamic", "static", "average", "learned_average")


def member(folder: Path, name: str = "anna", version: str = "1") -> Member:
    return Member(name=name, version=version, uri=str(folder), digest=bundle.read_manifest(folder).digest)


def fusion_spec(base: Path, data: DataRef, found: list[Member], kind: str = "dynamic", epochs: int = 2) -> JobSpec:
    plain = toy_spec(base, data, "pfeiffer", epochs=epochs).model_dump()
    return JobSpec.model_validate({**plain, "method": "fusion", "settings": {"kind": kind, "members": found}})


@pytest.fixture(scope="module")
def two(lively_base: Path, data: DataRef, tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """Bundles of two adapters that learned the task from different starts."""
    root = tmp_path_factory.mktemp("members")
    names = ("anna", "bruno")
    return [
        member(finished(lively_base, data, "pfeiffer", root / name, epochs=2, seed=seed), name)
        for seed, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def fused(
    lively_base: Path, data: DataRef, two: list[Member], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A bundle of each kind."""
    root = tmp_path_factory.mktemp("fused")
    for kind in KINDS:
        job.run(fusion_spec(lively_base, data, two, kind), str(root / kind), silent)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def moved(fused: dict[str, Path], two: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of the members by digest, where fusions now look for them."""
    for each in two:
        shutil.copytree(each.uri, tmp_path / each.digest)
    monkeypatch.setenv(members.PATH_VARIABLE, str(tmp_path))
    return tmp_path


def loaded(folder: Path, base: Path) -> object:
    manifest = bundle.read_manifest(folder)
    torch.manual_seed(123)  # another state than the job's: nothing may be left to chance
    return bundle.load_model(folder, manifest, base_model.find(BaseConfig(name=str(base))))


def probabilities(folder: Path, base: Path) -> np.ndarray:
    tokenizer = base_model.load_tokenizer(base_model.find(BaseConfig(name=str(base))))
    tokens = batching.tokenise(toy_split().test, tokenizer, bundle.read_manifest(folder).max_tokens)
    return loop.predict(loaded(folder, base), tokens, 0, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_fusion_answers_what_the_job_answered(fused: dict[str, Path], lively_base: Path, kind: str) -> None:
    found = probabilities(fused[kind], lively_base)
    assert np.abs(found - bundle.read_predictions(fused[kind]).probabilities).max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_holds_fusion_and_head_alone(fused: dict[str, Path], kind: str) -> None:
    names = set(load_file(fused[kind] / "adapter_model.safetensors"))
    fusions = {name for name in names if ".bottleneck_fusions." in name}
    assert all("classifier" in name or "pooler" in name for name in names - fusions)
    assert names - fusions
    assert bool(fusions) == (kind != "average")  # fixed weights are none to learn
    assert len(list(fused[kind].glob("*.safetensors"))) == 2  # these and the predictions


def test_fusions_of_other_members_share_no_trunk(
    lively_base: Path, data: DataRef, two: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of fixed weights learns nothing in the layers: all of them are trunk, with the members in it."""
    monkeypatch.setenv("ADAPTERLINE_CACHE", str(tmp_path / "cache"))
    clara = member(finished(lively_base, data, "pfeiffer", tmp_path / "clara", epochs=2, seed=2), "clara")
    found = {}
    for gigabytes in (1.0, 0.0):
        for number, each in enumerate((two, [two[0], clara])):
            spec = fusion_spec(lively_base, data, each, "average", epochs=1)
            spec = spec.model_copy(update={"limits": spec.limits.model_copy(update={"trunk_cache_gb": gigabytes})})
            out = tmp_path / f"{number}-{gigabytes}"
            job.run(spec, str(out), silent)
            found[number, gigabytes] = json.loads((out / "metrics.json").read_bytes())["history"][0]["train_loss"]
    for number in (0, 1):
        assert found[number, 1.0] == pytest.approx(found[number, 0.0], abs=1e-6)
    assert found[0, 1.0] != pytest.approx(found[1, 1.0], abs=1e-6)


def test_a_bundle_names_what_it_stands_on(fused: dict[str, Path], two: list[Member]) -> None:
    manifest = bundle.read_manifest(fused["dynamic"])
    assert list(manifest.members) == two
    config = json.loads((fused["dynamic"] / "adapter_config.json").read_bytes())
    assert config["fuse"] == [each.digest for each in two]


def test_a_fusion_learns(fused: dict[str, Path]) -> None:
    history = json.loads((fused["dynamic"] / "metrics.json").read_bytes())["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_frozen_members_count_as_parameters_but_not_as_trained(fused: dict[str, Path], two: list[Member]) -> None:
    alone, both = bundle.read_manifest(Path(two[0].uri)), bundle.read_manifest(fused["dynamic"])
    adapter = sum(
        tensor.numel() for name, tensor in load_file(Path(two[0].uri) / "adapter_model.safetensors").items()
        if ".bottleneck_adapters." in name
    )  # fmt: skip
    base = alone.total_parameters - alone.trained_parameters
    assert both.total_parameters - both.trained_parameters == base + 2 * adapter


def test_members_stay_as_they_are(fused: dict[str, Path], two: list[Member]) -> None:
    for each in two:
        assert bundle.read_manifest(Path(each.uri)).digest == each.digest


def test_members_weigh_in_the_model_what_they_weigh_in_their_bundles(
    fused: dict[str, Path], two: list[Member], lively_base: Path
) -> None:
    inside = loaded(fused["dynamic"], lively_base).state_dict()  # type: ignore[attr-defined]
    for each in two:
        for name, tensor in load_file(Path(each.uri) / "adapter_model.safetensors").items():
            if ".bottleneck_adapters." in name:
                there = name.replace(".bottleneck_adapters.", f".bottleneck_adapters.{each.digest}.")
                assert torch.equal(inside[there], tensor)


def test_the_same_spec_gives_the_same_bytes(
    fused: dict[str, Path], lively_base: Path, data: DataRef, two: list[Member], tmp_path: Path
) -> None:
    job.run(fusion_spec(lively_base, data, two), str(tmp_path / "again"), silent)
    for name in ("adapter_config.json", "adapter_model.safetensors", bundle.PREDICTIONS):
        assert (tmp_path / "again" / name).read_bytes() == (fused["dynamic"] / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_measured_at_each_place(fused: dict[str, Path], two: list[Member], kind: str) -> None:
    measured = json.loads((fused[kind] / "metrics.json").read_bytes())["attention"]
    assert measured["members"] == [str(each) for each in two]
    assert [place["layer"] for place in measured["places"]] == [0, 1]
    assert all(sum(place["weights"]) == pytest.approx(1, abs=1e-5) for place in measured["places"])
    equal = all(place["weights"] == pytest.approx([0.5, 0.5]) for place in measured["places"])
    assert equal == (kind == "average")


def test_attention_does_not_count_padding(fused: dict[str, Path], two: list[Member], lively_base: Path) -> None:
    """What is measured on batches, padded, is the mean over the tokens of texts that were read one by one."""
    model: Any = loaded(fused["dynamic"], lively_base)
    texts = Dataset.from_dict({"text": ["lovely word1", "word3 awful word2 word4 sad word9 word8", "great"]})
    tokenizer = base_model.load_tokenizer(base_model.find(BaseConfig(name=str(lively_base))))
    tokens = batching.tokenise(texts, tokenizer, 32)
    found = attention.measure(model, two, tokens, 0, torch.device("cpu"))
    fusions = [module for module in model.modules() if isinstance(module, layers.Fusion)]
    seen = []
    for row in range(len(texts)):
        with torch.no_grad():
            model(**batching.collate(tokens, [row], 0, torch.device("cpu")))
        seen.append(torch.stack([fusion.seen[0] for fusion in fusions]))
    mean = torch.cat(seen, dim=1).mean(1)
    for place, weights in zip(found["places"], mean, strict=True):
        assert place["weights"] == pytest.approx(weights.tolist(), abs=1e-5)


class TestRefusals:
    """Nothing loads that does not stand on exactly what it was trained on."""

    def test_a_member_is_found_elsewhere(self, moved: Path, fused: dict[str, Path], lively_base: Path) -> None:
        assert probabilities(fused["dynamic"], lively_base).shape == (len(toy_split().test), 2)

    def test_a_missing_member(self, moved: Path, fused: dict[str, Path], two: list[Member], lively_base: Path) -> None:
        shutil.rmtree(moved / two[1].digest)
        with pytest.raises(BundleError, match=r"member bruno/1 with bundle digest .* found no manifest.json"):
            loaded(fused["dynamic"], lively_base)

    def test_a_changed_weight(self, moved: Path, fused: dict[str, Path], two: list[Member], lively_base: Path) -> None:
        path = moved / two[0].digest / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(BundleError, match=r"member anna/1 .*adapter_model\.safetensors with sha256"):
            loaded(fused["dynamic"], lively_base)

    def test_another_bundle_in_its_place(
        self, moved: Path, fused: dict[str, Path], two: list[Member], lively_base: Path
    ) -> None:
        shutil.rmtree(moved / two[0].digest)
        shutil.copytree(moved / two[1].digest, moved / two[0].digest)
        with pytest.raises(BundleError, match=rf"member anna/1 .* found digest {two[1].digest[:12]}"):
            loaded(fused["dynamic"], lively_base)

    def test_a_manifest_that_names_other_members(
        self, fused: dict[str, Path], lively_base: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(fused["dynamic"], tmp_path / "forged")
        about = bundle.read_manifest(folder).model_dump(exclude={"files", "libraries"})
        bundle.write_manifest(folder, **{**about, "members": about["members"][::-1]})
        with pytest.raises(BundleError, match="as in the manifest"):
            loaded(folder, lively_base)

    def test_members_on_another_base(self, data: DataRef, two: list[Member], tmp_path: Path) -> None:
        other = make_base(tmp_path / "other", initializer_range=0.2)
        with pytest.raises(BundleError, match="weights_sha256"):
            job.run(fusion_spec(other, data, two), str(tmp_path / "out"), silent)

    @pytest.mark.parametrize("method", ["houlsby", "parallel", "lora", "full"])
    def test_members_of_other_kinds(
        self, lively_base: Path, data: DataRef, two: list[Member], tmp_path: Path, method: str
    ) -> None:
        third = member(finished(lively_base, data, method, tmp_path / method, epochs=1), "clara")
        with pytest.raises(ConfigError, match=f"clara/1 of method {method}"):
            job.run(fusion_spec(lively_base, data, [*two, third]), str(tmp_path / "out"), silent)

    def test_a_fusion_of_fusions(
        self, lively_base: Path, data: DataRef, two: list[Member], fused: dict[str, Path], tmp_path: Path
    ) -> None:
        third = member(fused["static"], "clara")
        with pytest.raises(ConfigError, match="clara/1 of method fusion"):
            job.run(fusion_spec(lively_base, data, [*two, third]), str(tmp_path / "out"), silent)

    def test_members_in_different_places(
        self, lively_base: Path, data: DataRef, two: list[Member], tmp_path: Path
    ) -> None:
        settings = {"reduction_factor": 2, "mh_adapter": True}
        third = member(finished(lively_base, data, "pfeiffer", tmp_path / "b", epochs=1, settings=settings), "clara")
        with pytest.raises(ConfigError, match=r"members with the same mh_adapter.*clara/1 has True"):
            job.run(fusion_spec(lively_base, data, [*two, third]), str(tmp_path / "out"), silent)

    def test_one_bundle_twice(self, two: list[Member]) -> None:
        with pytest.raises(ValidationError, match="different bundles, found anna/1, anna/1"):
            Fusion(members=(two[0], two[0]))
