"""Batch scoring: labels and probabilities for the rows of a file, in bounded memory whatever their number.

    python -m flows.score --model tweets-sentiment@production --source rows.csv --out scored.parquet
    python -m flows.score --model mood@production --model topic/3 --source s3://bucket/rows/ --out s3://bucket/scored.csv
    prefect deployment run score/on-demand -p config='{"models": [...], "source": "...", "out": "..."}' --watch

Several models on one base share what they can: the layers below the first adapter run once for all. By hand it asks no
Prefect server. Exit code 0: done. 1: an error; nothing is at --out then.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

from prefect import flow

from components.serving import models, scoring, settings
from components.serving.settings import ScoreConfig
from components.training.distributed import find_device
from flows.command import listen, one_line_errors, servers
from infra import local

if TYPE_CHECKING:
    from components.serving.scoring import Progress

EVERY_S = 30

log = logging.getLogger("adapterline")


@flow(name="score", persist_result=False)
def score(config: ScoreConfig) -> int:
    """Write the answers of `config.models` to the rows of `config.source`. Returns how many rows there were.

    Raises AdapterlineError; nothing is at `config.out` then.
    """
    chosen = models.loaded(config.models, find_device(config.device).type)
    log.info("models    %s", ", ".join(f"{name} ({len(labels)} labels)" for name, labels in chosen.labels.items()))
    for fleet in chosen.fleets:
        log.info("          %s share one base", ", ".join(fleet.manifests))
    with Meter() as meter:
        done = scoring.score(config, chosen, meter)
    log.info(
        "scored    %s rows in %.0f s, %.0f rows/s: %s", f"{done.rows:,}", done.seconds, done.rows_per_s, config.out
    )
    if done.without_text:
        log.info("          %s rows without text have no answer", f"{done.without_text:,}")
    return done.rows


class Meter:
    """How far it is: a bar on a terminal, a line of the log every half minute elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("          {task.description}"), BarColumn(20), TextColumn("left"), TimeRemainingColumn())
        self._bar = Progress(*columns, transient=True)
        self._bar.disable = not self._bar.console.is_terminal
        self._task = self._bar.add_task("scoring")
        self._told = time.monotonic()

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: Progress) -> None:
        words = f"{done.rows:,} of about {done.total:,} rows · {done.rows_per_s:.0f} rows/s"
        self._bar.update(self._task, completed=done.rows, total=done.total, description=words)
        if self._bar.disable and time.monotonic() - self._told > EVERY_S:
            self._told = time.monotonic()
            log.info("          %s · %.0f s left", words, done.eta_s)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.score",
        description="Score the rows of a file with registered models or bundles.",
        epilog="exit code: 0 done, 1 an error (nothing is at --out then)",
    )
    known = ScoreConfig.model_fields
    parser.add_argument("--model", action="append", required=True, dest="models", help=known["models"].description)
    for name in ("source", "out"):
        parser.add_argument(f"--{name}", required=True, help=known[name].description)
    for name in ("text", "text_pair", "id"):
        parser.add_argument(f"--{name.replace('_', '-')}", default=known[name].default, help=known[name].description)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    options = vars(parser.parse_args(arguments))
    debug = options.pop("debug")
    listen(debug)
    local.interrupt_on_sigterm()
    with one_line_errors(debug, "interrupted: nothing was written") as ending:
        config = settings.parsed(**options)
        with servers() if any(map(models.is_registered, config.models)) else nullcontext():
            score.fn(config)
    return ending.code


if __name__ == "__main__":
    sys.exit(main())
