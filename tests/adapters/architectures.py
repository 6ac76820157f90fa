"""A tiny random model of every family that adapters know, made in code, with inputs to run it on."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

HIDDEN = 16
LAYERS = 2  # of each stack
VOCABULARY = 40
POSITIONS = 24

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0}
_SPECIAL = {**_TOKENS, "bos_token_id": 2, "eos_token_id": 3}
_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
_DROPOUTS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER = {**_SIZES, **_TOKENS, **_DROPOUTS, "max_position_embeddings": POSITIONS}
_ROTARY = {**_SIZES, "max_position_embeddings": POSITIONS, "attention_dropout": 0.0}
_LLAMA = {**_ROTARY, **_TOKENS, "num_key_value_heads": 1, "head_dim": 8}
_SEQ2SEQ = {
    **_SPECIAL,
    "decoder_start_token_id": 2,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": POSITIONS,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "electra": {**_ENCODER, "embedding_size": 8},
    "distilbert": {
        **_TOKENS,
        "dim": HIDDEN,
        "n_layers": LAYERS,
        "n_heads": 2,
        "hidden_dim": 32,
        "max_position_embeddings": POSITIONS,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "deberta-v2": {  # as the published DeBERTa v3
        **_ENCODER,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_buckets": 8,
    },
    "mpnet": _ENCODER,
    "albert": {**_ENCODER, "embedding_size": 8},  # one layer, run twice
    "modernbert": {
        **_ROTARY,
        **_SPECIAL,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "embedding_dropout": 0.0,
        "mlp_dropout": 0.0,
    },
    "gpt2": {
        **_SPECIAL,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 2,
        "n_positions": POSITIONS,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "t5": {
        **_TOKENS,
        "decoder_start_token_id": 0,
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "dropout_rate": 0.0,
    },
    "bart": _SEQ2SEQ,
    "marian": _SEQ2SEQ,
    "vit": {**_SIZES, **_DROPOUTS, "image_size": 8, "patch_size": 4},
}
FAMILIES = tuple(_CONFIGS)
SEQ2SEQ = ("t5", "bart", "marian")


def tiny(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A bare model of that family in evaluation mode: 16 wide, 2 layers a stack, no dropout, drawn from `seed`.

    overrides: fields of the family's config.
    """
    return copy.deepcopy(_made(family, seed, tuple(overrides.items())))


@functools.cache
def _made(family: str, seed: int, overrides: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**_CONFIGS[family], **dict(overrides)})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModel.from_config(config)
        for parameter in model.parameters():  # every weight counts: norms off one, biases off zero, features apart
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def inputs(family: str) -> dict[str, Tensor]:
    """A batch of two for a model of that family; the second text is padded. An image is 3 x 8 x 8."""
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    batch = {
        "input_ids": torch.tensor([[2, 7, 9, 30, 3], [2, 15, 3, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = torch.tensor([[2, 11, 6, 3], [2, 21, 3, 0]])
        batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return batch
