"""What is done with an adapter once it is trained, and measured beside its score."""

from __future__ import annotations

from typing import Any

import torch

from components.adapters import prefix
from components.methods import Bottleneck, members_of
from components.training import attention, operating_curve
from components.training.batching import Tokens
from components.training.spec import JobSpec


def finish(spec: JobSpec, model: Any, tokens: dict[str, Tokens], padding: int, device: torch.device) -> dict[str, Any]:
    """Fold prefixes, drop layers that the margin allows; AdapterDrop's curve, a fusion's attention to its members."""
    prefix.fold(model)
    measured: dict[str, Any] = {}
    margin = spec.settings.drop_margin if isinstance(spec.settings, Bottleneck) else None
    if margin is not None:
        curve = operating_curve.measure(model, tokens["validation"], spec.training, padding, device)
        measured["operating_curve"] = operating_curve.settle(model, curve, margin)
    if members := members_of(spec.settings):
        measured["attention"] = attention.measure(model, members, tokens["test"], padding, device)
    return measured
