"""The tuner: puts adapters where the model family's table says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from components.adapters import places, prefix, rows
from components.adapters.config import PEFT_TYPE, BottleneckConfig
from components.adapters.layer import AdapterLayer, SharedParts, Site, placed
from components.adapters.phm import shared_parts
from components.adapters.registration import register
from components.errors import ConfigError

SHARED = "shared_of_adapters"  # PEFT passes over names that hold its prefix when it deletes an adapter
# Parts of the names of what adapters bring along.
OWN_NAMES = {
    SHARED, "bottleneck_adapters", "bottleneck_fusions", "bottleneck_parts", "base_layer", "modules_to_save",
    "original_module", "weight", "bias", "down", "up", "gate", "scaling", "ln_before", "ln_after", "which_masked",
    "rule", "left", "right", "weights", "factors", "flat", "inputs", "inner_layer", "outer_layer", "query", "key",
    "value", "scores", *(f"{kind}_{stack}" for kind in ("self", "cross") for stack in range(4)),
}  # fmt: skip


@dataclass(frozen=True)
class Spot:
    """One site of this very model: names are full names of modules."""

    layer: str
    index: int
    site: places.Site
    key: str  # the configuration's switch: mh_adapter, cross_adapter or output_adapter

    @property
    def exit(self) -> str:
        return f"{self.layer}.{self.site.exit}"


class BottleneckModel(BaseTuner):
    """Made by `peft.get_peft_model(model, BottleneckConfig(...))`.

    Not for calls from several threads at once while `adapter_names` are given; else a model may be shared.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = AdapterLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model, what its layers share first. What fails leaves nothing behind."""
        config = self.peft_config[adapter_name]
        if any(other is config for name, other in self.peft_config.items() if name != adapter_name):
            config = self.peft_config[adapter_name] = copy.deepcopy(config)  # each its own
        self._check_name(adapter_name)
        first, learning = not hasattr(model, SHARED), [each for each in model.parameters() if each.requires_grad]
        if first:
            model.requires_grad_(False)  # PEFT takes the shared parts for an earlier adapter, and would not
            setattr(model, SHARED, SharedParts(model))
        try:
            self._share(model, config, adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self._take_back(model, adapter_name)
            if first:
                self._forget(model)
            for each in learning:
                each.requires_grad_(True)
            raise
        if first:
            self._shared.begins = model.register_forward_pre_hook(partial(_begin, self._shared))

    def _share(self, model: nn.Module, config: BottleneckConfig, adapter_name: str) -> None:
        self._check_depth(config)
        parts = nn.ModuleDict()
        if config.phm_layer and not config.fuse:
            parts.update(dict(shared_parts(self.model.config.hidden_size, config)))
        if config.prefix_length:
            parts.update(self._prefixes(config))
            self._shared.attention = self._shared.attention or model.config._attn_implementation
            prefix.install(model)
        if config.drop_range:
            self._shared.step.ranges[adapter_name] = (config.drop_range[0], config.drop_range[1])
        if len(parts):
            self._shared.bottleneck_parts[adapter_name] = placed(parts, next(model.parameters()))

    def _take_back(self, model: nn.Module, adapter_name: str) -> None:
        """What was put in of an adapter before it failed."""
        self._shared.delete_adapter(adapter_name)
        for name, site in [(name, each) for name, each in model.named_modules() if isinstance(each, Site)]:
            site.delete_adapter(adapter_name)
            if not (site.bottleneck_adapters or site.bottleneck_fusions):
                parent, _, own = name.rpartition(".")
                as_it_was = site.unload_and_optionally_merge_module(False, False, None)
                self._replace_module(model.get_submodule(parent), own, as_it_was, site)

    def _forget(self, model: Any) -> None:
        """The base as it was: no shared parts, its own attention."""
        shared = model.__dict__["_modules"].pop(SHARED)
        if shared.begins:
            shared.begins.remove()
        if shared.attention:
            model.set_attn_implementation(shared.attention)
        for module in model.modules():
            module.__dict__.pop("bottleneck_slot", None)

    def _check_name(self, adapter_name: str) -> None:
        """PEFT tells adapters apart by the parts of parameters' names."""
        names = [name for name, _ in (*self.model.named_modules(), *self.model.named_parameters())]
        taken = {part for name in names for part in name.split(".")} - (set(self.peft_config) - {adapter_name})
        if adapter_name in taken | OWN_NAMES:
            raise ConfigError("an adapter's name that no module has", repr(adapter_name), "choose another name")

    def delete_adapter(self, adapter_name: str) -> None:
        """Raises ConfigError for an adapter that a fusion stands on."""
        users = [name for name, config in self.peft_config.items() if adapter_name in (config.fuse or ())]
        if users:
            raise ConfigError(f"{adapter_name!r} to be in no fusion", f"in {', '.join(users)}", "delete that one first")
        left = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        left = left or list(self.peft_config)[:1]  # the same everywhere: PEFT's layers each choose one of their own
        if left:
            self.set_adapter(left, inference_mode=self.peft_config[left[0]].inference_mode)

    @property
    def _shared(self) -> Any:
        return getattr(self.model, SHARED)

    def _prefixes(self, config: BottleneckConfig) -> dict[str, nn.Module]:
        """The prefixes of every kind of attention in the model, and a slot in each attention module."""
        about = self.model.config
        heads = getattr(about, "num_key_value_heads", None) or about.num_attention_heads
        features = getattr(about, "head_dim", None) or getattr(about, "d_kv", None)
        width = heads * (features or about.hidden_size // about.num_attention_heads)
        made: dict[str, nn.Module] = {}
        for part, attending in self._attentions(config).items():
            distances = self.model.get_submodule(attending[0][1])  # of a stack's layers, the first has them
            distances = distances if hasattr(distances, "relative_attention_bias") else None
            kept = [index for index, _ in attending if index not in config.leave_out]
            made[part] = prefix.Prefix(kept, about.hidden_size, heads, width, config)
            for index, name in attending:
                self.model.get_submodule(name).bottleneck_slot = prefix.Slot(self._shared, part, index, distances)
        return made

    def _attentions(self, config: BottleneckConfig) -> dict[str, list[tuple[int, str]]]:
        """The modules that attend, by kind, without the kinds that the configuration leaves without prefixes."""
        stacks = self._stacks(config)
        without = {"self_0"} if len(stacks) > 1 and not config.encoder_prefix else set()
        if not config.cross_prefix:
            without |= {f"cross_{index}" for index in range(len(stacks))}
        return {kind: found for kind, found in places.attentions(self.model, stacks).items() if kind not in without}

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> PeftConfig:
        """Name the places of this model in the config: the wrapped modules, and the layer norms that are trained."""
        if peft_config.fuse:
            peft_config.target_modules = self._fused(peft_config)
        elif peft_config.target_modules is None:
            spots = [spot for spot in self._spots(peft_config) if getattr(peft_config, spot.key)]
            spots = [spot for spot in spots if spot.index not in peft_config.leave_out]
            peft_config.target_modules = [spot.exit for spot in spots] or DUMMY_TARGET_MODULES
            if peft_config.train_layer_norm:
                norms = [f"{spot.layer}.{spot.site.norm or spot.site.entry}" for spot in spots]
                peft_config.modules_to_save = [
                    *(peft_config.modules_to_save or []), *filter(self._is_norm, dict.fromkeys(norms))
                ]  # fmt: skip
        return peft_config

    def _stacks(self, config: BottleneckConfig) -> tuple[places.Stack, ...]:
        return places.of_model(self.model, config.places)

    def _spots(self, config: BottleneckConfig) -> list[Spot]:
        found = []
        for index, (layer, stack) in enumerate(places.layers(self.model, self._stacks(config))):
            for key, site in (
                ("mh_adapter", stack.attention), ("cross_adapter", stack.cross), ("output_adapter", stack.output)
            ):  # fmt: skip
                if site is not None:
                    found.append(Spot(layer, index, site, key))
        return found

    def _is_norm(self, name: str) -> bool:
        shapes = [parameter.ndim for parameter in self.model.get_submodule(name).parameters()]
        return bool(shapes) and max(shapes) == 1

    def _check_depth(self, config: BottleneckConfig) -> None:
        depth = len(places.layers(self.model, self._stacks(config)))
        carrying = set(range(depth)) - set(config.leave_out)
        if not carrying or not set(config.leave_out) <= set(range(depth)):
            raise ConfigError(
                f"layers to leave out among 0 to {depth - 1}, and not all of them",
                ", ".join(map(str, config.leave_out)),
                "correct leave_out",
            )
        for name, dropped in (("drop_range", config.drop_range), ("drop_layers", [config.drop_layers])):
            if dropped and dropped[-1] > max(carrying):
                found = ", ".join(map(str, dropped))
                raise ConfigError(f"{name} up to {max(carrying)}", found, "leave the last layer its adapter")

    def _fused(self, config: BottleneckConfig) -> list[str]:
        """The modules that carry the adapters to fuse."""
        missing = [name for name in config.fuse or () if name not in self.peft_config]
        if missing:
            raise ConfigError(f"adapters {', '.join(config.fuse or ())}", f"no {', '.join(missing)}", "load them first")
        stance = _stance(self.peft_config[(config.fuse or [""])[0]])
        for name in config.fuse or ():
            child = self.peft_config[name]
            own = child.train_layer_norm or child.use_gating or child.ln_after or child.drop_layers
            if own or child.is_parallel or child.prefix_length or child.fuse or _stance(child) != stance:
                raise ConfigError(
                    "adapters to fuse that stand alike behind a sub-layer, in all their layers, without norms or gates",
                    f"{name!r} that does otherwise",
                    "fuse adapters of one method, pfeiffer",
                )
        return [name for name, module in self.model.named_modules() if isinstance(module, Site)
                 and any(child in module.bottleneck_adapters for child in config.fuse or ())]  # fmt: skip

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Saved keys name no adapter, so that it can be loaded under any name; PEFT expects the name further right."""
        for container in ("adapters", "fusions", "parts"):
            if f".bottleneck_{container}.{adapter_name}." in key:
                return key.replace(f".bottleneck_{container}.{adapter_name}.", f".bottleneck_{container}.")
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
        site = target if isinstance(target, Site) else self._site(peft_config, target, current_key)
        parts = self._shared.bottleneck_parts
        shared = dict(parts[adapter_name].items()) if adapter_name in parts else {}
        hidden = self.model.config.hidden_size
        site.update_layer(adapter_name, peft_config, hidden, self.active_adapters, shared, self._shared.step)
        if site is not target:
            setattr(parent, target_name, site)

    def _site(self, config: BottleneckConfig, target: nn.Module, name: str) -> Site:
        spots = {spot.exit: spot for spot in self._spots(config)}
        if name not in spots:
            raise ConfigError(
                f"target modules among the ends of sub-layers, e.g. {next(iter(spots))}",
                name,
                "leave target_modules out",
            )
        spot = spots[name]
        return Site(target, self.model.get_submodule(spot.layer), spot.site.entry, spot.site.norm, spot.index)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's own expects a module with a weight; the end of a sub-layer may be a dropout."""
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """Raises ConfigError for merging, before anything is changed: a non-linear adapter is no matrix."""
        if merge:
            raise ConfigError("a linear adapter to merge", "bottlenecks with an activation", "call unload() instead")
        model: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if hasattr(model, SHARED):
            self._forget(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """For the length of one forward: `adapter_names` tells each row's adapter, "__base__" for none.

        Raises ConfigError for an unknown name, while training, and for adapters with prefixes.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_rows(names)
        of_beams = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        # An encoder reads each row before there are beams of it.
        before = self.model.get_encoder().modules() if self.model.config.is_encoder_decoder else ()
        with rows.mixed(self.model, of_beams, dict.fromkeys(before, names)):
            yield

    def _check_rows(self, names: list[str]) -> None:
        unknown = sorted(set(names) - {rows.BASE, *self.peft_config})
        if unknown:
            raise ConfigError(
                f"adapters among {', '.join(self.peft_config)} or {rows.BASE}", ", ".join(unknown), "load them first"
            )
        if self.training:
            raise ConfigError("a model in eval mode for rows of several adapters", "training mode", "call eval()")
        if any(self.peft_config[name].prefix_length for name in set(names) - {rows.BASE}):
            raise ConfigError("adapters without prefixes in one batch", "prefixes", "run those one at a time")


def _begin(shared: Any, model: nn.Module, args: Any) -> None:
    shared.step.begin([] if shared.disable_adapters else shared.active_adapters)


def _stance(config: BottleneckConfig) -> tuple[Any, ...]:
    """Where an adapter stands beside the sub-layer."""
    return config.original_ln_before, config.original_ln_after, config.residual_before_ln


register(PEFT_TYPE, BottleneckConfig, BottleneckModel)
