"""Registered versions for tests of promotion: real bundles, reports of the gate, an MLflow database and a store."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components import digest
from components.config import GateConfig, RegistryConfig
from components.evaluation import gate
from components.registry import bundle, promotion, tracking, versions
from components.registry.promotion import Registry
from components.registry.versions import Version
from components.training.spec import DataRef
from tests.training.toy_jobs import finished, saved_split

POLICY = GateConfig(margin=0.2, champion_margin=0.05, slice_margin=0.4, max_trainable_share=0.5, must_beat_tfidf=False)


@dataclass
class Shelf:
    """Makes versions of models from one trained bundle."""

    root: Path
    trained: Path
    data: DataRef
    registry: Registry

    def version(self, model: str, accuracy: float = 1.0, champion: str | None = None, **tags: str) -> Version:
        """The next version of a model, right on this share of its test rows, judged against version `champion`.
        tags: others than a registration sets.
        """
        there = self.registry.versions
        folder = Path(shutil.copytree(self.trained, self.root / "artifacts" / model / unused(self.root) / "bundle"))
        predictions = bundle.read_predictions(folder)
        right = np.arange(len(predictions.labels)) < round(accuracy * len(predictions.labels))
        chosen = np.where(right, predictions.labels, 1 - predictions.labels)
        probabilities = np.eye(2, dtype=np.float32)[chosen]
        bundle.write_predictions(folder, bundle.Predictions(predictions.rows, predictions.labels, probabilities))
        sealed = seal(folder)
        run = tracking.start(there, "retrain", {"model": model})
        self.report(run, sealed, probabilities, predictions.labels, champion)
        if not there.client.search_registered_models(f"name = '{model}'"):
            there.client.create_registered_model(model)
        known = {
            "state": "proven",
            "verdict": "pass",
            "bundle_digest": sealed,
            "gate_run": run,
            "split_uri": self.data.uri,
            "split_digest": self.data.digest,
            **tags,
        }
        there.client.log_artifacts(run, str(folder.parent), "model")
        source = f"{there.client.get_run(run).info.artifact_uri}/model"
        made = there.client.create_model_version(model, source, run_id=run, tags=known)
        return versions.find(there, f"{model}/{made.version}")

    def report(
        self, run: str, sealed: str, probabilities: Any, labels: Any, champion: str | None, **changes: Any
    ) -> None:
        """Keep the gate's report on a bundle, as the flow does."""
        rows = np.arange(len(labels))
        evidence = gate.Evidence(
            label_names=("bad", "good"),
            labels=labels,
            lengths=rows,
            adapter=probabilities,
            baseline=probabilities,
            tfidf=probabilities,
            champion=gate.Champion(champion, rows, probabilities) if champion else None,
            trainable_share=0.01,
            bundle_bytes=1000,
        )
        content = gate.judge(evidence, POLICY).as_json()
        content |= {"bundle_digest": sealed, "champion": champion, "policy": POLICY.model_dump(mode="json"), **changes}
        tracking.keep(self.registry.versions, run, {versions.GATE_REPORT: json.dumps(content)})

    def production(self, model: str) -> str | None:
        """Where the alias stands, asked of MLflow."""
        found = versions.with_alias(self.registry.versions, model, versions.PRODUCTION)
        return found.number if found else None

    def by_hand(self, model: str, number: str) -> None:
        """What a person does in the MLflow UI."""
        self.registry.versions.client.set_registered_model_alias(model, versions.PRODUCTION, number)

    def runs(self, model: str) -> list[Any]:
        """The runs about a model's promotions, oldest first."""
        there = self.registry.promotions
        return sorted(
            there.client.search_runs([there.experiment_id], f"tags.model = '{model}'"),
            key=lambda run: (run.info.start_time, run.info.run_id),
        )


def shelf(root: Path, base: Path, config: RegistryConfig | None = None) -> Shelf:
    """In a database and a store below `root`, if no other registry is named."""
    data = saved_split(root / "split")
    trained = finished(base, data, "pfeiffer", root / "trained", epochs=1)
    own = RegistryConfig(store=str(root / "store"), tracking_uri=f"sqlite:///{root}/mlflow.db")
    return Shelf(root, trained, data, promotion.connect(config or own))


def seal(folder: Path, **changes: Any) -> str:
    """Write the manifest of a bundle anew, after a change of its files, and return its digest."""
    content = json.loads((folder / bundle.MANIFEST).read_text())
    for name, file in content["files"].items():
        file |= {"size": (folder / name).stat().st_size, "sha256": digest.of_file(folder / name)}
    (folder / bundle.MANIFEST).write_text(json.dumps({**content, **changes}))
    return bundle.read_manifest(folder).digest


def unused(root: Path) -> str:
    """A name that no folder below `root` has yet."""
    return str(len(list(root.glob("artifacts/*/*"))))


def folder_of(version: Version) -> Path:
    """Where the bundle of a version lies."""
    return Path(version.uri.removeprefix("file://")) / "bundle"
