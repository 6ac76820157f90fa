"""Every method on several tasks and seeds, as a table in Markdown.

    python -m tests.benchmarks.methods                                     # everything: hours
    python -m tests.benchmarks.methods --tasks tweets --methods pfeiffer lora --seeds 0 --epochs 3

Tasks are presets, and `banking77` where that data set lies beside the checkout. Settings of methods are those of their
presets. Each job's bundle is kept in out/benchmarks, so that a run that was cut off goes on. The split is the same for
all; a seed decides the drawn weights and the order of batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components import base_model
from components.config import RetrainConfig, load_preset, parse
from components.data import ledger, rows, sources
from components.data.split import split
from components.presets import METHODS, content
from components.registry import bundle
from components.training.spec import DataRef, JobSpec, Limits, code_version
from tests.conftest import SHARED

OUT = Path("out/benchmarks")
TASKS = ("tweets", "movies", "banking77")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantiles of t for so many seeds (n - 1 degrees)


@dataclass(frozen=True)
class Cell:
    """One method on one task: accuracies on the test part, one a seed, and what the first seed's bundle is like.

    seconds: of training, with the fastest seed: what else a machine does only adds to them.
    """

    accuracies: list[float]
    trained: int
    share: float
    bytes: int
    seconds: float

    def __str__(self) -> str:
        mean = 100 * statistics.mean(self.accuracies)
        if len(self.accuracies) < 2:
            return f"{mean:.1f}"
        spread = 100 * statistics.stdev(self.accuracies) / len(self.accuracies) ** 0.5
        return f"{mean:.1f} ± {STUDENT[len(self.accuracies)] * spread:.1f}"


def main(arguments: list[str] | None = None) -> int:
    methods = [*sorted(file.stem for file in METHODS.glob("*.yaml")), "full"]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.methods", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="at most so many, instead of the presets'")
    parser.add_argument("--rows", type=int, help="of a task at most so many, drawn once; split like the presets'")
    parser.add_argument("--at-once", type=int, default=2, help="jobs side by side, one thread each")
    options = parser.parse_args(arguments)
    data = {task: _data(_config(task), options.rows) for task in options.tasks}
    wanted = [(task, method, seed) for task in options.tasks for method in options.methods for seed in options.seeds]

    def run(what: tuple[str, str, int]) -> tuple[tuple[str, str, int], Path]:
        task, method, seed = what
        folder = _bundle(_spec(task, method, seed, options.epochs, *data[task]))
        print(f"{task} {method} {seed}: {folder}", file=sys.stderr)  # noqa: T201  # for a person who waits
        return what, folder

    with ThreadPoolExecutor(options.at_once) as pool:
        folders = dict(pool.map(run, wanted))
    print(_table(options.tasks, options.methods, options.seeds, folders))  # noqa: T201  # what it is for
    return 0


def _config(task: str, method: str | None = None) -> RetrainConfig:
    if task != "banking77":
        return load_preset(f"{task}+{method}" if method else task)
    columns = {"text": "text", "label": "category"}
    own: dict[str, Any] = {"model": "banking77", "data": {"source": str(_banking77()), "columns": columns}}
    own |= {"training": {"max_tokens": 64}, "split": {"test": 0.3}}
    return parse({**own, **(content(METHODS / f"{method}.yaml") if method else {})}, "the benchmark")


def _banking77() -> Path:
    """Both of its files, as one."""
    folder = SHARED / "banking77"
    if not folder.is_dir():
        raise SystemExit(f"expected the data set banking77 at {folder}; found none; leave it out of --tasks")
    whole = OUT / "banking77.csv"
    whole.parent.mkdir(parents=True, exist_ok=True)
    train, test = ((folder / f"{part}.csv").read_text(encoding="utf-8") for part in ("train", "test"))
    whole.write_text(train.rstrip("\n") + "\n" + test.split("\n", 1)[1], encoding="utf-8")
    return whole


def _data(config: RetrainConfig, most: int | None) -> tuple[DataRef, tuple[str, ...]]:
    read = sources.read(config.data)
    labels = rows.label_names(read.table, config.data.labels)
    table = read.table
    if most and most < len(table):
        table = table.shuffle(seed=0).select(range(most))
    parts = split(rows.clean(table, labels), config.split)
    folder = OUT / "splits" / parts.digest[:16]
    if not folder.is_dir():
        ledger.save(parts, str(folder))
    return DataRef(uri=str(folder), digest=parts.digest), labels


def _spec(task: str, method: str, seed: int, epochs: int | None, data: DataRef, labels: tuple[str, ...]) -> JobSpec:
    full = method == "full"
    config = _config(task, None if full else method)
    schedule = config.baseline.schedule if full else config.adapter.schedule
    if epochs:
        schedule = schedule.model_copy(update={"epochs": min(epochs, schedule.epochs)})
    return JobSpec(
        method=method,  # type: ignore[arg-type]  # the parser took it from the presets
        base=base_model.find(config.base).pin,
        data=data,
        labels=labels,
        settings=None if full else config.adapter.settings,
        schedule=schedule,
        training=config.training,
        limits=Limits(threads=1, device="cpu"),
        seed=seed,
        code=code_version(),
    )


def _bundle(spec: JobSpec) -> Path:
    """Runs the job in a process of its own, unless its bundle is there."""
    folder = OUT / "jobs" / f"{spec.method}-{spec.digest[:16]}"
    if not bundle.is_complete(folder):
        written = OUT / "specs" / f"{spec.digest[:16]}.json"
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(spec.model_dump_json())
        command = [sys.executable, "-m", "components.training.job", str(written), str(folder), "--progress", "json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def _cell(folders: list[Path]) -> Cell:
    measured = [json.loads((folder / "metrics.json").read_bytes()) for folder in folders]
    manifest = bundle.read_manifest(folders[0])
    return Cell(
        [each["test"]["accuracy"] for each in measured],
        manifest.trained_parameters,
        manifest.trained_share,
        manifest.bytes,
        min(each["training_seconds"] for each in measured),
    )


def _table(tasks: list[str], methods: list[str], seeds: list[int], folders: dict[tuple[str, str, int], Path]) -> str:
    lines = [
        f"| method | {' | '.join(f'{task} | s' for task in tasks)} | trained | bundle |",
        f"|---|{'---:|---:|' * len(tasks)}---:|---:|",
    ]
    for method in methods:
        cells = [_cell([folders[task, method, seed] for seed in seeds]) for task in tasks]
        scores = " | ".join(f"{cell} | {cell.seconds:.0f}" for cell in cells)
        size = f"{cells[0].bytes / 1e3:,.0f} kB"
        lines.append(f"| {method} | {scores} | {cells[0].trained:,} ({cells[0].share:.2%}) | {size} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
