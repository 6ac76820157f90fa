"""A model of any family, cut between two of its layers: all below the first one that learns is a trunk there, too.

The layers below are passed by, and the next one reads what was kept of its input. Whether the model computes the same
then is tried on a few rows before: in T5 the first layer makes the position bias of all others, so it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as everybody calls it

from components.adapters import places
from components.adapters.layer import Site
from components.adapters.parameters import is_adapted
from components.errors import ConfigError
from components.training.encoder import forward_instead
from components.training.packing import Packing

log = logging.getLogger("adapterline")
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Between:
    """Before the layer of this name and number, whose input is kept of every token."""

    name: str
    layer: int
    states: int = 1
    first: bool = False


@dataclass(frozen=True)
class Layered:
    """What a trunk asks of `encoder.Encoder`, of any model.

    dtype: of what is kept.  layers: all of the stack.  beside: how many things a layer returns in a tuple with the
    hidden states; None where it returns these alone.
    """

    model: Any  # a transformers model; torch types its attributes too widely
    dtype: torch.dtype
    layers: Sequence[nn.Module]
    cut: Between
    beside: int | None
    packs: ClassVar[bool] = False

    @staticmethod
    def of(model: Any, inputs: Inputs, dtype: torch.dtype) -> Layered | None:
        """Cut as high as may be; None where that saves nothing, or the model would compute something else.

        model: in training mode.  inputs: of a few rows, each with padding.
        """
        layers = _layers(model)
        frozen = next((number for number, each in enumerate(layers.values()) if _may_learn(each)), len(layers) - 1)
        if frozen < 1:
            return None
        device = inputs["input_ids"].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            run = _Run(model, [*layers.values()], inputs)
            if not run.is_plain or run.read[frozen].requires_grad:
                return None
            cut = Between([*layers][frozen], frozen)
            found = Layered(model, torch.float32, [*layers.values()], cut, run.beside)
            return replace(found, dtype=dtype) if found._computes_the_same(inputs) else None

    def states(self, packing: Packing, inputs: Inputs) -> list[torch.Tensor]:
        """What the layer above the cut reads, (tokens, hidden)."""
        with torch.no_grad(), _hooked(self.layers[self.cut.layer], _reach):
            try:
                self.model(**inputs)
            except _Reached as reached:
                x = reached.x
        return [packing.pack(F.pad(x, (0, 0, 0, packing.width - x.shape[1])).to(self.dtype))]

    @contextmanager
    def above(self, states: list[torch.Tensor], packing: Packing) -> Iterator[None]:
        """For the length of the block the model's forward pass begins with these states, in whatever thread."""
        x = packing.spread(states[0])
        with ExitStack() as stack:
            for layer in self.layers[: self.cut.layer]:
                stack.enter_context(forward_instead(layer, self._pass_by))
            stack.enter_context(_hooked(self.layers[self.cut.layer], partial(_begin_with, x)))
            yield

    def _pass_by(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self.beside is None else (hidden_states, *self.beside * (None,))

    def _computes_the_same(self, inputs: Inputs) -> bool:
        there = inputs["attention_mask"].bool()
        packing = Packing.of(there.sum(1).cpu().numpy(), self.dtype, there.device)
        with torch.no_grad():
            whole = _Run(self.model, self.layers, inputs)
            try:
                kept = [packing.spread(each) * there[:, : packing.width, None] for each in self.states(packing, inputs)]
                with self.above([packing.pack(each) for each in kept], packing):
                    cut = _Run(self.model, self.layers, inputs)
            except Exception as error:  # noqa: BLE001  # a family may fail as it likes; as a whole its model just computed
                log.warning("no layer is passed by: %s", str(error).partition("\n")[0][:200])
                return False
        pairs = (whole.last[there], cut.last[there]), (whole.logits, cut.logits)
        return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs)


class _Run:
    """A forward pass, with what its layers read and the last one made. read: (rows, width, hidden) each."""

    def __init__(self, model: Any, layers: Sequence[nn.Module], inputs: Inputs) -> None:
        self.read: list[Any] = []
        self._made: list[Any] = []
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(_hooked(layer, self._reads))
                stack.callback(layer.register_forward_hook(self._makes).remove)
            torch.manual_seed(0)  # adapters may drop out
            self.logits: torch.Tensor = model(**inputs).logits
        self._layers, self._shape = len(layers), inputs["input_ids"].shape

    @property
    def is_plain(self) -> bool:
        """Was each layer called once, with hidden states of every token, and did all return them in the same way?"""
        states = [x for x in self.read if isinstance(x, torch.Tensor) and x.shape[:-1] == self._shape]
        return len(self.read) == len(states) == self._layers and len(set(map(_beside, self._made))) == 1

    @property
    def beside(self) -> int | None:
        return _beside(self._made[-1])

    @property
    def last(self) -> torch.Tensor:
        made: torch.Tensor = self._made[-1] if self.beside is None else self._made[-1][0]
        return made

    def _reads(self, x: Any) -> None:
        self.read.append(x)

    def _makes(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._made.append(output)


def _beside(output: Any) -> int | None:
    return len(output) - 1 if isinstance(output, tuple) else None


class _Reached(Exception):
    """Ends a forward pass whose rest nobody asks for."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = x


def _reach(x: torch.Tensor) -> None:
    raise _Reached(x)


def _begin_with(x: torch.Tensor, instead_of: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, instead_of.shape[1] - x.shape[1])).to(instead_of.dtype)


@contextmanager
def _hooked(layer: nn.Module, see: Callable[[Any], torch.Tensor | None]) -> Iterator[None]:
    """For the length of the block `see` is called with the hidden states that the layer is to read, and may change
    them.
    """

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            x = see(args[0])
            return None if x is None else ((x, *args[1:]), kwargs)
        x = see(kwargs.get("hidden_states"))
        return None if x is None else (args, {**kwargs, "hidden_states": x})

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _layers(model: Any) -> dict[str, nn.Module]:
    """Those of the first stack; none where what is kept of texts would not do, or nobody knows them."""
    if not is_adapted(model):
        return {}
    own = list(model.peft_config.values())
    # Of tokens that are padding, a gate takes the mean, and an adapter learns whose neurons are masked.
    if any(each.is_prompt_learning or getattr(each, "use_gating", 0) or getattr(each, "mask_rate", 0) for each in own):
        return {}
    named = next((given for each in own if (given := getattr(each, "places", None))), None)
    try:
        first, *_ = places.of_model(model, named)
        return {name: model.get_submodule(name) for name, _ in places.layers(model, (first,))}
    except ConfigError:
        return {}


def _may_learn(layer: nn.Module) -> bool:
    """Has it parameters that learn, but for those of adapters that never work there (AdapterDrop)?"""
    idle = [each for each in layer.modules() if isinstance(each, Site) and not each.may_work]
    never = {parameter for site in idle for parameter in site.parameters()}
    return any(parameter.requires_grad and parameter not in never for parameter in layer.parameters())
