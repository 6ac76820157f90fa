"""What a sweep needs beside the steps of a retrain: its jobs, their scores, and the choice among them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact

from components import base_model, cache, digest
from components.config import RetrainConfig, SweepConfig
from components.data.ledger import Record
from components.errors import ConfigError
from components.evaluation import choice as choices
from components.evaluation.choice import SHOWN, Choice, Tried
from components.registry import bundle, claim, references, tracking
from components.training.spec import JobSpec
from components.variants import Variant
from flows import groups, steps, training
from flows.groups import Failures, Jobs
from flows.values import Plan, Rows, Run

DIGEST = "sweep_digest"
CHOICE = "sweep/choice.json"
WIDTH = 112
# Digests that one tag lists: MLflow holds 8,000 characters of it.
AT_ONCE = 400

log = logging.getLogger("adapterline")


def plan(config: RetrainConfig, rows: Rows, tried: Sequence[Variant]) -> Plan:
    """What is fixed for all jobs, with the cores of one of the groups that train at the same time."""
    return replace(steps.plan(config, rows), limits=groups.limits(config, tried))


def check(config: RetrainConfig, tried: Sequence[Variant]) -> None:
    """Does every variant fit the base, and the sweep the place where it runs? Raises ConfigError with everything that
    does not, before anything is trained.
    """
    problems = groups.misfits(config)
    base = base_model.find(config.base).path
    for variant in tried:
        try:
            steps.require_fit(next(iter(variant.configs.values())), base)
        except ConfigError as error:
            problems.append(f"{variant.name}: {error.found}")
    if problems:
        raise ConfigError("a sweep that can be carried out", "; ".join(problems), "correct sweep, adapter and compute")


def jobs_of(plan: Plan, split: Record, tried: Sequence[Variant]) -> Jobs:
    """The very jobs that a retrain with these settings has."""
    return {
        variant.name: {
            seed: replace(plan, config=config).adapter(split) for seed, config in variant.configs.items()
        }
        for variant in tried
    }  # fmt: skip


def hold(jobs: Jobs, run: Run) -> None:
    """Have the run name its jobs, so that none is removed before all are trained."""
    names = [spec.digest[:16] for specs in jobs.values() for spec in specs.values()]
    starts = range(0, len(names), AT_ONCE)
    tags = {f"{references.JOBS}{start}": " ".join(names[start : start + AT_ONCE]) for start in starts}
    tracking.record(run.tracking, run.id, tags=tags)


@task(**steps.RETRIED, name="up to date?")
def up_to_date(config: RetrainConfig, plan: Plan) -> Choice | None:
    """What an equal sweep has chosen, if there was one."""
    connection = tracking.connect(config.registry)
    claim.make(connection, config.registry.store, config.compute.workspace, str(cache.folder()))
    found = tracking.finished(connection, DIGEST, _digest(config, plan))
    kept = tracking.kept(connection, found, CHOICE) if found else None
    return Choice.model_validate_json(kept) if kept else None


def _digest(config: RetrainConfig, plan: Plan) -> str:
    lists = (config.sweep or SweepConfig()).model_dump(mode="json", exclude=groups.WITHOUT_EFFECT)
    return digest.of_json([plan.digest, lists])


@task(**steps.RETRIED, name="choose")
def choose(
    config: RetrainConfig, plan: Plan, tried: Sequence[Variant], jobs: Jobs, failures: Failures, run: Run
) -> Choice:
    """The variant with the best mean on the validation part, and a nested run in MLflow for each job.

    Raises TrainingError when every variant failed.
    """
    outcomes = []
    for variant in tried:
        measured = {}
        for seed, spec in jobs[variant.name].items():
            name = f"{variant.name} · seed {seed}"
            measured[seed] = _recorded(name, spec, config, failures.get(spec.digest), run)
        outcomes.append(_tried(variant, jobs[variant.name], failures, [each for each in measured.values() if each]))
    seeds = sorted(next(iter(tried)).configs, key=lambda seed: seed != config.seed)
    choice = choices.choose(outcomes, config.training.metric, seeds)
    tracking.keep(run.tracking, run.id, {CHOICE: choice.model_dump_json(indent=2)})
    tracking.keep_table(run.tracking, run.id, _rows(choice), "sweep/table.json")
    best = {f"best_validation_{name}": value for name, value in choice.best.means.items()}
    tracking.record(run.tracking, run.id, metrics=best, tags={DIGEST: _digest(config, plan), "best": choice.best.name})
    title = f"# {config.model}: best on the validation part is {choice.best.name}"
    create_table_artifact(_rows(choice), key=steps.key("sweep", config.model), description=title)
    return choice


def _recorded(name: str, spec: JobSpec, config: RetrainConfig, failure: str | None, run: Run) -> dict[str, Any] | None:
    """A nested run for one job, without its test scores. Returns its measurements, None where it failed."""
    id_ = tracking.start(run.tracking, name, {"role": "sweep", "job_digest": spec.digest}, run.id)
    params = steps.flat(spec.model_dump(mode="json", include=training.SHOWN, exclude_none=True))
    tracking.record(run.tracking, id_, params=params)
    if failure:
        tracking.keep_failure(run.tracking, id_, failure)
        return None
    out = training.job_folder(spec, config.compute)
    manifest = bundle.read_manifest(out)
    measured: dict[str, Any] = json.loads((out / "metrics.json").read_bytes())
    counts = {
        "trained_parameters": manifest.trained_parameters,
        "bundle_bytes": manifest.bytes,
        "training_seconds": measured["training_seconds"],
    }
    scores = {f"best_validation_{key}": value for key, value in choices.validation(measured).items()}
    tracking.record(run.tracking, id_, metrics=counts | scores, tags={"bundle_digest": manifest.digest})
    tracking.keep_history(run.tracking, id_, measured["history"])
    tracking.finish(run.tracking, id_)
    return measured


def _tried(
    variant: Variant, specs: dict[int, JobSpec], failures: Failures, measured: Sequence[dict[str, Any]]
) -> Tried:
    failed = [failures[spec.digest] for spec in specs.values() if spec.digest in failures]
    if failed:
        return Tried(name=variant.name, changes=variant.changes, failure=failed[0])
    scores = [choices.validation(each) for each in measured]
    return Tried(
        name=variant.name,
        changes=variant.changes,
        scores={metric: tuple(each[metric] for each in scores) for metric in scores[0]},
        trained_parameters=measured[0]["trained_parameters"],
        seconds=sum(each["training_seconds"] for each in measured),
    )


def settings(choice: Choice) -> dict[str, Any]:
    """What the best variant changes in the configuration, as dotted keys, with the seed to train it with."""
    return {**choice.best.changes, "seed": choice.seeds[0]}


def show(choice: Choice, up_to_date: bool = False) -> None:
    """All variants as a table, and how to retrain with the best."""
    if up_to_date:
        log.info("up to date: an equal sweep has chosen")
    for line in (*_table(choice), "", *_advice(choice)):
        log.info("%s", line)


def _advice(choice: Choice) -> list[str]:
    given = settings(choice)
    words = " ".join(f"--set {key}={json.dumps(value).strip(chr(34))}" for key, value in given.items())
    return [
        f"best      {choice.best.name}, by {choice.metric} on the validation part",
        "          the best of many looks better than it is; what it is worth, the gate says on other rows:",
        f"          python -m flows.retrain … {words}",
    ]


def _table(choice: Choice) -> list[str]:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("validation part", "accuracy", "macro F1", "log loss", "seeds", "trained parameters", "training"):
        table.add_column(name, justify="left" if name == "validation part" else "right", no_wrap=True)
    for each in choice.tried:
        if each.failure:
            table.add_row(each.name, "failed")
            continue
        seeds = len(next(iter(each.scores.values())))
        shown = [_score(each, metric, 1 if metric == "log_loss" else 100) for metric in SHOWN]
        table.add_row(each.name, *shown, f"{seeds}", f"{each.trained_parameters:,}", f"{each.seconds:.0f} s")
    out = Console(file=io.StringIO(), width=WIDTH, color_system=None, markup=False, highlight=False)
    out.print(table)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    reasons = [f"failed    {each.name}: {each.failure}" for each in choice.tried if each.failure]
    return ["", *(line.rstrip() for line in text.splitlines()), *reasons]


def _score(tried: Tried, metric: str, unit: int) -> str:
    """The mean over seeds, and their standard deviation where there are several; shares as percentages."""
    digits, sign = (1, " %") if unit == 100 else (3, "")
    spread = f" ± {unit * tried.spreads[metric]:.{digits}f}" if tried.spreads else ""
    return f"{unit * tried.means[metric]:.{digits}f}{spread}{sign}"


def _rows(choice: Choice) -> list[dict[str, Any]]:
    """The table for Prefect and MLflow."""
    return [
        {"variant": each.name, "seeds": len(choice.seeds), "parameters": each.trained_parameters,
         "seconds": round(each.seconds, 1), "failure": each.failure or "",
         **{metric: each.means.get(metric) for metric in SHOWN},
         **{f"{metric}_sd": each.spreads.get(metric) for metric in SHOWN}}
        for each in choice.tried
    ]  # fmt: skip
