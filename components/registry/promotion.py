"""Promotion: the alias `production` moves only with evidence, a name and a record, and only from what it was seen on.

In this order: a run in MLflow with the evidence, the record in the store (one writer gets its number: compare-and-set),
the alias, a mark that it was moved. Whoever comes next finishes what was cut off after the record, and records what was
changed by hand in MLflow.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from components.config import RegistryConfig
from components.errors import ProductionMoved, RegistryError
from components.registry import evidence, history, tracking, versions
from components.registry.evidence import Evidence
from components.registry.history import Action, Record
from components.registry.tracking import Tracking, calls
from components.registry.versions import PRODUCTION, Version

EXPERIMENT = "promotions"
UNKNOWN = "unknown"
# A version's tag with the number of the record that it is, or was about to be, in production by.
TAG = "production_record"

log = logging.getLogger("adapterline")


@dataclass(frozen=True)
class Approval:
    """Who wants it, and why."""

    who: str
    why: str

    def __post_init__(self) -> None:
        if not self.who.strip():
            raise RegistryError("the name of a reviewer", "none", "say who decides: --reviewer NAME")


@dataclass(frozen=True)
class Registry:
    """Where versions, their history and the runs about it are."""

    versions: Tracking
    promotions: Tracking
    store: str


def connect(config: RegistryConfig) -> Registry:
    """Raises RegistryError when MLflow cannot be reached."""
    promotions = config.model_copy(update={"experiment": EXPERIMENT})
    return Registry(tracking.connect(config), tracking.connect(promotions), config.store)


@dataclass(frozen=True)
class Case:
    """What a reviewer decides on: the evidence, and how many records the history had when it was gathered."""

    evidence: Evidence
    records: int

    @property
    def version(self) -> Version:
        return self.evidence.version


def examine(registry: Registry, name: str, which: str | None = None) -> Case:
    """Gather the evidence for version `which`, by default the candidate.

    Raises GateFailed, GateInconclusive, RegistryError or BundleError when it may not go to production.
    """
    reference = f"{name}/{which}" if which else f"{name}@{versions.CANDIDATE}"
    found = settle(registry, name)
    return Case(evidence.gather(registry.versions, versions.find(registry.versions, reference)), len(found))


def promote(registry: Registry, case: Case, approval: Approval) -> Record:
    """Put the version of a case into production.

    Raises ProductionMoved when production changed since the evidence was gathered; it then stays as it is.
    """
    found = settle(registry, case.version.name)
    if len(found) != case.records:
        raise _moved(found[-1])
    report = {**case.evidence.report.as_json(), "remeasured": case.evidence.remeasured}
    return _change(registry, found, "promote", case.version, approval, case.evidence.report.verdict, report)


def roll_back(registry: Registry, name: str, approval: Approval, to: str | None = None) -> Record:
    """Go back to the version that production had before, or to `to`, which must have been in production.

    Its bundle is checked byte for byte; the gate is not asked again. Raises RegistryError when there is nothing to go
    back to, and BundleError when that is not whole any more.
    """
    found = settle(registry, name)
    current = found[-1].after if found else None
    target = to or history.before_that(found)
    been = [record.after for record in found]
    if target is None or target not in been or target == current:
        there = ", ".join(dict.fromkeys(number for number in been if number and number != current)) or "none"
        raise RegistryError(
            f"a version of {name} that was in production before: {there}",
            f"{to or 'none'}",
            "promote a version instead",
        )
    version = versions.find(registry.versions, f"{name}/{target}")
    with evidence.whole(registry.versions, version):
        pass
    return _change(registry, found, "roll back", version, approval, version.tags.get("verdict", ""), {})


def look(registry: Registry, name: str) -> tuple[list[Record], Record | None]:
    """The history of a model, and what it lacks: a change by hand that nobody has recorded yet. Changes nothing."""
    found = history.records(registry.store, name)
    standing = versions.with_alias(registry.versions, name, PRODUCTION)
    now, last = standing.number if standing else None, found[-1] if found else None
    if now == (last.after if last else None) or (last and _is_cut_off(registry, last, now)):
        return found, None
    if len(history.records(registry.store, name)) > len(found):  # it changed between the two questions above
        return look(registry, name)
    approval = Approval(UNKNOWN, "the alias was changed in MLflow, without these flows")
    verdict = standing.tags.get("verdict", "") if standing else ""
    return found, _record(found, name, "by hand", standing, approval, verdict)


def settle(registry: Registry, name: str) -> list[Record]:
    """The history of a model once it says what is: what was cut off is finished, what was done by hand is recorded."""
    found, by_hand = look(registry, name)
    if by_hand is None:
        if found and not history.is_done(registry.store, found[-1]):
            _carry_out(registry, found[-1])
        return found
    if history.append(registry.store, by_hand):
        history.mark_done(registry.store, by_hand)
        log.warning("warning   production of %s was changed by hand: %s → %s", name, by_hand.before, by_hand.after)
    return history.records(registry.store, name)


def _is_cut_off(registry: Registry, last: Record, now: str | None) -> bool:
    """Does the alias still stand where it was before the last record, since nobody came to move it?"""
    return now == last.before and not history.is_done(registry.store, last)


def _change(
    registry: Registry,
    found: list[Record],
    action: Action,
    version: Version,
    approval: Approval,
    verdict: str,
    report: Mapping[str, object],
) -> Record:
    """Write the next record and do what it says. Before it is written nothing has changed, after it, it will."""
    record = _record(found, version.name, action, version, approval, verdict)
    _require_right_to_change(registry, version, record)
    title = f"{action} {version.name} to version {version.number}"
    tags = {"model": version.name, "record": str(record.sequence), "action": action, "reviewer": approval.who,
            "from": record.before or "", "to": version.number, "verdict": verdict, "reason": approval.why}  # fmt: skip
    run = tracking.start(registry.promotions, title, tags)
    try:
        if report:
            tracking.keep(registry.promotions, run, {"evidence.json": json.dumps(report, indent=2)})
        record = record.model_copy(update={"run": run})
        if not history.append(registry.store, record):
            first = history.records(registry.store, version.name)[record.sequence - 1]
            if first != record:  # else the answer of S3 was lost, and its client wrote again
                raise _moved(first)
    except BaseException as error:
        tracking.keep_failure(registry.promotions, run, str(error))
        raise
    _carry_out(registry, record)
    tracking.end_abandoned(registry.promotions, version.name, {record.run, *(each.run for each in found)})
    return record


def _record(
    found: list[Record], name: str, action: Action, version: Version | None, approval: Approval, verdict: str
) -> Record:
    return Record(
        sequence=len(found) + 1,
        model=name,
        action=action,
        before=found[-1].after if found else None,
        after=version.number if version else None,
        who=approval.who,
        why=approval.why,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=verdict,
        bundle_digest=version.tags.get("bundle_digest", "") if version else "",
        previous=found[-1].digest if found else "",
    )


def _require_right_to_change(registry: Registry, version: Version, record: Record) -> None:
    """MLflow refuses here what it would refuse for the alias: nothing is recorded that could not be done."""
    with calls(registry.versions.uri):
        registry.versions.client.set_model_version_tag(version.name, version.number, TAG, str(record.sequence))


def _carry_out(registry: Registry, record: Record) -> None:
    """Move the alias as a record says, again if it was done before, and mark it done.

    MLflow has no conditional move. So whoever was held up here while others went on looks for the newest record
    afterwards, and the last word is that one's.
    """
    while True:
        with calls(registry.versions.uri):
            client = registry.versions.client
            if record.after is None:
                client.delete_registered_model_alias(record.model, PRODUCTION)
            else:
                client.set_registered_model_alias(record.model, PRODUCTION, record.after)
        if record.run:
            tracking.finish(registry.promotions, record.run)
        history.mark_done(registry.store, record)
        newest = history.records(registry.store, record.model)[-1]
        if newest.sequence == record.sequence:
            return
        record = newest


def _moved(by: Record) -> ProductionMoved:
    return ProductionMoved(
        f"production of {by.model} as it was when the evidence was gathered, version {by.before or 'none'}",
        f"version {by.after or 'none'} since {by.when} by {by.who} ({by.action}: {by.why})",
        "look at that one, and decide again",
    )
