"""What adapters add to the task's loss while they train."""

from __future__ import annotations

import torch
from torch import nn

from components.adapters.fusion import Fusion
from components.adapters.step import steps_of

FUSION_WEIGHT = 0.01  # of the value matrices' distance from the identity, as in AdapterHub


class Regulariser:
    """Of a model whose modules stay what they are: they are looked for once."""

    def __init__(self, model: nn.Module) -> None:
        self._steps = steps_of(model)
        self._fusions = [module for module in model.modules() if isinstance(module, Fusion)]

    def __call__(self) -> torch.Tensor | None:
        """Of the last forward pass: fusions near the identity, masked neurons told. None where nothing is added."""
        losses = [loss for step in self._steps for loss in step.losses]
        for fusion in self._fusions:
            if fusion.training and (distance := fusion.regulariser()) is not None:
                losses.append(FUSION_WEIGHT * distance)
        losses = [loss for loss in losses if loss.requires_grad]
        return torch.stack(losses).sum() if losses else None
