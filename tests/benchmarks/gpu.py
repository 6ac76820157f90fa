"""Training on a GPU: tokens a second, share of the device's matmul peak, peak memory, at several lengths.

    python -m tests.benchmarks.gpu                                             # BERT-base's shape, 128 and 512 tokens
    python -m tests.benchmarks.gpu --device cpu --layers 2 --hidden 128 --lengths 32 --batch 4 --steps 2

Needs PyTorch, transformers and PEFT and nothing else, so that a bare machine with a GPU runs it from a checkout.
Weights and tokens are random, all rows of one length, nothing has dropout: what is learned does not matter here.
`plain` is a loop as PEFT's users write it, under autocast; `ours` is the loop of our jobs. Rivals take turns, and a
table of medians follows. The first epoch warms up, and what is done once is done there; it is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.benchmarks import work

VOCABULARY, LABELS, REDUCTION = 30_522, 2, 16
RATE = 1e-4
CACHE_BYTES = 20 * 10**9


@dataclass(frozen=True)
class Task:
    """What all train in one round. rows: (rows, length) token ids, steps · batch of them."""

    rows: torch.Tensor
    labels: torch.Tensor
    batch: int
    epochs: int
    device: torch.device
    low: bool


@dataclass(frozen=True)
class Rival:
    """half: the first half of the layers has no adapters."""

    train: Callable[[Any, Task], list[float]]
    full: bool = False
    half: bool = False


def plain(model: Any, task: Task) -> list[float]:
    """Seconds of each epoch of a loop without any thought."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE, fused=True)
    rows, labels = task.rows.to(task.device), task.labels.to(task.device)
    model.train()
    seconds = []
    for _ in range(task.epochs):
        order = torch.randperm(len(rows), device=task.device).split(task.batch)
        work.synchronise(task.device)
        begin = time.perf_counter()
        for chosen in order:
            with torch.autocast(task.device.type, torch.bfloat16) if task.low else nullcontext():
                logits = model(input_ids=rows[chosen], attention_mask=torch.ones_like(rows[chosen])).logits
            loss = nn.functional.cross_entropy(logits.float(), labels[chosen])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        work.synchronise(task.device)
        seconds.append(time.perf_counter() - begin)
    return seconds


def ours(model: Any, task: Task, cache: bool = False) -> list[float]:
    """Seconds of each epoch of our jobs' loop. cache: with the frozen trunk computed once, in the first."""
    from components.config import TrainingConfig
    from components.methods import LearningRates, Schedule
    from components.training import loop, progress
    from components.training.batching import Tokens
    from components.training.passes import Means
    from components.training.trunk_cache import TrunkCache

    rates = LearningRates(body=RATE, layer_norm=RATE, head=RATE)
    schedule = Schedule(epochs=task.epochs, patience=task.epochs, learning_rates=rates)
    training = TrainingConfig(batch_size=task.batch, max_tokens=task.rows.shape[1])
    ids = task.rows.numpy().astype(np.int32)
    train = Tokens(list(ids), None, task.labels.numpy(), np.zeros(len(ids), dtype=bool))
    few = Tokens(list(ids[:2]), None, np.arange(2), np.zeros(2, dtype=bool))
    ends = [0.0]

    def keep(state: loop.State, best: bool) -> None:
        if state.batch == 0:  # an epoch ended
            ends.append(state.seconds)

    learner = loop.learner(model, schedule, training, len(ids), task.device)
    with tempfile.TemporaryDirectory() as folder:
        means = Means(TrunkCache(Path(folder), CACHE_BYTES) if cache else None, "random")
        loop.fit(learner, train, few, schedule, training, 0, 0, loop.State(), progress.nowhere, keep, means)
    return np.diff(ends).tolist()


RIVALS = {
    "full, plain": Rival(plain, full=True),
    "pfeiffer, plain": Rival(plain),
    "pfeiffer, ours": Rival(ours),
    "pfeiffer, ours with cache": Rival(partial(ours, cache=True)),
    "pfeiffer upper half, plain": Rival(plain, half=True),
    "pfeiffer upper half, ours": Rival(ours, half=True),
    "pfeiffer upper half, ours with cache": Rival(partial(ours, cache=True), half=True),
}


def main(arguments: list[str] | None = None) -> int:
    from components.training.kernels import Shape
    from components.training.precision import arithmetic

    options = _options(arguments)
    os.environ.setdefault("ADAPTERLINE_CACHE", str((options.out.parent / "cache").resolve()))
    device = torch.device(options.device)
    low = arithmetic(device, "auto", Shape(options.hidden, 4 * options.hidden, options.hidden // 64)).low
    precision = "bfloat16" if low else "float32"
    peak = work.peak(precision, device)
    samples: list[dict[str, Any]] = []
    for length in options.lengths:
        for repeat in range(options.repeats):
            for name, rival in RIVALS.items():
                samples.append({"length": length, "name": name, **_sample(rival, length, options, device, low, repeat)})
    for sample in samples:
        sample["share"] = sample["owed"] / sample["seconds"] / peak
    about = {"device": work.name_of(device), "precision": precision, "peak": peak, "torch": torch.__version__}
    settings = {name: getattr(options, name) for name in ("layers", "hidden", "batch", "steps", "epochs")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**about, **settings, "samples": samples}, indent=2))
    print(f"{about['device']}, torch {torch.__version__}, torch.mm {peak / 1e12:,.2f} TFLOPS {precision}")  # noqa: T201
    print(_table(samples))  # noqa: T201
    return 0


def _sample(
    rival: Rival, length: int, options: argparse.Namespace, device: torch.device, low: bool, seed: int
) -> dict[str, Any]:
    """One training. seconds: median of the epochs after the first.  first: of the first.  owed: operations an epoch."""
    torch.manual_seed(seed)
    rows = torch.randint(1_000, VOCABULARY, (options.steps * options.batch, length))
    task = Task(rows, torch.arange(len(rows)) % LABELS, options.batch, options.epochs, device, low)
    left_out = tuple(range(options.layers // 2)) if rival.half else ()
    model = _model(rival, options, length, left_out).to(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    first, *later = rival.train(model, task)
    seconds = statistics.median(later)
    shape = work.Shape(
        options.layers,
        options.hidden,
        4 * options.hidden,
        LABELS,
        options.hidden // 64,
        0 if rival.full else options.hidden // REDUCTION,
        len(left_out),
    )
    lengths = np.full(len(rows), length)
    return {
        "seconds": seconds,
        "first": first,
        "tokens_per_second": rows.numel() / seconds,
        "owed": work.owed(shape, lengths, 2) - work.owed(shape, lengths, 1),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _model(rival: Rival, options: argparse.Namespace, length: int, left_out: tuple[int, ...]) -> Any:
    from peft import get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    from components.adapters import METHODS

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        intermediate_size=4 * options.hidden,
        max_position_embeddings=max(512, length),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=LABELS,
    )
    model = BertForSequenceClassification(config)
    if rival.full:
        return model
    method = METHODS["pfeiffer"](reduction_factor=REDUCTION, leave_out=list(left_out), modules_to_save=["classifier"])
    return get_peft_model(model, method)


def _table(samples: list[dict[str, Any]]) -> str:
    lines = [
        "| tokens | rival | tokens/s | of the peak | peak memory | first epoch | n |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for length, name in dict.fromkeys((sample["length"], sample["name"]) for sample in samples):
        own = [sample for sample in samples if (sample["length"], sample["name"]) == (length, name)]
        rate, share, first = (statistics.median(s[key] for s in own) for key in ("tokens_per_second", "share", "first"))
        memory = own[0]["peak_memory_bytes"]
        shown = f"{memory / 1e9:.2f} GB" if memory else "–"
        lines.append(f"| {length} | {name} | {rate:,.0f} | {share:.1%} | {shown} | {first:.2f} s | {len(own)} |")
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 64, the size of a head")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="an epoch")
    parser.add_argument("--epochs", type=int, default=4, help="the first warms up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/bench/gpu.json"))
    options = parser.parse_args(arguments)
    if options.epochs < 2:
        parser.error(f"expected at least 2 epochs, of which the first warms up; found {options.epochs}")
    return options


if __name__ == "__main__":
    sys.exit(main())
