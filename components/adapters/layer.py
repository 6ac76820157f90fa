"""The adapted module: what ends a sub-layer, and the adapters that work on its output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from components.adapters import stacked
from components.adapters.bottleneck import Bottleneck, Norm
from components.adapters.config import BottleneckConfig
from components.adapters.fusion import Fusion, make
from components.adapters.rows import own_copy, require_rows
from components.adapters.step import Step
from components.adapters.stream import Stream, remember, stand_in
from components.errors import ConfigError


class AdapterLayer(nn.Module, BaseTunerLayer):
    """What PEFT switches, freezes and deletes by an adapter's name."""

    _disable_adapters: bool
    merged_adapters: list[str]

    def __init__(self, home: nn.Module) -> None:
        """home: part of the base, on whose device adapters work."""
        super().__init__()
        self._parent = (home,)  # in a tuple it is no sub-module of its own sub-module
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters = []

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """What PEFT calls once it has loaded weights; its own looks for a base layer with a weight."""
        for container in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in container:
                container[adapter_name].to(device or next(self._parent[0].parameters()).device)


class SharedParts(AdapterLayer):
    """What the layers of one adapter share: Compacter's rule, the network behind prefixes."""

    adapter_layer_names = ("bottleneck_parts",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.bottleneck_parts = nn.ModuleDict()
        self.step = Step()
        self.attention: str | None = None  # transformers' implementation that prefixes took the place of
        self.begins: Any = None  # the hook that begins a step

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.step.ranges.pop(adapter_name, None)


class Site(AdapterLayer):
    """Wraps the module that computes h, the sub-layer's output. x: its residual input, norm: that of their sum.

    An adapter makes h' of h, x and norm, and the model goes on as it always did, with norm(h' + x). With several active
    adapters their changes of h add up. All tensors: (batch, tokens, hidden).
    """

    adapter_layer_names = ("bottleneck_adapters", "bottleneck_fusions")

    base_layer: Any  # a module; torch types attributes of modules too widely to call them
    bottleneck_adapters: Any
    bottleneck_fusions: Any

    def __init__(self, base_layer: nn.Module, parent: nn.Module, entry: str, norm: str | None, index: int) -> None:
        """parent: the transformer layer; entry and norm are paths below it. index: its number, from 0."""
        super().__init__(parent)
        self.base_layer = base_layer
        self.bottleneck_adapters = nn.ModuleDict()
        self.bottleneck_fusions = nn.ModuleDict()
        self.index = index
        self._step: Step | None = None
        self.stream = Stream()
        self._norm_path = norm
        self._hooks = [remember(self.stream, parent.get_submodule(entry))]
        if norm:
            self._hooks.append(stand_in(self.stream, parent.get_submodule(norm)))

    def update_layer(
        self, name: str, config: BottleneckConfig, hidden: int, active: Sequence[str], shared: Any, step: Step
    ) -> None:
        """Add an adapter or a fusion, drawn from the current random state. shared: what its layers share, by name."""
        self._step = step
        like = next(self._parent[0].parameters())
        if config.fuse:
            children = [child for child in config.fuse if child in self.bottleneck_adapters]
            self.bottleneck_fusions[name] = placed(make(hidden, children, config), like)
        else:
            self.bottleneck_adapters[name] = placed(Bottleneck(hidden, self.index, config, shared), like)
        self.set_adapter(list(active), inference_mode=config.inference_mode)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """adapter_names: one a row, as PEFT passes them for batches of several adapters."""
        output = self.base_layer(*args, **kwargs)
        h, *rest = output if isinstance(output, tuple) else (output,)
        h = self.changed(h, adapter_names)
        return (h, *rest) if isinstance(output, tuple) else h

    def changed(self, h: torch.Tensor, adapter_names: list[str] | None = None) -> torch.Tensor:
        """h', where x is in the stream; what stands in for norm(h' + x) is there afterwards."""
        x = self.stream.take()
        active: Any = self.active_adapters
        names: list[str] = [] if self.disable_adapters else adapter_names or active
        if not any(map(self.carries, dict.fromkeys(names))):
            return h
        # Under autocast h is of few bits and x is not; the sum that the adapter takes part in shall not lose them.
        h = h.to(torch.promote_types(h.dtype, x.dtype))
        if adapter_names is not None:
            return self._mixed(h, x, names)
        h, self.stream.result = self._adapted(h, x, [name for name in names if self.carries(name)])
        return h

    @property
    def may_work(self) -> bool:
        """Does any active adapter work here, in some step or when used?"""
        active: Any = self.active_adapters
        configs = [part.config for name in active if (part := self._part(name)) is not None]
        return any(self.index >= min([each.drop_layers, *(each.drop_range or ())]) for each in configs)

    @property
    def alone(self) -> Bottleneck | Fusion | None:
        """What works here, in every step, and nothing beside it."""
        active: Any = self.active_adapters
        here = [] if self.disable_adapters else [part for name in active if (part := self._part(name)) is not None]
        return here[0] if len(here) == 1 and self.may_work else None

    def carries(self, name: str) -> bool:
        """Does this adapter work here, in this step?"""
        part = self._part(name)
        if part is None:
            return False
        learns = part.training and part.config.drop_range and torch.is_grad_enabled()
        drawn = self._step.layers if self._step and learns else None
        return self.index >= (part.config.drop_layers if drawn is None else drawn)

    def mixes(self, names: Iterable[str]) -> bool:
        """Can a batch have rows of all these adapters? Not behind a layer norm of which an adapter has its own copy."""
        behind = any(self._part(name) and not self._config(name).original_ln_after for name in names)
        norm = self._parent[0].get_submodule(self._norm_path) if self._norm_path else None
        return not (behind and isinstance(norm, ModulesToSaveWrapper))

    def _part(self, name: str) -> Bottleneck | Fusion | None:
        for container in (self.bottleneck_adapters, self.bottleneck_fusions):
            if name in container:
                part: Bottleneck | Fusion = container[name]
                return part
        return None

    def _adapted(self, h: torch.Tensor, x: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """h', and what stands in for norm(h' + x) where the adapter comes after it."""
        outputs = [self._output(name, h, x) for name in names]
        if len(outputs) == 1:
            return self._placed(outputs[0], h, x, names[0])
        if not all(self._config(name).original_ln_after for name in names):
            raise ConfigError("one active adapter behind the layer norm", ", ".join(names), "activate one of them")
        return (h + torch.stack([each - h for each in outputs]).sum(0)).to(h.dtype), None

    def _placed(
        self, output: torch.Tensor, h: torch.Tensor, x: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same of one adapter's output, or of several alike."""
        if self._config(name).original_ln_after:
            return output.to(h.dtype), None
        if self._norm_path is None:
            return (output - x).to(h.dtype), None
        return h, output.to(h.dtype)

    def _mixed(self, h: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        """h' where each row has an adapter of its own, or none. Adapters of one form are computed at once."""
        require_rows(names, h)
        changed, behind = h.clone(), []
        for alike, where in self._alike(names).values():
            rows = slice(None) if len(where) == len(h) else torch.tensor(where, device=h.device)
            output = self._output_of_rows(alike, h[rows], x[rows])
            changed[rows], after = self._placed(output, h[rows], x[rows], alike[0])
            if after is not None:
                behind.append((rows, after))
        if not behind:
            self.stream.result = None
            return changed
        norm = self._parent[0].get_submodule(str(self._norm_path))
        if not self.mixes(set(names)):
            raise ConfigError(
                "in one batch, adapters that train layer norms or adapters behind them",
                ", ".join(dict.fromkeys(names)),
                "run them one after the other",
            )
        self.stream.result = _in_its_dtype(norm, changed + x)
        for rows, after in behind:
            self.stream.result[rows] = after
        return changed

    def _alike(self, names: list[str]) -> dict[Any, tuple[list[str], list[int]]]:
        """Names and rows of the adapters that work here, together where they are of one form."""
        forms = {name: stacked.form(part) or name for name in dict.fromkeys(names)
                 if self.carries(name) and (part := self._part(name)) is not None}  # fmt: skip
        found: dict[Any, tuple[list[str], list[int]]] = {}
        for row, name in enumerate(names):
            if name in forms:
                alike, rows = found.setdefault(forms[name], ([], []))
                alike.append(name)
                rows.append(row)
        return found

    def _output_of_rows(self, names: list[str], h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """As `_output`, of adapters of one form. names: one a row."""
        if len(set(names)) == 1:
            return self._output(names[0], h, x)
        parts: list[Any] = [self._part(name) for name in names]
        norm = self._parent[0].get_submodule(self._norm_path) if self._norm_path else None
        if isinstance(norm, ModulesToSaveWrapper):
            of_rows: Norm | None = partial(_in_their_dtype, [own_copy(norm, name) for name in names])
        else:
            of_rows = self._norm(names[0])
        return stacked.output(parts, _like(parts[0], h), _like(parts[0], x), of_rows)

    def _output(self, name: str, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The adapter's output, residual included, in the adapter's own dtype unless autocast chooses."""
        part = self._part(name)
        norm = self._norm(name)
        if isinstance(part, Bottleneck):
            h, x = _like(part, h), _like(part, x)
            made: torch.Tensor = part(*part.reads(h, x, norm))
            if self._step and part.mask_loss is not None and torch.is_grad_enabled():
                self._step.losses.append(part.config.mask_weight * part.mask_loss)
                part.mask_loss = None
            return made
        children = [self.bottleneck_adapters[child] for child in part.children_names]
        h, x = _like(children[-1], h), _like(children[-1], x)
        read, residual = children[-1].reads(h, x, norm)
        query = h if part.config.query_before_ln else read
        return part(query, torch.stack([child.raised(read) for child in children], dim=2), residual)  # type: ignore

    def _config(self, name: str) -> BottleneckConfig:
        part = self._part(name)
        if isinstance(part, Fusion):
            part = self.bottleneck_adapters[part.children_names[-1]]
        return part.config

    def _norm(self, name: str) -> Norm | None:
        """The layer norm of the residual sum: the adapter's own copy where it has one."""
        if self._norm_path is None:
            return None
        norm = self._parent[0].get_submodule(self._norm_path)
        return partial(_in_its_dtype, own_copy(norm, name) if isinstance(norm, ModulesToSaveWrapper) else norm)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """The wrapped module as it was."""
        for hook in self._hooks:
            hook.remove()
        base: nn.Module = self.base_layer
        return base


def placed(part: nn.Module, like: torch.Tensor) -> nn.Module:
    """On the device of the base, in its dtype. What PEFT makes on the meta device stays there until it is loaded."""
    meta = any(parameter.is_meta for parameter in part.parameters())
    return part.to(like.dtype) if meta else part.to(like.device, like.dtype)


def _in_its_dtype(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The base may be of fewer bits than the adapter."""
    dtype = next(norm.parameters()).dtype
    normed: torch.Tensor = norm(x.to(dtype))
    return normed.to(x.dtype)


def _in_their_dtype(norms: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """The same with a norm for each row."""
    return stacked.through(norms, x.to(next(norms[0].parameters()).dtype)).to(x.dtype)


def _like(bottleneck: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    return x if torch.is_autocast_enabled(x.device.type) else x.to(bottleneck.dtype)
