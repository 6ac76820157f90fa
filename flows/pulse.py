"""Signs of life of a job that runs elsewhere: one small object beside its bundle, written every few seconds."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import asdict, replace
from types import TracebackType

from components import storage
from components.errors import StorageError
from components.training.progress import Event

# Each beat is one small request to the store.
BEAT_S = 3.0
# A job that was silent for so long is taken for dead; its store may be away for a minute.
SILENCE_S = 150.0

log = logging.getLogger("adapterline")


def place(out: str) -> str:
    """Where the signs of life of the job with this output lie."""
    return f"{out.rstrip('/')}.progress.json"


class Pulse:
    """Writes the newest progress every `BEAT_S`, also when there is none, from its own thread."""

    def __init__(self, out: str) -> None:
        self._uri = place(out)
        self._event: Event | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __call__(self, event: Event) -> None:
        self._event = replace(event, metrics=None)  # the epochs' metrics go to MLflow and the log, not only the last

    def __enter__(self) -> Pulse:
        self._write(0)  # whatever keeps us from the store is said now, not after the training
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_S):
            count += 1
            try:
                self._write(count)
            except StorageError as problem:
                log.warning("progress did not reach the store: %s", problem)

    def _write(self, count: int) -> None:
        event = asdict(self._event) if self._event else None
        storage.write(self._uri, json.dumps({"beat": count, "event": event}).encode())


class Listener:
    """Hears the pulse of a job: its events, and for how long it has been silent."""

    def __init__(self, out: str) -> None:
        self._uri = place(out)
        self._last = self._read()  # what an earlier try left is no sign of life
        self._heard = time.monotonic()

    def _read(self) -> bytes | None:
        """None when the store cannot be reached, which is no silence of the job."""
        try:
            return storage.read(self._uri) if storage.exists(self._uri) else b""
        except StorageError:
            return None

    def listen(self) -> Event | None:
        """The newest event if there is news."""
        found = self._read()
        if found is None:
            self._heard = time.monotonic()
            return None
        if self._last is None:  # the store was away until now
            self._last = found
        if not found or found == self._last:
            return None
        self._last, self._heard = found, time.monotonic()
        event = json.loads(found)["event"]
        return Event(**event) if event else None

    def restart(self) -> None:
        """Count silence from now: the job has not begun."""
        self._heard = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._heard
