"""Where a retrain's seconds go: wall and CPU of each of its parts, of all processes that it starts.

    python -m tests.benchmarks.retrain --rows 10000

Starts a stack of its own, makes rows with labels that can be learned, retrains on the embedded base and runs the same
once more ("up to date"). Prints both as Markdown and leaves the numbers in out/bench/retrain.json. The servers' own
CPU is not counted.

CPU of a moment is that of the run's process and of all below it, those that have ended included. A job begins with its
first step and ends with its last epoch: what lies before and after is not training.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

OUT = Path("out/bench/retrain.json")
HOME = Path(__file__).parent.parent.parent
WORDS = """time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city name president team minute idea body back parent face others level office
door health person art war history party result change morning reason research girl guy moment air teacher force"""
TELLING = {
    "yes": "good great happy best love nice fine sweet bright warm",
    "no": "bad worse sad hate poor wrong sick dark cold lost",
}
SETTINGS = {
    "model": "overhead",
    "adapter": {"schedule": {"epochs": 1, "learning_rates": {"body": 1e-3, "layer_norm": 1e-3, "head": 1e-3}}},
    "baseline": {"schedule": {"epochs": 1, "learning_rates": {"body": 5e-5, "layer_norm": 5e-5, "head": 5e-4}}},
    "training": {"max_tokens": 32},
    # Registering is a part: every verdict of one epoch has to pass.
    "gate": {"margin": 0.9, "champion_margin": 0.9, "slice_margin": 0.9},
    "report": {"examples": ["a good day", "a cold night"]},
}
STEPS = ("fetch", "plan", "up_to_date", "check", "validate", "split", "register")
NAMES = {"up_to_date": "up to date?", "validate": "validation", "side_by_side": "jobs", "register": "registration"}


@dataclass
class Part:
    """Seconds of wall clock and CPU, and how many of the latter went into imports of the run's own process."""

    wall: float = 0.0
    cpu: float = 0.0
    imports: float = 0.0


@dataclass
class Job:
    """One job's process: until its first step, until its last epoch ended, and until it was over."""

    start: Part = field(default_factory=Part)
    training: Part = field(default_factory=Part)
    end: Part = field(default_factory=Part)
    cache_seconds: float | None = None


@dataclass
class Measured:
    """A run: its parts in order, its jobs by role, and the process from which others are forked."""

    parts: dict[str, Part] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    libraries: float = 0.0
    total: Part = field(default_factory=Part)


def cpu_of(process: psutil.Process) -> float:
    """CPU seconds of a process and of its children that have ended."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def cpu_below() -> float:
    me, found = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            found += cpu_of(process)
        except psutil.Error:  # it ended: its parent has its seconds now
            continue
    return found


class Imports:
    """CPU seconds that `import` statements of this thread took."""

    def __init__(self) -> None:
        self.seconds, self._inside, self._real = 0.0, False, builtins.__import__
        self._thread = threading.get_ident()
        builtins.__import__ = self._timed

    def _timed(self, *arguments: Any, **named: Any) -> Any:
        if self._inside or threading.get_ident() != self._thread:
            return self._real(*arguments, **named)
        self._inside, begin = True, time.thread_time()
        try:
            return self._real(*arguments, **named)
        finally:
            self._inside = False
            self.seconds += time.thread_time() - begin


def measure(configuration: str) -> tuple[int, Measured]:
    """Run `flows.retrain` in this process with its steps watched; nothing in the flow knows of it."""
    measured, imports = Measured(), Imports()
    begun = psutil.Process().create_time()

    def watched(module: Any, name: str) -> None:
        function = getattr(module, name)

        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            wall, cpu, imported = time.time(), cpu_below(), imports.seconds
            try:
                return function(*arguments, **named)
            finally:
                part = Part(time.time() - wall, cpu_below() - cpu, imports.seconds - imported)
                measured.parts[NAMES.get(name, name)] = part

        setattr(module, name, called)

    from components import forks
    from flows import command, jobs, judging, retrain, steps

    measured.parts["imports"] = Part(time.time() - begun, cpu_below(), imports.seconds)
    for name in STEPS:
        watched(steps, name)
    watched(judging, "gate")
    watched(retrain, "side_by_side")
    jobs.run = _watching_jobs(jobs.run, forks, measured)  # type: ignore[assignment]
    code = command.main(retrain.retrain, ["--config", configuration])
    measured.libraries = sum(
        float(sum(each.cpu_times()[:2])) for each in psutil.Process().children() if forks.__file__ in each.cmdline()
    )
    measured.total = Part(time.time() - begun, cpu_below(), imports.seconds)
    return code, measured


def _watching_jobs(run: Callable[..., None], forks: Any, measured: Measured) -> Callable[..., None]:
    """`jobs.run` that notes what each job's process has used at its first event, its last one, and its end."""
    process: dict[int, Any] = {}  # of each thread
    start = forks.start

    def starting(*arguments: Any, **named: Any) -> Any:
        process[threading.get_ident()] = found = start(*arguments, **named)
        return found

    forks.start = starting

    def used(seen: list[tuple[float, float]], pid: int) -> None:
        """Until it ends, every tenth of a second."""
        try:
            while True:
                seen[0] = (time.time(), cpu_of(psutil.Process(pid)))
                time.sleep(0.1)
        except psutil.Error:
            return

    def called(spec: Any, path: str, out: str, mlflow_run: str, uri: str, hours: float, report: Any) -> None:
        begun, events = time.time(), []
        latest: list[tuple[float, float]] = [(begun, 0.0)]

        def reporting(event: Any) -> None:
            pid = process[threading.get_ident()].pid
            if not events:
                threading.Thread(target=used, args=(latest, pid), daemon=True).start()
            events.append((time.time(), cpu_of(psutil.Process(pid))))
            report(event)

        run(spec, path, out, mlflow_run, uri, hours, reporting)
        points = [(begun, 0.0), events[0], events[-1], (time.time(), latest[0][1])]
        parts = [Part(late[0] - early[0], late[1] - early[1]) for early, late in itertools.pairwise(points)]
        seconds = json.loads((Path(out) / "metrics.json").read_bytes()).get("cache_seconds")
        measured.jobs["baseline" if spec.method == "full" else "adapter"] = Job(*parts, seconds)

    return called


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """CSV of texts of 8 to 14 words, of which two mostly tell the label."""
    import csv

    rng = random.Random(seed)  # noqa: S311  # not for secrets
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label"))
        for number in range(count):
            label, other = ("no", "yes") if number % 2 else ("yes", "no")
            words = rng.sample(WORDS.split(), rng.randint(6, 12))
            words += (rng.choice(TELLING[label if rng.random() < 0.95 else other].split()) for _ in range(2))
            rng.shuffle(words)
            rows.writerow((" ".join(words), label))


def table(measured: Measured) -> str:
    lines = ["| part | wall, s | CPU, s | of which imports |", "|---|--:|--:|--:|"]

    def line(name: str, part: Part, imports: str = "") -> None:
        lines.append(f"| {name} | {part.wall:.1f} | {part.cpu:.1f} | {imports or f'{part.imports:.1f}'} |")

    for name, part in measured.parts.items():
        line(name, part)
        if name == NAMES["side_by_side"]:
            for role, job in measured.jobs.items():
                for when in ("start", "training", "end"):
                    line(f"· {role}, {when}", getattr(job, when), "–")
                if job.cache_seconds is not None:
                    lines.append(f"| · {role}, of its start the trunk cache | {job.cache_seconds:.1f} | – | – |")
    parts = measured.parts.values()
    total = measured.total
    line("rest", Part(*(getattr(total, each) - sum(getattr(part, each) for part in parts) for each in asdict(total))))
    line("all", total)
    trained = sum(job.training.cpu for job in measured.jobs.values())
    lines.append(f"| all but training | – | {total.cpu - trained:.1f} | {total.imports + measured.libraries:.1f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.retrain", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--watch", nargs=2, help=argparse.SUPPRESS)  # one run in this process: configuration, answer
    options = parser.parse_args()
    if options.watch:
        code, measured = measure(options.watch[0])
        Path(options.watch[1]).write_text(json.dumps(asdict(measured)))
        return code
    with tempfile.TemporaryDirectory() as name:
        found = _on_a_stack(Path(name), options.rows)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"rows": options.rows, "cores": os.cpu_count(), "runs": found}, indent=2))
    for title, run in found.items():
        jobs = {
            role: Job(*(Part(**job[when]) for when in ("start", "training", "end")), job["cache_seconds"])
            for role, job in run["jobs"].items()
        }
        parts = {part: Part(**seconds) for part, seconds in run["parts"].items()}
        measured = Measured(parts, jobs, run["libraries"], Part(**run["total"]))
        print(f"\n{title}, {options.rows:,} rows, {os.cpu_count()} cores\n\n{table(measured)}")  # noqa: T201
    return 0


def _on_a_stack(folder: Path, rows: int) -> dict[str, Any]:
    """A retrain and the same once more, against servers of their own."""
    from infra import environment

    write_rows(folder / "rows.csv", rows)
    configuration = folder / "overhead.json"  # YAML reads JSON
    settings = {"data": {"source": str(folder / "rows.csv")}, "compute": {"workspace": str(folder / "work")}}
    configuration.write_text(json.dumps({**SETTINGS, **settings}))
    bare = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "AWS_"))}
    bare["PYTHONPATH"] = str(HOME)
    stack, found = folder / "stack", {}

    def infra(verb: str) -> None:
        command = [sys.executable, "-m", "infra.local", "--folder", str(stack), verb]
        subprocess.run(command, cwd=folder, env=bare, check=True, stdout=sys.stderr)

    infra("up")
    try:
        running = environment.supervised(stack)
        assert running is not None
        for title in ("retrain", "up to date"):
            answer = folder / "measured.json"
            command = [sys.executable, "-m", __spec__.name, "--watch", str(configuration), str(answer)]
            subprocess.run(command, env={**bare, **running.environment}, check=True, stdout=sys.stderr)
            found[title] = json.loads(answer.read_bytes())
    finally:
        infra("down")
    return found


if __name__ == "__main__":
    sys.exit(main())
