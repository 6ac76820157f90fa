"""The layers of a BERT-like classifier, as who trains adapters in them sees them: frozen sub-layers, and their ends.

    sub-layer     h of x, by attention or feed-forward; frozen in most methods
    its end       the adapter, if there is one, and the layer norm of h + x

Below the first end where something is trained, all is the same in every epoch: the trunk, which makes states of tokens.
What is above, the tail, makes of states what the head reads: the first token, so the last layer computes no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as everybody calls it
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)

from components.adapters import families
from components.adapters.bottleneck import Bottleneck
from components.adapters.families import Site as Place
from components.adapters.families import Stack
from components.adapters.layer import Site
from components.adapters.parameters import is_adapted
from components.training.chain import chains, through
from components.training.end import End
from components.training.frozen import ACTIVATIONS, Attention, FeedForward, attended, attends_packed
from components.training.packing import Packing, takes_packed


@dataclass(frozen=True)
class Matrices:
    """Paths below a layer, of its nn.Linear: query, key, value and output of attention; up and down of feed-forward.
    And of what is between the latter.
    """

    attention: tuple[str, str, str, str]
    output: tuple[str, str]
    activation: str


_BERT = Matrices(
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ("intermediate.dense", "output.dense"),
    "intermediate.intermediate_act_fn",
)
# Families that compute as BERT does, whose heads read the first token.
FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": Matrices(
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        ("ffn.lin1", "ffn.lin2"),
        "ffn.activation",
    ),
}


@dataclass(frozen=True)
class Cut:
    """Where the trunk ends: before the sub-layer of this number, or before its end.

    Its states are x, or h and x, of every token; in the last layer of the first token alone, but for what attention
    reads.
    """

    sublayer: int
    inside: bool
    states: int
    first: bool


class SubLayer:
    """h of x, and its end."""

    def __init__(
        self,
        layer: nn.Module,
        names: Sequence[str],
        place: Place,
        config: Any,
        matrices: Matrices,
        dtype: torch.dtype,
        compiled: bool,
        at_rest: bool,
    ) -> None:
        """names: of the matrices in here."""
        self.is_attention, self.heads, self.last = names == matrices.attention, config.num_attention_heads, False
        self.exit, self.norm = layer.get_submodule(place.exit), layer.get_submodule(place.norm or "")
        self._end = End.of(self.exit, self.norm)
        found = [layer.get_submodule(name) for name in names]
        # DistilBERT's exit is its output matrix: what adapters do there comes after it.
        self.modules: list[Any] = [each.base_layer if isinstance(each, Site) else each for each in found]
        self.activation: Any = attrgetter(matrices.activation)(layer)  # some have weights
        self.frozen: Attention | FeedForward | None = None
        plain = all(type(each) is nn.Linear and each.bias is not None for each in self.modules)
        if plain and (at_rest or not any(map(_learns, self.modules))):
            activation = getattr(config, "hidden_act", None) or config.activation
            if self.is_attention:
                query, key, value, out = self.modules
                self.frozen = Attention(query, key, value, out, self.heads, dtype, compiled)
            elif activation in ACTIVATIONS:
                up, down = self.modules
                self.frozen = FeedForward(up, down, activation, dtype)

    @property
    def begins_to_learn(self) -> str | None:
        """Where in here something is trained first."""
        if any(map(_learns, self.modules)):
            return "before"
        if isinstance(self.exit, Site) and _learns(self.exit) and self.exit.may_work:
            return "inside"
        return "inside" if _learns(self.norm) else None

    @property
    def end(self) -> End | None:
        """None where there is more to it."""
        drops = isinstance(self.exit, nn.Dropout) and self.exit.training and self.exit.p > 0
        return None if drops else self._end

    @property
    def first(self) -> bool:
        """Does it make states of the first token of each row alone?"""
        return self.last and self.is_attention

    def h(self, x: torch.Tensor, packing: Packing, fused: bool) -> torch.Tensor:
        """x: (tokens, hidden), packed; what is made (rows, hidden) where it is `first`."""
        if isinstance(self.frozen, Attention):
            return self.frozen(x, packing, self.first, fused)
        if isinstance(self.frozen, FeedForward):
            return self.frozen(x)
        made: torch.Tensor
        if self.is_attention:
            query, key, value, out = self.modules
            asked = x[packing.firsts] if self.first else x
            q, k, v = (part.unflatten(1, (self.heads, -1)) for part in (query(asked), key(x), value(x)))
            made = out(attended(q, k, v, packing))
        else:
            up, down = self.modules
            made = down(self.activation(up(x)))
        return made

    def ended(self, h: torch.Tensor, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """What the next sub-layer reads. h, x: (tokens or rows, hidden)."""
        if self.end is not None and h.dtype == x.dtype:
            return self.end(h, x)
        h, x = packing.apart(h), packing.apart(x)
        if isinstance(self.exit, Site):
            self.exit.stream.x = x
            h = self.exit.changed(h)
        elif isinstance(self.exit, nn.Dropout):
            h = self.exit(h)
        made: torch.Tensor = self.norm(h + x)
        return made.flatten(0, 1)


class Encoder:
    """The layers of one model, with matrices kept in `dtype`."""

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        plain_until: int = 0,
        compiled: bool = False,
        at_rest: bool = False,
        as_written: bool = False,
    ) -> None:
        """plain_until: rows of at most so many tokens attend by our own products, others by torch's fused attention.
        compiled: those of frozen layers by `heads`.
        at_rest: nothing learns for as long as this encoder is used, whatever may do so otherwise.  as_written: what
        passes from one sub-layer to the next is of the model's own dtype, and the last one makes every token.
        """
        self.model, self.plain_until, self.dtype = model, plain_until, dtype
        self._as_written = as_written
        base = _classifier(model)
        self._body: Any = base.base_model  # all but the head
        self._encoder, matrices, stack = _layers(base)
        self.sublayers = [
            SubLayer(layer, names, place, base.config, matrices, dtype, compiled, at_rest)
            for layer in self._encoder.layer
            for names, place in ((matrices.attention, stack.attention), (matrices.output, stack.output))
        ]
        for each in self.sublayers[-2:]:
            each.last = not as_written
        self.cut = self._find_cut()
        self._now = threading.local()  # what takes the place of modules in the forward pass of this thread

    @staticmethod
    def fits(model: Any) -> bool:
        """Is this an adapted classifier that learns nothing but what is known here, of what its head reads alone?"""
        if not (is_adapted(model) and Encoder.knows(model)) or _learns(_classifier(model).base_model.embeddings):
            return False
        # From which neurons are masked an adapter learns of every token.
        return not any(getattr(each, "mask_rate", 0) for each in model.peft_config.values())

    @staticmethod
    def knows(model: Any) -> bool:
        """Is this a classifier, adapted or not, whose layers are known here?"""
        base = _classifier(model)
        config: Any = getattr(base, "config", None)
        if getattr(config, "model_type", None) not in FAMILIES or getattr(config, "is_decoder", False):
            return False
        own = list(model.peft_config.values()) if is_adapted(model) else []
        return (
            type(base).__name__.endswith("ForSequenceClassification")
            and config._attn_implementation == "sdpa"  # no prefixes
            and not any(each.is_prompt_learning or getattr(each, "use_gating", False) for each in own)
            and not any(getattr(each, "places", None) for each in own)  # which may be others
            and not any(vars(module).get("gradient_checkpointing") for module in base.modules())
        )

    def _find_cut(self) -> Cut:
        for number, each in enumerate(self.sublayers):
            if where := each.begins_to_learn:
                inside = where == "inside"
                reads_all = not each.last or (each.is_attention and not inside)
                return Cut(number, inside, 2 if inside else 1, not reads_all)
        return Cut(len(self.sublayers), inside=False, states=1, first=True)

    @property
    def replaced(self) -> set[nn.Module]:
        """Modules of the model that are not called while this encoder is in place."""
        return {module for each in self.sublayers if each.frozen for module in each.modules}

    @cached_property
    def packs(self) -> bool:
        """Do rows lie packed? Not where adapters that rows pass by must know the rows."""
        config, device = self.model.config, self.model.device
        heads = config.num_attention_heads
        features = config.hidden_size // heads
        parts = (each for each in self._encoder.modules() if isinstance(each, Bottleneck))
        return (
            takes_packed(device, self.dtype, features)
            and attends_packed(device, self.dtype, heads, features)
            and not any(each.config.stochastic_depth for each in parts)
        )

    @property
    def draws(self) -> bool:
        """Is anything left to chance while the model learns?"""
        return any(map(_draws, self.model.modules()))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For the length of the block the model has this encoder for its own; called as a whole it computes as ever."""
        self._whole_body, self._layers = self._body.forward, self._encoder.forward
        with forward_instead(self._body, self._body_forward), forward_instead(self._encoder, self._forward):
            yield

    def logits(self, tails: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What the head makes of the first tokens that `tails` makes, (rows, hidden): (rows, classes)."""
        # Embeddings and masks of no tokens would take as long as a sub-layer of few.
        logits: torch.Tensor = self._instead("body", lambda: tails().unsqueeze(1)).logits
        return logits

    def whole(self, packing: Packing, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the head makes of the first tokens when all layers are computed at once, (rows, classes)."""

        def layers(x: torch.Tensor) -> torch.Tensor:
            x = self._through(self.sublayers, self._packed(x, packing), packing)
            return (x if self.sublayers[-1].last else x[packing.firsts]).unsqueeze(1)

        logits: torch.Tensor = self._instead("layers", layers, **inputs).logits
        return logits

    def states(self, packing: Packing, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What the trunk makes of tokens: as many as the cut has, (tokens or rows, hidden) each."""
        made: list[torch.Tensor] = []

        def record(x: torch.Tensor) -> torch.Tensor:
            made.extend(self._trunk(self._packed(x, packing), packing))
            return x[:, :1]

        with torch.no_grad():
            self._instead("layers", record, **inputs)
        return made

    def tail(self, states: list[torch.Tensor], packing: Packing) -> torch.Tensor:
        """(rows, hidden): what the last layer makes of the first tokens."""
        *h, x = states
        begin = self.cut.sublayer
        rest = self.sublayers[begin:]
        if h and torch.is_grad_enabled() and chains(rest, self._fused(packing)):
            return through(rest, h[0], x, packing)
        if h:
            x, begin = self._ended(self.sublayers[begin], h[0], x, packing), begin + 1
        return self._through(self.sublayers[begin:], x, packing)

    def _packed(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        x = x if self._as_written else x.to(self.dtype)
        return packing.pack(F.pad(x, (0, 0, 0, packing.width - x.shape[1])))

    def _trunk(self, x: torch.Tensor, packing: Packing) -> list[torch.Tensor]:
        x = self._through(self.sublayers[: self.cut.sublayer], x, packing)
        if not self.cut.inside:
            return [x]
        within = self.sublayers[self.cut.sublayer]
        h = within.h(x, packing, self._fused(packing))
        return [h, x[packing.firsts] if within.first else x]

    def _through(self, sublayers: Sequence[SubLayer], x: torch.Tensor, packing: Packing) -> torch.Tensor:
        for each in sublayers:
            h = each.h(x, packing, self._fused(packing))
            x = self._ended(each, h, x[packing.firsts] if each.first else x, packing)
        return x

    def _ended(self, sublayer: SubLayer, h: torch.Tensor, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        return sublayer.ended(h, x if self._as_written else x.to(h.dtype), packing)

    def _fused(self, packing: Packing) -> bool:
        return packing.width > self.plain_until

    def _instead(self, place: str, made: Callable[..., torch.Tensor], **inputs: torch.Tensor) -> Any:
        """A forward pass of the model with something else in the place of its `layers`, or of its `body`."""
        around = getattr(self._now, place, None)
        setattr(self._now, place, made)
        try:
            return self.model(**inputs)
        finally:
            setattr(self._now, place, around)

    def _forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layers = getattr(self._now, "layers", None)
        if layers is None:
            return self._layers(hidden_states, *args, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=layers(hidden_states))

    def _body_forward(self, *args: Any, **kwargs: Any) -> Any:
        tails = getattr(self._now, "body", None)
        if tails is None:
            return self._whole_body(*args, **kwargs)
        x, pooler = tails(), getattr(self._body, "pooler", None)  # which not all families have
        pooled = None if pooler is None else pooler(x)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=x, pooler_output=pooled)


@contextmanager
def forward_instead(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """For the length of the block the module computes so."""
    earlier = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if earlier:
            module.forward = earlier


def _layers(base: Any) -> tuple[Any, Matrices, Stack]:
    """The module with the layers of a classifier, where their matrices are, and where their sub-layers end."""
    family = base.config.model_type
    (stack,) = families.FAMILIES[family]
    return base.base_model.get_submodule(stack.layers.rpartition(".")[0]), FAMILIES[family], stack


def _classifier(model: Any) -> Any:
    """The model that PEFT has put adapters into, or one without any."""
    return getattr(model.base_model, "model", None) if is_adapted(model) else model


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _draws(module: nn.Module) -> bool:
    """Dropout, masked neurons, rows that pass by an adapter."""
    if not module.training:
        return False
    own = getattr(module, "config", None) if isinstance(module, Bottleneck) else None
    return (isinstance(module, nn.Dropout) and module.p > 0) or bool(own and (own.mask_rate or own.stochastic_depth))
