"""Decide what is in production: look at the evidence, promote, roll back, read the history.

    python -m flows.promote tweets-sentiment                       # the evidence; changes nothing
    python -m flows.promote tweets-sentiment --yes --reviewer ada
    python -m flows.promote rollback tweets-sentiment --reviewer ada --reason 'complaints since noon'
    python -m flows.promote history tweets-sentiment
    prefect deployment run promote/review -p model=tweets-sentiment      # asks for approval with a form in Prefect's UI

Exit code 0: done. 2: the gate says no. 3: the test rows cannot tell. 1: an error; production is as it was.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput

from components.config import RegistryConfig
from components.errors import AdapterlineError
from components.registry import promotion, versions
from components.registry.history import Record
from components.registry.promotion import Approval
from flows import events, review
from flows.steps import key

WEEK_S = 7 * 24 * 3600

log = logging.getLogger("adapterline")


class Review(RunInput):
    """The form of a suspended run."""

    reviewer: str
    decision: Literal["approve", "reject"]
    comment: str = ""


@flow(name="promote", persist_result=True)
def promote(model: str, version: str | None = None, registry: RegistryConfig | None = None) -> str:
    """Wait for a reviewer, then put `version` of a model (the candidate) into production. Returns what was decided.

    A run that goes on after the form starts from the top: the evidence is gathered again. When production changed while
    it waited, the form asks again, with the new comparison.

    Raises AdapterlineError; of these, GateFailed and GateInconclusive when the version may not go to production.
    """
    there = promotion.connect(registry or RegistryConfig())
    case = promotion.examine(there, model, version)
    page = review.page(case)
    create_markdown_artifact(page, key=key("review", model), description=f"Evidence for version {case.version.number}")
    asked = key("review", case.version.number, "after", str(case.records))
    form = Review.with_initial_data(description=page)
    answer = suspend_flow_run(wait_for_input=form, key=asked, timeout=WEEK_S)
    if answer.decision == "reject":
        versions.tag(there.versions, case.version, {"rejected": f"{answer.reviewer}: {answer.comment}"})
        return f"version {case.version.number} of {model} was rejected by {answer.reviewer}"
    record = promotion.promote(there, case, Approval(answer.reviewer, answer.comment or "approved in Prefect"))
    events.moved(record)
    return review.moved(record)


@flow(name="roll-back", persist_result=False)
def roll_back(
    model: str, reviewer: str, reason: str, to: str | None = None, registry: RegistryConfig | None = None
) -> str:
    """Put the version that production had before, or `to`, back. Returns what was done."""
    record = promotion.roll_back(promotion.connect(registry or RegistryConfig()), model, Approval(reviewer, reason), to)
    events.moved(record)
    return review.moved(record)


@flow(name="approvals", persist_result=False)
def approvals(registry: RegistryConfig | None = None) -> list[str]:
    """Do what reviewers asked for in the MLflow UI: promote each version that has a tag `approve`, with their name.

    What is done is told by the tag `approved`, what is not by `refused`, with the reason. Changes of production by hand
    are recorded on the way. Returns what was done.

    Raises the first error of a server that did not answer, after all others were tried.
    """
    there = promotion.connect(registry or RegistryConfig())
    done, unanswered = [], None
    for model in versions.models(there.versions):
        try:
            promotion.settle(there, model)
            for version in versions.tagged(there.versions, model, "approve"):
                done.append(_answer(there, version))
        except AdapterlineError as error:
            unanswered = unanswered or error
            log.warning("warning   %s: %s", model, error)
    if unanswered:
        raise unanswered
    return done


def _answer(there: promotion.Registry, version: versions.Version) -> str:
    """Promote a version that a reviewer approved by a tag, and put the outcome in its place."""
    name = version.tags["approve"].strip()
    try:
        record = _cut_off(there, version, name)
        if record is None:
            case = promotion.examine(there, version.name, version.number)
            record = promotion.promote(there, case, Approval(name, version.tags.get("comment", "approved in MLflow")))
    except AdapterlineError as error:
        if error.retry_can_help:
            raise
        versions.tag(there.versions, version, {"approve": None, "refused": str(error)})
        log.warning("refused   version %s of %s: %s", version.number, version.name, error)
        return f"refused: {version.address}: {error}"
    versions.tag(there.versions, version, {"approve": None, "approved": f"{name} {record.when}", "refused": None})
    events.moved(record)
    return review.moved(record)


def _cut_off(there: promotion.Registry, version: versions.Version, name: str) -> Record | None:
    """The promotion that this approval brought about before, when nobody came to set the tags."""
    last = next(reversed(promotion.settle(there, version.name)), None)
    wanted = ("promote", version.number, name)
    return last if last and (last.action, last.after, last.who) == wanted else None


if __name__ == "__main__":
    from flows import deciding

    sys.exit(deciding.main())
