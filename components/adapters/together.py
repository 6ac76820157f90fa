"""One input, the answers of several adapters, with the layers below the first adapter computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from components.adapters import places
from components.adapters.layer import Site
from components.errors import ConfigError


def answers(model: Any, names: Sequence[str], **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits by adapter, or last hidden states of a model without a head; each row equals that of the adapter alone.

    model: a PEFT model of BOTTLENECK adapters in eval mode.  inputs: of one batch, (batch, ...) each. The adapters may
    have heads of different sizes. Raises ConfigError for encoder-decoder models and for adapters with prefixes.
    """
    base = model.base_model.model
    stacks = places.of_model(base, model.peft_config[names[0]].places)
    if len(stacks) > 1:
        raise ConfigError("one stack of layers", "an encoder and a decoder", "run the adapters one at a time")
    layers = [name for name, _ in places.layers(base, stacks)]
    first = min(
        module.index for module in base.modules()
        if isinstance(module, Site) and any(module.carries(name) for name in names)
    )  # fmt: skip
    batch = len(next(iter(inputs.values())))
    with _branching([base.get_submodule(layer) for layer in layers[first:]], batch, len(names)):
        output = model(**inputs, adapter_names=[name for name in names for _ in range(batch)])
    made = (output.logits if "logits" in output else output.last_hidden_state).chunk(len(names))
    # Where heads differ in size, -inf fills the rows of the smaller ones.
    return {name: part[..., : int(part[0].isfinite().sum(-1).max())] for name, part in zip(names, made, strict=True)}


@contextmanager
def _branching(layers: list[nn.Module], batch: int, times: int) -> Iterator[None]:
    """The first of the layers repeats what it reads; what the model hands to each of them is repeated with it."""
    hooks = [layer.register_forward_pre_hook(partial(_repeated, batch, times), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _repeated(
    batch: int, times: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def repeat(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == batch:
            return torch.cat([value] * times)
        return tuple(map(repeat, value)) if isinstance(value, tuple) else value

    return repeat(args), {name: repeat(value) for name, value in kwargs.items()}
