"""Adapters against AdapterHub's and against full fine-tuning: side by side, in one run, on the same rows.

    python -m tests.benchmarks.train                                  # make bench: hours, as the peer is slow
    python -m tests.benchmarks.train --epochs-of peer=1 peer_half=1 --only-seed peer=0 peer_half=0
    python -m tests.benchmarks.train --rows 300 --test-rows 200 --epochs 1 --seeds 0 --variants ours peer_tuned

All train on the same token ids in batches of the same size, at the same learning rate, for the same epochs, each in a
process of its own and in turn, so that whatever else the machine does falls on all. The peer is `adapters` 1.3.0 in a
virtual environment of its own. On the clock is training, with the cache that we build for it; not imports, loading, or
scoring the test rows after each epoch. Samples are kept in OUT/train.json as they come: a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from components import base_model, digest
from components.config import BaseConfig, ComputeConfig
from components.errors import AdapterlineError
from components.training.kernels import shape_of
from components.training.spec import code_version
from tests.benchmarks import peer, prepared, standings, work
from tests.benchmarks.rivals import RIVALS, Setup, run

BOTTLENECK = 16  # reduction factor


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training under way ends too
    if options.data is None and not prepared.DEPRESSION.is_file():
        _say(f"skipped: expected {prepared.DEPRESSION}; found none; pass --data FILE, or a preset: --data tweets")
        return 0
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    config = _base_config(options.base)
    data = prepared.source(options.data, options.text, options.label)
    shared = prepared.prepare(data, options.base, options.rows, options.test_rows, options.max_tokens, out / "data")
    needs_peer = any(RIVALS[name].runs == "peer" for name in options.variants)
    setup = Setup(
        data=shared,
        base=options.base,
        layers=config.num_hidden_layers,
        max_tokens=options.max_tokens,
        batch=options.batch,
        adapter_rate=options.adapter_rate,
        full_rate=options.full_rate,
        threads=options.threads,
        trunk_cache_gb=options.trunk_cache_gb,
        bf16=_bf16(),
        python=peer.python(out / "peer-venv") if needs_peer else "",
    )
    record = Record(out / "train.json", setup)
    wanted = [
        (name, options.epochs_of.get(name, options.epochs), seed, repeat)
        for seed in options.seeds
        for repeat in range(options.repeats)
        for name in options.variants
        if options.only_seed.get(name, seed) == seed
    ]
    measured = None
    for number, what in enumerate(wanted, 1):
        name, epochs, seed, repeat = what
        if record.has(*what):
            continue
        _say(f"{number} of {len(wanted)}: {RIVALS[name].title}, {epochs} epochs, seed {seed}")
        if what[2:] != measured:  # once a round
            measured = what[2:]
            # Where bfloat16 is imitated one product takes a minute, and nobody computes in it.
            for precision in ("float32", "bfloat16") if setup.bf16 else ("float32",):
                record.peak(precision, work.peak(precision, torch.device("cpu"), setup.threads))
        sample = run(name, setup, epochs, seed, out / "runs" / f"{name}-{seed}-{repeat}")
        record.add(sample, *what)
        _say("    " + ", ".join(f"{epoch['seconds']:.1f} s: {epoch['accuracy']:.1%}" for epoch in sample["epochs"]))
    _report(record, wanted, setup, config, out)
    return 0


class Record:
    """The JSON file: every raw sample with what it was measured under, and the peaks of the device."""

    def __init__(self, path: Path, setup: Setup) -> None:
        self.path = path
        about = {**asdict(setup), "python": "", "data": {"digest": setup.data.digest}}
        self.setup = digest.of_json(about)[:16]
        self.content: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {"samples": [], "peaks": {}}
        self.content |= {"setup": about, "machine": work.name_of(torch.device("cpu"))}

    def has(self, name: str, epochs: int, seed: int, repeat: int) -> bool:
        return self.sample(name, epochs, seed, repeat) is not None

    def sample(self, name: str, epochs: int, seed: int, repeat: int) -> dict[str, Any] | None:
        key = self._key(name, epochs, seed, repeat)
        return next((each for each in self.content["samples"] if each["key"] == key), None)

    def add(self, sample: dict[str, Any], name: str, epochs: int, seed: int, repeat: int) -> None:
        about = {"name": name, "seed": seed, "repeat": repeat, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        self.content["samples"].append({"key": self._key(name, epochs, seed, repeat), **about, **sample})
        self.save()

    def peak(self, precision: str, value: float) -> None:
        self.content["peaks"].setdefault(self.setup, {}).setdefault(precision, []).append(value)

    def best_peak(self, precision: str) -> float | None:
        return max(self.content["peaks"].get(self.setup, {}).get(precision, []), default=None)

    def save(self) -> None:
        written = self.path.with_suffix(".part")
        written.write_text(json.dumps(self.content, indent=2))
        written.replace(self.path)

    def _key(self, name: str, epochs: int, seed: int, repeat: int) -> str:
        code = code_version()[:12] if RIVALS[name].runs == "ours" else ""
        return f"{self.setup} {name} epochs={epochs} seed={seed} repeat={repeat} {code}".strip()


def _report(record: Record, wanted: list[tuple[str, int, int, int]], setup: Setup, config: Any, out: Path) -> None:
    by_rival: dict[str, list[dict[str, Any]]] = {}
    for what in wanted:
        by_rival.setdefault(what[0], []).append(record.sample(*what) or {})
    lengths, found, sizes = setup.data.lengths(), {}, shape_of(config)
    for name, samples in by_rival.items():
        rival = RIVALS[name]
        shape = work.Shape(
            layers=config.num_hidden_layers,
            hidden=sizes.hidden,
            feed_forward=sizes.inner,
            labels=len(setup.data.labels),
            heads=sizes.heads,
            bottleneck=0 if rival.full else sizes.hidden // BOTTLENECK,
            first=len(setup.left_out(rival)),
        )
        precision = "bfloat16" if rival.low and setup.bf16 else "float32"
        debt = work.owed(shape, lengths, len(samples[0]["epochs"]))
        found[name] = standings.standing(samples, debt, record.best_peak(precision))
    wall, cpu = standings.ratios(found, 0), standings.ratios(found, 1)
    times = standings.to_99(by_rival) if "full_hf" in by_rival else {}
    ours = [seconds for name in ("ours", "ours_half") if (seconds := times.get(name)) is not None]
    if ours and (full := times.get("full_hf")) is not None:
        wall["time_to_99_vs_full"] = full / min(ours)
    record.content |= {
        "ratios": wall,
        "ratios_cpu": cpu,
        "seconds_to_99": times,
        "standings": {name: asdict(each) for name, each in found.items()},
    }
    record.save()
    title = f"{len(lengths):,} training rows, {setup.threads} threads, {record.content['machine']}"
    standings.plot(by_rival, title, out / "train.png")
    peaks = ", ".join(
        f"{best / 1e9:,.0f} GFLOPS {name}" for name in ("float32", "bfloat16") if (best := record.best_peak(name))
    )
    _say(f"\n{title}; {int(lengths.sum()):,} tokens an epoch; torch.mm: {peaks}\n")
    _say(standings.table(found))
    if times:
        _say("\nseconds to 99 % of full fine-tuning's accuracy")
        for name, seconds in times.items():
            _say(f"  {RIVALS[name].title:28} {f'{seconds:7.1f}' if seconds else '  never'}")
    _say("\n" + standings.bars(wall, cpu, found.get("ours")))
    _say(f"\n{out / 'train.json'}: every sample; {out / 'train.png'}: accuracy against seconds")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--variants", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=1, help="trainings of each variant and seed")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--epochs-of", nargs="+", type=_pair, default=[], metavar="VARIANT=N")
    parser.add_argument("--only-seed", nargs="+", type=_pair, default=[], metavar="VARIANT=SEED")
    parser.add_argument("--rows", type=int, default=3_000, help="for training, at most")
    parser.add_argument("--test-rows", type=int, default=1_231, help="at most")
    parser.add_argument("--data", help="a preset or a file; the posts of the first experiment if left out")
    parser.add_argument("--text", default="text", help="column of a --data file")
    parser.add_argument("--label", default="label", help="column of a --data file")
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--adapter-rate", type=float, default=1e-3, help="learning rate of all with adapters")
    parser.add_argument("--full-rate", type=float, default=5e-5, help="and of full fine-tuning, everybody's")
    parser.add_argument("--threads", type=int, default=work.cores())
    parser.add_argument("--trunk-cache-gb", type=float, default=ComputeConfig().trunk_cache_gb)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    options = parser.parse_args(arguments)
    options.epochs_of, options.only_seed = dict(options.epochs_of), dict(options.only_seed)
    return options


def _pair(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in RIVALS or not number.isdecimal():
        raise argparse.ArgumentTypeError(
            f"expected VARIANT=NUMBER with a variant of {', '.join(RIVALS)}; found {text!r}"
        )
    return name, int(number)


def _base_config(name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base_model.find(BaseConfig(name=name)).path)


def _bf16() -> bool:
    """Can the CPU? It does then for the tuned peer; our jobs measure whether it is faster."""
    from components.training.precision import cpu_has_bf16

    return cpu_has_bf16()


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201  # for a person who waits


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AdapterlineError as error:
        sys.exit(f"error: {error}")
