"""What training leaves behind and nothing refers to any more: listed, and removed when told to.

    python -m flows.tidy                     list it; nothing is removed
    python -m flows.tidy --delete            remove it
    python -m flows.tidy --older-than 7      only what nobody has touched for a week; by default a day

Bundles, checkpoints, splits, copies of rows, reports, fetched files, unfinished uploads, and the artifacts of runs and
logged models that MLflow has deleted or forgotten. What a registered version, a record of a model's history, accepted
data or a running job refers to stays, and so do the accepted data's records, the history and the runs in MLflow.
When somebody cannot be asked, nothing is removed that he might refer to. Exit code 0, or 1 for an error.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import time
from pathlib import Path

from components import cache, storage
from components.config import ComputeConfig, RegistryConfig
from components.errors import RegistryError
from components.registry import garbage, removal
from components.registry.survey import Places, Survey, survey
from components.registry.tracking import PATIENCE
from flows.command import one_line_errors, servers
from infra import local

DAY_S = 86_400
SHORTEST = 0.1
PAGE = 200


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.tidy", description="List what nothing refers to any more, and remove it with --delete."
    )
    parser.add_argument("--delete", action="store_true", help="remove what is listed")
    parser.add_argument("--older-than", type=_days, default=1.0, metavar="DAYS", help="spare what is younger; 1")
    parser.add_argument("--store", default=RegistryConfig().store, help="registry.store; %(default)s")
    parser.add_argument("--artifacts", metavar="URI", help="where MLflow keeps artifacts; STORE/mlflow")
    parser.add_argument(
        "--workspace", type=Path, default=Path(ComputeConfig().workspace), help="compute.workspace; %(default)s"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    local.interrupt_on_sigterm()
    with one_line_errors(options.debug, "interrupted: run the same command again to go on") as ending, servers():
        if tidy(options) and not options.delete:
            print(f"to remove these: {shlex.join(['python', '-m', 'flows.tidy', *given, '--delete'])}")
    return ending.code


def tidy(options: argparse.Namespace) -> int:
    """List what is left over, and remove it if told to. Returns how many things that are.

    Raises AdapterlineError when somebody does not answer who must be asked; nothing is removed then.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise RegistryError("an MLflow tracking URI", "none", "set MLFLOW_TRACKING_URI")
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    artifacts = options.artifacts or storage.join(options.store, "mlflow")
    places = Places(options.store, artifacts, options.workspace, cache.folder())

    def look() -> Survey:
        return survey(places, uri, running(), time.time(), options.older_than * DAY_S)

    found = look()
    show(found, time.time(), options.older_than)
    if options.delete and found.leftovers:
        removed = []
        try:
            for thing in garbage.in_both(found.leftovers, look().leftovers):
                if removal.remove(thing, uri):
                    removed.append(thing)
        finally:
            print(f"removed {_count(len(removed))}, {_size(sum(thing.bytes for thing in removed))}", end="")
            rest = len(found.leftovers) - len(removed)
            print(f"; {rest} stay: changed meanwhile, or not reached" if rest else "")
    return len(found.leftovers)


def running() -> set[str] | None:
    """The keys of jobs in deployments that have not ended; None when Prefect does not say."""
    import httpx
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.exceptions import PrefectException
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        return set()  # jobs run here then, and hold their locks
    alive = ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]
    having = FlowRunFilter.model_validate({"state": {"type": {"any_": alive}}})
    tags: set[str] = set()
    try:
        with get_client(sync_client=True) as client:
            offset = 0
            while page := client.read_flow_runs(flow_run_filter=having, limit=PAGE, offset=offset):
                tags.update(tag for run in page for tag in run.tags)
                offset += PAGE
    except (httpx.HTTPError, PrefectException, RuntimeError):
        return None
    return {tag for tag in tags if tag.startswith("job:")}


def show(found: Survey, now: float, days: float) -> None:
    """What is left over as a table, and what stays."""
    from rich.console import Console
    from rich.table import Table

    if found.leftovers:
        table = Table(box=None, pad_edge=False, header_style="")
        for name in ("what", "where", "size", "age", "why"):
            numbers = name in ("size", "age")
            table.add_column(name, justify="right" if numbers else "left", no_wrap=name != "why", overflow="fold")
        for thing in found.leftovers:
            age = _age(now - thing.modified)
            table.add_row(thing.kind, thing.place, _size(thing.bytes), age, thing.reason)
        width = max(len(thing.place) for thing in found.leftovers) + 100
        out = Console(file=io.StringIO(), width=width, color_system=None, markup=False, highlight=False)
        out.print(table)
        text: str = out.file.getvalue()  # type: ignore[attr-defined]
        print("\n".join(line.rstrip() for line in text.splitlines()), end="\n\n")
    total = sum(thing.bytes for thing in found.leftovers)
    print(f"left over  {_count(len(found.leftovers))}, {_size(total)}")
    print(f"stays      {_count(found.kept)}, {_size(found.kept_bytes)}: referred to, held, or younger than {days:g} d")
    for note in found.notes:
        print(f"note       {note}")


def _count(number: int) -> str:
    return f"{number:,} thing{'' if number == 1 else 's'}"


def _size(size: int) -> str:
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def _age(seconds: float) -> str:
    return f"{seconds / DAY_S:.0f} d" if seconds >= 2 * DAY_S else f"{seconds / 3600:.0f} h"


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not SHORTEST <= days < float("inf"):  # what runs has to have had the time to say what it needs
        raise argparse.ArgumentTypeError(f"expected a number of days, at least {SHORTEST:g}; found {text}")
    return days


if __name__ == "__main__":
    sys.exit(main())
