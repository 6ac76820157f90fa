"""Retrain one adapter and prove it: validate → split → baseline ∥ adapter → gate → register.

    python -m flows.retrain --preset tweets
    python -m flows.retrain --preset tweets+lora
    python -m flows.retrain --config my.yaml --set gate.margin=0.02
    python -m flows.retrain --base NEW --all-from production     (flows/upgrade.py)
    prefect deployment run retrain/nightly -p preset=tweets --watch

Exit code 0: registered, or up to date. 2: the gate failed. 3: the test part is too small to tell. 1: an error.
"""

from __future__ import annotations

import sys
from typing import Any

from prefect import flow

from components import config as configs
from components.config import RetrainConfig
from flows import events, judging, screen, steps, training
from flows.jobs import side_by_side
from flows.turns import alone


@flow(name="retrain", persist_result=False)
def retrain(
    config: RetrainConfig | None = None,
    preset: str | None = None,
    overrides: dict[str, Any] | None = None,
    saved_split: str | None = None,
) -> str:
    """Register a new candidate of `config.model` if it passes the gate. Returns the version that answers,
    as models:/NAME/NUMBER.

    config, or a preset of flows/presets, with a method's if you like (tweets+lora); overrides: dotted keys, e.g.
    {"gate.margin": 0.02}.  saved_split: digest of a split that was accepted for this model before, to train on its very
    parts whatever has become of `config.data.source`.

    Raises AdapterlineError; of these, GateFailed and GateInconclusive when the gate did not pass.
    """
    config = configs.settle(config, preset, overrides or {})
    with alone(config.model):
        rows = steps.fetch(config, saved_split)
        plan = steps.plan(config, rows)
        if standing := steps.up_to_date(config, plan, rows):
            screen.up_to_date(standing)
            return standing.address
        steps.check(config)

        with steps.recorded(config, rows, plan) as run:
            steps.validate(config, rows, run)
            split = steps.split(config, rows, run)
            jobs = [plan.baseline(split), plan.adapter(split)]
            baseline, adapter = side_by_side(training.train, jobs, plan.jobs_at_once, config.compute, run)
            judged = judging.gate(config, split, baseline, adapter, run)
            screen.results(judged, baseline, adapter)
            events.judged(config, judged, run)
            judged.report.raise_unless_passed()
            version = steps.register(config, plan, split, adapter, judged, run)
            screen.registered(version)
    return version.address


if __name__ == "__main__":
    from flows import command
    from flows.upgrade import upgrade

    sys.exit(command.main(retrain, upgrade=upgrade))
