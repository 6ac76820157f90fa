"""What the two halves share that run in the reference environment: models and adapters of AdapterHub's `adapters`."""

from __future__ import annotations

import logging
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters.composition import Fuse
from transformers import AutoConfig, AutoModel

from tests.adapters.adapterhub.cases import (
    ENCODER_DECODERS,
    FAMILIES,
    HIDDEN,
    LABELS,
    PADDING,
    VOCABULARY,
    Case,
    Config,
)

HEAD = "task"  # the head's name; a head over a fusion has the fusion's name
BATCH, TOKENS, DECODER_TOKENS = 3, 7, 5
LENGTHS, DECODER_LENGTHS = (7, 5, 3), (5, 3, 4)  # real tokens a row; the rest is padding
FUSION = ".adapter_fusion_layer."
# What names the parameters that AdapterHub adds.
ADDED = (
    FUSION,
    ".adapters.",
    ".invertible_adapters.",
    ".prefix_tunings.",
    ".prefix_gates.",
    ".shared_parameters.",
    ".heads.",
)
COPY = ".pool."  # AdapterHub saves a prefix once for the model, and again, under names with this, for every layer


def settle() -> None:
    """Same numbers at every run, and no chatter: AdapterHub warns whenever an adapter is activated."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def generator(of: str) -> torch.Generator:
    """A stream of random numbers of its own for every name, so that a new case changes no other."""
    return torch.Generator().manual_seed(zlib.crc32(of.encode()))


def draw(parameters: Iterable[tuple[str, torch.Tensor]], stream: torch.Generator, std: float) -> None:
    """Fill with normal numbers. Those of a fusion are half as large: a softmax near 0 and 1 magnifies rounding."""
    with torch.no_grad():
        for name, parameter in parameters:
            scale = std / 2 if FUSION in name else std
            parameter.copy_(scale * torch.randn(parameter.shape, generator=stream))


def make_base(family: str, folder: Path) -> None:
    """Save a model whose weights, layer norms included, are all far from their initial values."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    draw(model.named_parameters(), generator(f"{family} base"), std=HIDDEN**-0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):  # of a layer norm
                parameter.add_(1)
    model.save_pretrained(folder)


def make_inputs(family: str) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask: (batch, tokens), and those of the decoder where there is one."""
    stream = generator(f"{family} inputs")

    def ids(tokens: int, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        mask = (torch.arange(tokens) < torch.tensor(lengths).unsqueeze(1)).long()
        drawn = torch.randint(5, VOCABULARY, (BATCH, tokens), generator=stream)  # 0 to 4 may have a meaning
        return torch.where(mask.bool(), drawn, PADDING.get(family, 0)), mask

    input_ids, mask = ids(TOKENS, LENGTHS)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if family in ENCODER_DECODERS:
        inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = ids(DECODER_TOKENS, DECODER_LENGTHS)
    return inputs


def load_base(case: Case, folder: Path) -> Any:
    """The base that AdapterHub can add adapters to: bare, or with heads to come."""
    settings = {"attn_implementation": "eager"} if case.eager else {}
    if case.wrapped:
        model = adapters.AutoAdapterModel.from_pretrained(folder, **settings)
    else:
        model = AutoModel.from_pretrained(folder, **settings)
        adapters.init(model)
    model.config.name_or_path = f"tiny-random-{case.family}"  # written into every config: no path of this machine
    return model.eval()


def outputs_of(model: Any, inputs: dict[str, torch.Tensor], head: bool) -> dict[str, torch.Tensor]:
    """`hidden`: (batch, tokens, hidden), of the decoder where there is one; `logits`: (batch, labels) with a head."""
    found = model(**inputs, output_hidden_states=True)
    if head:
        return {"hidden": found.hidden_states[-1], "logits": found.logits}
    return {"hidden": found.last_hidden_state}


def build(config: Config) -> Any:
    kinds = adapters if hasattr(adapters, config.kind) else adapters.configuration
    settings = {key: build(value) if isinstance(value, Config) else value for key, value in config.settings.items()}
    return getattr(kinds, config.kind)(**settings)


def adapt(model: Any, case: Case) -> str:
    """Add and activate what the case asks for; returns the head's name."""
    for name in case.adapters:
        model.add_adapter(name, config=build(case.config))
    head = HEAD
    if case.fusion:
        fuse = Fuse(*case.adapters)
        model.add_adapter_fusion(fuse, build(case.fusion))
        model.set_active_adapters(fuse)
        head = fuse.name
    else:
        model.set_active_adapters(case.adapters[0])
    if case.head:
        model.add_classification_head(head, num_labels=LABELS, layers=2)
    return head


def added(model: Any) -> dict[str, torch.nn.Parameter]:
    """Every parameter that AdapterHub added, by all of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if any(mark in f".{name}" for mark in ADDED)}
