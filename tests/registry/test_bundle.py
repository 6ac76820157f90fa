"""Bundles: complete or refused, loaded whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from components import base_model, digest
from components.base_model import BaseModel
from components.config import BaseConfig
from components.errors import BundleError
from components.registry import bundle
from components.training import batching, loop
from tests.conftest import make_base
from tests.training.toy_jobs import RATES, finished, saved_split, toy_split

every_method = pytest.mark.parametrize("method", RATES)


@pytest.fixture(scope="module")
def bundles(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    data = saved_split(root / "split")
    return {method: finished(tiny_base, data, method, root / method, epochs=2) for method in RATES}


@pytest.fixture
def copied(bundles: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A bundle that a test may damage."""
    return lambda method: Path(shutil.copytree(bundles[method], tmp_path / method))


def base_at(path: Path) -> BaseModel:
    return base_model.find(BaseConfig(name=str(path)))


def change(folder: Path, **entries: Any) -> None:
    """Overwrite entries of a manifest."""
    path = folder / bundle.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@every_method
def test_the_manifest_lists_every_file_with_size_and_digest(bundles: dict[str, Path], method: str) -> None:
    listed = bundle.read_manifest(bundles[method]).files
    files = {path.name: path for path in bundles[method].iterdir() if path.name != bundle.MANIFEST}
    assert {name: (file.size, file.sha256) for name, file in listed.items()} == {
        name: (path.stat().st_size, digest.of_file(path)) for name, path in files.items()
    }


@every_method
def test_the_manifest_is_written_last(bundles: dict[str, Path], method: str) -> None:
    newest = max(bundles[method].iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == bundle.MANIFEST


@every_method
def test_nothing_in_a_bundle_can_execute(bundles: dict[str, Path], method: str) -> None:
    assert {path.suffix for path in bundles[method].rglob("*")} == {".safetensors", ".json"}


@every_method
def test_what_loads_the_model_names_no_path_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    make_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    folder = finished(Path("base"), saved_split(tmp_path / "split", 100), method, tmp_path / "out", epochs=1)
    config = folder / ("config.json" if method == "full" else "adapter_config.json")
    assert str(tmp_path) not in config.read_text()


def test_a_manifest_left_half_written_is_not_listed(tmp_path: Path, bundles: dict[str, Path]) -> None:
    about = bundle.read_manifest(bundles["full"]).model_dump(exclude={"files", "libraries", "format"})
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / f"{bundle.MANIFEST}.new").write_text("{")
    bundle.write_manifest(tmp_path, **about)
    assert set(bundle.read_manifest(tmp_path).files) == {"metrics.json"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "predictions.safetensors"])
def test_one_flipped_bit_is_noticed(copied: Callable[[str], Path], name: str) -> None:
    folder = copied("pfeiffer")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        bundle.read_manifest(folder)


def test_a_missing_file_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("pfeiffer")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(BundleError, match=r"adapter_config\.json.*no such file"):
        bundle.read_manifest(folder)


@pytest.mark.parametrize("name", ["more.json", "sub/pickle.bin"])
def test_an_extra_file_is_named(copied: Callable[[str], Path], name: str) -> None:
    folder = copied("pfeiffer")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(BundleError, match=name):
        bundle.read_manifest(folder)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_path_that_leads_out_is_named(copied: Callable[[str], Path], tmp_path: Path, absolute: bool) -> None:
    folder = copied("pfeiffer")
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    listed = {"size": 2, "sha256": digest.of_file(outside)}
    change(folder, files={(str(outside) if absolute else "../secret.json"): listed})
    with pytest.raises(BundleError, match=r"leads out.*secret\.json"):
        bundle.read_manifest(folder)


def test_a_link_that_leads_out_is_named(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("pfeiffer")
    (folder / "metrics.json").rename(tmp_path / "metrics.json")
    (folder / "metrics.json").symlink_to(tmp_path / "metrics.json")
    with pytest.raises(BundleError, match=r"leads out.*metrics\.json"):
        bundle.read_manifest(folder)


def test_without_manifest_a_bundle_is_incomplete(copied: Callable[[str], Path]) -> None:
    folder = copied("pfeiffer")
    (folder / bundle.MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        bundle.read_manifest(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"format": 1}'])
def test_a_damaged_manifest_is_refused(copied: Callable[[str], Path], content: bytes) -> None:
    folder = copied("pfeiffer")
    (folder / bundle.MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        bundle.read_manifest(folder)


@every_method
def test_a_loaded_model_predicts_what_the_job_predicted(bundles: dict[str, Path], tiny_base: Path, method: str) -> None:
    manifest = bundle.read_manifest(bundles[method])
    base = base_at(tiny_base)
    torch.manual_seed(123)  # another state than the job's: nothing may be left to chance
    model = bundle.load_model(bundles[method], manifest, base)
    tokens = batching.tokenise(toy_split().test, base_model.load_tokenizer(base), manifest.max_tokens)
    found = loop.predict(model, tokens, 0, torch.device("cpu"))
    assert np.array_equal(found, bundle.read_predictions(bundles[method]).probabilities)


@every_method
def test_a_loaded_model_has_nothing_to_train_but_in_full(
    bundles: dict[str, Path], tiny_base: Path, method: str
) -> None:
    model = bundle.load_model(bundles[method], bundle.read_manifest(bundles[method]), base_at(tiny_base))
    assert any(parameter.requires_grad for parameter in model.parameters()) == (method == "full")


def tampered(folder: Path, method: str, edit: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    """Edit the tensors of a bundle in place; `edit` gets them and the name of one."""
    path = folder / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    tensors = load_file(path)
    edit(tensors, next(name for name in sorted(tensors) if name.endswith("classifier.weight")))
    save_file(tensors, path, metadata={"format": "pt"})


def remove(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def add(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.more"] = torch.zeros(2)


def reshape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.zeros(3, 32)


@every_method
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove, r"missing: .*classifier\.weight"),
        (add, r"unexpected: .*weight\.more"),
        (reshape, r"classifier\.weight of shape \(2, 32\); found \(3, 32\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    copied: Callable[[str], Path],
    tiny_base: Path,
    method: str,
    edit: Callable[[dict[str, torch.Tensor], str], None],
    message: str,
) -> None:
    folder = copied(method)
    manifest = bundle.read_manifest(folder)
    tampered(folder, method, edit)
    with pytest.raises(BundleError, match=message):
        bundle.load_model(folder, manifest, base_at(tiny_base))


def test_another_base_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    other = base_at(make_base(tmp_path, initializer_range=0.05))
    with pytest.raises(BundleError, match=other.pin.weights_sha256[:12]):
        bundle.load_model(bundles["pfeiffer"], bundle.read_manifest(bundles["pfeiffer"]), other)


def test_another_tokenizer_is_refused(bundles: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("lovely", "lively"))
    with pytest.raises(BundleError, match="tokenizer_sha256"):
        bundle.load_model(bundles["full"], bundle.read_manifest(bundles["full"]), base_at(folder))


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = bundle.Predictions(
        ["00000000000000ff", "ffffffffffffffff"], np.array([1, 0]), np.array([[0.25, 0.75], [1, 0]], dtype=np.float32)
    )
    bundle.write_predictions(tmp_path, written)
    read = bundle.read_predictions(tmp_path)
    assert read.rows == written.rows
    assert np.array_equal(read.labels, written.labels)
    assert np.array_equal(read.probabilities, written.probabilities)
