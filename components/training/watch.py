"""How long training takes: of the wall clock and of all threads, without what is between the steps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from components.training.loop import State


class Watch:
    """Adds to the seconds of a training's state what passes between `go` and `lap`. As a context it begins at once."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._begin = self._cpu_begin = 0.0

    def __enter__(self) -> Watch:
        self.go()
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to do: what was not counted by then is not to be counted."""

    def go(self) -> None:
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()

    def lap(self) -> float:
        """Returns the seconds that it adds."""
        passed = time.perf_counter() - self._begin
        self._state.seconds += passed
        self._state.cpu_seconds += time.process_time() - self._cpu_begin
        return passed

    def of_epoch(self) -> dict[str, float]:
        """The seconds of the epoch that ended: all so far without those of earlier epochs."""
        before = {name: sum(entry[name] for entry in self._state.history) for name in ("seconds", "cpu_seconds")}
        return {name: round(getattr(self._state, name) - before[name], 3) for name in before}
