"""Tokens and batches: texts tokenised once, batches of near-equal length, in an order that length does not decide."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

# Batches are cut from buckets of this many batches: large enough to pad little, small enough to stay random.
BUCKET = 50
# Tokens that go through a model at once where nothing is learned, by device: enough to fill the kernels of matrices,
# few enough for the activations of one layer to take tens of MB on CPUs.
AT_ONCE = {"cpu": 2048, "cuda": 16_384}
# And where an adapter learns, for each thread of a CPU: more is no faster there, and keeps more activations.
LEARNED_AT_ONCE = 1024
# Held by the thread that tokenises: where texts are cut is a state of the tokenizer, and threads of a server share it.
# One lock does for all tokenizers, since each works on all cores by itself.
_TOKENISING = threading.Lock()


class Ragged(Sequence[npt.NDArray[np.int32]]):
    """Rows of unequal length over one Arrow list array: no Python object a row, and a row is a view of its buffer."""

    def __init__(self, batches: list[pa.Array]) -> None:
        import pyarrow as pa

        self.lists = pa.chunked_array(batches, pa.large_list(pa.int32())).combine_chunks()
        self._values, self._starts = self.lists.values.to_numpy(), self.lists.offsets.to_numpy()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: Any) -> Any:
        return self._values[self._starts[row] : self._starts[row + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        starts: npt.NDArray[np.int64] = self._starts
        return np.diff(starts)


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows, in the order of the table.

    ids, types: one int array a row.  labels: (rows,).  cut: (rows,), how many tokens a text had beyond `max_tokens`.
    """

    ids: Sequence[npt.NDArray[np.int32]]
    types: Sequence[npt.NDArray[np.int32]] | None
    labels: npt.NDArray[np.int64]
    cut: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        if isinstance(self.ids, Ragged):
            return self.ids.lengths
        return np.array([len(row) for row in self.ids], dtype=np.int64)


def tokenise(table: Dataset, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> Tokens:
    """Tokenise `text` and [`text_pair`], cutting at `max_tokens`; `label` may be missing."""
    import pyarrow as pa

    kind = pa.large_list(pa.int32())
    ids: list[pa.Array] = []
    types: list[pa.Array] = []
    cut: list[npt.NDArray[np.int64]] = []
    for batch in table.iter(batch_size=128):  # what the tokenizer tells of a thousand texts takes 50 MB
        texts, pairs = list(batch["text"]), list(batch["text_pair"]) if "text_pair" in batch else None
        beyond = np.zeros(len(texts), dtype=np.int64)
        with _TOKENISING:
            encoded = tokenizer(
                texts,
                text_pair=pairs,
                truncation=True,  # of a pair, the longer text
                max_length=max_tokens,
                padding=False,
                return_attention_mask=False,
            )
            if long := [index for index, row in enumerate(encoded.encodings) if row.overflowing]:
                whole = tokenizer([texts[at] for at in long], text_pair=[pairs[at] for at in long] if pairs else None)
                beyond[long] = [len(row) - max_tokens for row in whole["input_ids"]]
        ids.append(pa.array(encoded["input_ids"], kind))
        if "token_type_ids" in encoded:
            types.append(pa.array(encoded["token_type_ids"], kind))
        cut.append(beyond)
    labels = np.asarray(table["label"][:] if "label" in table.column_names else [0] * len(table), dtype=np.int64)
    return Tokens(
        Ragged(ids), Ragged(types) if types else None, labels, np.concatenate([np.zeros(0, dtype=np.int64), *cut])
    )


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


def bounded_batches(lengths: npt.NDArray[np.int64], tokens: int) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers of each batch, longest texts first: if memory does not suffice, that shows at once.

    Each has at most `tokens` tokens, padding counted, and at least one row: a power of two, for the sake of few shapes
    (see `widened`).
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        most = max(1, tokens // max(1, int(lengths[order[start]])))
        size = 1 << (most.bit_length() - 1)
        yield order[start : start + size]
        start += size


def parts(lengths: npt.NDArray[np.int64], tokens: int | None, hands: int = 1) -> list[npt.NDArray[np.int64]]:
    """Places in a batch of what goes through the model at once: all, or what `hands` take, most tokens first.

    Each takes as many rows, of like length for the sake of few shapes (see `widened`); all together are at work on at
    most so many tokens, padding counted.
    """
    if tokens is None:
        return [np.arange(len(lengths))]
    shares = np.array_split(np.argsort(lengths, kind="stable"), hands)
    found = [rows[part] for rows in shares for part in bounded_batches(lengths[rows], tokens // hands)]
    return sorted(found, key=lambda rows: -len(rows) * int(lengths[rows].max()))


def widened(tokens: int) -> int:
    """So many tokens, or a few more: there are a dozen widths, not hundreds.

    oneDNN compiles kernels for each shape of a product in bfloat16, which takes as long as computing a small one.
    """
    step = next((step for step, most in ((8, 64), (16, 128), (32, 256)) if tokens <= most), 64)
    return -(-tokens // step) * step


def collate(
    tokens: Tokens,
    rows: Sequence[int] | npt.NDArray[np.int64],
    padding: int,
    device: torch.device,
    width: int | None = None,
) -> dict[str, torch.Tensor]:
    """Model inputs of some rows, padded to the longest or `width`: `input_ids`, `attention_mask`, [`token_type_ids`].

    Each (batch, tokens).
    """
    width = width or max(len(tokens.ids[row]) for row in rows)
    inputs = {
        "input_ids": _padded(tokens.ids, rows, width, padding),
        "attention_mask": _padded([np.ones_like(tokens.ids[row]) for row in rows], range(len(rows)), width, 0),
    }
    if tokens.types is not None:
        inputs["token_type_ids"] = _padded(tokens.types, rows, width, 0)
    return {name: moved(tensor, device) for name, tensor in inputs.items()}


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To a GPU from pinned memory, so that the copy goes on beside what is computed."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _padded(
    values: Sequence[npt.NDArray[np.integer]],
    rows: Sequence[int] | npt.NDArray[np.int64] | range,
    width: int,
    fill: int,
) -> torch.Tensor:
    block = np.full((len(rows), width), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        block[index, : len(values[row])] = values[row]
    return torch.from_numpy(block)
