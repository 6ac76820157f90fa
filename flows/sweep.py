"""Try many settings of an adapter over one trunk: validate → split → train all → choose on the validation part.

    python -m flows.sweep --preset tweets --set sweep.learning_rates='[1e-4, 1e-3]' --set sweep.seeds='[0, 1, 2]'
    python -m flows.sweep --preset tweets --set sweep.methods='[pfeiffer, parallel]' \
        --set sweep.reduction_factors='[8, 16]' --set sweep.task_runner=ray
    prefect deployment run sweep/on-demand -p overrides='{"sweep.learning_rates": [0.0001, 0.001]}' --watch

Every combination is a job like any other, and many train in one process: base and rows are read once, and what frozen
layers make of texts is computed once for all that are cut at the same place. Run again it goes on, or says what it
chose. Nothing is registered, and no test score is looked at: flows/retrain.py with the chosen settings does that, and
finds the adapter trained. Exit code 0: chosen. 1: an error, or nothing could be trained.
"""

from __future__ import annotations

import sys
from typing import Any

from prefect import flow

from components import config as configs
from components import variants
from components.config import RetrainConfig
from flows import groups, steps, sweeping
from flows.turns import alone


@flow(name="sweep", persist_result=False)
def sweep(
    config: RetrainConfig | None = None, preset: str | None = None, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train every combination of `config.sweep` with every seed. Returns what the best one changes in `config`, as
    dotted keys.

    config, or a preset of flows/presets; overrides: dotted keys, e.g. {"sweep.seeds": [0, 1, 2]}.

    Raises AdapterlineError.
    """
    config = configs.settle(config, preset, overrides or {})
    tried = variants.of(config)
    with alone(config.model):
        rows = steps.fetch(config)
        plan = sweeping.plan(config, rows, tried)
        if standing := sweeping.up_to_date(config, plan):
            sweeping.show(standing, up_to_date=True)
            return sweeping.settings(standing)
        sweeping.check(config, tried)

        with steps.recorded(config, rows, plan, "sweep") as run:
            steps.validate(config, rows, run)
            split = steps.split(config, rows, run)
            jobs = sweeping.jobs_of(plan, split, tried)
            sweeping.hold(jobs, run)
            failures = groups.train_all(config, tried, jobs)
            choice = sweeping.choose(config, plan, tried, jobs, failures, run)
            sweeping.show(choice)
    return sweeping.settings(choice)


if __name__ == "__main__":
    from flows import command

    about = "Try many settings of an adapter in one process, and choose on the validation part."
    sys.exit(command.main(sweep, module="flows.sweep", about=about, codes="0 chosen, 1 an error", registers=False))
