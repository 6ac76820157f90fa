"""What a person sees: the same lines on the terminal and in the log of the run's page."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from components.data.split import PARTS
from components.evaluation.gate import GateReport
from components.registry.versions import Version
from components.training import progress
from components.training.spec import JobSpec
from flows.values import Judged, Trained

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

log = logging.getLogger("adapterline")

MARKS = {"pass": "✓", "fail": "✗", "inconclusive": "?", "reported": "·"}
WIDTH = 112


class Terminal:
    """The terminal of a flow started by hand: log lines, and one bar for each running job."""

    current: Terminal | None = None

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("          {task.description:<52}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("steps, left"),
            TimeRemainingColumn(),
        )
        self.progress: Progress = Progress(*columns, console=console, transient=True)
        self.bars: dict[str, Any] = {}
        self.said = ""  # by the version that was registered

    def __enter__(self) -> Terminal:
        Terminal.current = self
        if self.progress.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        Terminal.current = None


def bar(job: str, event: progress.Event | None) -> None:
    """Move the bar of a job; None removes it. Without a terminal, a log line at the end of each epoch."""
    terminal = Terminal.current
    if (
        event is not None
        and event.metrics is not None
        and (terminal is None or not terminal.progress.console.is_terminal)
    ):
        score = event.metrics["validation_accuracy"]
        log.info(
            "          %s: %s · validation accuracy %.1f %% · %.0f s left",
            job,
            progress.describe(event),
            100 * score,
            event.eta_s,
        )
    if terminal is None:
        return
    if event is None:
        if job in terminal.bars:
            terminal.progress.remove_task(terminal.bars.pop(job))
        return
    if job not in terminal.bars:
        terminal.bars[job] = terminal.progress.add_task(job, total=event.steps)
    description = f"{job} · {progress.describe(event)}"
    terminal.progress.update(terminal.bars[job], completed=event.step, description=description)


def data(counts: Mapping[str, int]) -> None:
    kept, duplicates = counts["rows_kept"], counts["exact_duplicates_dropped"]
    parts = ", ".join(f"{counts[f'rows_{part}']:,} {part}" for part in PARTS)
    contradicting = counts["contradicting_rows_dropped"]
    log.info("split     %s rows kept: %s", f"{kept:,}", parts)
    log.info("          dropped %s exact duplicates, %s rows with contradicting labels", duplicates, contradicting)
    if together := counts["near_duplicates_kept_together"]:
        log.info("          %s near duplicates stay in the part of their likes", f"{together:,}")


def trained(role: str, spec: JobSpec, measured: Mapping[str, Any], reused: bool) -> None:
    """One finished job, and how many texts it had to cut."""
    seconds, best = measured["training_seconds"], measured["best_epoch"]
    how = "reused" if reused else f"{seconds:.0f} s"
    log.info("%-9s %s: best of %d epochs was %d, %s", role, spec.method, measured["epochs"], best, how)
    cut = {name: share for name, share in measured["cut_share_per_class"].items() if share > 0}
    if cut and role == "adapter":
        shares = ", ".join(f"{share:.1%} of class {name}" for name, share in cut.items())
        log.info("          cut at %d tokens: %s of the training texts", spec.training.max_tokens, shares)


def attention(measured: Mapping[str, Any]) -> None:
    """How much each member of a fusion counted, over all layers."""
    rows = [[weight or 0.0 for weight in place["weights"]] for place in measured["places"]]
    shares = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    said = (f"{name} {share:.0%}" for name, share in zip(measured["members"], shares, strict=True))
    log.info("attention %s", ", ".join(said))


def results(judged: Judged, baseline: Trained, adapter: Trained) -> None:
    """The comparison and the verdict with its reasons."""
    for line in (*_comparison(judged, baseline, adapter), "", *verdict(judged.report)):
        log.info("%s", line)


def rule_rows(report: GateReport) -> list[dict[str, Any]]:
    """The gate as a table for Prefect and MLflow."""
    return [
        {"rule": rule.rule, "verdict": rule.verdict, "value": rule.value, "bound": rule.bound, "rows": rule.rows,
         "low": rule.low, "high": rule.high, "reason": rule.reason}
        for rule in report.rules
    ]  # fmt: skip


def summary(report: GateReport) -> str:
    """The comparison and the rules as Markdown, for the pages of the run and of the version in MLflow."""
    points = (f"{who} **{100 * scores['accuracy'].value:.1f} %**" for who, scores in report.scores.items())
    rules = (f"| {MARKS[rule.verdict]} {rule.verdict} | {rule.rule} | {rule.reason} |" for rule in report.rules)
    head = f"Gate: **{report.verdict}**. Accuracy: {', '.join(points)}."
    return "\n".join([head, "", "| verdict | rule | reason |", "|---|---|---|", *rules])


def registered(version: Version) -> None:
    if Terminal.current is not None:
        Terminal.current.said = version.said
    log.info("")
    log.info("registered version %s of %s as candidate: %s", version.number, version.name, _bytes(version.size))
    log.info("          %s", version.uri)
    log.info("          the job's test predictions were reproduced from it in a fresh process")


def up_to_date(version: Version) -> None:
    log.info(
        "up to date: version %s of %s answers for this data, configuration, code and base", version.number, version.name
    )
    log.info("          %s (%s)", version.uri, _bytes(version.size))


def _comparison(judged: Judged, baseline: Trained, adapter: Trained) -> list[str]:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("", "accuracy", "macro F1", "trained parameters", "training", "on disk"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    scores = judged.report.scores
    for label, name, job in (
        (f"adapter ({adapter.manifest.method})", "adapter", adapter),
        ("full fine-tuning", "full fine-tuning", baseline),
    ):
        if name in scores:
            manifest = job.manifest
            parameters = f"{manifest.trained_parameters:,} ({manifest.trained_share:.2%})"
            table.add_row(
                label, *_scores(scores[name]), parameters, f"{job.training_seconds:.0f} s", _bytes(manifest.bytes)
            )
    if "TF-IDF" in scores:
        seconds = f"{judged.tfidf_seconds:.1f} s"
        table.add_row("TF-IDF + logistic", *_scores(scores["TF-IDF"]), f"{judged.tfidf_parameters:,}", seconds, "–")
    out = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    out.print(table)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return ["", *(line.rstrip() for line in text.splitlines())]


def _scores(estimates: Mapping[str, Any]) -> list[str]:
    return [
        f"{100 * e.value:.1f} ± {50 * (e.high - e.low):.1f} %" for e in (estimates["accuracy"], estimates["macro_f1"])
    ]


def verdict(report: GateReport) -> list[str]:
    """The verdict and each rule with its reason."""
    lines = [f"verdict: {report.verdict.upper()}"]
    return lines + [f"  {MARKS[rule.verdict]} {rule.rule}: {rule.reason}" for rule in report.rules]


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
