"""The tuner: puts bottleneck layers where the model family's table says."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from components.adapters.config import PEFT_TYPE, BottleneckConfig
from components.adapters.layer import AfterDense, AfterNorm, BottleneckLayer
from components.adapters.places import layer_names, of_family
from components.errors import ConfigError


class BottleneckModel(BaseTuner):
    """Made by `peft.get_peft_model(model, BottleneckConfig(...))`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> PeftConfig:
        """Name the places of this model in the config: the wrapped modules, and the layer norms that are trained."""
        if peft_config.target_modules is None:
            peft_config.target_modules, norms = _targets(self.model, peft_config)
            if norms:
                peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *norms]
        return peft_config

    def _check_new_adapter_config(self, config: BottleneckConfig) -> None:
        """A layer norm is wrapped by one adapter or trained by another: PEFT keeps one wrapper a module."""
        super()._check_new_adapter_config(config)
        configs = self.peft_config.values()
        if any(other.original_ln_before for other in configs) and any(other.train_layer_norm for other in configs):
            raise ConfigError(
                "adapters on one model that all read the layer norms, or all train them or leave them alone",
                "original_ln_before (pfeiffer) beside train_layer_norm (houlsby)",
                "load the base a second time for the other method",
            )

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Saved keys name no adapter, so that it can be loaded under any name; PEFT expects the name further right."""
        container = ".bottleneck_adapters."
        if f"{container}{adapter_name}." in key:
            return key.replace(f"{container}{adapter_name}.", container)
        plain: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return plain

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = (AfterNorm if isinstance(target, nn.LayerNorm) else AfterDense)(target)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _targets(model: Any, config: BottleneckConfig) -> tuple[list[str], list[str]]:
    """Names of the modules to wrap and of the layer norms to train."""
    places = of_family(model.config.model_type)
    layers = layer_names(model, places)
    wrong = sorted(index for index in config.leave_out if not 0 <= index < len(layers))
    if wrong or len(set(config.leave_out)) == len(layers):
        raise ConfigError(
            f"layers to leave out among 0 to {len(layers) - 1}, and not all of them",
            ", ".join(map(str, config.leave_out)),
            "correct adapter.bottleneck.leave_out",
        )
    kept = [name for index, name in enumerate(layers) if index not in config.leave_out]
    spots: list[tuple[str, str]] = []
    if config.mh_adapter:
        spots.append((places.attention_dense, places.attention_norm))
    if config.output_adapter:
        spots.append((places.output_dense, places.output_norm))
    targets = [f"{layer}.{norm if config.original_ln_before else dense}" for layer in kept for dense, norm in spots]
    norms = [f"{layer}.{norm}" for layer in kept for _, norm in spots] if config.train_layer_norm else []
    return targets, norms


def register() -> None:
    """Make the method known to PEFT. Harmless when called again."""
    from peft import mapping

    for table, entry in (
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, BottleneckConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, BottleneckModel),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, BottleneckModel.prefix),
    ):
        table[PEFT_TYPE] = entry


def trainable_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The trained parameters by what they are: `body` (bottlenecks), `layer_norm`, `head`.

    For a model without adapters, fully fine-tuned, `body` is the transformer except its layer norms.
    """
    from transformers import PreTrainedModel

    norms = {
        f"{name}.{key}" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)
        for key, _ in module.named_parameters(recurse=False)
    }  # fmt: skip
    prefix = model.base_model_prefix if isinstance(model, PreTrainedModel) else None
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"body": [], "layer_norm": [], "head": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in norms:
            groups["layer_norm"].append((name, parameter))
        elif f".{BottleneckModel.prefix}" in name or (prefix and name.startswith(f"{prefix}.")):
            groups["body"].append((name, parameter))
        else:
            groups["head"].append((name, parameter))
    return groups


def dropouts(model: nn.Module) -> list[nn.Dropout]:
    """The adapters' own dropout modules: all that behaves differently while an adapter trains on a frozen base."""
    found: list[Any] = [
        module
        for name, module in model.named_modules()
        if f".{BottleneckModel.prefix}" in name and isinstance(module, nn.Dropout)
    ]
    return found
