"""The states of a frozen trunk: the same in every epoch, so computed once for all rows and read a batch at a time."""

from __future__ import annotations

import hashlib
from functools import partial
from importlib import metadata
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from components import digest
from components.adapters.places import positions
from components.training.batching import AT_ONCE, Tokens, bounded_batches, collate, moved
from components.training.crew import Crew
from components.training.encoder import Encoder
from components.training.layered import Layered
from components.training.packing import Packing
from components.training.precision import Precision
from components.training.trunk_cache import Layout, Rows, Store, TrunkCache

# What the states follow from, beside frozen weights, tokens and cut.
CODE = (
    "training/batching",
    "training/encoder",
    "training/end",
    "training/frozen",
    "training/heads",
    "training/layered",
    "training/onednn",
    "training/packing",
    "training/trunk",
    "training/trunk_cache",
    "adapters",
    "base_model",
)
LIBRARIES = ("torch", "transformers", "peft")


E = TypeVar("E", Encoder, Layered)


class Trunk(Generic[E]):
    """Of one model and some rows, in the order of `tokens`."""

    def __init__(self, encoder: E, tokens: Tokens, padding: int, device: torch.device, precision: Precision) -> None:
        """padding: id of the padding token."""
        self.encoder: E = encoder
        self.precision, self.tokens, self.lengths = precision, tokens, tokens.lengths
        self._padding, self._device = padding, device
        self._store: Store | None = None
        self.is_kept = False  # or was to be, without room for it

    def digest(self, base: str) -> str:
        """Of all that the states follow from. base: digest of the frozen weights."""
        about: list[str] = [
            base,
            tokens_digest(self.tokens),
            str(self.encoder.cut),
            str(self.precision.dtype),
            self._device.type,
        ]
        versions: list[str] = [metadata.version(name) for name in LIBRARIES]
        return digest.of_json([*about, *versions, digest.of_code(*CODE)])

    @property
    def layout(self) -> Layout:
        """Of the states when they are kept."""
        cut, hidden = self.encoder.cut, int(self.encoder.model.config.hidden_size)
        return Layout(self.lengths, cut.states, hidden, self.precision.dtype, cut.first)

    def keep(self, cache: TrunkCache, base: str, crew: Crew, beside: int = 0) -> None:
        """Read the states from the cache from now on, computing them first if it has not got them; it may have no room.

        Texts of like length go together, whatever order they are trained in, so the states are the same for every job.
        beside: bytes of another trunk that shares the cache.
        """

        def fill(store: Store) -> None:
            kept = store.rows
            batches = bounded_batches(self.lengths[kept], AT_ONCE[self._device.type])
            crew.each([partial(self._put, store, kept[rows]) for rows in batches])

        self.is_kept = True
        self._store = cache.opened(self.digest(base), self.layout, fill, beside)

    def states(self, rows: Rows) -> tuple[list[torch.Tensor], Packing]:
        """As many as the cut has, (tokens or rows, hidden) each, and how rows lie in them."""
        packing = self.packing(rows)
        if self._store is None or not (kept := self._store.has(rows)).any():
            return self.computed(rows, packing), packing
        starts, tokens = self._places(packing)
        found = [moved(each, self._device) for each in self._store.read(rows[kept], starts[kept], tokens)]
        if not kept.all():
            self._complete(found, rows, starts, kept)
        return found, packing

    def _complete(self, found: list[torch.Tensor], rows: Rows, starts: Rows, kept: npt.NDArray[np.bool_]) -> None:
        """Compute what is missing, and put it where its rows start."""
        order, missing = np.argsort(kept, kind="stable"), int(np.count_nonzero(~kept))
        # In bfloat16 beside others, for the sake of few shapes (see `batching.widened`).
        at_once = 1 << (missing - 1).bit_length() if self.encoder.dtype == torch.bfloat16 else missing
        packing = self.packing(rows[order[:at_once]])
        begins, _ = self._places(packing)
        states = self.computed(rows[order[:at_once]], packing)
        counts = self.layout.counts[rows]
        for row, begin in zip(order[:missing], begins, strict=False):
            for state, made in zip(found, states, strict=True):
                state[starts[row] : starts[row] + counts[row]] = made[begin : begin + counts[row]]

    def computed(self, rows: Rows, packing: Packing) -> list[torch.Tensor]:
        longest, most = int(self.lengths[rows].max()), positions(self.encoder.model.config)
        inputs = collate(self.tokens, rows, self._padding, self._device, max(longest, min(packing.width, most)))
        with self.precision.autocast():
            return self.encoder.states(packing, inputs)

    def _put(self, store: Store, rows: Rows) -> None:
        packing = self.packing(rows)
        starts, _ = self._places(packing)
        store.write(rows, starts, [each.cpu() for each in self.computed(rows, packing)])

    def packing(self, rows: Rows) -> Packing:
        return Packing.of(self.lengths[rows], self.encoder.dtype, self._device, self.encoder.packs)

    def _places(self, packing: Packing) -> tuple[Rows, int]:
        """Where rows start in states, and how many tokens there are."""
        return (np.arange(packing.rows), packing.rows) if self.encoder.cut.first else (packing.starts, packing.tokens)


def tokens_digest(tokens: Tokens) -> str:
    """Of all token ids, with where a row ends and what part of a pair they are of."""
    content = hashlib.sha256(tokens.lengths.tobytes())
    for rows in filter(None, (tokens.ids, tokens.types)):
        for row in rows:
            content.update(np.ascontiguousarray(row).data)
    return content.hexdigest()
