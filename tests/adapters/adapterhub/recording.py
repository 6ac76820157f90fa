"""Writes the golden files. Runs in the reference environment: `record.py` starts it as
`python -m tests.adapters.adapterhub.recording OUT`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters.composition import Fuse
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.adapters.adapterhub.cases import CASES, FAMILIES, LABELS, Case
from tests.adapters.adapterhub.reference import (
    BATCH,
    COPY,
    adapt,
    added,
    draw,
    generator,
    load_base,
    make_base,
    make_inputs,
    outputs_of,
    say,
    settle,
)


def save(model: Any, case: Case, folder: Path) -> dict[str, str]:
    """As AdapterHub's users do. Returns the folders by what they hold: the adapters' names, `fusion`."""
    folders = {name: name for name in case.adapters}
    for name in case.adapters:
        settings = {"with_head": case.head and not case.fusion} if case.wrapped else {}
        model.save_adapter(str(folder / name), name, use_safetensors=case.safetensors, **settings)
    if case.fusion:
        settings = {"with_head": case.head} if case.wrapped else {}
        fuse = Fuse(*case.adapters)
        model.save_adapter_fusion(str(folder / "fusion"), fuse, use_safetensors=case.safetensors, **settings)
        folders["fusion"] = "fusion"
    return folders


def record_case(case: Case, out: Path) -> None:
    model = load_base(case, out / case.family / "base")
    head = adapt(model, case)
    folder = out / case.path
    folder.mkdir(parents=True)
    parameters = added(model)
    ours = sorted(name for name in parameters if COPY not in name)
    draw(((name, parameters[name]) for name in ours), generator(case.path), std=0.3)
    folders = save(model, case, folder)

    shared = load_file(out / case.family / "inputs.safetensors")
    inputs = {name: shared[name] for name in make_inputs(case.family)}
    outputs = outputs_of(model, inputs, case.head)
    scalar = "logits" if case.head else "hidden"
    gradients = torch.autograd.grad(
        (outputs[scalar] * shared[f"probe.{scalar}"]).sum(), [parameters[name] for name in ours]
    )
    tensors = {f"output.{name}": tensor for name, tensor in outputs.items()}
    tensors |= {f"gradient.{name}": tensor for name, tensor in zip(ours, gradients, strict=True)}
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, folder / "case.safetensors"
    )
    facts = {
        "family": case.family,
        "case": case.name,
        "model_class": type(model).__name__,
        "attention": "eager" if case.eager else "default",
        "config": case.config.kind,
        "fusion": case.fusion.kind if case.fusion else None,
        "adapters": list(case.adapters),
        "folders": folders,
        "head": head if case.head else None,
        "gradient_of": f"sum(output.{scalar} * probe.{scalar})",
        "versions": {module.__name__: module.__version__ for module in (adapters, torch, transformers)},
    }
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def record(out: Path) -> None:
    for family in FAMILIES:
        shutil.rmtree(out / family, ignore_errors=True)
        make_base(family, out / family / "base")
        inputs = make_inputs(family)
        with torch.no_grad():
            hidden = AutoModel.from_pretrained(out / family / "base").eval()(**inputs).last_hidden_state
        stream = generator(f"{family} probe")
        mask = inputs.get("decoder_attention_mask", inputs["attention_mask"]).unsqueeze(-1)
        shared = {
            "base.hidden": hidden,
            "probe.hidden": torch.randn(hidden.shape, generator=stream) * mask,  # padding is nobody's output
            "probe.logits": torch.randn(BATCH, LABELS, generator=stream),
        }
        save_file({**inputs, **shared}, out / family / "inputs.safetensors")
    for case in CASES:
        record_case(case, out)
        say(f"{case.path}")
    files = [path for family in FAMILIES for path in (out / family).rglob("*") if path.is_file()]
    say(f"{len(CASES)} cases, {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes in {out}")


if __name__ == "__main__":
    settle()
    record(Path(sys.argv[1]))
