"""The weights of an adapter in a model, by the names that AdapterHub gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from components.adapters import places
from components.adapters.bottleneck import Bottleneck
from components.adapters.layer import Site
from components.adapters.model import SHARED
from components.adapters.phm import PHM, Factors
from components.adapters.prefix import Prefix
from components.errors import ConfigError

# Where AdapterHub keeps the adapters of a site, below a layer: in these families in the module that holds the site's
# last one, in the others in a module of that name. ALBERT is not among them: AdapterHub 1.3.0 takes the two inputs of
# its attention adapters for each other.
_BESIDE = {"attention": "attention_adapters", "cross": "cross_attention_adapters", "output": "output_adapters"}
HOLDERS: dict[str, dict[str, str]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "electra": {},
    "deberta-v2": {},
    "t5": {},
    "distilbert": _BESIDE,
    "bart": _BESIDE,
    "gpt2": _BESIDE,
    "llama": _BESIDE,
}
# Of prefixes, by kind of attention: in encoder-decoders, and in models of one stack.
PREFIXES = {"self_0": "encoder_prefix", "self_1": "self_prefix", "cross_1": "cross_prefix"}
ONE_STACK = {"distilbert": "self"}
LINEAR = {"weight": "weight", "bias": "bias"}
FACTORS = {"factors": "W", "left": "W_left", "right": "W_right"}
RULE = {"factors": "phm_rule", "left": "phm_rule_left", "right": "phm_rule_right"}
NETWORK = {
    "inputs": "wte.weight",
    **{f"{ours}_layer.{part}": f"control_trans.{index}.{part}"
       for ours, index in (("inner", 0), ("outer", 2)) for part in LINEAR},
}  # fmt: skip

Named = Iterator[tuple[str, torch.Tensor]]


def require_family(family: str) -> None:
    """Raises ConfigError for a family whose names are not known to be the same in both libraries."""
    if family not in HOLDERS:
        raise ConfigError(
            f"a model of a family among {', '.join(HOLDERS)}", f"family {family!r}", "train an adapter for it here"
        )


def of_adapter(base: Any, adapter: str, saved_as: str) -> dict[str, torch.Tensor]:
    """Everything of one adapter but its head, without the name of the whole model in front, e.g. `bert.`.

    adapter: its name in `base`, the model below PEFT's.  The tensors are the model's own, in AdapterHub's shapes; what
    AdapterHub saves under two names is here under both, except copies of prefixes.
    """
    found: dict[str, torch.Tensor] = {}
    for holder, site in _sites(base):
        if adapter in site.bottleneck_adapters:
            found.update(_below(f"{holder}.adapters.{saved_as}.", _bottleneck(site.bottleneck_adapters[adapter])))
    family = base.config.model_type
    parts = getattr(base, SHARED).bottleneck_parts
    for kind, part in parts[adapter].items() if adapter in parts else ():
        if isinstance(part, Prefix):
            group = PREFIXES[kind] if base.config.is_encoder_decoder else ONE_STACK.get(family, "self_prefix")
            found.update(_below(f"prefix_tuning.prefix_tunings.{saved_as}.{group}.", _prefix(part)))
        else:
            names = RULE if kind == "rule" else {ours: name.replace("W", f"W_{kind}") for ours, name in FACTORS.items()}
            found.update(_below(f"shared_parameters.{saved_as}.", _renamed(part, names)))
    return found


def of_fusion(base: Any, fusion: str, saved_as: str) -> dict[str, torch.Tensor]:
    """The same of an AdapterFusion, without the adapters under it."""
    found: dict[str, torch.Tensor] = {}
    for holder, site in _sites(base):
        if fusion in site.bottleneck_fusions:
            named = site.bottleneck_fusions[fusion].named_parameters()
            found.update(_below(f"{holder}.adapter_fusion_layer.{saved_as}.", named))
    return found


def _sites(base: Any) -> Iterator[tuple[str, Site]]:
    """The adapted sites, each with the path where AdapterHub keeps its adapters."""
    holders = HOLDERS[base.config.model_type]
    for layer, stack in places.layers(base, places.of_model(base)):
        for kind, place in stack.sites.items():
            site = base.get_submodule(f"{layer}.{place.exit}")
            if isinstance(site, Site):
                holder = holders.get(kind) or place.exit.rpartition(".")[0]
                yield f"{layer.removeprefix(f'{base.base_model_prefix}.')}.{holder}", site


def _bottleneck(bottleneck: Bottleneck) -> Named:
    first = "adapter_down.0."
    if bottleneck.ln_before is not None:  # the first of the modules in a row, and beside it under a name of its own
        yield from _below(first, bottleneck.ln_before.named_parameters())
        yield from _below("adapter_norm_before.", bottleneck.ln_before.named_parameters())
        first = "adapter_down.1."
    yield from _below(first, _projection(bottleneck.down))
    yield from _below("adapter_up.", _projection(bottleneck.up))
    if bottleneck.scaling is not None:
        yield "scaling", bottleneck.scaling
    for name, module in (("gate.", bottleneck.gate), ("adapter_norm_after.", bottleneck.ln_after)):
        if module is not None:
            yield from _below(name, module.named_parameters())


def _projection(projection: nn.Module) -> Named:
    if not isinstance(projection, PHM):
        yield from projection.named_parameters()
        return
    yield from _renamed(projection, {**FACTORS, "bias": "b"})
    if isinstance(getattr(projection, "rule", None), Factors):
        yield from _renamed(projection.rule, RULE)


def _prefix(prefix: Prefix) -> Named:
    if hasattr(prefix, "flat"):
        yield "control_trans", prefix.flat.view(-1)
    else:
        yield from _renamed(prefix, NETWORK)


def _renamed(module: nn.Module, names: dict[str, str]) -> Named:
    """Parameters and buffers of the module itself, by other names."""
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    return ((theirs, own[ours]) for ours, theirs in names.items() if ours in own)


def _below(path: str, named: Named) -> Named:
    return ((f"{path}{name}", tensor) for name, tensor in named)
