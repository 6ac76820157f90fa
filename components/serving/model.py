"""The code of a registered version, run by MLflow ("models from code": nothing is unpickled).

    model = mlflow.pyfunc.load_model("models:/tweets-sentiment@candidate")
    model.predict(["What a day!"])     # columns: label, probability_negative, probability_positive

The artifact holds the bundle and this package's code; the base model is found by its pin.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.pyfunc import PythonModel

from components.errors import DataError
from components.serving import classifier

if TYPE_CHECKING:
    import pandas as pd


class AdapterModel(PythonModel):
    """Text classification by base and adapter."""

    def load_context(self, context: Any) -> None:
        self._classifier = classifier.load(Path(context.artifacts["bundle"]))

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """model_input: a list of texts, or a frame with columns `text` and, for pairs, `text_pair`."""
        import pandas as pd

        texts, pairs = _texts(model_input)
        found = self._classifier.probabilities(texts, pairs)
        labels = self._classifier.labels
        columns = {f"probability_{name}": found[:, code] for code, name in enumerate(labels)}
        return pd.DataFrame({"label": [labels[code] for code in found.argmax(axis=1)], **columns})


def _texts(model_input: Any) -> tuple[list[Any], list[Any] | None]:
    if isinstance(model_input, list | tuple):
        return list(model_input), None
    if "text" in model_input.columns:
        pairs = list(model_input["text_pair"]) if "text_pair" in model_input.columns else None
        return list(model_input["text"]), pairs
    if len(model_input.columns) == 1:
        return list(model_input.iloc[:, 0]), None
    raise DataError("a column `text`", ", ".join(map(str, model_input.columns)), "rename it")


mlflow.models.set_model(AdapterModel())
