"""What is trained in a model, whatever the method: its parameters by kind, and the modules that must know of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def trainable_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The trained parameters by what they are: `body`, `layer_norm`, `head`.

    With an adapter, `body` is what the method adds to the base, `layer_norm` trained copies of the base's norms, `head`
    the other modules that are trained as a whole. For a model without adapters, fully fine-tuned, `body` is the
    transformer except its layer norms.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"body": [], "layer_norm": [], "head": []}
    kind_of = _kinds_of_adapted(model) if is_adapted(model) else _kinds_of_whole(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[kind_of(name)].append((name, parameter))
    return groups


def is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def training_mode(model: nn.Module) -> None:
    """Dropout, masks and the like where something is learned: a frozen base computes what it will compute when used,
    and so do the adapters that a fusion stands on.
    """
    if not is_adapted(model):
        model.train()
        return
    model.eval()
    for module in own_modules(model):
        own = list(module.parameters())
        module.train(not own or any(parameter.requires_grad for parameter in own))


def own_modules(model: nn.Module) -> Iterator[nn.Module]:
    """What adapters brought into the model: everything in their layers but what these wrap."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for name, child in layer.named_children():
                if name != "base_layer":
                    yield child


def _kinds_of_adapted(model: nn.Module) -> Any:
    whole = {name: wrapper for name, wrapper in model.named_modules() if isinstance(wrapper, AuxiliaryTrainingWrapper)}
    norms = tuple(f"{name}." for name, wrapper in whole.items() if _is_norm(wrapper.original_module))
    others = tuple(f"{name}." for name, wrapper in whole.items() if not _is_norm(wrapper.original_module))
    return lambda name: "layer_norm" if name.startswith(norms) else "head" if name.startswith(others) else "body"


def _kinds_of_whole(model: nn.Module) -> Any:
    norms = {
        f"{name}.{key}" for name, module in model.named_modules() if _is_norm(module)
        for key, _ in module.named_parameters(recurse=False)
    }  # fmt: skip
    inside = f"{getattr(model, 'base_model_prefix', '')}."
    return lambda name: "layer_norm" if name in norms else "body" if name.startswith(inside) else "head"


def _is_norm(module: Any) -> bool:
    """LayerNorm of torch, and the RMS norms that families write for themselves (LlamaRMSNorm, T5LayerNorm, …)."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
