"""What is recorded, as data: a case is a family of tiny models and a configuration of AdapterHub.

Imports nothing outside the standard library, so that the reference environment and the tests both read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Config:
    """A configuration class that `adapters` or `adapters.configuration` exports, and its settings."""

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    config: Config
    fusion: Config | None = None  # two adapters of `config`, and this over them
    head: bool = False  # with AdapterHub's own classification head of two layers

    @property
    def path(self) -> str:
        """Of its folder, below the folder of all golden files."""
        return f"{self.family}/{self.name}"

    @property
    def adapters(self) -> tuple[str, ...]:
        return ("first", "second") if self.fusion else ("task",)

    @property
    def with_prefix(self) -> bool:
        return self.name.startswith(("mam", "prefix"))

    @property
    def safetensors(self) -> bool:
        """About half of the cases are in each format.

        What AdapterHub holds under two names, prefixes and `ln_before`, it fails to write as safetensors.
        """
        return len(self.path) % 2 == 0 and not self.with_prefix and self.name != "ln_before"

    @property
    def eager(self) -> bool:
        """Attention without torch's fused kernel, where AdapterHub's prefixes are right only so (see record.py)."""
        return self.with_prefix

    @property
    def wrapped(self) -> bool:
        """In a model that can have heads, rather than a bare one: names of weights begin with `bert.`, for example.

        From a bare model AdapterHub does not save what Compacter shares between layers.
        """
        return self.head or "compacter" in self.name


VOCABULARY = 40
HIDDEN = 16
LABELS = 3
PREFIX = Config("PrefixTuningConfig", {"prefix_length": 3, "bottleneck_size": 4})

# Settings of the transformers configuration of each family. Dropout is off everywhere.
_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": {**_BERT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1},
    "distilbert": {
        "vocab_size": VOCABULARY, "dim": HIDDEN, "n_layers": 2, "n_heads": 2, "hidden_dim": 32,
        "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0,
    },
    "t5": {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
        "dropout_rate": 0.0,
    },
    "bart": {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    },
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    },
    "xlm-roberta": {**_BERT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1},
    "electra": {**_BERT, "embedding_size": 8},
    "deberta-v2": {
        **_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
    },
    "llama": {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 32, "bos_token_id": 0,
        "eos_token_id": 0,
    },
}  # fmt: skip
PADDING = {"roberta": 1, "bart": 1, "xlm-roberta": 1}  # the others pad with 0
ENCODER_DECODERS = ("t5", "bart")
WITH_HEAD = ("bert", "roberta")


def _houlsby(**settings: Any) -> Config:
    return Config("DoubleSeqBnConfig", {"reduction_factor": 4, **settings})


def _pfeiffer(**settings: Any) -> Config:
    return Config("SeqBnConfig", {"reduction_factor": 4, **settings})


def _parallel(**settings: Any) -> Config:
    return Config("ParBnConfig", {"reduction_factor": 4, **settings})


def _compacter(kind: str = "CompacterConfig", **settings: Any) -> Config:
    """A bottleneck of 8 neurons: both sizes must be multiples of phm_dim."""
    return Config(kind, {"reduction_factor": 2, "phm_dim": 4, **settings})


DYNAMIC = Config("DynamicAdapterFusionConfig")

# On these: enough to know every place and name; DeBERTa's attention takes no prefixes here.
FURTHER: dict[str, tuple[str, ...]] = {
    "xlm-roberta": ("houlsby", "mam"),
    "electra": ("houlsby", "mam"),
    "deberta-v2": ("houlsby",),
    "llama": ("houlsby", "mam"),
}

# On every other family: (configuration, fusion over two of it).
METHODS: dict[str, tuple[Config, Config | None]] = {
    "houlsby": (_houlsby(), None),
    "pfeiffer": (_pfeiffer(), None),
    "parallel": (_parallel(), None),
    "mam": (Config("MAMConfig", {"prefix_tuning": PREFIX, "adapter": _parallel()}), None),
    "compacter": (_compacter(), None),
    "fusion": (_pfeiffer(), DYNAMIC),
}

# On BERT alone: the words of the configuration, one or two at a time. Most are at both places of a layer.
VARIANTS: dict[str, tuple[Config, Config | None]] = {
    # where the layer norm and the residual of the base are
    "norm_before_and_after": (_houlsby(original_ln_before=True), None),
    "norm_before_only": (_houlsby(original_ln_before=True, original_ln_after=False), None),
    "norm_never": (_houlsby(original_ln_after=False), None),
    "residual_after_norm": (_houlsby(original_ln_before=True, residual_before_ln=False), None),
    "residual_post_add": (_houlsby(original_ln_before=True, residual_before_ln="post_add"), None),
    "adapter_plus": (Config("AdapterPlusConfig", {"reduction_factor": 4, "stochastic_depth": 0.0}), None),
    # layer norms of the adapter
    "ln_before": (_houlsby(ln_before=True), None),
    "ln_after": (_houlsby(ln_after=True), None),
    "ln_after_residual": (_houlsby(ln_after=True, adapter_residual_before_ln=True), None),
    # size, place, scale, gate
    "attention_only": (_pfeiffer(mh_adapter=True, output_adapter=False), None),
    "per_layer": (_pfeiffer(reduction_factor={"0": 8, "default": 2}), None),
    "leave_out": (_houlsby(leave_out=[0]), None),
    "scaling_fixed": (_houlsby(scaling=0.5), None),
    "scaling_learned": (_houlsby(scaling="learned"), None),
    "scaling_channel": (_houlsby(scaling="channel"), None),
    "gating": (_houlsby(use_gating=True), None),
    # a layer norm takes back what one factor for a whole token did: no gate and no learned scale with it
    "parallel_ln_after": (_parallel(mh_adapter=True, scaling="channel", ln_after=True), None),
    "parallel_gating": (_parallel(mh_adapter=True, scaling="learned", use_gating=True), None),
    # non-linearities: the methods themselves have swish, relu and gelu
    "gelu_new": (_pfeiffer(non_linearity="gelu_new"), None),
    "leakyrelu": (_pfeiffer(non_linearity="leakyrelu"), None),
    "tanh": (_pfeiffer(non_linearity="tanh"), None),
    # Compacter
    "compacter_plus_plus": (_compacter("CompacterPlusPlusConfig"), None),
    "compacter_own_rules": (_compacter(shared_phm_rule=False), None),
    "compacter_factorised_rule": (_compacter(factorized_phm_rule=True), None),
    "compacter_whole_weights": (_compacter(factorized_phm_W=False), None),
    "compacter_shared_weights": (_compacter(shared_W_phm=True), None),
    "compacter_rank": (_compacter(phm_rank=2), None),
    # prefixes
    "prefix": (PREFIX, None),
    "prefix_flat": (Config("PrefixTuningConfig", {"prefix_length": 3, "flat": True}), None),
    # AdapterFusion
    "fusion_static": (_pfeiffer(), Config("StaticAdapterFusionConfig")),
    "fusion_houlsby": (_houlsby(), DYNAMIC),
    "fusion_query_before_norm": (
        _pfeiffer(), Config("DynamicAdapterFusionConfig", {"query_before_ln": True})
    ),
}  # fmt: skip

CASES = [
    *(
        Case(family, name, *METHODS[name], head=family in WITH_HEAD)
        for family in FAMILIES
        for name in FURTHER.get(family, tuple(METHODS))
    ),
    *(Case("bert", name, *variant) for name, variant in VARIANTS.items()),
    # the place after the attention to the encoder
    *(Case(family, "cross", _houlsby(cross_adapter=True)) for family in ENCODER_DECODERS),
]
