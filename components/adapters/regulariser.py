"""What adapters add to the task's loss while they train."""

from __future__ import annotations

import torch
from torch import nn

from components.adapters.fusion import Fusion
from components.adapters.step import steps_of

FUSION_WEIGHT = 0.01  # of the value matrices' distance from the identity, as in AdapterHub


def regulariser(model: nn.Module) -> torch.Tensor | None:
    """Of the last forward pass: fusions near the identity, masked neurons told. None where there is nothing to add."""
    losses = [loss for step in steps_of(model) for loss in step.losses]
    for module in model.modules():
        if isinstance(module, Fusion) and module.training and (distance := module.regulariser()) is not None:
            losses.append(FUSION_WEIGHT * distance)
    losses = [loss for loss in losses if loss.requires_grad]
    return torch.stack(losses).sum() if losses else None
