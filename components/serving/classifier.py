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


@dataclass(frozen=True)
class Classifier:
    """Made by `load`."""

    manifest: bundle.Manifest
    _model: Any
    _tokenizer: Any

    @property
    def labels(self) -> tuple[str, ...]:
        return self.manifest.labels

    def probabilities(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> npt.NDArray[np.float32]:
        """(texts, classes), in the order of the texts. `pairs` are the second texts of a task on pairs."""
        import torch
        from datasets import Dataset

        from components.training.batching import tokenise
        from components.training.loop import predict

        wrong = next((index for index, text in enumerate([*texts, *(pairs or [])]) if not isinstance(text, str)), None)
        if wrong is not None:
            raise DataError("a list of texts", f"something else at position {wrong}", "pass strings")
        if pairs is not None and len(pairs) != len(texts):
            raise DataError(f"second texts for {len(texts)} texts", f"{len(pairs)}", "pass one for each")
        columns = {"text": list(texts), **({"text_pair": list(pairs)} if pairs is not None else {})}
        tokens = tokenise(Dataset.from_dict(columns), self._tokenizer, self.manifest.max_tokens)
        return predict(self._model, tokens, int(self._tokenizer.pad_token_id or 0), torch.device("cpu"))


def load(folder: Path) -> Classifier:
    """The classifier of a bundle on its pinned base. Raises BundleError or BaseModelError when either is not right."""
    manifest = bundle.read_manifest(folder)
    base = base_model.find_pinned(manifest.base)
    return Classifier(manifest, bundle.load_model(folder, manifest, base), base_model.load_tokenizer(base))
