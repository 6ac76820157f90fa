"""Where the adapted modules are, as data: a row for each model family.

A place is a path below one transformer layer. `dense` ends a sub-layer, `norm` is the layer norm of the residual sum
that follows it. All families here are post-norm: x = norm(x + dense(...)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

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


def positions(model: Any) -> int:
    """Tokens that the model can read at once. Families of RoBERTa and MPNet keep two positions for padding."""
    config = model.config
    offset = 2 if config.model_type in ("roberta", "xlm-roberta", "mpnet") else 0
    return int(config.max_position_embeddings) - offset
