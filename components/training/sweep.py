"""Many trainings in one process: what they read is read once, and the trunk that they share is computed once.

    python -m components.training.sweep ERRANDS

ERRANDS is a JSON file with a list of {"spec": a job spec, "out": where its bundle goes}. Each is the very job that
`components.training.job` would do, with the same result. One that cannot train, of a learning rate that is too high
say, does not keep the others from it. Standard output is a JSON line for each step of each job, for its end, and for
what it logs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from components import disk
from components.errors import AdapterlineError, ConfigError, TrainingError
from components.frozen import Frozen
from components.training import job, memory, progress
from components.training.distributed import end_with_parent
from components.training.material import Shelf
from components.training.progress import Event
from components.training.spec import JobSpec

MODULE = "components.training.sweep"


class Errand(Frozen):
    """A job, and where it leaves its bundle: a folder or an s3:// prefix."""

    spec: JobSpec
    out: str


class News(Frozen):
    """Of the errand with this number: how far it is, or why it failed, or neither when it is done."""

    errand: int
    event: Event | None = None
    failed: str | None = None


ERRANDS: TypeAdapter[tuple[Errand, ...]] = TypeAdapter(tuple[Errand, ...])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Train many bundles in one process.")
    parser.add_argument("errands", type=Path, help="JSON file: a list of job specs, each with its place")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    memory.collect_rarely()
    end_with_parent()  # a worker of Ray that is killed ends no process of its own
    try:
        with progress.notes():
            run(read(options.errands), tell)
    except Exception as error:  # of a library: its message might quote a row, its name does not
        if options.debug:
            raise
        known = error if isinstance(error, AdapterlineError) else disk.full(error)
        line = known or f"unexpected {type(error).__name__}; run the sweep again with --debug to see where"
        sys.stderr.write(f"{line}\n")
        return 1
    return 0


def run(errands: Sequence[Errand], tell: Callable[[News], None]) -> None:
    """Do all that can be done, those that stand on the same trunk one after the other if they come so."""
    shelf = Shelf()
    for number, errand in enumerate(errands):
        try:
            job.run(errand.spec, errand.out, partial(_pass_on, tell, number), shelf=shelf)
        except TrainingError as error:
            tell(News(errand=number, failed=str(error)))
        else:
            tell(News(errand=number))
        gc.collect()  # a model's modules know each other in circles: it would be there beside the next one


def _pass_on(tell: Callable[[News], None], number: int, event: Event) -> None:
    tell(News(errand=number, event=event))


def read(path: Path) -> tuple[Errand, ...]:
    """Raises ConfigError when it is no list of errands."""
    try:
        return ERRANDS.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigError(
            "a list of job specs", f"{type(error).__name__} in {path}", "let flows/sweep.py write it"
        ) from error


def write(errands: Sequence[Errand], path: Path) -> None:
    path.write_bytes(ERRANDS.dump_json(tuple(errands)))


def tell(news: News) -> None:
    """One JSON object a line on standard output."""
    content = {"errand": news.errand, "event": news.event and asdict(news.event), "failed": news.failed}
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def heard(line: str) -> News | None:
    """The news of a line, None for any other line."""
    try:
        return News.model_validate_json(line)
    except ValidationError:
        return None


if __name__ == "__main__":
    sys.exit(main())
