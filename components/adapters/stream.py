"""The residual stream at one site: what the sub-layer read, kept until its output is there."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch import nn

from components.errors import ConfigError


class Stream(threading.local):
    """Between the first and the last module of a sub-layer, in one thread. Empty outside.

    x: (batch, tokens, hidden), the residual input of the sub-layer.  result: what stands in for the output of the layer
    norm that follows, for adapters that come after it.

    A copy of a model shares it with the original: nothing stays in it from one sub-layer to the next.
    """

    x: torch.Tensor | None = None
    result: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        """x, and the stream is empty again. Raises ConfigError when the sub-layer's first module has not run."""
        x, self.x = self.x, None
        if x is None:
            raise ConfigError("the entry of a site to run before its exit", "an exit alone", "correct the places")
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Stream:
        return self

    def __reduce__(self) -> tuple[type[Stream], tuple[()]]:
        return Stream, ()


def remember(stream: Stream, entry: nn.Module) -> Any:
    """From now on the stream holds what `entry` reads. Returns the handle that ends it."""
    return entry.register_forward_pre_hook(partial(_remember, stream), with_kwargs=True)


def stand_in(stream: Stream, norm: nn.Module) -> Any:
    """From now on the stream's result, if there is one, takes the place of the norm's output."""
    return norm.register_forward_hook(partial(_stand_in, stream))


def _remember(stream: Stream, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    stream.x = args[0] if args else kwargs["hidden_states"]


def _stand_in(stream: Stream, norm: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    result, stream.result = stream.result, None
    return output if result is None else result
