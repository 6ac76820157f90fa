"""What others may react to: infra/automations.yaml turns these events into notifications."""

from __future__ import annotations

from prefect.events import emit_event

from components.config import RetrainConfig
from components.registry.history import Record
from flows.values import Judged, Run


def judged(config: RetrainConfig, judgement: Judged, run: Run) -> None:
    """Emit adapterline.gate.pass, .fail or .inconclusive for the model, with each rule's verdict and reason."""
    report = judgement.report
    emit_event(
        f"adapterline.gate.{report.verdict}",
        resource={
            "prefect.resource.id": f"adapterline.model.{config.model}",
            "prefect.resource.name": config.model,
            "adapterline.mlflow-run": run.id,
        },
        payload={
            "model": config.model,
            "verdict": report.verdict,
            "rules": [{"rule": each.rule, "verdict": each.verdict, "reason": each.reason} for each in report.rules],
        },
    )


def moved(record: Record) -> None:
    """Emit adapterline.production.moved for the model, with the record."""
    emit_event(
        "adapterline.production.moved",
        resource={"prefect.resource.id": f"adapterline.model.{record.model}", "prefect.resource.name": record.model},
        payload=record.model_dump(mode="json"),
    )
