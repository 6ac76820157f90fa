"""What one forward pass of a model knows and leaves for the loss, beside its output."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Step:
    """layers: how many do without their adapters while this step learns; None, as many as the configuration says.
    losses: what adapters add to the task's loss, weighted.  ranges: by adapter, for AdapterDrop.
    """

    def __init__(self) -> None:
        self.layers: int | None = None
        self.losses: list[torch.Tensor] = []
        self.ranges: dict[str, tuple[int, int]] = {}
        self.random = random.Random(torch.initial_seed())  # noqa: S311  # no secret
        self.seed: str | None = None  # of the step under way, where somebody counts them

    def begin(self, active: list[str]) -> None:
        """A forward pass. Of the active adapter's range, both ends included; all passes of a step draw alike.

        One that learns nothing is none of its: a trunk may be computed in the midst of one that does.
        """
        if not torch.is_grad_enabled():
            return
        self.losses.clear()
        drawn = [self.ranges[name] for name in active if name in self.ranges]
        # Threads with rows of one step pass at once, so each draws by itself.
        source = self.random if self.seed is None else random.Random(self.seed)  # noqa: S311  # no secret
        self.layers = source.randint(*drawn[0]) if drawn else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        copied = Step()
        copied.ranges = dict(self.ranges)
        copied.random.setstate(self.random.getstate())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "losses": []}


def steps_of(model: nn.Module) -> list[Step]:
    return [module.step for module in model.modules() if isinstance(getattr(module, "step", None), Step)]  # type: ignore[misc]


def reseed(steps: Sequence[Step], seed: int, step: int) -> None:
    """From here on their PEFT model draws what it would draw in this step in any other process, or when resumed, and in
    each part of the batch.
    """
    for each in steps:
        each.seed = f"{seed} {step}"  # a sum would give one seed the draws of another
