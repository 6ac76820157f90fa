"""The step that judges: the adapter against full fine-tuning, the yardstick and what is in production."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task
from prefect.artifacts import create_table_artifact

from components.config import RetrainConfig
from components.data import ledger
from components.data.ledger import Record
from components.errors import BundleError, RegistryError
from components.evaluation import gate as rules
from components.registry import bundle, tracking, versions
from flows import screen
from flows.steps import RETRIED, key
from flows.values import Judged, Run, Trained

if TYPE_CHECKING:
    from datasets import Dataset


@task(**RETRIED, name="gate")
def gate(config: RetrainConfig, split: Record, baseline: Trained, adapter: Trained, run: Run) -> Judged:
    """Measure adapter, baseline, yardstick and champion on the frozen test part, and apply every rule."""
    import numpy as np

    from components.evaluation.tfidf import yardstick

    with tempfile.TemporaryDirectory() as folder:
        parts, labels = ledger.load_parts(split.split_uri, split.split_digest, Path(folder))
    test = parts["test"]
    ours, theirs = bundle.read_predictions(adapter.folder), bundle.read_predictions(baseline.folder)
    if not ours.rows == theirs.rows == test["row"][:]:
        raise BundleError("predictions for the same test rows", "different rows", "remove both bundles and train again")
    tfidf = yardstick(parts["train"], test, labels, config.seed)
    evidence = rules.Evidence(
        label_names=labels,
        labels=np.asarray(test["label"][:], dtype=np.int64),
        lengths=np.array([len(text) for batch in test.iter(1_000) for text in batch["text"]], dtype=np.int64),
        adapter=ours.probabilities,
        baseline=theirs.probabilities,
        tfidf=tfidf.probabilities,
        champion=_champion(config, test, labels, run),
        trainable_share=adapter.manifest.trained_share,
        bundle_bytes=adapter.manifest.bytes,
    )
    report = rules.judge(evidence, config.gate)
    judged = json.dumps(
        {
            **report.as_json(),
            "champion": evidence.champion.version if evidence.champion else None,
            "bundle_digest": adapter.manifest.digest,
            "policy": config.gate.model_dump(mode="json"),
        },
        indent=2,
    )
    (run.reports / "gate.json").write_text(judged)
    tracking.keep(run.tracking, run.id, {versions.GATE_REPORT: judged})
    table = screen.rule_rows(report)
    tracking.keep_table(run.tracking, run.id, table, "gate/rules.json")
    create_table_artifact(table, key=key("gate", config.model), description=f"# {config.model}: {report.verdict}")
    tracking.record(
        run.tracking,
        run.id,
        metrics={
            f"{who}/{name}{bound}".replace(" ", "_"): value
            for who, scores in report.scores.items()
            for name, score in scores.items()
            for bound, value in (("", score.value), ("_low", score.low), ("_high", score.high))
        },
        tags={"verdict": report.verdict, tracking.NOTE: screen.summary(report)},
    )
    return Judged(report, tfidf.seconds, tfidf.parameters)


def _champion(config: RetrainConfig, test: Dataset, labels: tuple[str, ...], run: Run) -> rules.Champion | None:
    """What is in production, on the rows of this test part that it never learned from."""
    import numpy as np

    version = versions.with_alias(run.tracking, config.model, versions.PRODUCTION)
    if version is None:
        return None
    if "split_uri" not in version.tags:
        found = f"version {version.number} without tag split_uri"
        raise RegistryError("a production version that this flow registered", found, "take the alias from it")
    learned = ledger.learned_rows(version.tags["split_uri"])
    unseen = np.array([index for index, row in enumerate(test["row"][:]) if row not in learned], dtype=np.int64)
    probabilities = np.zeros((0, len(labels)), dtype=np.float32)
    if len(unseen):
        uri = f"models:/{config.model}/{version.number}"
        probabilities = versions.score(run.tracking, uri, test.select(unseen), labels)
    return rules.Champion(version.number, unseen, probabilities)
