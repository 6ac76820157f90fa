"""The rows that all rivals train on: one split, one tokenisation, saved once for every Python that reads them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from components import base_model, digest
from components.config import BaseConfig, DataConfig, SplitConfig, load_preset
from components.data import ledger, rows, sources
from components.data.split import split
from components.training.spec import DataRef
from tests.conftest import SHARED

DEPRESSION = SHARED / "depression_reddit" / "depression_dataset_reddit_cleaned.csv"


@dataclass(frozen=True)
class Prepared:
    """The saved split, in which the validation part is the test part, and its token ids.

    tokens: an .npz with `PART_ids` (tokens,), `PART_starts` (rows + 1,), `PART_labels` (rows,) of `train` and `test`.
    """

    split: str
    digest: str
    tokens: str
    labels: tuple[str, ...]
    padding: int

    @property
    def ref(self) -> DataRef:
        return DataRef(uri=self.split, digest=self.digest)

    def lengths(self) -> np.ndarray:
        """Tokens of each training row, without padding."""
        return np.diff(np.load(self.tokens)["train_starts"])

    def truth(self) -> np.ndarray:
        return np.asarray(np.load(self.tokens)["test_labels"])


def source(name: str | None, text: str, label: str) -> DataConfig:
    """A preset's data, a file's, or the posts of the first experiment."""
    if name is not None and not Path(name).is_file():
        return load_preset(name).data
    columns = {"text": text, "label": label} if name else {"label": "is_depressive"}
    return DataConfig.model_validate({"source": name or str(DEPRESSION), "columns": columns})


def prepare(data: DataConfig, base: str, train: int, test: int, max_tokens: int, folder: Path) -> Prepared:
    """At most `train` and `test` rows, drawn once from a split that no duplicate crosses."""
    from datasets import disable_progress_bars

    key = digest.of_json([data.model_dump(mode="json"), base, train, test, max_tokens])[:16]
    about = folder / key / "prepared.json"
    if about.is_file():
        content = json.loads(about.read_bytes())
        return Prepared(**{**content, "labels": tuple(content["labels"])})
    disable_progress_bars()
    read = sources.read(data)
    labels = rows.label_names(read.table, data.labels)
    whole = split(rows.clean(read.table, labels), SplitConfig())
    held_out = _drawn(whole.test, test)
    parts = replace(whole, train=_drawn(whole.train, train), validation=held_out, test=held_out)
    ledger.save(parts, str(about.parent / "split"))
    tokenizer = base_model.load_tokenizer(base_model.find(BaseConfig(name=base)))
    saved: dict[str, Any] = {}
    for name, table in (("train", parts.train), ("test", parts.test)):
        ids = tokenizer(list(table["text"]), truncation=True, max_length=max_tokens)["input_ids"]
        saved[f"{name}_ids"] = np.concatenate([np.asarray(row, dtype=np.int32) for row in ids])
        saved[f"{name}_starts"] = np.cumsum([0, *map(len, ids)])
        saved[f"{name}_labels"] = np.asarray(table["label"])
    np.savez(about.parent / "tokens.npz", **saved)
    result = Prepared(
        split=str(about.parent / "split"),
        digest=parts.digest,
        tokens=str(about.parent / "tokens.npz"),
        labels=labels,
        padding=int(tokenizer.pad_token_id),
    )
    about.write_text(json.dumps(asdict(result)))
    return result


def _drawn(table: Any, most: int) -> Any:
    return table.shuffle(seed=0).select(range(min(most, len(table))))
