"""The bundle: the folder a job leaves. Only safetensors and JSON, so nothing in it can execute.

adapter_config.json, adapter_model.safetensors    the adapter with its head, as PEFT saves it …
                      (a fusion without the adapters that it stands on: the manifest says where these are)
config.json, model.safetensors                    … or, for method `full`, the whole model
job.json              the spec it was made from
metrics.json          scores, parameters, seconds, one entry an epoch
predictions.safetensors    test part: `rows` (ids), `labels`, `probabilities`
manifest.json         written last: its presence means complete
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from components import digest
from components.base_model import BaseModel, BasePin, load_classifier
from components.config import Frozen
from components.errors import BundleError
from components.methods import Member

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"  # folder of what a job goes on from: no part of the bundle, and gone once that is complete
PREDICTIONS = "predictions.safetensors"
ADAPTER_NAME = "task"
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "datasets", "numpy")


class File(Frozen):
    size: int
    sha256: str


class Manifest(Frozen):
    """What a bundle is and holds. members: the bundles without which a fusion is nothing."""

    format: Literal[1] = 1
    method: str
    job_digest: str
    data_uri: str
    data_digest: str
    code: str
    seed: int
    base: BasePin
    members: tuple[Member, ...] = ()
    labels: tuple[str, ...]
    max_tokens: int
    trained_parameters: int
    total_parameters: int
    libraries: dict[str, str]
    files: dict[str, File]

    @property
    def digest(self) -> str:
        without = None if self.members else {"members"}  # as it was before there were fusions
        return digest.of_json(self.model_dump(mode="json", exclude=without))

    @property
    def bytes(self) -> int:
        """Size of all files, without the manifest itself."""
        return sum(file.size for file in self.files.values())

    @property
    def trained_share(self) -> float:
        return self.trained_parameters / self.total_parameters


@dataclass(frozen=True)
class Predictions:
    """Of the test part. rows: ids, (rows,) hex.  labels: (rows,).  probabilities: (rows, classes)."""

    rows: list[str]
    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]


def version_of(library: str) -> str:
    return importlib.metadata.version(library)


def libraries() -> dict[str, str]:
    return {name: version_of(name) for name in LIBRARIES}


def write_manifest(folder: Path, **about: Any) -> Manifest:
    """List every file of a bundle with size and digest, and declare it complete."""
    fresh = folder / f"{MANIFEST}.new"
    fresh.unlink(missing_ok=True)  # of a job that was killed right here
    files = {
        path.relative_to(folder).as_posix(): File(size=path.stat().st_size, sha256=digest.of_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and folder / CHECKPOINT not in path.parents
    }
    manifest = Manifest(files=files, libraries=libraries(), **about)
    fresh.write_text(manifest.model_dump_json(indent=2))
    fresh.replace(folder / MANIFEST)
    return manifest


def is_complete(folder: Path) -> bool:
    """Is the bundle there, and no checkpoint? A job killed between its last two steps leaves both, and run again clears
    the latter.
    """
    return (folder / MANIFEST).is_file() and not (folder / CHECKPOINT).exists()


def read_manifest(folder: Path) -> Manifest:
    """The manifest, after every file was compared with it. Raises BundleError naming the first that differs."""
    if not is_complete(folder):
        found = f"a {CHECKPOINT} beside it" if (folder / MANIFEST).is_file() else f"no {MANIFEST}"
        raise BundleError(f"a complete bundle at {folder}", found, "run the job again: it resumes")
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except ValueError as error:
        raise BundleError(
            f"a readable {MANIFEST}", "one that is damaged or of another format", "fetch it again"
        ) from error
    for name, file in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError("files inside the bundle", f"a path that leads out, {name!r}", "do not use this bundle")
        found = digest.of_file(path) if path.is_file() else "no such file"
        if found != file.sha256:
            raise BundleError(
                f"{name} with sha256 {file.sha256[:12]}", found[:12], "the bundle was changed: fetch it again"
            )
    extra = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    extra -= {MANIFEST, *manifest.files}
    if extra:
        raise BundleError("only the files of the manifest", f"also {', '.join(sorted(extra))}", "remove them")
    return manifest


def write_predictions(folder: Path, predictions: Predictions) -> None:
    from safetensors.numpy import save_file

    rows = np.array([int(row, 16) for row in predictions.rows], dtype=np.uint64)
    tensors = {"rows": rows, "labels": predictions.labels, "probabilities": predictions.probabilities}
    save_file(tensors, folder / PREDICTIONS)


def read_predictions(folder: Path) -> Predictions:
    from safetensors.numpy import load_file

    tensors = load_file(folder / PREDICTIONS)
    return Predictions([f"{row:016x}" for row in tensors["rows"]], tensors["labels"], tensors["probabilities"])


def save_model(folder: Path, model: Any, base: BasePin) -> None:
    """Write what was trained: adapter and head, or the whole model of method `full`."""
    if not hasattr(model, "peft_config"):
        model.save_pretrained(folder)
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = base.name  # not the path on this machine
        for name, value in vars(config).items():
            if isinstance(value, set):  # equal bundles have equal bytes
                setattr(config, name, sorted(value))
        # PEFT's prefix tuning names the head twice.
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save or ()))
    model.save_pretrained(folder, selected_adapters=[ADAPTER_NAME], save_embedding_layers=False)
    # PEFT puts a named adapter into a folder of that name, and a model card beside it that says nothing.
    for path in (folder / ADAPTER_NAME).iterdir():
        path.rename(folder / path.name)
    (folder / ADAPTER_NAME).rmdir()
    (folder / "README.md").unlink(missing_ok=True)


def load_model(folder: Path, manifest: Manifest, base: BaseModel) -> Any:
    """The model of a bundle, ready to predict.

    Raises BundleError when a tensor is missing, unexpected or of another shape, or the base is another one.
    """
    require_base(manifest, base.pin)
    model, _ = load_classifier(base, manifest.labels)
    model = _load_full(folder, model) if manifest.method == "full" else _load_adapter(folder, manifest, model)
    model.eval()
    return model


def require_base(manifest: Manifest, found: BasePin) -> None:
    """Raise BundleError when a bundle was made for another base."""
    wanted = manifest.base
    for what in ("weights_sha256", "tokenizer_sha256"):
        if getattr(wanted, what) != getattr(found, what):
            raise BundleError(
                f"base {wanted.name} with {what} {getattr(wanted, what)[:12]}",
                f"{found.name} with {getattr(found, what)[:12]}",
                "load the bundle with the base it was trained on",
            )


def _load_full(folder: Path, model: Any) -> Any:
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    require_same(state, {name: tensor for name, tensor in model.state_dict().items() if "position_ids" not in name})
    model.load_state_dict(state, strict=True)
    return model


def _load_adapter(folder: Path, manifest: Manifest, model: Any) -> Any:
    from safetensors.torch import load_file

    from components.adapters import methods  # also registers ours with PEFT
    from components.registry import members

    config = methods.load_config(folder)
    model = members.adapted(model, config, manifest.members, manifest.base)
    load_adapter_weights(model, ADAPTER_NAME, load_file(folder / "adapter_model.safetensors"))
    return model


def load_adapter_weights(model: Any, name: str, state: dict[str, torch.Tensor]) -> None:
    """Put weights into an adapter of a PEFT model. Raises BundleError unless they are exactly the ones it has."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    require_same(state, get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    set_peft_model_state_dict(model, state, adapter_name=name)


def require_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raise BundleError unless both have tensors of the same names and shapes."""
    missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unexpected:
        raise BundleError(
            f"{len(wanted)} tensors",
            f"{len(found)}; missing: {_few(missing)}; unexpected: {_few(unexpected)}",
            "the bundle was made by other code or for another base",
        )
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise BundleError(
                f"{name} of shape {tuple(tensor.shape)}", f"{tuple(found[name].shape)}", "the base has another size"
            )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) or "none"
