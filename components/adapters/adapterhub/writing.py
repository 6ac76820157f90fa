"""From an adapter in a model to a folder that AdapterHub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from components.adapters.adapterhub import folder as folders
from components.adapters.adapterhub import heads, settings, weights
from components.adapters.adapterhub.folder import ADAPTER, FUSION, HEAD, Saved
from components.adapters.config import BottleneckConfig
from components.errors import ConfigError

VERSION = "adapters.1.3.0"  # the release whose words the configurations use


def save(model: PeftModel, folder: Path | str, name: str | None = None, *, safetensors: bool = False) -> None:
    """Write an adapter, or a fusion and below it its adapters, as AdapterHub reads them.

    name: the active adapter by default.  safetensors: AdapterHub reads these when it is asked to
    (`use_safetensors=True`), and otherwise the .bin files written by default.

    The head goes along when there is one. Raises ConfigError for what AdapterHub does not have.
    """
    name = name or str(model.active_adapter)
    base, config = model.get_base_model(), _config(model, name)
    weights.require_family(base.config.model_type)
    contents = [(Path(folder), name)]
    contents += [(Path(folder) / child, child) for child in config.fuse or ()]
    plans = [(path, _config(model, adapter), adapter) for path, adapter in contents]
    described = [_described(base, own, adapter) for _, own, adapter in plans]
    for (path, own, adapter), about in zip(plans, described, strict=True):
        _write(base, path, own, adapter, about, safetensors)


def _described(base: Any, config: BottleneckConfig, adapter: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The contents of the configuration files: the adapter's or fusion's, and the head's."""
    common = {
        "hidden_size": base.config.hidden_size,
        "model_name": base.config.name_or_path,
        "model_type": base.config.model_type,
        "name": ",".join(config.fuse) if config.fuse else adapter,  # AdapterHub finds a fusion by its adapters
        "version": VERSION,
    }
    own = settings.written_fusion(config) if config.fuse else settings.written(config, base.config.model_type)
    head = heads.describe(base, list(config.modules_to_save)) if config.modules_to_save else None
    about = {**common, "config": own, "model_class": heads.model_class(base)}
    if config.fuse:
        about["adapter_names"] = config.fuse
    return about, {**common, **head} if head else None


def _write(
    base: Any,
    folder: Path,
    config: BottleneckConfig,
    adapter: str,
    described: tuple[dict[str, Any], dict[str, Any] | None],
    safetensors: bool,
) -> None:
    about, head = described
    tensors = (weights.of_fusion if config.fuse else weights.of_adapter)(base, adapter, about["name"])
    prefix = f"{base.base_model_prefix}." if heads.has_head(base) else ""
    saved = Saved(about, {f"{prefix}{key}": tensor for key, tensor in tensors.items()})
    folders.write(folder, FUSION if config.fuse else ADAPTER, saved, safetensors)
    if head:
        folders.write(folder, HEAD, Saved(head, heads.weights(head, base, adapter)), safetensors)


def _config(model: PeftModel, name: str) -> BottleneckConfig:
    config = model.peft_config.get(name)
    if not isinstance(config, BottleneckConfig):
        kinds = {key: str(value.peft_type) for key, value in model.peft_config.items()}
        raise ConfigError(
            "a bottleneck adapter of this model", f"{name!r} of {kinds}", "name one of its bottleneck adapters"
        )
    return config
