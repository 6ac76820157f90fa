"""A model of any family, cut before the first layer that learns, or before its end: all below is a trunk there, too.

The layers below are passed by, and the next one reads what was kept of its input or, where nothing but its end learns,
is that end alone. Whether the model computes the same then is tried on a few rows before: in T5 the first layer makes
the position bias of all others, so it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
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
class Cut:
    """Before the layer of this name and number, or before its end. Kept is of every token x, that which it reads, or h
    and x, those of its end.
    """

    name: str
    layer: int
    states: int
    first: bool = False


@dataclass(frozen=True)
class End:
    """Of a layer: its last sub-layer's adapter, and the layer norm of the sum, None without one."""

    site: Site
    norm: nn.Module | None

    @staticmethod
    def of(layer: nn.Module, place: places.Site) -> End | None:
        """None where anything else may learn in the layer."""
        site = layer.get_submodule(place.exit)
        norm = layer.get_submodule(place.norm) if place.norm else None
        if not isinstance(site, Site):
            return None
        own = {*site.parameters(), *(norm.parameters() if norm else ())} - {*site.base_layer.parameters()}
        return None if _may_learn(layer, own) else End(site, norm)

    def __call__(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What the layer makes. h, x: (rows, width, hidden)."""
        self.site.stream.x = x
        total = self.site.changed(h) + x
        made: torch.Tensor = total if self.norm is None else self.norm(total)
        return made


@dataclass(frozen=True)
class Layered:
    """What a trunk asks of `encoder.Encoder`, of any model.

    dtype: of what is kept.  layers: all of the stack.  beside: how many things a layer returns in a tuple with the
    hidden states; None where it returns these alone.  end: of the layer that the cut is in; None where it is before it.
    """

    model: Any  # a transformers model; torch types its attributes too widely
    dtype: torch.dtype
    layers: Sequence[nn.Module]
    cut: Cut
    beside: int | None
    end: End | None
    packs: ClassVar[bool] = False

    @staticmethod
    def of(model: Any, inputs: Inputs, dtype: torch.dtype) -> Layered | None:
        """Cut as high as may be; None where that saves nothing, or the model would compute something else.

        model: in training mode.  inputs: of a few rows, each with padding.
        """
        if not (stack := _stack(model)):
            return None
        names, layers, place = stack
        frozen = next((number for number, each in enumerate(layers) if _may_learn(each)), len(layers) - 1)
        ends = [each for each in (End.of(layers[frozen], place), None) if each or frozen]
        if not ends:
            return None
        device = inputs["input_ids"].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            run = _Run(model, layers, inputs, ends[0])
            for end in ends if run.is_plain else ():
                kept = run.ended if end else [run.read[frozen]]
                found = Layered(model, torch.float32, layers, Cut(names[frozen], frozen, len(kept)), run.beside, end)
                # Layers may also learn by what is in none of them, as prefixes are.
                if not any(x.requires_grad for x in kept) and found._computes_the_same(inputs):
                    return replace(found, dtype=dtype)
        return None

    def states(self, packing: Packing, inputs: Inputs) -> list[torch.Tensor]:
        """What is kept at the cut, (tokens, hidden) each."""
        with torch.no_grad(), _ending(self.end, _reach) if self.end else _hooked(self._first, _reach):
            try:
                self.model(**inputs)
            except _Reached as reached:
                kept = reached.states
        return [packing.pack(F.pad(x, (0, 0, 0, packing.width - x.shape[1])).to(self.dtype)) for x in kept]

    @contextmanager
    def above(self, states: list[torch.Tensor], packing: Packing) -> Iterator[None]:
        """For the length of the block the model's forward pass begins with these states, in whatever thread."""
        *h, x = map(packing.spread, states)
        with ExitStack() as stack:
            for below in self.layers[: self.cut.layer]:
                stack.enter_context(forward_instead(below, self._pass_by))
            if self.end:
                stack.enter_context(forward_instead(self._first, partial(self._end_with, self.end, *h, x)))
            else:
                stack.enter_context(_hooked(self._first, partial(_as_wide, x)))
            yield

    @property
    def _first(self) -> nn.Module:
        """Of the layers that are not passed by."""
        return self.layers[self.cut.layer]

    def _pass_by(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self.beside is None else (hidden_states, *self.beside * (None,))

    def _end_with(
        self, end: End, h: torch.Tensor, x: torch.Tensor, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return self._pass_by(end(_as_wide(h, hidden_states), _as_wide(x, hidden_states)))

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
    """A forward pass, with what its layers and the end of one read, and the last layer made.

    read, ended: (rows, width, hidden) each.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module], inputs: Inputs, end: End | None = None) -> None:
        self.read: list[Any] = []
        self.ended: list[torch.Tensor] = []
        self._made: list[Any] = []
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(_hooked(layer, self._reads))
                stack.callback(layer.register_forward_hook(self._makes).remove)
            if end:
                stack.enter_context(_ending(end, lambda *states: self.ended.extend(states)))
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

    def __init__(self, *states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


def _reach(*states: torch.Tensor) -> None:
    raise _Reached(*states)


@contextmanager
def _ending(end: End, see: Callable[..., None]) -> Iterator[None]:
    """For the length of the block `see` is called with the h and x of this end."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        see(output[0] if isinstance(output, tuple) else output, end.site.stream.x)

    handle = end.site.base_layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        end.site.stream.x = None  # where the pass ended here


def _as_wide(x: torch.Tensor, instead_of: torch.Tensor) -> torch.Tensor:
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


def _stack(model: Any) -> tuple[list[str], list[nn.Module], places.Site] | None:
    """Names and layers of the first stack, and where they end; None where what is kept of texts would not do, or nobody
    knows them.
    """
    if not is_adapted(model):
        return None
    own = list(model.peft_config.values())
    # Of tokens that are padding, a gate takes the mean, and an adapter learns whose neurons are masked.
    if any(each.is_prompt_learning or getattr(each, "use_gating", 0) or getattr(each, "mask_rate", 0) for each in own):
        return None
    named = next((given for each in own if (given := getattr(each, "places", None))), None)
    try:
        first, *_ = places.of_model(model, named)
        names = [name for name, _ in places.layers(model, (first,))]
    except ConfigError:
        return None
    return names, [model.get_submodule(name) for name in names], first.output


def _may_learn(layer: nn.Module, but: Collection[nn.Parameter] = ()) -> bool:
    """Has it parameters that learn, but for these and those of adapters that never work there (AdapterDrop)?"""
    idle = [each for each in layer.modules() if isinstance(each, Site) and not each.may_work]
    never = {*but, *(parameter for site in idle for parameter in site.parameters())}
    return any(parameter.requires_grad and parameter not in never for parameter in layer.parameters())
