"""What modules a model has, in words for a message."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

SHOWN = 40  # names in a message


def lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The nn.ModuleLists by their full names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}


def near(name: str, names: Iterable[str]) -> str:
    """The names most alike as ` (near: a, b)`; empty without any."""
    alike = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" (near: {', '.join(alike)})" if alike else ""


def counted(model: nn.Module) -> str:
    """The nn.ModuleLists with their lengths, lists within lists once: `block (12), block.*.layer (3)`."""
    kinds = {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name): len(module) for name, module in lists(model).items()}
    return _some([f"{name} ({length})" for name, length in kinds.items()]) or "none"


def described(model: nn.Module) -> str:
    """The nn.ModuleLists, and the paths below one layer of the longest that is in no other."""
    found = lists(model)
    outer = [name for name in found if not name.startswith(tuple(f"{above}." for above in found)) and len(found[name])]
    if not outer:
        return "no nn.ModuleList"
    longest = max(outer, key=lambda name: len(found[name]))
    below = [path for path, _ in found[longest][0].named_modules() if path]
    return f"with the nn.ModuleLists {counted(model)}, and below {longest}.0 {_some(below)}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
