"""Retrain, and fell a server or be felled while registering:

    python -m tests.faults.felling POINT WHO SECONDS STACK CONFIGURATION

WHO: s3, mlflow or prefect of the stack in folder STACK, which stays away for SECONDS (0: until the supervisor has
started it again); or the retrain itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.registry import registration
from flows import command
from flows.retrain import retrain
from tests.faults import outage

ITSELF = "the retrain"
# The steps of a registration, and what opens each.
POINTS = {"artifact": "_requirements", "proof": "_prove", "alias": "_make_candidate"}


def fell(who: str, seconds: float, stack: Path) -> None:
    if who == ITSELF:
        os.kill(os.getpid(), signal.SIGKILL)
    elif seconds:
        outage.refuse(stack, who, seconds)
    else:
        outage.kill(stack, who)


def felling(function: Callable[..., Any], who: str, seconds: float, stack: Path) -> Callable[..., Any]:
    left = [True]

    def called(*arguments: Any) -> Any:
        if left and left.pop():
            fell(who, seconds, stack)
        return function(*arguments)

    return called


def main(point: str, who: str, seconds: str, stack: str, configuration: str) -> int:
    name = POINTS[point]
    setattr(registration, name, felling(getattr(registration, name), who, float(seconds), Path(stack)))
    return command.main(retrain, ["--config", configuration])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
