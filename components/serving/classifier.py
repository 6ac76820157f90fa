"""A bundle at work: texts in, labels and probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import base_model
from components.errors import DataError
from components.registry import bundle

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from datasets import Dataset


@dataclass(frozen=True)
class Classifier:
    """Made by `load`."""

    manifest: bundle.Manifest
    _model: Any
    _tokenizer: Any
    _device: str

    @property
    def labels(self) -> tuple[str, ...]:
        return self.manifest.labels

    def probabilities(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> npt.NDArray[np.float32]:
        """(texts, classes), in the order of the texts. `pairs` are the second texts of a task on pairs."""
        return self.of_rows(table(texts, pairs))

    def of_rows(self, rows: Dataset) -> npt.NDArray[np.float32]:
        """(rows, classes). rows: string columns `text` and, for pairs, `text_pair`."""
        import torch

        from components.training.batching import tokenise
        from components.training.loop import predict

        tokens = tokenise(rows, self._tokenizer, self.manifest.max_tokens)
        return predict(self._model, tokens, self._model.config.pad_token_id, torch.device(self._device))


def load(folder: Path, device: str = "cpu") -> Classifier:
    """The classifier of a bundle on its pinned base. Raises BundleError or BaseModelError when either is not right."""
    manifest = bundle.read_manifest(folder)
    base = base_model.find_pinned(manifest.base)
    model = bundle.load_model(folder, manifest, base).to(device)
    return Classifier(manifest, model, base_model.load_tokenizer(base), device)


def table(texts: Sequence[str], pairs: Sequence[str] | None = None) -> Dataset:
    """Columns `text` and [`text_pair`]. Raises DataError for what is no string, by its position."""
    from datasets import Dataset

    wrong = next((index for index, text in enumerate([*texts, *(pairs or [])]) if not isinstance(text, str)), None)
    if wrong is not None:
        raise DataError("a list of texts", f"something else at position {wrong}", "pass strings")
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(f"second texts for {len(texts)} texts", f"{len(pairs)}", "pass one for each")
    return Dataset.from_dict({"text": list(texts), **({"text_pair": list(pairs)} if pairs is not None else {})})
