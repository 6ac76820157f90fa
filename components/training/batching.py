"""Tokens and batches: texts tokenised once, batches of near-equal length, in an order that length does not decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

# Batches are cut from buckets of this many batches: large enough to pad little, small enough to stay random.
BUCKET = 50


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows, in the order of the table. `cut` says which texts were longer than `max_tokens`.

    ids, types: one int array a row.  labels: (rows,).  cut: (rows,).
    """

    ids: list[npt.NDArray[np.int64]]
    types: list[npt.NDArray[np.int64]] | None
    labels: npt.NDArray[np.int64]
    cut: npt.NDArray[np.bool_]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(row) for row in self.ids], dtype=np.int64)


def tokenise(table: Dataset, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> Tokens:
    """Tokenise `text` and [`text_pair`], cutting at `max_tokens`; `label` may be missing."""
    ids: list[npt.NDArray[np.int64]] = []
    types: list[npt.NDArray[np.int64]] = []
    cut: list[bool] = []
    for batch in table.iter(batch_size=1_000):
        encoded = tokenizer(
            list(batch["text"]),
            text_pair=list(batch["text_pair"]) if "text_pair" in batch else None,
            truncation=True,  # of a pair, the longer text
            max_length=max_tokens,
            padding=False,
            return_attention_mask=False,
        )
        ids.extend(np.asarray(row, dtype=np.int64) for row in encoded["input_ids"])
        types.extend(np.asarray(row, dtype=np.int64) for row in encoded.get("token_type_ids", []))
        cut.extend(bool(row.overflowing) for row in encoded.encodings)
    labels = np.asarray(table["label"] if "label" in table.column_names else [0] * len(table), dtype=np.int64)
    return Tokens(ids, types or None, labels, np.array(cut, dtype=bool))


def training_batches(lengths: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
    """Row numbers of each batch of one epoch.

    Rows are shuffled, sorted by length within buckets, cut into batches, and the batches are shuffled too: length may
    tell the label, and batches in order of length would then be runs of one label, which ruins training.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(order), size * BUCKET):
        bucket = order[start : start + size * BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches.extend(bucket[at : at + size] for at in range(0, len(bucket), size))
    return [batches[index] for index in rng.permutation(len(batches))]


def scoring_batches(lengths: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers of each batch, longest texts first: if memory does not suffice, that shows at once."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def collate(
    tokens: Tokens, rows: Sequence[int] | npt.NDArray[np.int64], padding: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Model inputs of some rows, padded to the longest: `input_ids`, `attention_mask`, [`token_type_ids`].

    Each (batch, tokens).
    """
    width = max(len(tokens.ids[row]) for row in rows)
    inputs = {
        "input_ids": _padded(tokens.ids, rows, width, padding),
        "attention_mask": _padded([np.ones_like(tokens.ids[row]) for row in rows], range(len(rows)), width, 0),
    }
    if tokens.types is not None:
        inputs["token_type_ids"] = _padded(tokens.types, rows, width, 0)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def _padded(
    values: list[npt.NDArray[np.int64]], rows: Sequence[int] | npt.NDArray[np.int64] | range, width: int, fill: int
) -> torch.Tensor:
    block = np.full((len(rows), width), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        block[index, : len(values[row])] = values[row]
    return torch.from_numpy(block)
