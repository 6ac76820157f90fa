"""The PEFT method "BITFIT": only the biases of the base are trained.

Ben-Zaken et al. 2022 (https://arxiv.org/abs/2106.10199) train the biases themselves. Here each gets a difference that
starts at zero and is added to its module's output, which is the same, and leaves the base as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers.pytorch_utils import Conv1D

from components.adapters.registration import register
from components.errors import ConfigError

PEFT_TYPE = "BITFIT"
BIASED = (nn.Linear, Conv1D, nn.LayerNorm)


@dataclass
class BitFitConfig(PeftConfig):
    """Which biases are trained: by default all of the base's linear modules and layer norms."""

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "modules whose biases are trained"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules that are left alone"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "further trained modules: the head"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


def head_only(modules: list[str]) -> BitFitConfig:
    """No bias at all: only `modules`, the task head, are trained and saved."""
    return BitFitConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=modules)


class BitFitLayer(nn.Module, BaseTunerLayer):
    """Wraps a module with a bias; the differences of the active adapters are added to what it puts out."""

    adapter_layer_names = ("bitfit_deltas",)

    base_layer: Any  # a module; torch types attributes of modules too widely to call them
    bitfit_deltas: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bitfit_deltas = nn.ParameterDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._unmerged: torch.Tensor | None = None

    def update_layer(self, adapter_name: str, config: BitFitConfig) -> None:
        """Add an adapter that changes nothing yet."""
        self.bitfit_deltas[adapter_name] = nn.Parameter(torch.zeros_like(self.get_base_layer().bias))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: (…, features in). Returns (…, features), that is base(x) + Σ delta."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                if name in self.bitfit_deltas:
                    output = output + self.bitfit_deltas[name].to(output.dtype)
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the differences to the base's bias.

        Raises ValueError, as PEFT's methods do, when safe_merge finds a number in the sum that is none.
        """
        bias = self.get_base_layer().bias
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.bitfit_deltas:
                continue
            total = bias.data + self.bitfit_deltas[name].data.to(bias.dtype)
            if safe_merge and not torch.isfinite(total).all():
                raise ValueError(f"adapter {name} has weights that are no finite numbers: it cannot be merged")
            self._unmerged = bias.data if self._unmerged is None else self._unmerged
            bias.data = total
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Bring back the base's own bias, to the bit."""
        if self._unmerged is not None:
            self.get_base_layer().bias.data = self._unmerged
        self._unmerged = None
        self.merged_adapters.clear()


class BitFitModel(BaseTuner):
    """Made by `peft.get_peft_model(model, BitFitConfig(...))`."""

    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer

    @staticmethod
    def _check_target_module_exists(peft_config: BitFitConfig, key: str) -> Any:
        return check_target_module_exists(peft_config, key)

    def _prepare_adapter_config(self, peft_config: BitFitConfig, model_config: dict[str, Any]) -> PeftConfig:
        """Name the modules with a bias in the config."""
        if peft_config.target_modules is None:
            peft_config.target_modules = _biased(self.model)
        return peft_config

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Raises ConfigError for rows of several adapters, rather than ignore them."""
        if kwargs.get("adapter_names") is not None:
            raise ConfigError("one adapter for all rows, with BitFit", "adapter_names", "use set_adapter()")
        yield

    def _create_and_replace(
        self,
        peft_config: BitFitConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BitFitLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, BIASED) or target.bias is None:
            raise ConfigError(
                "target_modules with a bias, linear ones or layer norms",
                f"{current_key}, {type(target).__name__}",
                "leave target_modules out: all biases of the base are found",
            )
        layer = BitFitLayer(target)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _biased(model: nn.Module) -> list[str]:
    """Names of the base's modules that have a bias; a head that stands on the base is none of them."""
    prefix = getattr(model, "base_model_prefix", "")
    inside = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    found = []
    for name, module in model.named_modules():
        if not name.startswith(inside) or ".modules_to_save." in name or name.endswith(".original_module"):
            continue
        if isinstance(module, BIASED) and module.bias is not None:
            found.append(name.removesuffix(".base_layer"))
    if not found:
        raise ConfigError("a base model with biases", "none in its linear modules and layer norms", "use method lora")
    return found


register(PEFT_TYPE, BitFitConfig, BitFitModel)
