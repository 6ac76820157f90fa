"""Where the adapted modules are, as data: a row for each model family.

A place is a path below one transformer layer. `dense` ends a sub-layer, `norm` is the layer norm of the residual sum
that follows it. All families here are post-norm: x = norm(x + dense(...)).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from components.config import Bottleneck
from components.errors import ConfigError


@dataclass(frozen=True)
class Places:
    """Paths of one family: the list of layers, and what ends attention and feed-forward in a layer."""

    layers: str
    attention_dense: str
    attention_norm: str
    output_dense: str
    output_norm: str


_BERT = Places(
    "encoder.layer", "attention.output.dense", "attention.output.LayerNorm", "output.dense", "output.LayerNorm"
)

FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "mpnet": Places("encoder.layer", "attention.attn.o", "attention.LayerNorm", "output.dense", "output.LayerNorm"),
    "distilbert": Places("transformer.layer", "attention.out_lin", "sa_layer_norm", "ffn.lin2", "output_layer_norm"),
}


def of_family(model_type: str) -> Places:
    """Raises ConfigError for a family without a row."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"a base model of a family among {', '.join(FAMILIES)}",
            f"family {model_type!r}",
            "choose another base, or add a row to components/adapters/places.py",
        )
    return FAMILIES[model_type]


def layer_names(model: nn.Module, places: Places) -> list[str]:
    """Full names of the transformer layers, first to last, e.g. `bert.encoder.layer.0`."""
    for name, module in model.named_modules():
        if (name == places.layers or name.endswith(f".{places.layers}")) and isinstance(module, nn.ModuleList):
            return [f"{name}.{index}" for index in range(len(module))]
    raise ConfigError(f"transformer layers at {places.layers}", "none in the model", "check the model's architecture")


def positions(config: Any) -> int:
    """Tokens that a model of this transformers config can read at once.

    Families of RoBERTa and MPNet keep the first positions for padding.
    """
    offset = 2 if config.model_type in ("roberta", "xlm-roberta", "mpnet") else 0
    return int(config.max_position_embeddings) - offset


def misfits(base: Path, bottleneck: Bottleneck, max_tokens: int) -> list[str]:
    """What of the settings the base in this folder does not allow, a phrase each, from its config.json alone."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    problems = []
    if config.model_type not in FAMILIES:
        problems.append(f"base.name: family {config.model_type!r}, adapters know {', '.join(FAMILIES)}")
        return problems
    if bottleneck.reduction_factor > config.hidden_size:
        found = f"{bottleneck.reduction_factor:g}"
        problems.append(f"adapter.bottleneck.reduction_factor: {found}, at most the hidden size, {config.hidden_size}")
    layers = config.num_hidden_layers
    if any(not 0 <= layer < layers for layer in bottleneck.leave_out) or len(set(bottleneck.leave_out)) == layers:
        problems.append(
            f"adapter.bottleneck.leave_out: {list(bottleneck.leave_out)}, some of the layers 0 to {layers - 1}"
        )
    if max_tokens > positions(config):
        problems.append(f"training.max_tokens: {max_tokens}, at most the base's {positions(config)} positions")
    return problems
