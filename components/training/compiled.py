"""torch.compile, for who asks for it: where it cannot, the reason is told and the model computes as it is."""

from __future__ import annotations

import logging
from typing import Any

import torch

log = logging.getLogger("adapterline")


class Compiled:
    """Calls the compiled model; from the first call that fails on, the model itself.

    Shapes are dynamic, for batches differ in length. Compiling takes a minute or so, and a C++ compiler on CPUs.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._compiled: Any = torch.compile(model, dynamic=True)

    def __call__(self, **inputs: torch.Tensor) -> Any:
        if self._compiled is not None:
            try:
                return self._compiled(**inputs)
            except Exception as error:  # noqa: BLE001  # compilers raise what they like; if it was the model, it does so again
                self._compiled = None
                torch._dynamo.reset()
                reason = str(error).strip().partition("\n")[0]
                log.warning("not compiled: %s: %s; training goes on without", type(error).__name__, reason[:200])
        return self._model(**inputs)
