"""Batches in which each row has its own adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from components.adapters.stacked import through
from components.errors import ConfigError

BASE = "__base__"  # PEFT's name for rows without an adapter


@contextmanager
def mixed(model: nn.Module, names: list[str], others: Mapping[nn.Module, list[str]]) -> Iterator[None]:
    """For the length of the block every forward pass of the model takes the adapter of its name for each row.

    others: names of the rows that some modules read.
    """
    handles = []
    for module in model.modules():
        own = others.get(module, names)
        if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
            handles.append(module.register_forward_pre_hook(partial(_with_names, own), with_kwargs=True))
        elif isinstance(module, ModulesToSaveWrapper):
            handles.append(module.register_forward_hook(partial(_by_rows, own), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_rows(names: Sequence[str], rows: torch.Tensor) -> None:
    """Raises ConfigError unless there is a name for each row."""
    if len(names) != len(rows):
        raise ConfigError(f"adapter_names for {len(rows)} rows", f"{len(names)}", "pass one a row")


def own_copy(wrapper: ModulesToSaveWrapper, name: str) -> nn.Module:
    """The adapter's copy of a module that is trained as a whole; the base's where it has none."""
    copies: nn.ModuleDict = wrapper.modules_to_save
    original: nn.Module = wrapper.original_module
    return copies[name] if name in copies else original  # noqa: SIM401  # a ModuleDict has no get()


def _with_names(
    names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _by_rows(
    names: list[str], wrapper: ModulesToSaveWrapper, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
) -> torch.Tensor:
    """Each row by its adapter's own copy of the module; PEFT's does so for linear ones alone.

    Where the copies differ in size, as heads of tasks do, -inf fills the rows of the smaller ones.
    """
    x, *rest = args
    require_rows(names, x)
    return through([own_copy(wrapper, name) for name in names], x, *rest, **kwargs)
