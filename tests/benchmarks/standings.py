"""What the samples of a benchmark say: seconds, scores, shares of the device, ratios between rivals, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.rivals import RIVALS

# Ratio: seconds an epoch of the first over those of the second, and how large it is to be. `all` compares adapters in
# the upper half with the peer's in all layers, as a user who changes from one to the other does.
RATIOS = {
    "all_layers_vs_peer": ("peer", "ours", 15.0),
    "all_layers_vs_peer_tuned": ("peer_tuned", "ours", 2.5),
    "half_vs_peer": ("peer_half", "ours_half", 30.0),
    "half_vs_peer_tuned": ("peer_half_tuned", "ours_half", 3.5),
    "half_vs_peer_all": ("peer", "ours_half", None),
    "half_vs_peer_tuned_all": ("peer_tuned", "ours_half", None),
}
TIME_TO_99 = 10.0
SHARE = 0.40
Sample = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """One rival over its samples. An epoch's seconds are the mean over the epochs of a training, so that what is done
    once, in the first, is spread over them.

    median, best: of the samples' (wall, CPU) seconds an epoch.  share: of the device's peak, None where it is unknown.
    accuracy, macro_f1: (mean, half of a 95 % interval of it by Student's t or None for one seed), after the last epoch.
    """

    samples: int
    seeds: int
    epochs: int
    median: tuple[float, float]
    best: tuple[float, float]
    first: float
    accuracy: tuple[float, float | None]
    macro_f1: tuple[float, float | None]
    peak_rss: int
    setup: float
    share: float | None
    trained: int


def standing(samples: Sequence[Sample], owed: float, peak: float | None) -> Standing:
    """owed: operations of one such training.  peak: operations a second of the device in the rival's precision."""
    means = {
        kind: [statistics.mean(epoch[kind] for epoch in sample["epochs"]) for sample in samples]
        for kind in ("seconds", "cpu_seconds")
    }
    by_seed = {sample["seed"]: sample["epochs"][-1] for sample in reversed(samples)}
    wall, epochs = statistics.median(means["seconds"]), len(samples[0]["epochs"])
    return Standing(
        samples=len(samples),
        seeds=len(by_seed),
        epochs=epochs,
        median=(wall, statistics.median(means["cpu_seconds"])),
        best=(min(means["seconds"]), min(means["cpu_seconds"])),
        first=statistics.median(sample["epochs"][0]["seconds"] for sample in samples),
        accuracy=interval([last["accuracy"] for last in by_seed.values()]),
        macro_f1=interval([last["macro_f1"] for last in by_seed.values()]),
        peak_rss=max(sample["process"]["peak_rss_bytes"] for sample in samples),
        setup=statistics.median(
            sample["process"]["seconds"] - sum(epoch["seconds"] for epoch in sample["epochs"]) for sample in samples
        ),
        share=owed / (wall * epochs) / peak if peak else None,
        trained=samples[0]["trained_parameters"],
    )


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval by Student's t; None of a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return values[0], None
    quantile = float(t.ppf(0.975, len(values) - 1))
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def ratios(found: dict[str, Standing], kind: int) -> dict[str, float]:
    """Those of RATIOS whose rivals were measured; of medians. kind: 0 for wall, 1 for CPU seconds."""
    return {
        name: found[slow].median[kind] / found[fast].median[kind]
        for name, (slow, fast, _) in RATIOS.items()
        if slow in found and fast in found
    }


def time_to(samples: Sequence[Sample], accuracy: float) -> float | None:
    """Median over samples of the training seconds until the end of the first epoch with this accuracy.

    None when some sample never reached it.
    """
    times = []
    for sample in samples:
        spent = 0.0
        for epoch in sample["epochs"]:
            spent += epoch["seconds"]
            if epoch["accuracy"] >= accuracy:
                times.append(spent)
                break
        else:
            return None
    return statistics.median(times)


def to_99(by_rival: dict[str, list[Sample]]) -> dict[str, float | None]:
    """Seconds until 99 % of the accuracy that full fine-tuning by HF's Trainer ends with, of each rival."""
    target = 0.99 * statistics.mean(sample["epochs"][-1]["accuracy"] for sample in by_rival["full_hf"])
    return {name: time_to(samples, target) for name, samples in by_rival.items()}


def table(found: dict[str, Standing]) -> str:
    lines = [
        f"{'seconds an epoch: median (best)':>62}{'peak':>40}{'of the':>8}{'not':>6}",
        f"{'wall':>45}{'CPU':>17}{'first':>9}{'accuracy':>12}{'macro F1':>12}{'RSS':>7}{'peak':>8}{'timed':>6}  n",
    ]
    for name, row in found.items():
        wall, cpu = (f"{row.median[kind]:7.1f} ({row.best[kind]:.1f})" for kind in (0, 1))
        share = f"{row.share:.1%}" if row.share is not None else "–"
        lines.append(
            f"{RIVALS[name].title:28} {wall:>16} {cpu:>16} {row.first:8.1f} {percent(row.accuracy):>11}"
            f" {percent(row.macro_f1):>11} {row.peak_rss / 1e6:5.0f}M {share:>7} {row.setup:4.0f}s"
            f"  {row.samples} of {row.seeds} seeds, {row.epochs} epochs"
        )
    return "\n".join(lines)


def percent(value: tuple[float, float | None]) -> str:
    mean, half = value
    return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")


def bars(wall: dict[str, float], cpu: dict[str, float], ours: Standing | None) -> str:
    """Each ratio beside what it is to reach."""
    lines = [f"{'ratio of medians':28} {'wall':>8} {'CPU':>8}"]
    for name, value in wall.items():
        bar = TIME_TO_99 if name == "time_to_99_vs_full" else RATIOS[name][2]
        other = f"{cpu[name]:.1f}x" if name in cpu else ""
        lines.append(f"{name:28} {value:7.1f}x {other:>8}  {_verdict(value, bar, 'x')}")
    if ours is not None and ours.share is not None:
        share = 100 * ours.share
        lines.append(f"{'share of matmul peak, ours':28} {share:7.1f}% {'':8}  {_verdict(share, 100 * SHARE, '%')}")
    return "\n".join(lines)


def _verdict(value: float, bar: float | None, unit: str) -> str:
    return "" if bar is None else f"{'met' if value >= bar else 'not met'}: at least {bar:g}{unit}"


def plot(by_rival: dict[str, list[Sample]], title: str, path: Path) -> None:
    """Accuracy against training seconds: a point an epoch of each seed, a line through their means."""
    from itertools import accumulate

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (name, samples) in enumerate(by_rival.items()):
        colour = f"C{index}"
        curves = []
        for sample in samples:
            seconds = list(accumulate(epoch["seconds"] for epoch in sample["epochs"]))
            curves.append((seconds, [100 * epoch["accuracy"] for epoch in sample["epochs"]]))
            axes.scatter(*curves[-1], s=10, color=colour, alpha=0.5)
        seconds, accuracy = np.mean(curves, axis=0)
        axes.plot(seconds, accuracy, color=colour, marker="o", markersize=4, label=RIVALS[name].title)
    axes.set(xscale="log", xlabel="training time (s, log scale)", ylabel="accuracy on the test rows (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
