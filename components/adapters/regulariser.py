"""What adapters add to the task's loss while they train."""

from __future__ import annotations

import torch
from torch import nn

from components.adapters.bottleneck import Bottleneck
from components.adapters.fusion import Fusion

FUSION_WEIGHT = 0.01  # of the value matrices' distance from the identity, as in AdapterHub


def regulariser(model: nn.Module) -> torch.Tensor | None:
    """The sum over the parts that train: fusions near the identity, masked neurons told. None where there is none."""
    losses: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Fusion) and module.training and (distance := module.regulariser()) is not None:
            losses.append(FUSION_WEIGHT * distance)
        elif isinstance(module, Bottleneck) and module.training and module.mask_loss is not None:
            losses.append(module.config.mask_weight * module.mask_loss)
            module.mask_loss = None  # of this step only
    return torch.stack(losses).sum() if losses else None
