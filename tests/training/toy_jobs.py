"""Jobs that learn the toy task in seconds, for the tests that need a real bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from datasets import Dataset

from components import base_model
from components.adapters.config import METHODS
from components.config import BaseConfig, LearningRates, Schedule, SplitConfig, TrainingConfig
from components.data import ledger, rows
from components.data.split import Split, split
from components.methods import AdapterMethod, settings_of
from components.training import job
from components.training.progress import Event
from components.training.spec import DataRef, JobSpec, Limits, code_version
from tests.conftest import toy_rows

LABELS = ("bad", "good")
ADAPTERS: tuple[str, ...] = get_args(AdapterMethod)
RATES = {"full": 2e-3, "pfeiffer": 1e-2, "houlsby": 1e-2}  # the methods that most tests of whole jobs go through
# Sizes that fit a base of hidden size 32.
SMALL: dict[str, dict[str, Any]] = {
    **{method: {"reduction_factor": 2} for method in METHODS},
    "mam": {"reduction_factor": 2, "prefix_length": 3, "prefix_bottleneck": 8},
    "lora": {"r": 4},
    "prefix": {"length": 3},
}


def silent(event: Event) -> None:
    """A progress report that tells nobody."""


def toy_split(count: int = 400) -> Split:
    texts, labels = zip(*toy_rows(count), strict=True)
    table = Dataset.from_dict({"text": list(texts), "label": list(labels)})
    return split(rows.clean(table, LABELS), SplitConfig(validation=0.15, test=0.25))


def saved_split(folder: Path, count: int = 400) -> DataRef:
    """A split of toy rows on disk, as a job reads it."""
    made = toy_split(count)
    ledger.save(made, str(folder))
    return DataRef(uri=str(folder), digest=made.digest)


def toy_spec(base: Path, data: DataRef, method: str, epochs: int = 4, **changes: Any) -> JobSpec:
    """A spec whose job takes about a second; `changes` are other fields of JobSpec."""
    rate = RATES.get(method, 1e-2)
    fields: dict[str, Any] = {
        "method": method,
        "base": base_model.find(BaseConfig(name=str(base))).pin,
        "data": data,
        "labels": LABELS,
        "settings": settings_of(method, **SMALL.get(method, {})),
        "schedule": Schedule(
            epochs=epochs, patience=epochs, learning_rates=LearningRates(body=rate, layer_norm=rate, head=rate)
        ),
        "training": TrainingConfig(max_tokens=32, precision="fp32"),
        "limits": Limits(threads=1, device="cpu"),
        "seed": 1,
        "code": code_version(),
    }
    return JobSpec.model_validate({**fields, **changes})


def finished(base: Path, data: DataRef, method: str, out: Path, **changes: Any) -> Path:
    """The bundle of a job that was run to its end."""
    job.run(toy_spec(base, data, method, **changes), str(out), silent)
    return out
