"""Tiny adapted models of every family, for the tests of adapters."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from components import base_model
from components.adapters.config import METHODS, BottleneckConfig
from components.base_model import load_classifier
from components.config import BaseConfig

FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "mpnet")
LABELS = ("bad", "good")
HIDDEN = 32
INPUTS = {
    "input_ids": torch.tensor([[2, 7, 9, 30, 3], [2, 15, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


def classifier(base: Path, seed: int = 0) -> tuple[Any, tuple[str, ...]]:
    """The base with a head drawn from `seed`, and the names of the head's modules."""
    model, head = _loaded(base, seed)
    torch.manual_seed(seed)
    return copy.deepcopy(model), head


@functools.cache
def _loaded(base: Path, seed: int) -> tuple[Any, tuple[str, ...]]:
    """Read from disk once: hundreds of tests want the same."""
    torch.manual_seed(seed)
    model, head = load_classifier(base_model.find(BaseConfig(name=str(base))), LABELS)
    return model.eval(), head


def config_of(method: str, head: tuple[str, ...], **settings: Any) -> BottleneckConfig:
    small = {"reduction_factor": 4, **({"prefix_length": 3, "prefix_bottleneck": 5} if method == "mam" else {})}
    return METHODS[method](modules_to_save=list(head), **{**small, **settings})


def adapted(base: Path, method: str, **settings: Any) -> PeftModel:
    """The base with a fresh adapter named `task`."""
    model, head = classifier(base)
    return get_peft_model(model, config_of(method, head, **settings), adapter_name="task").eval()


def stir(model: nn.Module, adapter: str = "task", seed: int = 1) -> None:
    """Move every weight of an adapter at random, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits(model: nn.Module) -> torch.Tensor:
    """(2, classes), without gradients."""
    with torch.no_grad():
        result: torch.Tensor = model(**INPUTS).logits
    return result
