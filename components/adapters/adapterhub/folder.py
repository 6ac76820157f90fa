"""Folders as AdapterHub writes them: for an adapter, a fusion or a head, a configuration and its weights."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.errors import BundleError


@dataclass(frozen=True)
class Kind:
    """What a folder may hold, and the names of its files."""

    word: str
    config: str
    weights: str
    safetensors: str


ADAPTER = Kind("an adapter", "adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors")
FUSION = Kind(
    "a fusion", "adapter_fusion_config.json", "pytorch_model_adapter_fusion.bin", "model_adapter_fusion.safetensors"
)
HEAD = Kind("a head", "head_config.json", "pytorch_model_head.bin", "model_head.safetensors")


@dataclass(frozen=True)
class Saved:
    """about: the configuration and what it was made for.  tensors: by AdapterHub's names."""

    about: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def holds(folder: Path, kind: Kind) -> bool:
    return (folder / kind.config).is_file()


def read(folder: Path, kind: Kind) -> Saved:
    """Nothing in the files is executed. Raises BundleError when one is missing or is not what its name says."""
    return Saved(_about(folder / kind.config), _tensors(folder, kind))


def write(folder: Path, kind: Kind, saved: Saved, safetensors: bool) -> None:
    """In AdapterHub's own two formats; it looks for the safetensors only when asked to."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in saved.tensors.items()}
    for name in (kind.weights, kind.safetensors):
        (folder / name).unlink(missing_ok=True)  # or an older one would be read
    if safetensors:
        save_file(own, folder / kind.safetensors)
    else:
        torch.save(own, folder / kind.weights)
    text = json.dumps(saved.about, indent=2, sort_keys=True)
    (folder / kind.config).write_text(f"{text}\n", encoding="utf-8")


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path.name} in {path.parent}", f"none that can be read: {error}", "save it again"
        ) from error
    if not isinstance(about, dict) or not isinstance(about.get("config") or {}, dict):
        raise BundleError(f"an object with an object `config` in {path}", "something else", "save it again")
    return about


def _tensors(folder: Path, kind: Kind) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    safe, plain = folder / kind.safetensors, folder / kind.weights
    if not safe.is_file() and not plain.is_file():
        raise BundleError(f"{safe.name} or {plain.name} in {folder}", "neither", f"save {kind.word} there again")
    path = safe if safe.is_file() else plain
    try:
        found = load_file(safe) if path is safe else torch.load(plain, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise BundleError(f"weights alone in {path}", f"{error}".split("\n")[0], "save it again") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise BundleError(f"tensors by name in {path}", "something else", "save it again")
    return dict(found)
