"""One input, the answers of several adapters, with the layers below the first adapter computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    model: a PEFT model of BOTTLENECK adapters in eval mode, whose heads may be of different sizes.  inputs: of one
    batch, (batch, ...) each.

    Raises ConfigError for unknown adapters, for those with prefixes, and for encoder-decoder models.
    """
    unknown = [name for name in names if name not in model.peft_config]
    if unknown or not names:
        found = ", ".join(unknown) or "no name"
        raise ConfigError(f"adapters among {', '.join(model.peft_config)}", found, "load them first")
    base = model.base_model.model
    stacks = places.of_model(base, model.peft_config[names[0]].places)
    if len(stacks) > 1:
        raise ConfigError("one stack of layers", "an encoder and a decoder", "run the adapters one at a time")
    layers = [name for name, _ in places.layers(base, stacks)]
    first = min(
        module.index for module in base.modules()
        if isinstance(module, Site) and any(module.carries(name) for name in names)
    )  # fmt: skip
    batch, times = len(next(iter(inputs.values()))), len(names)
    repeated = {name: torch.cat([tensor] * times) for name, tensor in inputs.items()}
    with _shared([base.get_submodule(layer) for layer in layers[: first + 1]], batch, times):
        output = model(**repeated, adapter_names=[name for name in names for _ in range(batch)])
    made = (output.logits if "logits" in output else output.last_hidden_state).chunk(times)
    # Where heads differ in size, -inf fills the rows of the smaller ones.
    return {name: part[..., : int(part[0].isfinite().sum(-1).max())] for name, part in zip(names, made, strict=True)}


@contextmanager
def _shared(layers: list[nn.Module], batch: int, times: int) -> Iterator[None]:
    """The rows come as often as there are adapters: all but the last of these layers compute them once."""
    *below, last = layers
    hooks = [layer.register_forward_pre_hook(partial(_narrow, batch, times), with_kwargs=True) for layer in below]
    if below:
        hooks.append(last.register_forward_pre_hook(partial(_widen, batch, times), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _narrow(batch: int, times: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The hidden states, and of the rest what comes repeated: a table that layers share (DeBERTa's of distances) may
    happen to have as many rows. What computed the states may have rounded each row otherwise, so they are not compared.
    """

    def once(tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) != batch * times:
            return tensor
        parts = tensor.view(times, batch, *tensor.shape[1:])
        return parts[0] if torch.equal(parts, parts[:1].expand_as(parts)) else tensor

    stream, *others = args if args else (kwargs["hidden_states"],)
    kwargs = {name: _each(value, once) for name, value in kwargs.items() if name != "hidden_states"}
    if args:
        return (stream[:batch], *_each(tuple(others), once)), kwargs
    return (), {**kwargs, "hidden_states": stream[:batch]}


def _widen(batch: int, times: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Only the hidden states come narrowed; the rest comes from the model as it is."""
    stream, *others = args if args else (kwargs["hidden_states"],)
    stream = torch.cat([stream] * times) if len(stream) == batch else stream
    return ((stream, *others), kwargs) if args else ((), {**kwargs, "hidden_states": stream})


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Every tensor of more than one dimension in a value, changed."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.ndim > 1 else value
    return tuple(_each(part, change) for part in value) if isinstance(value, tuple) else value
