"""What the rows' way costs: read, validate, clean, split, accept, load; memory and CPU seconds of each, at several sizes.

    python -m tests.benchmarks.rows --rows 100000 500000 5000000

The rows are made up: words of a vocabulary of 50,000 with the frequencies that Zipf's law gives, 3 to 200 a row, 20 on
average, three labels; of a hundred rows two are exact copies in other case, three near copies and one follows a template.
Each step runs in a process of its own and calls what the flow calls. `anonymous` is the peak of memory that only swap
could take back (RssAnon); `resident` counts also pages of files, which the kernel drops when others want the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path("out/benchmarks/rows")
STEPS = ("fetch", "validate", "split", "load")
LABELS = ("complaint", "praise", "question")
VOCABULARY, CHUNK = 50_000, 50_000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rows", description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[100_000, 500_000])
    parser.add_argument("--step", choices=STEPS, help="one step, in this process; what the others left is in --folder")
    parser.add_argument("--folder", type=Path, help="where files go and stay; else a new one, removed at the end")
    options = parser.parse_args(arguments)
    if options.step:
        print(json.dumps(_step(options.step, options.folder)))  # noqa: T201  # for the process that started this one
        return 0
    OUT.mkdir(parents=True, exist_ok=True)
    print("| rows | step | CPU s | µs a row | anonymous MB | resident MB | of it |\n" + "|---" * 7 + "|")  # noqa: T201
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=OUT) as name:
            folder = options.folder or Path(name)
            if not (source := folder / "rows.csv").exists():
                write(source, rows)
            for step in STEPS:
                print(_line(rows, step, *_measured(step, folder)), flush=True)  # noqa: T201  # what it is for
    return 0


def write(path: Path, rows: int, seed: int = 0) -> None:
    """Made-up rows as CSV, chunk by chunk."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, 3 + rank % 8)) + str(rank) for rank in range(VOCABULARY)])
    odds = 1 / (np.arange(VOCABULARY) + 2.7)
    heap = np.cumsum(odds) / odds.sum()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for start in range(0, rows, CHUNK):
            for text, label in _rows(min(CHUNK, rows - start), rng, words, heap):
                file.write(f"{text},{label}\n")


def _rows(count: int, rng: np.random.Generator, words: Any, heap: Any) -> list[tuple[str, str]]:
    lengths = np.clip(rng.lognormal(2.7, 0.75, count), 3, 200).astype(int)
    drawn = words[np.searchsorted(heap, rng.random(lengths.sum()))]
    texts = [" ".join(each) for each in np.split(drawn, np.cumsum(lengths)[:-1])]
    labels = [LABELS[code] for code in rng.choice(3, count, p=(0.5, 0.3, 0.2))]
    kind = rng.random(count)
    for row in np.flatnonzero(kind < 0.06):
        if kind[row] < 0.01:
            texts[row] = f"your order {row} of {rng.integers(10**9)} has been shipped to the address that you gave us"
            continue
        other = int(rng.integers(count))
        labels[row] = labels[other]
        texts[row] = texts[other].upper() if kind[row] < 0.03 else f"{texts[other]} {words[rng.integers(VOCABULARY)]}"
    return list(zip(texts, labels, strict=True))


def _measured(step: str, folder: Path) -> tuple[dict[str, Any], int, int]:
    """What the step says of itself, and its peaks of anonymous and of all resident memory, in kB."""
    command = [sys.executable, "-m", "tests.benchmarks.rows", "--step", step, "--folder", str(folder)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    anonymous = resident = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            sizes = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if " kB" in line}
            anonymous = max(anonymous, sizes.get("RssAnon", 0))
            resident = max(resident, sizes.get("VmHWM", 0))
            time.sleep(0.02)
        told = child.stdout.read() if child.stdout else ""
    if child.returncode:
        raise SystemExit(f"{step} failed")
    return json.loads(told.splitlines()[-1]), anonymous, resident


def _line(rows: int, step: str, told: dict[str, Any], anonymous: int, resident: int) -> str:
    seconds = told.pop("seconds")
    about = ", ".join(f"{name} {value}" for name, value in told.items())
    return (
        f"| {rows:,} | {step} | {seconds:.1f} | {1e6 * seconds / rows:.1f} | {anonymous / 1e3:,.0f} "
        f"| {resident / 1e3:,.0f} | {about} |"
    )


def _step(step: str, folder: Path) -> dict[str, Any]:
    told = globals()[f"_{step}"](folder)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": used.ru_utime + used.ru_stime, **told}


def _fetch(folder: Path) -> dict[str, Any]:
    from flows import steps

    rows = steps.fetch.fn(_config(folder))
    (folder / "fetched").write_bytes(pickle.dumps(rows))
    return {"rows": rows.count}


def _validate(folder: Path) -> dict[str, Any]:
    from components.data import expectations, ledger

    rows = _fetched(folder)
    config = _config(folder)
    report = expectations.validate(ledger.read_table(rows.kept), rows.labels, config.validation)
    return {"unmet": len(report.errors) + len(report.warnings)}


def _split(folder: Path) -> dict[str, Any]:
    from components.data import ledger
    from components.data.rows import clean
    from components.data.split import split

    rows, config = _fetched(folder), _config(folder)
    started = time.process_time()
    cleaned = clean(ledger.read_table(rows.kept), rows.labels)
    cleaning = time.process_time() - started
    parts = split(cleaned, config.split)
    splitting = time.process_time() - started - cleaning
    record = ledger.accept(config.registry.store, config.model, parts, rows.data_digest, "settings", 1)
    (folder / "accepted").write_text(json.dumps([record.split_uri, record.split_digest]))
    dropped = cleaned.exact_duplicates + cleaned.contradicting_rows
    return {
        "dropped": dropped,
        "near": record.near_duplicates,
        "clean s": round(cleaning, 1),
        "split s": round(splitting, 1),
        "accept s": round(time.process_time() - started - cleaning - splitting, 1),
        "digest": record.split_digest[:8],
    }


def _load(folder: Path) -> dict[str, Any]:
    from components.data import ledger

    uri, digest = json.loads((folder / "accepted").read_text())
    parts, _ = ledger.load_parts(uri, digest, folder / "parts")
    return {name: len(table) for name, table in parts.items()}


def _config(folder: Path) -> Any:
    from components.config import parse

    return parse(
        {
            "model": "rows",
            "data": {"source": str(folder / "rows.csv")},
            "registry": {"store": str(folder / "store")},
            "compute": {"workspace": str(folder / "workspace")},
        },
        "the benchmark",
    )


def _fetched(folder: Path) -> Any:
    return pickle.loads((folder / "fetched").read_bytes())  # noqa: S301  # written by the step before


if __name__ == "__main__":
    raise SystemExit(main())
