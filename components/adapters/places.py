"""Where adapters sit in a model: the rows of its family, or those that its user names."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from components.adapters import inventory
from components.adapters.families import FAMILIES, Site, Stack
from components.config import Bottleneck
from components.errors import ConfigError

__all__ = ["FAMILIES", "Site", "Stack", "attentions", "layers", "misfits", "named", "of_model", "positions"]

EXAMPLE = (
    'BottleneckConfig(places=[{"layers": "encoder.layer", '
    '"attention": {"entry": "attention", "exit": "attention.output.dropout", "norm": "attention.output.LayerNorm"}, '
    '"output": {"entry": "intermediate", "exit": "output.dropout", "norm": "output.LayerNorm"}}])'
)

# Relative positions (T5, DeBERTa) fall into buckets, the last of which holds all distances beyond: any length is read.
UNLIMITED = sys.maxsize


def of_model(model: Any, places: list[dict[str, Any]] | None = None) -> tuple[Stack, ...]:
    """The stacks of a model: those named in `places`, or else its family's that it has (a T5 encoder has one of two).

    Raises ConfigError for a family without a row, telling what the model has, and for modules that are not there.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if places:
        stacks = named(places)
    elif family in FAMILIES:
        stacks = tuple(row for row in FAMILIES[family] if _found(model, row.layers)) or FAMILIES[family]
    else:
        raise ConfigError(
            f"a base model of a family among {', '.join(FAMILIES)}, or places that name its modules",
            f"family {family!r}, {inventory.described(model)}",
            f"name entry, exit and norm (none where nothing normalises the sum) of the sub-layers: {EXAMPLE}",
        )
    problems = [f"places[{index}].{problem}" for index, row in enumerate(stacks) for problem in _missing(model, row)]
    if problems:
        expected = "modules of the model at the places named" if places else f"the modules of family {family!r}"
        raise ConfigError(expected, "; ".join(problems), "name them in BottleneckConfig(places=[...])")
    return stacks


def layers(model: nn.Module, stacks: tuple[Stack, ...]) -> list[tuple[str, Stack]]:
    """Full names of the layers of all stacks, first to last, e.g. `bert.encoder.layer.0`, each with its stack."""
    names = []
    for row in stacks:
        found = _found(model, row.layers)
        if len(found) != 1:
            raise ConfigError(
                f"one nn.ModuleList at {row.layers}", _none_or_several(model, row.layers), "correct the places"
            )
        for name, container in next(iter(found.values())).items():
            names += [(f"{name}.{index}", row) for index in range(len(container))]
    return names


def attentions(model: nn.Module, stacks: tuple[Stack, ...]) -> dict[str, list[tuple[int, str]]]:
    """The modules that attend, by kind: `self_0` of the first stack, `self_1` and `cross_1` of the second.

    Each is the number of its layer, and its full name. Raises ConfigError where attention is code of the family's own.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for index, (layer, row) in enumerate(layers(model, stacks)):
        for kind, site in (("self", row.attention), ("cross", row.cross)):
            if site is not None and site.attends is not None:
                found.setdefault(f"{kind}_{stacks.index(row)}", []).append((index, f"{layer}.{site.attends}"))
    if not found:
        raise ConfigError(
            "a base whose attention goes through transformers' attention interface, for prefixes",
            "one that computes it by code of its own",
            'choose a method without prefixes, another base, or name the modules in places (key "attends")',
        )
    return found


def named(places: list[dict[str, Any]]) -> tuple[Stack, ...]:
    """Stacks from the dicts of BottleneckConfig(places=[...]). Raises ConfigError with all that is wrong in them."""
    problems: list[str] = []
    stacks = []
    for index, place in enumerate(places):
        where = f"places[{index}]"
        fields = _fields(place, where, ("layers", "attention", "output"), ("cross",), problems)
        sites: dict[str, Site] = {}
        for name in ("attention", "output", "cross"):
            if fields.get(name) is not None:
                spot = f"{where}.{name}"
                paths = _fields(fields[name], spot, ("entry", "exit"), ("norm", "attends"), problems)
                problems += _not_paths(paths, spot)
                sites[name] = Site(**{"entry": "", "exit": "", **paths})
        problems += _not_paths({"layers": fields.get("layers", "-")}, where)
        if {"attention", "output"} <= sites.keys():
            stacks.append(Stack(fields.get("layers", ""), sites["attention"], sites["output"], sites.get("cross")))
    if problems:
        raise ConfigError("places that name the modules of a layer", "; ".join(problems), f"write them as {EXAMPLE}")
    return tuple(stacks)


def positions(config: Any) -> int:
    """Tokens that a model of this transformers config can read at once; for rotary positions, what it was trained on.

    Families of RoBERTa and MPNet keep the positions up to the padding token's number for padding. An image's patches
    and its class token are the tokens of ViT.
    """
    family = config.model_type
    if family == "vit":
        sizes = (config.image_size, config.patch_size)
        image, patch = ((size, size) if isinstance(size, int) else size for size in sizes)
        return int((image[0] // patch[0]) * (image[1] // patch[1])) + 1
    if family == "t5" or (family == "deberta-v2" and not config.position_biased_input):
        return UNLIMITED
    kept = {"roberta": config.pad_token_id, "xlm-roberta": config.pad_token_id, "mpnet": 1}.get(family)
    limit = getattr(config, "max_position_embeddings", None) or UNLIMITED
    return int(limit) - (0 if kept is None else kept + 1)


def misfits(base: Path, bottleneck: Bottleneck, max_tokens: int) -> list[str]:
    """What of the settings the base in this folder does not allow, a phrase each, from its config.json alone."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    if config.model_type not in FAMILIES:
        return [f"base.name: family {config.model_type!r}, adapters know {', '.join(FAMILIES)}"]
    with torch.device("meta"):  # modules without weights: families name, share and stack their layers each in their way
        model = AutoModel.from_config(config)
    count = len(layers(model, of_model(model)))
    given, wanted = bottleneck.reduction_factor, []
    factors = given if isinstance(given, dict) else {"default": given or 1}  # without one, the method has its own
    for layer, factor in factors.items():
        if factor > config.hidden_size:
            wanted.append(("reduction_factor", f"{factor:g}", f"at most the hidden size, {config.hidden_size}"))
        if layer != "default" and int(layer) >= count:
            wanted.append(("reduction_factor", f"for layer {layer}", f"some of the layers 0 to {count - 1}"))
    carrying = set(range(count)) - set(bottleneck.leave_out)
    if not carrying or not set(bottleneck.leave_out) <= set(range(count)):
        wanted.append(("leave_out", f"{list(bottleneck.leave_out)}", f"some of the layers 0 to {count - 1}"))
    for name, dropped in (("drop_layers", [bottleneck.drop_layers or 0]), ("drop_range", bottleneck.drop_range)):
        if dropped and carrying and dropped[-1] > max(carrying):
            found = ", ".join(map(str, dropped))
            wanted.append((name, found, f"at most {max(carrying)}: the last layer keeps its adapter"))
    problems = [f"adapter.bottleneck.{name}: {found}, {wish}" for name, found, wish in wanted]
    if max_tokens > positions(config):
        problems.append(f"training.max_tokens: {max_tokens}, at most the base's {positions(config)} positions")
    return problems


def _found(model: nn.Module, path: str) -> dict[str, dict[str, nn.ModuleList]]:
    """The lists of layers at a path, by the prefix above it; none that lie below another one."""
    pattern = re.compile(rf"(?:(.*)\.)?{re.escape(path).replace(re.escape('*'), '[0-9]+')}")
    found: dict[str, dict[str, nn.ModuleList]] = {}
    above: list[str] = []
    for name, module in inventory.lists(model).items():
        match = pattern.fullmatch(name)
        if match and not name.startswith(tuple(above)):
            found.setdefault(match[1] or "", {})[name] = module
            above.append(f"{name}.")
    return found


def _none_or_several(model: nn.Module, path: str) -> str:
    several = [name for group in _found(model, path).values() for name in group]
    if several:
        return f"several: {', '.join(several)}"
    return f"not among the nn.ModuleLists {inventory.counted(model)}{inventory.near(path, inventory.lists(model))}"


def _missing(model: nn.Module, row: Stack) -> list[str]:
    """The modules of a stack that are not in the model, with what is called alike."""
    if len(_found(model, row.layers)) != 1:
        return [f"layers: {row.layers!r}, {_none_or_several(model, row.layers)}"]
    problems: dict[str, str] = {}
    for name, _ in layers(model, (row,)):
        below = [path for path, _ in model.get_submodule(name).named_modules() if path]
        for kind, site in row.sites.items():
            for key, path in asdict(site).items():
                if path is not None and path not in below:
                    problem = f"{kind}.{key}: no {path!r} below {name}{inventory.near(path, below)}"
                    problems.setdefault(f"{kind}.{key}", problem)
    return list(problems.values())


def _fields(given: Any, where: str, needed: tuple[str, ...], more: tuple[str, ...], problems: list[str]) -> Any:
    """The fields of a dict that are known; what is wrong goes to `problems`."""
    if not isinstance(given, dict):
        problems.append(f"{where}: {given!r} is no dict")
        return {}
    problems += [
        f"{where}: unknown key {key!r}{inventory.near(str(key), [*needed, *more])}"
        for key in given
        if key not in (*needed, *more)
    ]
    problems += [f"{where}: no {key!r}" for key in needed if key not in given]
    return {key: value for key, value in given.items() if key in (*needed, *more)}


def _not_paths(paths: dict[str, Any], where: str) -> list[str]:
    return [
        f"{where}.{key}: {path!r} is no path"
        for key, path in paths.items()
        if not (isinstance(path, str) and path) and not (key in ("norm", "attends") and path is None)
    ]
