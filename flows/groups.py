"""The jobs of a sweep in groups: each is one process, here or on a Ray cluster."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.task_runners import TaskRunner

from components.config import ComputeConfig, RetrainConfig, SweepConfig
from components.registry import bundle
from components.training import sweep as process
from components.training.spec import JobSpec, Limits
from components.training.sweep import Errand, News
from components.variants import Variant
from flows import jobs, screen, steps
from flows.training import job_folder

# Of the section `sweep`, what decides neither what is trained nor what is chosen.
WITHOUT_EFFECT = {"groups", "task_runner", "ray_address"}
# It reports on its use over the network, unless told otherwise.
RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}
RAY_OPTIONS: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}

Jobs = dict[str, dict[int, JobSpec]]  # by variant and seed
Failures = dict[str, str]  # by digest of the job


def limits(config: RetrainConfig, tried: Sequence[Variant]) -> Limits:
    """Of each job: its group has its share of the cores."""
    return jobs.limits(config.compute, _count(config, tried))


def misfits(config: RetrainConfig) -> list[str]:
    """What of the parameters no group can do."""
    found = []
    if config.compute.deployment:
        found.append("compute.deployment: jobs of a sweep train in its own processes or on Ray (sweep.task_runner)")
    if config.compute.processes > 1:
        found.append("compute.processes: a job of a sweep is one process; sweep.groups has several jobs at a time")
    if (config.sweep or SweepConfig()).task_runner == "ray":
        try:
            import prefect_ray  # noqa: F401
        except ImportError:
            found.append("sweep.task_runner: ray is not installed: pip install 'adapterline[ray]'")
    return found


def train_all(config: RetrainConfig, tried: Sequence[Variant], specs: Jobs) -> Failures:
    """Train every job; why those that could not be trained failed. Raises TrainingError when a whole group did."""
    wanted, compute = config.sweep or SweepConfig(), config.compute
    dealt = deal([spec for each in specs.values() for spec in each.values()], _count(config, tried))
    if wanted.task_runner == "threads":
        failed = jobs.all_of(lambda: [train.submit(number, group, compute) for number, group in enumerate(dealt)])
    else:
        failed = _on_ray(wanted.ray_address)(dealt, compute)
    return {digest: reason for each in failed for digest, reason in each.items()}


def _count(config: RetrainConfig, tried: Sequence[Variant]) -> int:
    wanted = config.sweep or SweepConfig()
    every = [each for variant in tried for each in variant.configs.values()]
    methods = len({each.adapter.method for each in every})
    return min(len(every), wanted.groups or (methods if wanted.task_runner == "ray" else 1))


def deal(specs: list[JobSpec], count: int) -> list[list[JobSpec]]:
    """In `count` groups of about the same size, those of like settings together: their trunk ends at the same place."""
    like = sorted(specs, key=lambda spec: (spec.method, spec.settings.model_dump_json() if spec.settings else ""))
    ends = [round(len(like) * number / count) for number in range(count + 1)]
    return [like[begin:end] for begin, end in pairwise(ends)]


@task(**steps.RETRIED, name="train group", task_run_name="train group {number}")
def train(number: int, specs: list[JobSpec], compute: ComputeConfig) -> Failures:
    """Train in one process what has no bundle yet. Returns why jobs failed, by digest."""
    missing = [spec for spec in specs if not _is_there(job_folder(spec, compute))]
    failures: Failures = {}

    def hear(line: str) -> None:
        if (news := process.heard(line)) is not None:
            _pass_on(news, missing[news.errand], failures)

    if missing:
        errands = [Errand(spec=spec, out=str(job_folder(spec, compute).resolve())) for spec in missing]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "errands.json"
            process.write(errands, path)
            hours = compute.timeout_hours * len(missing)
            jobs.follow_process(
                [sys.executable, "-m", process.MODULE, str(path)], f"group {number} of the sweep", {}, hours, hear
            )
    return failures


def _is_there(out: Path) -> bool:
    if there := bundle.is_complete(out):
        (out / bundle.MANIFEST).touch()  # in use again, as `tidy` sees it
    return there


def _pass_on(news: News, spec: JobSpec, failures: Failures) -> None:
    screen.bar(f"{spec.method} {spec.digest[:6]}", news.event)
    if news.failed:
        failures[spec.digest] = news.failed


def _on_ray(address: str | None) -> Any:
    """A flow whose tasks run on a cluster: the one at this address, or one of this machine that ends with it."""
    from prefect_ray import RayTaskRunner

    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    runner: TaskRunner[Any] = RayTaskRunner(address, {**RAY_OPTIONS, **({} if address else {"address": "local"})})
    return spread.with_options(task_runner=runner)


@flow(name="spread", persist_result=False, validate_parameters=False)
def spread(dealt: list[list[JobSpec]], compute: ComputeConfig) -> list[Failures]:
    """Train each group as a task of the flow's task runner, with as many cores as its jobs have threads."""
    from prefect_ray.context import remote_options

    threads = dealt[0][0].limits.threads
    with remote_options(num_cpus=threads, num_gpus=1 if compute.device == "cuda" else 0):
        return jobs.all_of(lambda: [train.submit(number, group, compute) for number, group in enumerate(dealt)])
