"""Promote a version and be killed on the way: python -m tests.faults.dying POINT STORE TRACKING_URI MODEL VERSION"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from components.config import RegistryConfig
from components.registry import history, promotion, tracking
from components.registry.promotion import Approval

# Where it dies: which function of which module, before or after it was called.
POINTS: dict[str, tuple[Any, str, bool]] = {
    "before its run": (tracking, "start", False),
    "before the record": (history, "append", False),
    "after the record": (history, "append", True),
    "after the alias": (history, "mark_done", False),
    "after the mark": (history, "mark_done", True),
    "before the end": (tracking, "end_abandoned", False),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(function: Callable[..., Any], after: bool) -> Callable[..., Any]:
    def called(*arguments: Any, **named: Any) -> Any:
        if after:
            function(*arguments, **named)
        die()

    return called


def main(point: str, store: str, uri: str, model: str, version: str) -> None:
    registry = promotion.connect(RegistryConfig(store=store, tracking_uri=uri))
    case = promotion.examine(registry, model, version)
    module, name, after = POINTS[point]
    setattr(module, name, deadly(getattr(module, name), after))
    promotion.promote(registry, case, Approval("ada", "then killed"))


if __name__ == "__main__":
    main(*sys.argv[1:])
