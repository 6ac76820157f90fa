"""Put adapters on another base: what stands → each retrained on its own rows → old against new.

    python -m flows.retrain --base NEW --all-from production --list
    python -m flows.retrain --base NEW --all-from production
    python -m flows.retrain --base NEW --all-from production --standing-on OLD --set compute.deployment=train/gpu
    prefect deployment run upgrade/on-demand -p base=NEW --watch

Each version under the alias is retrained with the configuration that was kept with its run, of which only the base
changes, on the very parts of the split that it was trained on. It goes through the same gate and becomes a candidate;
what is in production stays there. Fusions come last, on the new versions of their members. Run again it goes on: what
is done is up to date. Exit code 0: all registered, or up to date; else the worst of 1 (an error), 2 (a gate failed),
3 (a test part is too small to tell).
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from components import base_model
from components import config as configs
from components.base_model import BaseModel
from components.config import BaseConfig, Frozen, RegistryConfig, RetrainConfig
from components.data import ledger
from components.data.ledger import Record
from components.errors import AdapterlineError, ConfigError
from components.registry import standing, tracking, versions
from components.registry.tracking import Tracking
from components.registry.versions import Version
from flows import command, composition, jobs, outcomes, steps, training
from flows.fuse import fuse
from flows.outcomes import Against, Outcome, Prospect
from flows.retrain import retrain
from flows.values import Plan

log = logging.getLogger("adapterline")

Alias = Literal["production", "candidate"]
# What a version is and what it learned from; an upgrade that changed these would compare unlike things.
ITS_OWN = ("model", "data", "validation", "split")


class Asked(Frozen):
    """The new base, where versions are looked for, and what else is to be another in each configuration."""

    base: BaseConfig
    registry: RegistryConfig
    overrides: dict[str, Any]


@flow(name="upgrade", persist_result=False)
def upgrade(
    base: str,
    all_from: Alias = "production",
    standing_on: str | None = None,
    overrides: dict[str, Any] | None = None,
    only_list: bool = False,
) -> list[str]:
    """Retrain every version under an alias on another base, and register those that pass the gate as candidates.
    Returns the versions that answer for the new base, as models:/NAME/NUMBER.

    base: embedded model, folder or hub id; then with {"base.revision": COMMIT} among the overrides.
    standing_on: only the versions on this base, by its name, its revision or the start of its weights' digest.
    overrides: dotted keys, for every configuration, e.g. {"compute.deployment": "train/gpu"}.
    only_list: say what would be done, and do nothing.

    Raises AdapterlineError; once all models had their turn, UpgradeError, GateFailed or GateInconclusive when one is
    not registered on the new base.
    """
    asked = ask(base, overrides or {})
    prospects = look(asked, all_from, standing_on)
    _say(outcomes.plan_table(prospects))
    if only_list:
        return []
    found: list[Outcome] = []
    for prospect in prospects:
        found.append(move(prospect, asked, found))
    report(found, base)
    outcomes.raise_unless_moved(found, base)
    return [each.new.address for each in found if each.new]


def ask(base: str, overrides: Mapping[str, Any]) -> Asked:
    """Raises ConfigError when a key of the overrides is wrong, or one that may not change."""
    own = [key for key in overrides if key.split(".")[0] in ITS_OWN]
    if own:
        raise ConfigError("overrides that leave models and their rows as they are", ", ".join(own), "remove them")
    content = {"model": "any", "data": {"source": "any"}, "base": {"name": base}}
    here = {key: value for key, value in overrides.items() if key.split(".")[0] in ("base", "registry")}
    settled = configs.parse(content, "what was asked for", here)
    return Asked(base=settled.base, registry=settled.registry, overrides=dict(overrides))


def changed(content: Mapping[str, Any], asked: Asked, origin: str) -> RetrainConfig:
    """A configuration with the new base, and the overrides. MLflow is the one in which the version was found."""
    registry = {**content.get("registry", {}), "tracking_uri": asked.registry.tracking_uri}
    moved = {**content, "base": asked.base.model_dump(mode="json"), "registry": registry}
    return configs.parse(copy.deepcopy(moved), origin, asked.overrides)


@task(**steps.RETRIED, name="look")
def look(asked: Asked, alias: str, standing_on: str | None) -> list[Prospect]:
    """What stands under the alias, and what is to become of it; fusions last.

    Raises ConfigError when nothing does.
    """
    new = base_model.find(asked.base)
    connection = tracking.connect(asked.registry)
    every = standing.under(connection, alias)
    for version in every:
        if not standing.is_ours(version):
            log.info("left out  version %s of %s, which these flows did not register", version.number, version.name)
    ours = [version for version in every if standing.is_ours(version)]
    chosen = [version for version in ours if not standing_on or standing.stands_on(version.tags, standing_on)]
    if not chosen:
        bases = ", ".join(sorted({version.tags["base"] for version in ours})) or "no such model"
        wanted = f"a model with alias {alias}" + (f" that stands on {standing_on}" if standing_on else "")
        raise ConfigError(wanted, bases, "correct the alias or the base, or promote a version first")
    return outcomes.in_order([_prospect(connection, version, new, asked) for version in chosen])


def _prospect(connection: Tracking, version: Version, new: BaseModel, asked: Asked) -> Prospect:
    accuracy = None
    try:
        accuracy = standing.accuracy(connection, version)
        if _is_on(connection, version, new):
            return Prospect(version, accuracy)
        origin = f"{standing.CONFIG} of {version.address}"
        config = changed(standing.configuration(connection, version), asked, origin)
        steps.require_fit(config, new.path)
        answer = None if config.adapter.fusion else _answering(connection, version, config)
    except AdapterlineError as error:
        if error.retry_can_help:
            raise
        return Prospect(version, accuracy, problem=error)
    return Prospect(version, accuracy, config, answer=answer)


def _answering(connection: Tracking, old: Version, config: RetrainConfig) -> Version | None:
    """What an earlier run of this upgrade has registered, and still stands."""
    plan, record = _planned(config, old)
    found = versions.answering(connection, old.name, plan.digest)
    return found if found and found.tags.get("split_digest") == record.split_digest else None


def _planned(config: RetrainConfig, old: Version) -> tuple[Plan, Record]:
    """What its retrain comes to, without starting it. Raises DataError when its rows are not there any more."""
    record = ledger.accepted(config.registry.store, config.model, old.tags["split_digest"])
    members = composition.members(config) if config.adapter.fusion else ()
    base = base_model.find(config.base)
    limits = jobs.limits(config.compute, 1)  # how many threads makes no other job
    return Plan(config, base.pin, record.data_digest, record.labels, 1, limits, members), record


def _is_on(connection: Tracking, version: Version, base: BaseModel) -> bool:
    """By weights and tokenizer, wherever the files lie."""
    if version.tags["base_weights_sha256"] != base.pin.weights_sha256:
        return False
    with tempfile.TemporaryDirectory() as folder:
        _, manifest = versions.bundle_of(connection, version, Path(folder))
    return manifest.base.tokenizer_sha256 == base.pin.tokenizer_sha256


def move(prospect: Prospect, asked: Asked, before: Sequence[Outcome]) -> Outcome:
    """Retrain one version on the new base. before: what came of those it may stand on.

    Whatever goes wrong is its outcome: the others are to have their turn.
    """
    old = prospect.version
    if prospect.problem:
        return Outcome(old, "error", reason=str(prospect.problem))
    if prospect.config is None:
        return Outcome(old, "up to date", old)
    _say(["", f"{old.name}: version {old.number}, from {old.tags['base']} to {asked.base.name}"])
    try:
        return _retrained(tracking.connect(asked.registry), old, with_members(prospect.config, old, before))
    except AdapterlineError as error:
        return Outcome(old, "error", reason=str(error))


def _retrained(connection: Tracking, old: Version, config: RetrainConfig) -> Outcome:
    """What the flow that is there for one model makes of it."""
    aliased = (versions.with_alias(connection, old.name, alias) for alias in (versions.PRODUCTION, versions.CANDIDATE))
    stood = {version.address for version in aliased if version}
    run = fuse if config.adapter.fusion else retrain
    state: Any = run(config, saved_split=old.tags["split_digest"], return_state=True)
    answer = state.result(raise_on_failure=False)
    if not isinstance(answer, str):
        came = outcomes.without_version(answer)
        against = None if came == "error" else _against(connection, old, None, config)
        return Outcome(old, came, None, against, command.in_one_line(answer))
    new = versions.find(connection, answer.removeprefix("models:/"))
    return Outcome(old, "up to date" if answer in stood else "registered", new, _against(connection, old, new, config))


def with_members(config: RetrainConfig, old: Version, before: Sequence[Outcome]) -> RetrainConfig:
    """The configuration of a fusion with the new versions of its members. A name by alias means the model's version
    of today; one by number only that version. Any other configuration as it is.

    Raises ConfigError when a member has no version on the new base.
    """
    fusion = config.adapter.fusion
    if fusion is None:
        return config
    moved = {each.old.name: each for each in before}
    members, missing = [], []
    for reference in fusion.members:
        name = reference.partition("@")[0].partition("/")[0]
        outcome = moved.get(name)
        if outcome is None or outcome.new is None:
            missing.append(f"{name} ({outcome.came if outcome else 'not among them'})")
        elif "/" in reference and reference not in (f"{name}/{outcome.old.number}", f"{name}/{outcome.new.number}"):
            missing.append(f"{reference} (version {outcome.old.number} was retrained)")
        else:
            members.append(f"{name}/{outcome.new.number}")
    if missing:
        raise ConfigError(
            f"every member of {old.name} on the new base",
            f"none for {', '.join(missing)}",
            "move these first; those that stand on the new base already count when standing_on is not asked for",
        )
    fused = config.adapter.model_copy(update={"fusion": fusion.model_copy(update={"members": tuple(members)})})
    return config.model_copy(update={"adapter": fused})


def _against(connection: Tracking, old: Version, new: Version | None, config: RetrainConfig) -> Against | None:
    """Old and new on the same test rows; None, and a line why, when one of the bundles is not to be had."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            first, _ = versions.bundle_of(connection, old, Path(folder) / "old")
            if new is None:
                return outcomes.against(first, _left_behind(config, old), config.gate)
            second, _ = versions.bundle_of(connection, new, Path(folder) / "new")
            return outcomes.against(first, second, config.gate)
    except AdapterlineError as error:
        log.warning("warning   %s cannot be compared: %s", old.name, error)
        return None


def _left_behind(config: RetrainConfig, old: Version) -> Path:
    """Where the bundle of an adapter is that was trained and not registered."""
    plan, record = _planned(config, old)
    return training.job_folder(plan.adapter(record), config.compute)


@task(**steps.RETRIED, name="report")
def report(found: Sequence[Outcome], base: str) -> None:
    """The table of all models, on the screen and on the run's page."""
    _say(outcomes.outcome_table(found))
    if any(each.came == "registered" for each in found):
        _say(
            ["", "what was registered is a candidate: look at its run, promote it, and name the new base in its preset"]
        )
    table = outcomes.outcome_rows(found)
    create_table_artifact(table, key=steps.key("upgrade", base), description=f"# Models on {base}")


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        log.info("%s", line)
