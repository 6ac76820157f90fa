"""Serving: many adapters in one batch against one, and memory of batch scoring by the number of rows.

    python -m tests.benchmarks.serve                                  # both; minutes
    python -m tests.benchmarks.serve --only mixed --repeats 20
    python -m tests.benchmarks.serve --only stream --rows 10000 5000000

Mixed: batches of 64 rows on MiniLM whose rows are of 1, 8 or 64 adapters in turn, the first half of the layers without.
All are measured again and again by turns, so that a busy machine slows them alike; what counts are ratios of CPU
seconds within a turn. Bar: at most 1.3 times one adapter.

Stream: a process of its own scores a CSV of made-up texts with an adapter on a tiny random base, as many as the largest
of the numbers, and tells its peak memory when it passes each of them: it should not grow with the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OUT = Path("out/bench/serve.json")
BATCH, COUNTS, BAR = 64, (1, 8, 64), 1.3
LEAVE_OUT = [0, 1, 2]  # of MiniLM's six layers
WORDS = (4, 12)  # of a made-up text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.serve", description=__doc__)
    parser.add_argument("--only", choices=("mixed", "stream"))
    parser.add_argument("--method", default="pfeiffer")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64], help="of every text")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 50_000, 200_000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--score", nargs=3, type=Path, metavar=("BUNDLE", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.score:
        _score(*options.score, options.rows, options.threads)
        return 0
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    if options.only != "stream":
        found["mixed"] = [mixed(options.method, tokens, options.repeats, options.threads) for tokens in options.tokens]
    if options.only != "mixed":
        found["stream"] = stream(options.rows, options.threads)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1))
    return 0


def mixed(method: str, tokens: int, repeats: int, threads: int) -> dict[str, Any]:
    """Texts/s and CPU seconds of a batch by number of adapters, and what they take more than one adapter does."""
    import torch
    from peft import get_peft_model

    from components import base_model
    from components.adapters.config import METHODS
    from components.config import BaseConfig

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base, head = base_model.load_classifier(base_model.find(BaseConfig(name="minilm")), ("no", "yes"))
    names = [f"adapter_{number:02d}" for number in range(max(COUNTS))]
    model: Any = get_peft_model(base, _config(METHODS[method], head), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, _config(METHODS[method], head))
    model.eval()
    inputs = {
        "input_ids": torch.randint(1_000, 20_000, (BATCH, tokens)),
        "attention_mask": torch.ones(BATCH, tokens, dtype=torch.long),
    }
    taken: dict[int, list[tuple[float, float]]] = {count: [] for count in COUNTS}
    with torch.inference_mode():
        for turn in range(repeats + 2):
            for count in COUNTS if turn % 2 else COUNTS[::-1]:
                cpu, wall = time.process_time(), time.perf_counter()
                model(**inputs, adapter_names=[names[row % count] for row in range(BATCH)])
                if turn > 1:  # the first ones warm caches
                    taken[count].append((time.process_time() - cpu, time.perf_counter() - wall))
    rows = []
    for count in COUNTS:
        ratios = sorted(mine[0] / one[0] for mine, one in zip(taken[count], taken[1], strict=True))
        cpu, wall = (statistics.median(pair[part] for pair in taken[count]) for part in (0, 1))
        rows.append({
            "adapters": count, "texts_per_s": BATCH / wall, "texts_per_cpu_s": BATCH / cpu,
            "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1],
        })  # fmt: skip
        last = rows[-1]
        _say(f"{method}, {tokens} tokens, {count:2} adapters: {last['texts_per_s']:6.0f} texts/s, "
             f"{last['texts_per_cpu_s']:6.0f} a CPU second, {last['ratio']:.2f} times one adapter "
             f"({last['lowest']:.2f} to {last['highest']:.2f}, n = {len(ratios)}, bar {BAR})")  # fmt: skip
    return {"method": method, "tokens": tokens, "threads": threads, "repeats": repeats, "rows": rows}


def _config(method: Any, head: tuple[str, ...]) -> Any:
    return method(leave_out=LEAVE_OUT, modules_to_save=list(head))


def stream(counts: list[int], threads: int) -> list[dict[str, Any]]:
    """Rows/s and peak memory of scoring when so many rows are done."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        bundle, source = _bundle(Path(name)), Path(name) / "rows.csv"
        size = _write(source, max(counts))
        command = [sys.executable, "-m", "tests.benchmarks.serve", "--threads", str(threads), "--rows"]
        places = (bundle, source, Path(name) / "scored.parquet")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with subprocess.Popen([*command, *map(str, sorted(counts)), "--score", *map(str, places)], text=True,
                              stdout=subprocess.PIPE, env=environment) as process:  # fmt: skip
            for line in process.stdout or ():
                found.append({**json.loads(line), "threads": threads})
                last = found[-1]
                _say(f"{last['rows']:9,} rows: {last['rows_per_s']:6.0f} rows/s, {last['rows_per_cpu_s']:6.0f} a CPU "
                     f"second, peak {last['peak_mb']:.0f} MB ({last['loaded_mb']:.0f} MB once loaded)")  # fmt: skip
        if process.returncode != 0:
            raise SystemExit(process.returncode)
    _say(f"the source has {size / 1e6:.0f} MB")
    return found


def _bundle(folder: Path) -> Path:
    from tests.conftest import make_base
    from tests.training.toy_jobs import finished, saved_split

    return finished(make_base(folder / "base"), saved_split(folder / "split"), "pfeiffer", folder / "bundle", epochs=1)


def _write(path: Path, count: int) -> int:
    """A CSV of texts that differ. Returns its bytes."""
    from tests.conftest import BAD, GOOD, PLAIN

    rng, words = random.Random(0), [*PLAIN, *GOOD, *BAD]  # noqa: S311  # no secret
    with path.open("w", encoding="utf-8") as file:
        file.write("text\n")
        for _ in range(count):
            file.write(" ".join(rng.choices(words, k=rng.randint(*WORDS))) + "\n")
    return path.stat().st_size


def _score(bundle: Path, source: Path, out: Path, counts: list[int], threads: int) -> None:
    """In this process, which does nothing else: a line when it passes each of the counts."""
    import resource

    import torch

    from components.serving import models, scoring, settings

    torch.set_num_threads(threads)
    config = settings.parsed(models=(str(bundle),), source=str(source), out=str(out))
    chosen = models.loaded(config.models)
    loaded, begin, left = _peak(resource), time.process_time(), sorted(counts)

    def passed(done: scoring.Progress) -> None:
        if left and done.rows >= left[0]:
            left.pop(0)
            cpu = time.process_time() - begin
            _say(json.dumps({"rows": done.rows, "rows_per_s": done.rows_per_s, "rows_per_cpu_s": done.rows / cpu,
                             "loaded_mb": loaded, "peak_mb": _peak(resource)}))  # fmt: skip

    assert scoring.score(config, chosen, passed).rows == max(counts)


def _peak(resource: Any) -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024  # which Linux gives in KiB


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201  # what it is for


if __name__ == "__main__":
    sys.exit(main())
