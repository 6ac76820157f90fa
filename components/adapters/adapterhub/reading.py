"""From a folder that AdapterHub wrote to an adapter in a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from components.adapters.adapterhub import folder as folders
from components.adapters.adapterhub import heads, settings, weights
from components.adapters.adapterhub.folder import ADAPTER, FUSION, HEAD, Kind, Saved
from components.adapters.config import BottleneckConfig
from components.adapters.model import BottleneckModel
from components.errors import BundleError, ConfigError

# Names of AdapterHub's first releases.
LEGACY = {
    f"{place}_text_{purpose}_adapters": "adapters" for place in ("attention", "layer") for purpose in ("task", "lang")
}


@dataclass(frozen=True)
class Part:
    """An adapter or a fusion to put into the model. name: here; saved.about["name"]: in AdapterHub."""

    name: str
    config: BottleneckConfig
    saved: Saved
    head: Saved | None = None

    @property
    def saved_as(self) -> str:
        return str(self.saved.about["name"])

    def weights(self, base: Any) -> dict[str, torch.Tensor]:
        """Where its tensors belong in a model that it is part of."""
        of = weights.of_fusion if self.config.fuse else weights.of_adapter
        return of(base, self.name, self.saved_as)

    def head_weights(self, base: Any) -> dict[str, torch.Tensor]:
        return heads.weights(self.head.about, base, self.name) if self.head else {}


def load(
    model: Any, folder: Path | str, name: str | None = None, adapters: Mapping[str, Path | str] | None = None
) -> PeftModel:
    """Put an adapter or a fusion that AdapterHub saved into a model, and activate it.

    model: a transformers model, or a PEFT model that has adapters already. Heads are read when it has one, and it gets
    their labels.
    folder: as `save_adapter` or `save_adapter_fusion` left it.  name: of the adapter here; its own by default.
    adapters: folders of a fusion's adapters by name; by default those of these names in the folder or beside it, or the
    adapters of these names that the model has.

    What counts at the start of training only, or drops out while it runs, is left behind. Raises ConfigError for what
    this library does not have and BundleError for weights that are not those of such an adapter in such a model, both
    before the model is touched.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    weights.require_family(base.config.model_type)
    here = Path(folder)
    if folders.holds(here, FUSION):
        parts = _fusion(model, base, here, name, {child: Path(path) for child, path in (adapters or {}).items()})
    elif folders.holds(here, ADAPTER):
        parts = [_adapter(base, here, name)]
    else:
        raise BundleError(
            f"{ADAPTER.config} or {FUSION.config} in {here}", "neither", "name a folder that AdapterHub saved"
        )
    _require_names(model, [part.name for part in parts])
    _check(model, base, parts)
    for part in parts:
        model = _added(model, part.name, part.config)
    for part in parts:
        places, tensors = part.weights(base), part.saved.tensors
        if part.head:
            places, tensors = places | part.head_weights(base), tensors | part.head.tensors
            heads.label(base, part.head.about)
        with torch.no_grad():
            for key, place in places.items():
                place.copy_(tensors[key])
    model.set_adapter(parts[-1].name)
    return model


def _adapter(base: Any, folder: Path, name: str | None, with_head: bool = True) -> Part:
    saved = _read(base, folder, ADAPTER)
    part = Part(name or str(saved.about["name"]), settings.read(saved.about), saved)
    return _with_head(part, base, folder) if with_head else part


def _fusion(model: Any, base: Any, folder: Path, name: str | None, adapters: dict[str, Path]) -> list[Part]:
    """The fusion, after the adapters that the model does not have yet."""
    saved = _read(base, folder, FUSION)
    fuse = saved.about.get("adapter_names") or str(saved.about["name"]).split(",")
    parts = []
    for child in fuse:
        beside = [path for path in (folder / child, folder.parent / child) if folders.holds(path, ADAPTER)]
        if child in adapters or child not in getattr(model, "peft_config", {}):
            if child not in adapters and not beside:
                raise BundleError(
                    f"adapter {child!r} in {folder} or beside it", "none", "name its folder in `adapters`"
                )
            parts.append(_adapter(base, adapters.get(child) or beside[0], child, with_head=False))
    fusion = Part(name or str(saved.about["name"]), settings.read_fusion(saved.about, list(fuse)), saved)
    return [*parts, _with_head(fusion, base, folder)]


def _with_head(part: Part, base: Any, folder: Path) -> Part:
    if not (heads.has_head(base) and folders.holds(folder, HEAD)):
        return part
    head = folders.read(folder, HEAD)
    modules = heads.modules(head.about, head.tensors, base)
    return replace(part, head=head, config=replace(part.config, modules_to_save=modules))


def _read(base: Any, folder: Path, kind: Kind) -> Saved:
    """Checked against the base, its tensors without the base's name in front and without AdapterHub's copies."""
    saved = folders.read(folder, kind)
    if not (saved.about.get("name") and isinstance(saved.about["name"], str)):
        raise BundleError(f"a name in {folder / kind.config}", "none", "save it again")
    for word in ("model_type", "hidden_size"):
        expected, found = getattr(base.config, word), saved.about.get(word)
        if found != expected:
            raise BundleError(
                f"{kind.word} for {word} {expected}", f"{found}", "load it onto the base it was trained for"
            )
    prefix = f"{base.base_model_prefix}."
    tensors = {_renamed(key.removeprefix(prefix)): tensor for key, tensor in saved.tensors.items()}
    for key, tensor in list(tensors.items()):
        original = f"prefix_tuning.{key.partition('.prefix_tuning.pool.')[2]}"
        if original in tensors and torch.equal(tensors[original], tensor):
            del tensors[key]  # every layer holds a copy of all prefixes
    return Saved(saved.about, tensors)


def _renamed(key: str) -> str:
    for old, new in LEGACY.items():
        key = key.replace(f".{old}.", f".{new}.")
    return key


def _check(model: Any, base: Any, parts: list[Part]) -> None:
    """Build the model once more without weights, and compare names and shapes. Raises BundleError."""
    with torch.device("meta"):
        skeleton = type(base)(copy.deepcopy(base.config))
        known = getattr(model, "peft_config", {})
        for child in [child for part in parts for child in part.config.fuse or () if child in known]:
            skeleton = _added(skeleton, child, known[child])
        for part in parts:
            skeleton = _added(skeleton, part.name, part.config)
    bare = skeleton.get_base_model()
    for part in parts:
        _compare(part.weights(bare), part.saved.tensors, f"adapter {part.saved_as!r}")
        if part.head:
            _compare(part.head_weights(bare), part.head.tensors, f"the head of {part.saved_as!r}")


def _compare(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], what: str) -> None:
    wrong = [("no", sorted(expected.keys() - found.keys())), ("unexpected", sorted(found.keys() - expected.keys()))]
    problems = [f"{word} {_first(keys)}" for word, keys in wrong if keys]
    problems += [f"{key} {tuple(found[key].shape)}, not {tuple(tensor.shape)}" for key, tensor in expected.items()
                 if key in found and found[key].shape != tensor.shape][:1]  # fmt: skip
    if problems:
        raise BundleError(
            f"the {len(expected)} weights of {what} by its configuration and this model",
            "; ".join(problems),
            "load it onto the base it was trained for, or save it again",
        )


def _first(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _added(model: Any, name: str, config: BottleneckConfig) -> Any:
    own = copy.deepcopy(config)
    if isinstance(model, PeftModel):
        model.add_adapter(name, own)
    else:
        training, model = model.training, get_peft_model(model, own, adapter_name=name)
        model.training = training
    return model.train(model.training)


def _require_names(model: Any, names: list[str]) -> None:
    for name in names:
        if not name or "." in name or name in BottleneckModel.prefix:
            raise ConfigError(
                f"a name without dots and not part of {BottleneckModel.prefix!r}", f"{name!r}", "give another name"
            )
        if name in getattr(model, "peft_config", {}):
            raise ConfigError("a new name for the adapter", f"{name!r}, which the model has", "give another name")
