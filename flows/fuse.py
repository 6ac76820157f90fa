"""Compose registered adapters for one task: members → validate → split → baseline ∥ fusion → gate → register.

    python -m flows.fuse --preset fusion
    python -m flows.fuse --preset fusion --set adapter.fusion.kind=static
    prefect deployment run fuse/on-demand -p preset=fusion --watch

AdapterFusion (Pfeiffer et al. 2021): the members stay as they are, what learns is how much each counts for a token, in
each layer, and a head. Exit code 0: registered, or up to date. 2: the gate failed. 3: the test part is too small to
tell. 1: an error.
"""

from __future__ import annotations

import sys
from typing import Any

from prefect import flow

from components import config as configs
from components.config import RetrainConfig
from flows import composition, events, judging, screen, steps, training
from flows.jobs import side_by_side
from flows.turns import alone


@flow(name="fuse", persist_result=False)
def fuse(
    config: RetrainConfig | None = None,
    preset: str | None = None,
    overrides: dict[str, Any] | None = None,
    saved_split: str | None = None,
) -> str:
    """Register a fusion of `config.adapter.fusion.members` as candidate of `config.model` if it passes the gate.
    Returns the version that answers, as models:/NAME/NUMBER.

    config, or a preset of flows/presets; overrides: dotted keys, e.g. {"adapter.fusion.kind": "static"}.
    saved_split: as of flows/retrain.py.

    Raises AdapterlineError; of these, GateFailed and GateInconclusive when the gate did not pass.
    """
    config = configs.settle(config, preset, overrides or {})
    with alone(config.model):
        members = composition.members(config)
        rows = steps.fetch(config, saved_split)
        plan = steps.plan(config, rows, members)
        if standing := steps.up_to_date(config, plan, rows):
            screen.up_to_date(standing)
            return standing.address
        steps.check(config)

        with steps.recorded(config, rows, plan) as run:
            steps.validate(config, rows, run)
            split = steps.split(config, rows, run)
            composition.require_unseen(split, members)
            jobs = [plan.baseline(split), plan.adapter(split)]
            baseline, fusion = side_by_side(training.train, jobs, plan.jobs_at_once, config.compute, run)
            composition.attention(config, fusion, run)
            judged = judging.gate(config, split, baseline, fusion, run)
            screen.results(judged, baseline, fusion)
            events.judged(config, judged, run)
            judged.report.raise_unless_passed()
            version = steps.register(config, plan, split, fusion, judged, run)
            screen.registered(version)
    return version.address


if __name__ == "__main__":
    from flows import command

    about = "Compose registered adapters, compare with full fine-tuning, register the fusion if it passes the gate."
    sys.exit(command.main(fuse, module="flows.fuse", about=about))
