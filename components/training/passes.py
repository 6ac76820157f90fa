"""How a batch goes through a model that learns: as a whole, or above a trunk that was computed once, by threads."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from components.adapters.parameters import is_adapted
from components.adapters.places import positions
from components.base_model import ATTENTION_DROPOUT
from components.training.batching import LEARNED_AT_ONCE, Tokens, collate
from components.training.compiled import Compiled
from components.training.crew import ALONE, Crew
from components.training.encoder import Encoder
from components.training.layered import Layered
from components.training.packing import Packing, width
from components.training.precision import Precision
from components.training.trunk import Trunk
from components.training.trunk_cache import TrunkCache

# Held by the thread whose encoder is in the place of a model's own; others, as a server has them, do without.
_IN_PLACE = threading.Lock()
# With fewer rows for each of several threads, their matrices are too small to be multiplied fast.
ROWS_EACH = 4

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Means:
    """What may be used beside the device. base: digest of the frozen weights, by which trunks are kept in the cache."""

    cache: TrunkCache | None = None
    base: str = ""
    compile: bool = False
    tokens_at_once: int | None = None


MODEST = Means()


class Pass(Protocol):
    def logits(self, rows: Rows) -> torch.Tensor:
        """(rows, classes) of some rows of the data, in their order."""


class Whole:
    """Every layer of every row."""

    def __init__(
        self, model: Any, tokens: Tokens, padding: int, device: torch.device, precision: Precision, compile: bool
    ) -> None:
        self._model = Compiled(model) if compile else model
        self._tokens, self._padding, self._device = tokens, padding, device
        self._precision, self._lengths = precision, tokens.lengths
        configs = model.peft_config.values() if is_adapted(model) else ()
        before = max((each.num_virtual_tokens for each in configs if each.is_prompt_learning), default=0)
        self._positions = positions(model.config) - before  # some families count those of prefixes

    def logits(self, rows: Rows) -> torch.Tensor:
        lengths = self._lengths[rows]
        tokens = max(int(lengths.max()), min(width(lengths, self._precision.dtype), self._positions))
        inputs = collate(self._tokens, rows, self._padding, self._device, tokens)
        with self._precision.forward(tokens):
            logits: torch.Tensor = self._model(**inputs).logits
        return logits


class AboveTrunk:
    """Only what is above the trunk; the encoder is in its place in the model."""

    def __init__(self, trunk: Trunk[Encoder]) -> None:
        self.trunk, self._encoder, self._precision = trunk, trunk.encoder, trunk.precision

    def logits(self, rows: Rows) -> torch.Tensor:
        with self._precision.autocast():
            states, packing = self.trunk.states(rows)
            return self._encoder.logits(partial(self._encoder.tail, states, packing))


class AboveLayers(Whole):
    """The same of a model of another family, whose layers below the cut are passed by."""

    def __init__(self, trunk: Trunk[Layered], model: Any, padding: int, device: torch.device) -> None:
        super().__init__(model, trunk.tokens, padding, device, trunk.precision, compile=False)
        self.trunk = trunk

    def logits(self, rows: Rows) -> torch.Tensor:
        with self.trunk.encoder.above(*self.trunk.states(rows)):
            return super().logits(rows)


class ByEncoder:
    """Every layer of every row, through an encoder in its place in the model: without padding where that packs."""

    def __init__(
        self, encoder: Encoder, tokens: Tokens, padding: int, device: torch.device, precision: Precision
    ) -> None:
        self._encoder, self._lengths, self._precision = encoder, tokens.lengths, precision
        self._tokens, self._padding, self._device = tokens, padding, device

    def logits(self, rows: Rows) -> torch.Tensor:
        packing = Packing.of(self._lengths[rows], self._encoder.dtype, self._device, self._encoder.packs)
        with self._precision.autocast():
            return self._encoder.whole(packing, collate(self._tokens, rows, self._padding, self._device))


@contextmanager
def at_rest(model: Any, tokens: Tokens, padding: int, device: torch.device, batches: int) -> Iterator[Pass]:
    """How so many batches go through the model in float32 while nothing learns; of the last layer only what the head
    reads. model: in evaluation mode.
    """
    precision = Precision(device, low=False)
    # A single batch is computed before matrices are laid together for it.
    if batches < 2 or not Encoder.knows(model) or not _IN_PLACE.acquire(blocking=False):
        yield Whole(model, tokens, padding, device, precision, compile=False)
        return
    try:
        encoder = Encoder(model, torch.float32, at_rest=True)
        with encoder.in_place():
            yield ByEncoder(encoder, tokens, padding, device, precision)
    finally:
        _IN_PLACE.release()


@dataclass(frozen=True)
class Passes:
    """learn: of the rows to train on.  check: of those to validate on, in float32 and for no gradients; None where they
    go through the model as a whole.  crew: the threads.  at_once: tokens that learn at once; None for a whole batch.
    replaced: modules of the model that `learn` does not call.
    """

    learn: Pass
    check: AboveTrunk | AboveLayers | None = None
    crew: Crew = ALONE
    at_once: int | None = None
    means: Means = MODEST
    replaced: Collection[nn.Module] = ()

    def ready_to_check(self) -> None:
        """Compute the trunk of the rows to validate on, if that was not done."""
        if self.check is not None and self.means.cache is not None and not self.check.trunk.is_kept:
            beside = self.learn.trunk.layout.bytes if isinstance(self.learn, AboveTrunk | AboveLayers) else 0
            self.check.trunk.keep(self.means.cache, self.means.base, self.crew, beside)


@contextmanager
def passes(
    model: Any,
    train: Tokens,
    validation: Tokens,
    padding: int,
    device: torch.device,
    precision: Precision,
    batch: int,
    means: Means = MODEST,
) -> Iterator[Passes]:
    """How batches go through the model while it learns. model: in training mode.  batch: rows of one."""
    exact = precision if not precision.low else Precision(device, low=False)
    if Encoder.fits(model):
        encoder = Encoder(model, precision.dtype, precision.plain_until, precision.compiled)
        judge = encoder if exact is precision else Encoder(model, exact.dtype, exact.plain_until)
        on_cpu = device.type == "cpu"
        hands = min(torch.get_num_threads(), max(1, batch // ROWS_EACH)) if on_cpu else 1
        # In bfloat16 operations take so little that threads would wait for Python, for up to a fifth of a step. Nor are
        # any kept for what comes between steps: glibc would hold memory for each of them, a tenth of the job's. What is
        # left to chance must not depend on which thread is first.
        crew = ALONE if precision.low or encoder.draws else Crew(hands)
        learn, check = (
            AboveTrunk(Trunk(encoder, train, padding, device, precision)),
            AboveTrunk(Trunk(judge, validation, padding, device, exact)),
        )
        with encoder.in_place(), judge.in_place() if judge is not encoder else nullcontext(), crew.at_work():
            if means.cache is not None:
                learn.trunk.keep(means.cache, means.base, crew, check.trunk.layout.bytes)
            at_once = means.tokens_at_once or (hands * LEARNED_AT_ONCE if on_cpu else None)
            yield Passes(learn, check, crew, at_once, means, encoder.replaced)
    elif packed := _packed(model, precision, means):
        with packed.in_place():
            yield Passes(ByEncoder(packed, train, padding, device, precision), at_once=means.tokens_at_once)
    elif (
        means.cache is not None
        and not means.compile
        and (layered := _layered(model, train, padding, device, precision))
    ):
        below = Trunk(layered, train, padding, device, precision)
        checked = Trunk(replace(layered, dtype=exact.dtype), validation, padding, device, exact)
        below.keep(means.cache, means.base, ALONE, checked.layout.bytes)
        above, judged = (AboveLayers(trunk, model, padding, device) for trunk in (below, checked))
        yield Passes(above, judged, at_once=means.tokens_at_once, means=means)
    else:
        whole = Whole(model, train, padding, device, precision, means.compile)
        yield Passes(whole, at_once=means.tokens_at_once)


def _packed(model: Any, precision: Precision, means: Means) -> Encoder | None:
    """For full fine-tuning where rows lie packed."""
    drops = any(getattr(model.config, name, 0) for name in ATTENTION_DROPOUT)  # which packed rows do not
    if is_adapted(model) or not Encoder.knows(model) or means.compile or drops:
        return None
    encoder = Encoder(model, precision.dtype, as_written=True)
    return encoder if encoder.packs else None


def _layered(model: Any, tokens: Tokens, padding: int, device: torch.device, precision: Precision) -> Layered | None:
    lengths, first = np.unique(tokens.lengths, return_index=True)
    width = min(int(lengths[:2].max()) + 1, positions(model.config))
    return Layered.of(model, collate(tokens, first[:2], padding, device, width), precision.dtype)
