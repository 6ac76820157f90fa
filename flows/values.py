"""What passes between the steps of a flow: small values with digests and places, never tables or models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components import digest
from components.base_model import BasePin
from components.config import RetrainConfig
from components.data.ledger import Record
from components.evaluation.gate import GateReport
from components.methods import Fusion, Member, Settings
from components.registry.bundle import Manifest
from components.registry.tracking import Tracking
from components.training.spec import DataRef, JobSpec, Limits, code_version

# Settings that decide neither what is learned nor what is concluded.
WITHOUT_EFFECT: dict[str, Any] = {
    "compute": {"deployment", "job_variables", "processes", "workspace", "threads", "job_memory_gb", "timeout_hours"},
    "registry": True, "report": True, "sweep": True, "data": {"source", "revision"},
    "adapter": {"fusion": {"members"}},  # the bundles that these stand for today decide
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Rows as read, kept in the workspace, or those of a data set that was accepted before, split as it was.

    `revision` is the commit of a hub data set.
    """

    kept: Path | Record
    data_digest: str
    source: str
    revision: str | None
    labels: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Plan:
    """What is to be trained, and the digest of everything that decides the outcome. members: those of a fusion."""

    config: RetrainConfig
    base: BasePin
    data_digest: str
    labels: tuple[str, ...]
    jobs_at_once: int
    limits: Limits
    members: tuple[Member, ...] = ()

    @property
    def digest(self) -> str:
        settings = self.config.model_dump(mode="json", exclude=WITHOUT_EFFECT)
        bundles = [member.digest for member in self.members]
        base = self.base.model_dump(mode="json")
        return digest.of_json([self.data_digest, settings, base, digest.of_code(""), bundles])

    def adapter(self, split: Record) -> JobSpec:
        return self._job(split, self.config.adapter.method)

    def baseline(self, split: Record) -> JobSpec:
        return self._job(split, "full")

    @property
    def _settings(self) -> Settings | None:
        adapter = self.config.adapter
        return Fusion(kind=adapter.fusion.kind, members=self.members) if adapter.fusion else adapter.settings

    def _job(self, split: Record, method: str) -> JobSpec:
        adapter, full = self.config.adapter, method == "full"
        return JobSpec.model_validate(
            {
                "method": method,
                "base": self.base,
                "data": DataRef(uri=split.split_uri, digest=split.split_digest),
                "labels": self.labels,
                "settings": None if full else self._settings,
                "schedule": self.config.baseline.schedule if full else adapter.schedule,
                "training": self.config.training,
                "limits": self.limits,
                "seed": self.config.seed,
                "code": code_version(),
            }
        )


@dataclass(frozen=True)
class Run:
    """The parent run in MLflow, the folder where this run's reports lie, and the store its jobs share."""

    tracking: Tracking
    id: str
    reports: Path
    store: str


@dataclass(frozen=True)
class Trained:
    """A finished job: its bundle, its run in MLflow, and whether it was there already."""

    folder: Path
    manifest: Manifest
    run_id: str
    training_seconds: float
    reused: bool


@dataclass(frozen=True)
class Judged:
    """The gate's report, and what the yardstick cost."""

    report: GateReport
    tfidf_seconds: float
    tfidf_parameters: int
