"""What a running job tells: a bar with remaining time for a person, or JSON lines for whoever started it."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

# Often enough to watch, seldom enough to cost nothing.
INTERVAL_S = 0.5


@dataclass(frozen=True)
class Event:
    """One state of a job. `metrics` is filled at the end of an epoch."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    tokens_per_s: float
    eta_s: float
    metrics: dict[str, float] | None = None


class Progress(Protocol):
    def __call__(self, event: Event) -> None: ...


def json_lines(event: Event) -> None:
    """One JSON object a line on standard output."""
    sys.stdout.write(json.dumps(asdict(event)) + "\n")
    sys.stdout.flush()


class Notes(logging.Handler):
    """What a job logs, each line once, as JSON lines on standard output for whoever started it."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            said = record.getMessage()
            if said not in self._told:
                self._told.add(said)
                sys.stdout.write(json.dumps({"note": said}) + "\n")
                sys.stdout.flush()
        except Exception:  # noqa: BLE001  # as all handlers: that something cannot be told ends no job
            self.handleError(record)


@contextmanager
def notes() -> Iterator[None]:
    """For the length of the block what is logged here is told as `Notes` do."""
    log, told = logging.getLogger("adapterline"), Notes()
    log.addHandler(told)
    try:
        yield
    finally:
        log.removeHandler(told)


def note(line: str) -> str | None:
    """What a line of `Notes` says, None for any other line."""
    try:
        content: Any = json.loads(line)
        return str(content["note"])
    except (ValueError, TypeError, KeyError):
        return None


def nowhere(event: Event) -> None:
    """For the processes of a job that have nothing to tell."""


def parse(line: str) -> Event | None:
    """The event of a line, None for any other line."""
    try:
        content: Any = json.loads(line)
        return Event(**content)
    except (ValueError, TypeError):
        return None


class Bar:
    """A progress bar on standard error, when a person is looking: a file or a pipe gets nothing."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = RichProgress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("starting", total=None)
        self._progress.start()

    def __call__(self, event: Event) -> None:
        self._progress.update(self._task, completed=event.step, total=event.steps, description=describe(event))

    def close(self) -> None:
        self._progress.stop()


def describe(event: Event) -> str:
    """`epoch 2/8 · loss 0.312 · 4,120 tokens/s`"""
    return f"epoch {event.epoch}/{event.epochs} · loss {event.loss:.3f} · {event.tokens_per_s:,.0f} tokens/s"


class Meter:
    """Turns steps into events, at most one an interval."""

    def __init__(self, report: Progress, steps: int, epochs: int, done: int = 0) -> None:
        self._report, self._steps, self._epochs = report, steps, epochs
        self._begin, self._first = time.monotonic(), done
        self._last, self._tokens = 0.0, 0
        self._loss = 0.0

    def step(self, step: int, epoch: int, loss: float, tokens: int) -> None:
        self._tokens += tokens
        # an average over about fifty steps, so that the number can be read
        self._loss = loss if step == self._first + 1 else 0.98 * self._loss + 0.02 * loss
        if time.monotonic() - self._last >= INTERVAL_S:
            self._send(step, epoch, None)

    def epoch(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        self._send(step, epoch, metrics)

    def _send(self, step: int, epoch: int, metrics: dict[str, float] | None) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._begin
        eta = seconds / max(step - self._first, 1) * (self._steps - step)
        rate = self._tokens / max(seconds, 1e-9)
        self._report(Event(step, self._steps, epoch, self._epochs, self._loss, rate, eta, metrics))
