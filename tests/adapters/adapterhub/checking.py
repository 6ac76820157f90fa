"""Loads exports with AdapterHub and compares what they compute. Runs in the reference environment: `record.py` starts
it as `python -m tests.adapters.adapterhub.checking GOLDEN CASE FOLDER [CASE FOLDER …]`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from adapters.composition import Fuse
from safetensors.torch import load_file

from tests.adapters.adapterhub.cases import CASES, Case
from tests.adapters.adapterhub.reference import added, load_base, make_inputs, outputs_of, say, settle

TOLERANCE = 1e-5


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that AdapterHub wrote below the folder, by its own names."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted([*folder.rglob("pytorch_*.bin"), *folder.rglob("*adapter*.safetensors"),
                        *folder.rglob("model_head.safetensors")]):  # fmt: skip
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        if both := sorted(set(found) & set(weights)):
            raise ValueError(f"saved twice: {', '.join(both)}")
        weights.update(found)
    return weights


def load_exported(model: Any, folder: Path) -> None:
    """Load every adapter below the folder, then the fusion if there is one, and activate them.

    AdapterHub logs missing and unexpected weights and goes on; here they end the check.
    """
    names = [
        model.load_adapter(str(config.parent), use_safetensors=True)
        for config in sorted(folder.rglob("adapter_config.json"))
    ]
    fusions = [config.parent for config in sorted(folder.rglob("adapter_fusion_config.json"))]
    if len(fusions) > 1 or (len(names) != 1 and not fusions):
        raise ValueError(f"expected one adapter, or one fusion and its adapters; found adapters {names}")
    if fusions:
        model.load_adapter_fusion(str(fusions[0]), use_safetensors=True)
        config = json.loads((fusions[0] / "adapter_fusion_config.json").read_text(encoding="utf-8"))
        model.set_active_adapters(Fuse(*config["adapter_names"]))
    else:
        model.set_active_adapters(names[0])
    if heads := list(getattr(model, "heads", {})):
        model.active_head = heads[0]  # of a fusion, it is not found by the adapters' names
    compare_weights(model, folder)


def compare_weights(model: Any, folder: Path) -> None:
    """Ends the check unless each added parameter holds what the folder has for it, and the folder has nothing else.

    One of its names will do for a parameter that has several, and so will a name from a bare model.
    """
    prefix = f"{model.base_model_prefix}."
    parameters = {name.removeprefix(prefix): parameter for name, parameter in added(model).items()}
    exported = {name.removeprefix(prefix): tensor for name, tensor in saved_weights(folder).items()}
    unexpected = set(exported) - set(parameters)
    covered = {id(parameters[name]) for name in set(exported) & set(parameters)}
    missing = {name for name, parameter in parameters.items() if id(parameter) not in covered}
    if unexpected or missing:
        raise ValueError(f"unexpected weights: {sorted(unexpected)}; missing: {sorted(missing)}")
    if unlike := sorted(name for name, tensor in exported.items() if not torch.equal(parameters[name], tensor)):
        raise ValueError(f"not loaded as exported: {', '.join(unlike)}")


def check(golden: Path, case: Case, folder: Path) -> float:
    """Largest difference between what the exported folder computes and what was recorded, over all outputs."""
    model = load_base(case, golden / case.family / "base")
    load_exported(model, folder)
    if case.head and not model.heads:
        raise ValueError("expected a head as the case has, found none; export a model with its head")
    shared = load_file(golden / case.family / "inputs.safetensors")
    recorded = load_file(golden / case.path / "case.safetensors")
    with torch.no_grad():
        outputs = outputs_of(model, {name: shared[name] for name in make_inputs(case.family)}, case.head)
    return max(float((tensor - recorded[f"output.{name}"]).abs().max()) for name, tensor in outputs.items())


def agrees(golden: Path, case: Case, folder: Path) -> bool:
    try:
        difference = check(golden, case, folder)
    except (ValueError, OSError, RuntimeError) as error:  # AdapterHub's own, and those from here
        say(f"{case.path}: {error}")
        return False
    agreed = difference <= TOLERANCE  # False also for nan
    say(f"{case.path}: max abs difference {difference:.2e}{'' if agreed else ', above the tolerance'}")
    return agreed


def main(golden: str, *pairs: str) -> int:
    settle()
    named = {case.path: case for case in CASES}
    if unknown := sorted(set(pairs[::2]) - set(named)):
        say(f"expected cases among {', '.join(named)}; found {', '.join(unknown)}")
        return 1
    verdicts = [
        agrees(Path(golden), named[path], Path(folder)) for path, folder in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
